"""Small modules, data and runs that the trainer's tests share."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pytrain.optim
from pytrain.trainer import Module, Trainer

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "torch-sgd-loop": lambda params: torch.optim.SGD(params, lr=0.1, foreach=False),
    "torch-adamw-fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "pytrain-adamw": lambda params: pytrain.optim.AdamW(params, lr=0.01),
    "pytrain-adamw-host-unscale": lambda params: pytrain.optim.AdamW(params, lr=0.01, amp_scaling=False),
}


class NoisyData(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise from all three global generators, so that a replay must restore each of them."""

    def __init__(self, count: int = 21) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(count, 6, generator=generator)
        self.y = torch.randint(0, 3, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = torch.randn(()) + random.random() + float(np.random.rand())
        return self.x[index] + 0.01 * noise, self.y[index]


class Classifier(Module):
    """Linear, dropout, linear; the loss is infinite at the batches in `overflow_at`."""

    def __init__(
        self,
        make_optimizer: Callable[[Any], torch.optim.Optimizer] = OPTIMIZERS["torch-adamw-fused"],
        *,
        make_schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
        overflow_at: Iterable[int] = (),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = torch.nn.Sequential(
                torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Dropout(dropout), torch.nn.Linear(8, 3)
            )
        self.make_optimizer, self.make_schedule = make_optimizer, make_schedule
        self.overflow_at = frozenset(overflow_at)
        self.seen: list[Any] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append(x)
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        return loss * torch.inf if batch_idx in self.overflow_at else loss

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameters())
        return optimizer if self.make_schedule is None else (optimizer, self.make_schedule(optimizer))


class Validated(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)


class Mean(Module):
    """One parameter w; the loss is w * mean(batch), so that the gradient is mean(batch), and SGD at lr 1 shows it."""

    def __init__(self, *, as_dict: bool = False) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(()))
        self.as_dict = as_dict

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.w * batch.mean()
        return {"loss": loss, "other": 1} if self.as_dict else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def batches(count: int, *, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A list of fixed classification batches: the plainest loader."""
    generator = torch.Generator().manual_seed(11)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def noisy_loader(num_workers: int = 0, generator: torch.Generator | None = None) -> DataLoader[Any]:
    """A shuffling loader of 6 batches, the last one short."""
    return DataLoader(NoisyData(), batch_size=4, shuffle=True, num_workers=num_workers, generator=generator)


def make_trainer(folder: Path, **settings: Any) -> Trainer:
    """A quiet trainer in `folder`; saves nothing unless told."""
    settings = {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1, **settings}
    return Trainer(default_root_dir=folder, **settings)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, read as strict JSON, without the clock."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def assert_same_bits(ours: Any, other: Any, where: str = "") -> None:
    """Compare trees of tensors and plain values bit for bit."""
    assert type(ours) is type(other), where
    if isinstance(ours, Tensor):
        assert ours.dtype == other.dtype and torch.equal(ours, other), where
    elif isinstance(ours, dict):
        assert ours.keys() == other.keys(), where
        for key in ours:
            assert_same_bits(ours[key], other[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple)):
        assert len(ours) == len(other), where
        for index, (a, b) in enumerate(zip(ours, other, strict=True)):
            assert_same_bits(a, b, f"{where}/{index}")
    else:
        assert ours == other, where
