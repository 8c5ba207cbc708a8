"""Does training lose anything to AdamW's storage formats? The demo's character GPT, trained once in each of them.

Every run begins with the same weights and sees the same batches in the same order; the loss is taken in fp32. A model
in bf16 also computes in bf16, which costs something whatever the optimizer does: "bf16 model, torch's AdamW on fp32
masters" is that model with masters kept by hand, and what a format of ours on a bf16 model is to be compared with.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import machine, markdown
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pytrain.demo.compare import warm_cosine
from pytrain.demo.data import Batches, load_text
from pytrain.demo.models import CharGPT
from pytrain.demo.tasks import FULL, Settings
from pytrain.optim import AdamW

BF16 = torch.bfloat16
FP32_RUN, MASTERS_RUN = "fp32", "bf16 model, torch's AdamW on fp32 masters"
DOCS = Path(__file__).resolve().parents[1] / "docs"
LAST = 50  # steps that the final loss is the mean of


@dataclass(frozen=True)
class Format:
    """The model's dtype and AdamW's options; `by_hand` keeps fp32 masters outside the optimizer."""

    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: bool = False


FORMATS = {
    FP32_RUN: Format(),
    "fp32, 8-bit state": Format(options={"state_dtype": "8bit"}),
    MASTERS_RUN: Format(BF16, by_hand=True),
    "bf16, master": Format(BF16, {"master_weights": True}),
    "bf16, compact master": Format(BF16, {"master_weights": "compact"}),
    "bf16, stochastic, bf16 state": Format(BF16, {"rounding": "stochastic", "state_dtype": "bf16"}),
    "bf16, Kahan": Format(BF16, {"kahan": True}),
    "bf16, nearest": Format(BF16),
}


@dataclass(frozen=True)
class Size:
    """How large the model is, and how long it is trained."""

    steps: int = 500
    width: int = 192
    layers: int = 2
    context: int = 64
    batch: int = FULL["gpt"].batch

    @property
    def settings(self) -> Settings:
        """The demo's settings with this many steps."""
        hyper = FULL["gpt"]
        return Settings(
            steps=self.steps, batch=self.batch, lr=hyper.lr, betas=hyper.betas, weight_decay=hyper.weight_decay,
            goal=hyper.goal,
        )  # fmt: skip


class Fp32Sums(TorchFunctionMode):
    """Matrix products of bf16 numbers with sums in fp32 and results in bf16, as processors with bf16 units do them.

    Others, for which torch's own bf16 products are ten times slower than fp32, train in the time of fp32 with it.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (functional.linear, functional.scaled_dot_product_attention) or args[0].dtype != BF16:
            return func(*args, **(kwargs or {}))
        wide = [x.float() if torch.is_tensor(x) else x for x in args]
        return func(*wide, **(kwargs or {})).to(BF16)


def make_batches(size: Size, seed: int) -> Batches:
    """The batches of a run: windows of the standard library's text, drawn with the seed."""
    data = load_text(context=size.context)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randint(len(data.train_inputs), (size.steps, size.batch), generator=generator)
    return Batches(data.train_inputs, data.train_targets, order)


def train(form: Format, size: Size, batches: Batches, seed: int) -> list[float]:
    """Train in one format; the loss of each step."""
    torch.manual_seed(seed)
    model = CharGPT(width=size.width, heads=size.width // 32, layers=size.layers, context=size.context)
    model = model.to(form.dtype)
    params = list(model.parameters())
    masters = [torch.nn.Parameter(p.detach().float()) for p in params] if form.by_hand else []
    hyper = size.settings
    common: dict[str, Any] = {"lr": hyper.lr, "betas": hyper.betas, "weight_decay": hyper.weight_decay}
    optimizer: torch.optim.Optimizer
    if form.by_hand:
        optimizer = torch.optim.AdamW(masters, fused=True, **common)
    else:
        optimizer = AdamW(params, **common, **form.options)
    schedule = warm_cosine(optimizer, hyper)
    losses = []
    for inputs, targets in batches:
        model.zero_grad()
        with Fp32Sums():
            logits = model(inputs)
        loss = functional.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        if form.by_hand:
            hand_over(params, masters)
        optimizer.step()
        if form.by_hand:
            take_back(params, masters)
        schedule.step()
        losses.append(loss.item())
    return losses


def hand_over(params: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    """Give the masters the gradients of the model's parameters."""
    for p, master in zip(params, masters, strict=True):
        master.grad = None if p.grad is None else p.grad.float()


@torch.no_grad()
def take_back(params: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    """Round the masters to the model's parameters."""
    for p, master in zip(params, masters, strict=True):
        p.copy_(master)


def final(losses: list[float]) -> float:
    """The mean of the last steps' losses."""
    last = losses[-LAST:]
    return sum(last) / len(last)


HEADER = ["format", "final loss", "against fp32", "against bf16 with torch's masters", "by seed, against its baseline"]


def cells(name: str, curves: dict[str, list[list[float]]]) -> list[str]:
    """A row of the table; `curves` has a list of losses for each seed."""
    finals = {key: [final(losses) for losses in runs] for key, runs in curves.items()}
    mean = {key: sum(values) / len(values) for key, values in finals.items()}
    bf16 = FORMATS[name].dtype == BF16
    baseline = MASTERS_RUN if bf16 else FP32_RUN
    each = [f"{percent(mine, base)}" for mine, base in zip(finals[name], finals[baseline], strict=True)]
    return [
        name,
        f"{mean[name]:.4f}",
        "" if name == FP32_RUN else percent(mean[name], mean[FP32_RUN]),
        percent(mean[name], mean[MASTERS_RUN]) if bf16 and name != MASTERS_RUN else "",
        "" if name == baseline else ", ".join(each),
    ]


def percent(mine: float, base: float) -> str:
    """How much larger a loss is than another."""
    return f"{100 * (mine / base - 1):+.2f} %"


def plot(curves: dict[str, list[list[float]]], file: Path) -> None:
    """The losses of the first seed, smoothed, and their difference to fp32."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "loss-parity", "font.size": 9})
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(1, 1))
    base = smooth(curves[FP32_RUN][0])
    for name, runs in curves.items():
        line = smooth(runs[0])
        above.plot(range(len(line)), line, label=name, linewidth=1)
        below.plot(range(len(line)), [a - b for a, b in zip(line, base, strict=True)], label=name, linewidth=1)
    above.set_ylabel("training loss, nats a character")
    below.set_ylabel("difference to fp32, nats")
    below.set_xlabel(f"step (means of up to {LAST} steps)")
    above.legend(fontsize=8)
    for axes in (above, below):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def smooth(losses: list[float]) -> list[float]:
    """At each step the mean of the last steps up to it."""
    return [final(losses[: i + 1]) for i in range(len(losses))]


def page(table: str, size: Size, seeds: int) -> str:
    """The text of docs/loss-parity.md."""
    facts = machine()
    runs = "one seed" if seeds == 1 else f"the mean of {seeds} seeds"
    return f"""# Loss parity of AdamW's storage formats

Written by `python benchmarks/loss_parity.py`.

The demo's character GPT (width {size.width}, {size.layers} layers, context {size.context}, batch {size.batch}) after
{size.steps} steps with the demo's settings and schedule, {runs}. The final loss is the mean of the last {LAST} steps'
training losses, in nats a character. Every run of a seed has the same first weights and the same batches in the same
order. Machine: {facts["cpu"]}, {facts["threads"]} threads, torch {facts["torch"]}.

{table}

A model in bf16 also computes in bf16: its activations and gradients are bf16, and products sum in fp32. What that
costs is the row "{MASTERS_RUN}": the same model with `torch.optim.AdamW(fused=True)`
on fp32 copies of its parameters, rounded to bf16 after every step. The fourth column leaves that cost out and shows the
optimizer's format alone. "bf16, nearest" is what the other bf16 formats are there
to avoid: parameters in bf16 and nothing beside them.

![Training losses, and their differences to fp32](loss-parity.svg)
"""


def main(argv: list[str]) -> int:
    """Train in every format; print the table, and write plot and page."""
    options = argparse.ArgumentParser(description=__doc__)
    for name, value in (("steps", 500), ("width", 192), ("layers", 2), ("context", 64), ("batch", Size.batch)):
        options.add_argument(f"--{name}", type=int, default=value, help="%(default)s")
    options.add_argument("--seeds", type=int, default=1, help="runs of each format (%(default)s)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (%(default)s)")
    options.add_argument("--docs", type=Path, default=DOCS, help="folder for loss-parity.md and .svg (%(default)s)")
    options.add_argument("--json", type=Path, help="file for the losses of every run")
    args = options.parse_args(argv)
    if args.width % 32:
        options.error(f"--width: expected a multiple of 32, got {args.width}")
    torch.set_num_threads(args.threads)
    size = Size(args.steps, args.width, args.layers, args.context, args.batch)
    curves: dict[str, list[list[float]]] = {name: [] for name in FORMATS}
    for seed in range(args.seeds):
        batches = make_batches(size, seed)
        for name, form in FORMATS.items():
            curves[name].append(train(form, size, batches, seed))
            print(f"  seed {seed}, {name}: {final(curves[name][-1]):.4f}", flush=True)
    table = markdown(HEADER, [cells(name, curves) for name in FORMATS])
    print(f"\n{table}")
    plot(curves, args.docs / "loss-parity.svg")
    (args.docs / "loss-parity.md").write_text(page(table, size, args.seeds))
    if args.json is not None:
        args.json.write_text(json.dumps(curves))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
