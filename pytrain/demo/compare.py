"""Trains one task three times from the same weights on the same batches, turn by turn, and compares the runs.

The runs are torch's fused AdamW in a plain loop, pytrain's AdamW in pytrain's trainer, and AdamW computed in fp64.
Pytrain's may be on several ranks, each with its part of every batch; the others are one process' on the whole of it.
The third is the yardstick: training amplifies rounding, so two correct optimizers drift apart, and how far torch's
fp32 drifts from fp64 tells how far pytrain may be from torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import islice
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import pytrain
from pytrain.control import Record
from pytrain.demo.tasks import Settings, Task, loss_of
from pytrain.launch import StrategyName, Team
from pytrain.optim import FusedOptimizer

TORCH, PYTRAIN, EXACT = "torch fused", "pytrain", "fp64 reference"
TURN = 10  # steps in a row before another run takes over: noise from the machine then hits all runs alike
EARLY = 20  # steps at the start, checked on their own: rounding has hardly grown there, and a wrong formula shows
FACTOR = 10  # times torch's own drift: room for how differently two drifts grow; a wrong formula is beyond 100 early on
MAX_NORM = 1.0  # of the gradients, in every run
ROUNDINGS = 16 * 2.0**-23  # of the loss: what evaluating the loss itself in fp32 may cost


@dataclass
class Run:
    """One training run: the loss and the seconds of each step, and the held-out result.

    `step_seconds` is the time from getting a batch to asking for the next, `after_seconds` that of all
    between backward and the schedule: clipping and the update, and with pytrain the check for inf and nan.
    """

    who: str
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    after_seconds: list[float] = field(default_factory=list)
    score: float = math.nan


@dataclass(frozen=True)
class Verdict:
    """One check of a comparison, in words."""

    passed: bool
    text: str


@dataclass(frozen=True)
class Comparison:
    """The runs of one task, and pytrain's trained model; where ranks trained it, how, and whether theirs are alike."""

    task: Task
    torch: Run
    pytrain: Run
    exact: Run
    model: nn.Module
    backend: str
    seconds: float
    ranks: str = ""
    alike: bool = True

    @property
    def runs(self) -> tuple[Run, Run, Run]:
        """The runs in the order in which they are shown."""
        return self.torch, self.pytrain, self.exact

    @property
    def timed(self) -> tuple[Run, Run]:
        """The runs whose times compare."""
        return self.torch, self.pytrain

    def differences(self, run: Run) -> list[float]:
        """Return |loss of the run - loss of torch's fused run| at each step."""
        return [abs(a - b) for a, b in zip(run.losses, self.torch.losses, strict=True)]

    def verdicts(self) -> list[Verdict]:
        """Return the checks: pytrain as near to torch as rounding lets it be, early and over the run; good models."""
        verdicts = []
        count = min(EARLY, len(self.torch.losses))
        for where, part in ((f"first {count} steps", slice(EARLY)), ("whole run", slice(None))):
            apart = largest(self.differences(self.pytrain)[part])
            drift = largest(self.differences(self.exact)[part])
            bound = FACTOR * drift + ROUNDINGS * largest(self.torch.losses[part])
            verdicts.append(
                Verdict(
                    apart <= bound,
                    f"{where}: pytrain's loss differs from torch's by at most {apart:.1e} (bound {bound:.1e}: {FACTOR} "
                    f"times the {drift:.1e} by which torch's differs from fp64, plus 16 roundings)",
                )
            )
        goal, unit = self.task.settings.goal, self.task.unit
        for run in (self.torch, self.pytrain):
            verdicts.append(
                Verdict(
                    self.task.reached(run.score),
                    f"{run.who}: held-out {'accuracy' if unit == '%' else 'loss'} {run.score:.2f} {unit} "
                    f"(expected at {'least' if unit == '%' else 'most'} {goal:g})",
                )
            )
        if self.ranks:
            verdicts.append(Verdict(self.alike, f"{self.ranks}: all have the same parameters, to the bit"))
        return verdicts


def largest(values: list[float]) -> float:
    """Return the largest value, 0 if there is none, and nan if one of them is nan."""
    return math.nan if any(map(math.isnan, values)) else max(values, default=0.0)


def middle(seconds: list[float]) -> float:
    """Return the median in milliseconds, nan for no values."""
    return 1e3 * median(seconds) if seconds else math.nan


def spread(seconds: list[float]) -> tuple[float, float]:
    """Return the 10th and the 90th percentile in milliseconds."""
    if len(seconds) < 2:
        return middle(seconds), middle(seconds)
    cuts = quantiles(seconds, n=10)
    return 1e3 * cuts[0], 1e3 * cuts[-1]


def compare(
    task: Task, *, seed: int, report: Callable[[str], None], team: Team, strategy: StrategyName = "single"
) -> Comparison:
    """Train a task with torch and with pytrain, and measure both.

    Args:
        task: what to train.
        seed: of the initial weights; 0 to 2**32 - 1.
        report: gets one line of progress a few times.
        team: the ranks that pytrain's run is on, of which the first has torch's runs and the right result.
        strategy: how they train.
    """
    started = perf_counter()
    torch.manual_seed(seed)
    model = task.build()
    torch_model, exact_model = deepcopy(model), deepcopy(model)
    fused, ours, exact = Run(TORCH), Run(PYTRAIN), Run(EXACT)
    hyper = task.settings
    fused_adamw = torch.optim.AdamW(
        torch_model.parameters(), lr=hyper.lr, betas=hyper.betas, weight_decay=hyper.weight_decay, fused=True
    )
    rivals = [
        torch_loop(task, torch_model, fused_adamw, fused),
        torch_loop(task, exact_model, adamw_in_double(exact_model, hyper), exact),
    ]
    module = _Compared(task, model, ours)
    part = replace(task, batches=task.batches.part(team.rank, team.size))
    with TemporaryDirectory() as folder:
        trainer = pytrain.Trainer(
            max_steps=hyper.steps,
            strategy=strategy,
            seed=seed,
            enable_progress_bar=False,
            enable_checkpointing=False,
            gradient_clip_val=MAX_NORM,
            default_root_dir=folder,
        )
        trainer.fit(module, _Turns(part, ours, rivals if team.rank == 0 else [], report))
    ours.losses = [math.fsum(parts) / team.size for parts in zip(*team.gather(ours.losses), strict=True)]
    digests = set(team.gather(digest(model)))
    if team.rank == 0:
        for run, trained in ((fused, torch_model), (ours, model), (exact, exact_model)):
            run.score = task.score(trained.eval())
    ranks = "" if team.ranks is None else f"{team.size} ranks by {strategy}"
    took = perf_counter() - started
    return Comparison(task, fused, ours, exact, model, module.backend, took, ranks, len(digests) == 1)


def digest(model: nn.Module) -> str:
    """Return a hash of all parameters' bits."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def torch_loop(task: Task, model: nn.Module, optimizer: torch.optim.Optimizer, run: Run) -> Iterator[None]:
    """Train in a plain torch loop; pause after each step."""
    schedule = warm_cosine(optimizer, task.settings)
    for batch in task.batches:
        start = perf_counter()
        model.zero_grad(set_to_none=True)
        loss = loss_of(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        after = perf_counter()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()
        run.after_seconds.append(perf_counter() - after)
        schedule.step()
        run.losses.append(loss.item())
        run.step_seconds.append(perf_counter() - start)
        yield


def adamw_in_double(model: nn.Module, hyper: Settings) -> torch.optim.AdamW:
    """Return torch's AdamW on fp64 copies of a model's parameters, which each step rounds to the model's own."""
    pairs = [(parameter, parameter.detach().double()) for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(
        [exact for _, exact in pairs], lr=hyper.lr, betas=hyper.betas, weight_decay=hyper.weight_decay
    )

    def before(*_: Any) -> None:
        for parameter, exact in pairs:
            exact.grad = None if parameter.grad is None else parameter.grad.double()

    @torch.no_grad()
    def after(*_: Any) -> None:
        for parameter, exact in pairs:
            parameter.copy_(exact)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


class _Compared(pytrain.Module):
    """The same training for pytrain's trainer."""

    def __init__(self, task: Task, model: nn.Module, run: Run) -> None:
        super().__init__()
        self.task, self.model, self.run, self.backend = task, model, run, ""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch, and write it down."""
        loss = loss_of(self.model, batch)
        self.run.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        """Return pytrain's AdamW with the same settings and schedule as torch's."""
        hyper = self.task.settings
        optimizer = pytrain.optim.AdamW(
            self.model.parameters(), lr=hyper.lr, betas=hyper.betas, weight_decay=hyper.weight_decay
        )
        self.backend = optimizer.backend
        watch_step(optimizer, self.run)
        schedule = warm_cosine(optimizer, hyper)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _Turns:
    """The trainer's loader: hands out and times pytrain's batches, and lets the rivals train in between."""

    def __init__(self, task: Task, run: Run, rivals: list[Iterator[None]], report: Callable[[str], None]) -> None:
        self.task, self.run, self.rivals, self.report = task, run, rivals, report

    def __len__(self) -> int:
        return len(self.task.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        started, steps = perf_counter(), len(self)
        every = max(TURN, steps // 4 // TURN * TURN)
        for number, batch in enumerate(self.task.batches):
            if number % TURN == 0:
                for rival in self.rivals:
                    for _ in islice(rival, TURN):
                        pass
            if number % every == 0 and number > 0:
                took = perf_counter() - started
                self.report(f"{self.task.name}: step {number} of {steps}, loss {self.run.losses[-1]:.3f}, {took:.0f} s")
            start = perf_counter()
            yield batch
            self.run.step_seconds.append(perf_counter() - start)


def watch_step(optimizer: FusedOptimizer, run: Run) -> None:
    """Measure each pytrain.step: from the beginning of its pass 1 to the end of its pass 2."""
    measure, finish = optimizer.measure, optimizer.finish
    started = 0.0

    def first_pass(*args: Any) -> Tensor:
        nonlocal started
        started = perf_counter()
        return measure(*args)

    def second_pass(**options: Any) -> Record:
        record = finish(**options)
        run.after_seconds.append(perf_counter() - started)
        return record

    optimizer.measure, optimizer.finish = first_pass, second_pass  # type: ignore[method-assign, assignment]


def warm_cosine(optimizer: torch.optim.Optimizer, hyper: Settings) -> LambdaLR:
    """Return the schedule: up over the first twentieth of the steps, down to a tenth as a cosine."""
    warm_up = max(1, hyper.steps // 20)

    def factor(step: int) -> float:
        falling = 0.55 + 0.45 * math.cos(math.pi * min(1.0, step / hyper.steps))
        return min((step + 1) / warm_up, falling)

    return LambdaLR(optimizer, factor)
