"""What two ranks of the trainer's tests do, and the same in one process on the joined batches."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler, TensorDataset
from trainer_cases import Validated, make_trainer, noisy_loader, read_metrics

from pytrain import parallel, sealed
from pytrain.optim import AdamW
from pytrain.trainer import Module

Group = dist.ProcessGroup
ROWS = 8  # of a joined batch


class Regression(Module):
    """An fp64 network with a buffer that each rank fills by itself; nothing in it is random."""

    def __init__(self, seed: int = 0, *, dtype: torch.dtype = torch.float64, overflow_at: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
        self.register_buffer("seen", torch.zeros(()))
        self.overflow_at = overflow_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.add_(x.sum())
        loss = (self.net(x) - y).square().mean()
        return loss * torch.inf if batch_idx in self.overflow_at else loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.log("worst", (self.net(x) - y).abs().mean())
        return (self.net(x) - y).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.parameters(), lr=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 2, 0.9), "interval": "step"}}


def joined(count: int, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(5)

    def draw(columns: int) -> Tensor:
        return torch.randn(rows, columns, dtype=torch.float64, generator=generator).to(dtype)

    return [(draw(5), draw(3)) for _ in range(count)]


def part(batches: list[tuple[Tensor, Tensor]], rank: int, size: int) -> list[tuple[Tensor, Tensor]]:
    return [(x[rank::size], y[rank::size]) for x, y in batches]


def place(group: Group | None) -> tuple[int, int]:
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def run(
    group: Group | None, folder: Path, strategy: Any, batches: int, settings: dict[str, Any], ckpt: Path | None = None
) -> Any:
    """Fit on this rank's part of joined batches: parameters, averages, metrics, counts."""
    rank, size = place(group)
    module = Regression(seed=rank)  # those of rank 0 win
    data = joined(batches)
    trainer = make_trainer(folder, strategy=strategy, **settings)
    trainer.fit(module, part(data, rank, size), part(data[:2], rank, size), ckpt_path=ckpt)
    assert not any(p._post_accumulate_grad_hooks for p in module.parameters())
    averages = [] if trainer.ema is None else [trainer.ema.averages[id(p)] for p in module.parameters()]
    counts = trainer.global_step, trainer.skipped_steps, trainer.current_epoch
    return [p.detach().clone() for p in module.parameters()], averages, read_metrics(folder), counts


def saved_after(group: Group, folder: Path, strategy: str) -> Any:
    """The buffer after `fit`, and a file that `save_checkpoint` writes then."""
    rank, size = place(group)
    module, trainer = Regression(seed=rank), make_trainer(folder, strategy=strategy, max_steps=3)
    trainer.fit(module, part(joined(5), rank, size))
    trainer.save_checkpoint(folder / ("after.ckpt" if rank == 0 else "none.ckpt"))
    assert not (folder / "none.ckpt").exists()
    return module.seen.item()


class Noisy(Validated):
    """What a rank has seen, in a buffer, tells on its loss."""

    def __init__(self) -> None:
        super().__init__(lambda params: AdamW(params, lr=0.01))
        self.register_buffer("mean", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean.lerp_(batch[0].mean(), 0.5)
        return super().training_step(batch, batch_idx) * (1 + self.mean)


def run_noisy(group: Group | None, folder: Path, strategy: str, settings: dict[str, Any], ckpt: Path | None) -> Any:
    """Fit with shuffling, noise in the data and dropout; which rows came, and what came out of it."""
    torch.manual_seed(999)
    module = Noisy()
    trainer = make_trainer(folder, strategy=strategy, **settings)
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        trainer.fit(module, noisy_loader(), noisy_loader(), ckpt_path=ckpt)
    return [p.detach().clone() for p in module.parameters()], module.seen, read_metrics(folder), said.getvalue()


def overflow(group: Group, folder: Path, strategy: str) -> Any:
    """fp16 with a scaler; the third batch's loss is inf on rank 1 alone."""
    rank, size = place(group)
    module = Regression(dtype=torch.float32, overflow_at=(2,) if rank == 1 else ())
    trainer = make_trainer(folder, strategy=strategy, max_epochs=1, precision="fp16-mixed", ema_decay=0.5)
    trainer.fit(module, part(joined(4, dtype=torch.float32), rank, size))
    run = trainer.run
    assert run is not None and run.scaler is not None
    params = [p.detach().clone() for p in module.parameters()]
    return (
        params,
        trainer.global_step,
        trainer.skipped_steps,
        run.scaler.get_scale(),
        run.setups[0].optimizer.param_groups[0]["lr"],
    )


class Rows(Regression):
    """Notes the first column of all rows that it is given, and learns nothing of it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.rows.append(batch[0][:, 0].tolist())
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("sum", batch[0][:, 0].mean())
        return batch[0].mean()


class Stream(IterableDataset[Any]):
    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Any]:
        return (self.data[i] for i in range(len(self.data)))


def table(count: int) -> TensorDataset:
    x = torch.arange(count, dtype=torch.float64)[:, None].expand(count, 5).contiguous()
    return TensorDataset(x, torch.zeros(count, 3, dtype=torch.float64))


def loader(kind: str, count: int) -> Any:
    data = table(count)
    if kind == "plain":
        return DataLoader(data, batch_size=2)
    if kind == "shuffled":
        return DataLoader(data, batch_size=2, shuffle=True, drop_last=True)
    if kind == "generator":
        return DataLoader(data, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    if kind == "own sampler":
        return DataLoader(data, batch_size=2, sampler=range(count))  # type: ignore[arg-type]
    if kind == "batch_sampler":
        return DataLoader(data, batch_sampler=BatchSampler(SequentialSampler(data), 2, False))
    if kind == "replacement":
        return DataLoader(data, batch_size=2, sampler=RandomSampler(data, replacement=True))
    if kind == "stream":
        return DataLoader(Stream(data), batch_size=2)
    return [(data.tensors[0][i : i + 2], data.tensors[1][i : i + 2]) for i in range(0, count, 2)]


def rows_of(group: Group, folder: Path, kind: str, count: int, validation: int, seed: int | None = None) -> Any:
    """Which rows this rank was given in two epochs, what was said, and the validation metrics."""
    module, said = Rows(), io.StringIO()
    trainer = make_trainer(folder, strategy="ddp", max_epochs=2, seed=seed)
    with contextlib.redirect_stderr(said):
        trainer.fit(module, loader(kind, count), loader("plain", validation) if validation else None)
    return module.rows, said.getvalue(), read_metrics(folder) if dist.get_rank(group) == 0 else None


class Unsized:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def counts(group: Group, folder: Path, numbers: list[int], accumulate: int, sized: bool) -> Any:
    """Applied steps where ranks have different numbers of batches, or the error."""
    data = joined(numbers[dist.get_rank(group)])
    trainer = make_trainer(folder, strategy="zero2", max_epochs=1, accumulate_grad_batches=accumulate)
    try:
        trainer.fit(Regression(), data if sized else Unsized(data))
    except RuntimeError as error:
        return str(error)
    return trainer.global_step, trainer.current_epoch


def differing(group: Group, folder: Path) -> Any:
    trainer = make_trainer(folder, strategy="ddp", max_steps=3 + dist.get_rank(group))
    try:
        trainer.fit(Regression(), joined(2))
    except RuntimeError as error:
        return str(error)


def auto(group: Group, folder: Path) -> Any:
    """What strategy "auto" is here, one of options, and one alone among ranks."""
    names = []

    def made(module: nn.Module, optimizer: torch.optim.Optimizer) -> parallel.Strategy:
        return parallel.DDP(module, optimizer, unused="agree")

    class Spy(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            run = self.trainer.run
            names.append((type(run.strategy).__name__, run.team.size, bool(run.loggers)))
            return super().training_step(batch, batch_idx)

    for strategy in ("auto", made, "single"):
        trainer = make_trainer(folder / str(dist.get_rank(group)), strategy=strategy, max_steps=1)
        trainer.fit(Spy(), joined(1))
    return names


def draws(group: Group, folder: Path) -> Any:
    """The first random numbers in training: each rank has its own."""
    seen: list[float] = []

    class Draws(Regression):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(torch.rand(()).item())
            return super().training_step(batch, batch_idx)

    make_trainer(folder, strategy="ddp", max_steps=1, seed=7).fit(Draws(), joined(1))
    return seen


class StoppedRank(Regression):
    """Rank 1 alone gets a signal in one phase of the first epoch."""

    def __init__(self, phase: str) -> None:
        super().__init__()
        self.phase = phase if dist.get_rank() == 1 else ""

    def come_by(self, phase: str) -> None:
        if phase == self.phase:
            self.phase = ""
            os.kill(os.getpid(), signal.SIGTERM)

    def on_fit_start(self) -> None:
        self.come_by("start")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.come_by({1: "step", 2: "last step"}.get(batch_idx, "another"))
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.come_by("validation")
        return super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.come_by("epoch end")


def stopped(group: Group, folder: Path, settings: dict[str, Any], phase: str) -> Any:
    """The exit code, or the parameters at the end; the step; and how many checkpoints were written by this rank."""
    rank, size = place(group)
    module, trainer, writes = StoppedRank(phase), make_trainer(folder, **settings), []
    real = sealed.write_checkpoint
    sealed.write_checkpoint = lambda *arguments: (writes.append(arguments), real(*arguments))[1]
    try:
        trainer.fit(module, part(joined(3), rank, size), part(joined(2), rank, size), ckpt_path="last")
    except SystemExit as left:
        return left.code, trainer.global_step, len(writes)
    finally:
        sealed.write_checkpoint = real
    return [p.detach().clone() for p in module.parameters()], trainer.global_step, len(writes)
