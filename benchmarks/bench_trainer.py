"""What does a trainer cost a step? pytrain's, Lightning's and Accelerate's against a plain torch loop with fused AdamW.

A small MLP, of which arithmetic is a small part of the step. Time is taken between the first and the last batch that a
contestant draws, calls are those of Python and C that cProfile counts, frames are those of the trainer on the stack.
"""

from __future__ import annotations

import cProfile
import io
import logging
import os
import pstats
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch
from common import Timing, machine, markdown, parser, summary, write_json
from torch import Tensor, nn

import pytrain
from pytrain.loggers import TensorBoardLogger

WIDTH, LR, LOG_EVERY = 64, 1e-3, 50
TARGETS = {"pytrain": 1.0, "pytrain with bar, TensorBoard, checkpoints": 1.15}
Batch = tuple[Tensor, Tensor]
Frames = dict[str, int]  # of the trainer: from its entry to the training step, and to the optimizer's step


class Terminal(io.StringIO):
    """A terminal that nobody looks at: bars are drawn for it."""

    def isatty(self) -> bool:
        return True


class Clock:
    """An iterable of batches that notes when they are drawn."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(16, 32, generator=generator), torch.randn(16, 1, generator=generator)
        self.batches = [(x.roll(i % 16, 0), y.roll(i % 16, 0)) for i in range(count)]
        self.first = self.last = 0.0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for i, batch in enumerate(self.batches):
            if i == len(self.batches) // 5:
                self.first = perf_counter()
            self.last = perf_counter()
            yield batch

    @property
    def seconds(self) -> float:
        """A step, after the first fifth of them."""
        return (self.last - self.first) / (len(self.batches) - 1 - len(self.batches) // 5)


def net() -> nn.Sequential:
    """The same weights for everybody."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


def depth(package: str, entry: str, frame: FrameType | None) -> int:
    """How many frames of a package lie between its entry point and here."""
    count = 0
    while frame is not None:
        inside = f"{os.sep}{package}{os.sep}" in frame.f_code.co_filename
        count += inside
        if inside and frame.f_code.co_name == entry:
            return count
        frame = frame.f_back
    return 0


def watched(kind: type[torch.optim.Optimizer], package: str, frames: Frames) -> type[torch.optim.Optimizer]:
    """The optimizer, with a `step` that notes how deep it lies."""

    class Watched(kind):  # type: ignore[misc, valid-type]
        def step(self, *args: Any, **options: Any) -> Any:
            frames["optimizer"] = depth(package, "fit", sys._getframe(1))
            return super().step(*args, **options)

    return Watched


def plain(clock: Clock, folder: Path, frames: Frames) -> nn.Module:
    """A plain loop."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for x, y in clock:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def accelerate(clock: Clock, folder: Path, frames: Frames) -> nn.Module:
    """Accelerate's loop; it logs nothing."""
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    for x, y in clock:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        accelerator.backward(loss)
        optimizer.step()
    return model


class Ours(pytrain.Module):
    """The MLP; logs its loss every step."""

    def __init__(self, frames: Frames) -> None:
        super().__init__()
        self.net, self.frames = net(), frames

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """A loss."""
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss)
        if batch_idx == 1:
            self.frames["training_step"] = depth("pytrain", "fit", sys._getframe(1))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """pytrain's AdamW."""
        return pytrain.optim.AdamW(self.parameters(), lr=LR)


def pytrain_fit(clock: Clock, folder: Path, frames: Frames, **settings: Any) -> nn.Module:
    """pytrain's Trainer; it logs to JSON lines."""
    settings = {"enable_progress_bar": False, "enable_checkpointing": False, **settings}
    module = Ours(frames)
    seen = pytrain.steps.take

    def take(*args: Any) -> Any:
        frames["optimizer"] = depth("pytrain", "fit", sys._getframe(1))
        pytrain.steps.take = seen
        return seen(*args)

    pytrain.steps.take = take  # once, for the frames
    pytrain.Trainer(max_epochs=1, log_every_n_steps=LOG_EVERY, default_root_dir=folder, **settings).fit(module, clock)
    return module.net


def pytrain_whole(clock: Clock, folder: Path, frames: Frames) -> nn.Module:
    """The same with a bar, TensorBoard and automatic checkpoints."""
    loggers = TensorBoardLogger(folder / "tensorboard")
    on = {"enable_progress_bar": True, "enable_checkpointing": True, "checkpoint_every_n_steps": 1000}
    return pytrain_fit(clock, folder, frames, logger=loggers, **on)


def lightning(clock: Clock, folder: Path, frames: Frames) -> nn.Module:
    """Lightning's Trainer; it logs to CSV."""
    import pytorch_lightning as pl
    from pytorch_lightning.loggers import CSVLogger

    class Theirs(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            x, y = batch
            loss = nn.functional.mse_loss(self.net(x), y)
            self.log("train_loss", loss)
            if batch_idx == 1:
                frames["training_step"] = depth("pytorch_lightning", "fit", sys._getframe(1))
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            kind: Any = watched(torch.optim.AdamW, "pytorch_lightning", frames)
            optimizer: torch.optim.Optimizer = kind(self.parameters(), lr=LR, fused=True)
            return optimizer

    module = Theirs()
    trainer = pl.Trainer(
        max_epochs=1, log_every_n_steps=LOG_EVERY, logger=CSVLogger(folder), accelerator="cpu",
        enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, clock)
    return module.net


CONTESTANTS: dict[str, Callable[[Clock, Path, Frames], nn.Module]] = {
    "torch loop": plain,
    "pytrain": pytrain_fit,
    "pytrain with bar, TensorBoard, checkpoints": pytrain_whole,
    "Lightning": lightning,
    "Accelerate": accelerate,
}


def run(name: str, count: int) -> tuple[float, nn.Module, Frames]:
    """Seconds a step of one contestant, what it has trained, and its frames."""
    clock, frames = Clock(count), Frames()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(Terminal()), redirect_stderr(Terminal()):
        model = CONTESTANTS[name](clock, Path(folder), frames)
    return clock.seconds, model, frames


def calls(name: str, count: int) -> float:
    """Python and C calls a step: those of twice as many steps less those of once as many, so without the start."""
    totals = []
    for steps in (count, 2 * count):
        profile = cProfile.Profile()
        profile.runcall(run, name, steps)
        totals.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
    return (totals[1] - totals[0]) / count


def check(count: int) -> dict[str, Frames]:
    """All train the same weights; returns their frames."""
    found, wanted = {}, run("torch loop", count)[1]
    for name in CONTESTANTS:
        _, model, found[name] = run(name, count)
        for ours, theirs in zip(model.parameters(), wanted.parameters(), strict=True):
            apart = (ours - theirs).abs().max().item()
            assert apart <= 1e-2 * LR * count, f"{name}: {apart:.1e} from the plain loop's after {count} steps"
    return found


def main(argv: list[str]) -> int:
    """Run the benchmark; an error where results do not agree."""
    options = parser(__doc__ or "")
    options.set_defaults(threads=1)  # what is this small runs on one
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import pytorch_lightning  # which sets up its own logging

    logging.getLogger(pytorch_lightning.__name__).handlers.clear()
    count, rounds = (200, 3) if args.quick else (2000, args.repeat)
    frames = check(20)
    seconds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for _ in range(rounds):
        for name in CONTESTANTS:
            seconds[name].append(run(name, count)[0])
    timings: dict[str, Timing] = {name: summary(values) for name, values in seconds.items()}
    rows, cells = [], []
    for name, timing in timings.items():
        ratio, target = timing.median / timings["torch loop"].median, TARGETS.get(name)
        count_of_calls = calls(name, 200)
        met = "" if target is None else f"{target:g} {'yes' if ratio <= target else 'NO'}"
        deep = [str(frames[name].get(key, "")) for key in ("training_step", "optimizer")]
        cells.append([name, f"{1e6 * timing.median:.0f}", f"{ratio:.2f}", met, f"{count_of_calls:.0f}", *deep])
        rows.append(
            {"machine": machine(), "trainer": name, "seconds": timing.median, "ratio": ratio, "calls": count_of_calls}
            | {"frames": frames[name], "target": target}
        )
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "pytorch-lightning", "accelerate"))
    print(f"weights agree; {versions}; {machine()}")
    header = ["trainer", "a step, us", "/ torch loop", "target", "calls", "frames to training_step", "to the step"]
    print(markdown(header, cells))
    write_json(args.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
