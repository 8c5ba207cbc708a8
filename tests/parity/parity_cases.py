"""Loops and modules that do the same training, with what may go wrong in one as arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pytrain

NAMES = ["0.weight", "0.bias", "3.weight", "3.bias"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.25), nn.Linear(16, 3))


def batches(count: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)]


class Net(pytrain.Module):
    def __init__(self, make_optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        super().__init__()
        self.net = network()
        self.make_optimizer, self.options = make_optimizer, options

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), **self.options)


def quiet_trainer(folder: Path, **settings: Any) -> pytrain.Trainer:
    quiet = {"max_epochs": 99, "enable_progress_bar": False, "enable_checkpointing": False}
    return pytrain.Trainer(default_root_dir=folder, **quiet, **settings)


def module(
    folder: Path, *, count: int = 1, adamw: Any = torch.optim.AdamW, **settings: Any
) -> Callable[[], tuple[Any, ...]]:
    """What a file's `make` would be."""

    def module_training() -> tuple[Any, ...]:
        return Net(adamw, lr=1e-2, weight_decay=0.1), batches(count), quiet_trainer(folder, **settings)

    return module_training


def loop(
    *,
    count: int = 1,
    accumulate: int = 1,
    scale: float | None = None,
    unscale: bool = True,
    zero_grad: bool = True,
    max_norm: float | None = None,
    weight_decay: float = 0.1,
    dropout_seed: int | None = None,
    seed: int = 0,
    frozen: Iterable[str] = (),
    overflow_at: int = -1,
    dropout: bool = True,
) -> Callable[[], None]:
    """An ordinary loop, with what may go wrong in it as arguments."""

    def loop_training() -> None:
        model = network(seed).train(dropout)
        named = [(name, param) for name, param in model.named_parameters() if name not in frozen]
        optimizer = torch.optim.AdamW([param for _, param in named], lr=1e-2, weight_decay=weight_decay)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        for step in range(99):
            if zero_grad:
                optimizer.zero_grad()
            for x, y in [batches(count)[(step * accumulate + i) % count] for i in range(accumulate)]:
                loss = nn.functional.mse_loss(model(x), y) / accumulate
                scaler.scale(loss * torch.inf if step == overflow_at else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            if unscale:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()

    return loop_training


def renamed(rename: Callable[[nn.Sequential], nn.Module], steps: int = 4) -> Callable[[], None]:
    def renamed_training() -> None:
        model = rename(network())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            x, y = batches()[0]
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    return renamed_training


class Adversaries(pytrain.Module):
    """Two networks that are stepped by hand, in turns."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = network(0), network(1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        for net, optimizer in zip((self.one, self.two), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(nn.functional.mse_loss(net(x), y))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1) for net in (self.one, self.two)]
