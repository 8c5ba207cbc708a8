"""A trainer of forty lines that calls callbacks as `pytrain.Trainer` does, and a small module for it to train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import pytrain
from pytrain.callbacks import Callback
from pytrain.sealed import read_checkpoint, write_checkpoint
from pytrain.trainer import Module


class Net(Module):
    """Linear, BatchNorm where asked for, linear, on random rows."""

    def __init__(self, *, norm: bool = False, lr: float = 0.05) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(5)
            middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
            self.net = nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 1))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (batch["tokens"], batch["y"]) if isinstance(batch, dict) else batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return pytrain.optim.AdamW(self.parameters(), lr=self.lr)


def rows(count: int = 4, *, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    """A list of fixed batches."""
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.randn(size, 4, generator=generator), torch.randn(size, 1, generator=generator)) for _ in range(count)
    ]


class SmallTrainer:
    """Trains for some epochs; each ends with a validation whose metrics are given.

    Args:
        folder: the default_root_dir.
        callbacks: called in this order.
        scores: the validation's "val_loss" of each epoch; None: no validation.
        skipped: steps, counted from 1 over the run, that are not applied.
        kill_at: raise KeyboardInterrupt after so many applied steps.
    """

    def __init__(
        self,
        folder: Path,
        callbacks: Sequence[Callback],
        *,
        epochs: int = 3,
        loader: Sequence[Any] | None = None,
        scores: Sequence[float] | None = None,
        skipped: Sequence[int] = (),
        kill_at: int | None = None,
        rank: int = 0,
        log_every: int = 1,
        precision: str = "32",
    ) -> None:
        self.default_root_dir, self.callbacks = folder, list(callbacks)
        self.train_dataloader = rows() if loader is None else loader
        self.num_training_batches = len(self.train_dataloader)
        alone = SimpleNamespace(gather=lambda value: [value])
        self.run = SimpleNamespace(
            val_loader=scores, train_loader=self.train_dataloader, team=alone, device=torch.device("cpu"),
            mode=SimpleNamespace(dtype=None), wrap=lambda name: getattr(self.module, name),
        )  # fmt: skip
        self.scores, self.skipped, self.kill_at, self.log_every = scores, skipped, kill_at, log_every
        self.global_rank, self.is_global_zero = rank, rank == 0
        self.config = SimpleNamespace(
            precision=precision, max_epochs=epochs, limit_val_batches=None, total_steps=lambda length: epochs * length
        )
        self.callback_metrics: dict[str, float] = {}
        self.lines: list[dict[str, float]] = []
        self.saved: list[str] = []
        self.ema: Any = None

    def call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, self.module, *arguments)

    def log(self, metrics: dict[str, float]) -> None:
        self.callback_metrics |= metrics
        self.call("log_metrics", metrics)
        self.lines.append({"step": self.global_step, **metrics})

    def save_checkpoint(self, path: Any) -> None:
        self.saved.append(Path(path).name)
        if self.is_global_zero:
            write_checkpoint(path, self.state())

    def state(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(),
            "optimizer": self.optimizers[0].state_dict(),
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "callbacks": {callback.state_key: callback.state_dict() for callback in self.callbacks},
            "epoch": self.current_epoch,
            "step": self.global_step,
            "in_epoch": self.in_epoch,
        }

    def fit(self, module: Module, ckpt_path: Any = None, make_schedule: Any = None) -> None:
        self.module, self.ema, self.should_stop = module, None, False
        self.optimizers = [module.configure_optimizers()]
        self.schedule = None if make_schedule is None else make_schedule(self.optimizers[0])
        self.current_epoch = self.global_step = self.in_epoch = tried = 0
        self.call("setup", "fit")
        if ckpt_path is not None:
            saved = read_checkpoint(ckpt_path)
            module.load_state_dict(saved["module"])
            self.optimizers[0].load_state_dict(saved["optimizer"])
            if self.schedule is not None:
                self.schedule.load_state_dict(saved["schedule"])
            if self.ema is not None:
                self.ema.load_state_dict(saved["ema"])
            for callback in self.callbacks:
                if callback.state_key in saved["callbacks"]:
                    callback.load_state_dict(saved["callbacks"][callback.state_key])
            self.current_epoch, self.global_step, self.in_epoch = saved["epoch"], saved["step"], saved["in_epoch"]
        self.call("on_fit_start")
        try:
            while self.current_epoch < self.config.max_epochs and not self.should_stop:
                if self.in_epoch == 0:
                    self.call("on_train_epoch_start")
                for i, batch in enumerate(self.train_dataloader):
                    if i < self.in_epoch:
                        continue
                    self.call("on_train_batch_start", batch, i)
                    loss = module.training_step(batch, i)
                    loss.backward()
                    self.call("on_train_batch_end", loss, batch, i)
                    tried += 1
                    if tried in self.skipped:
                        self.optimizers[0].zero_grad()
                        self.call("on_train_step_end", None)
                        continue
                    info = pytrain.step(self.optimizers[0], schedule=self.schedule, ema=self.ema)
                    self.optimizers[0].zero_grad()
                    self.global_step, self.in_epoch = self.global_step + 1, i + 1
                    if self.global_step % self.log_every == 0:
                        self.log({"loss": loss.item()})
                    self.call("on_train_step_end", info)
                    if self.global_step == self.kill_at:
                        raise KeyboardInterrupt
                if self.scores is not None:
                    self.call("on_validation_epoch_start")
                    self.log({"val_loss": self.scores[self.current_epoch]})
                    self.call("on_validation_epoch_end")
                self.call("on_train_epoch_end")
                self.current_epoch, self.in_epoch = self.current_epoch + 1, 0
        except BaseException as error:
            self.call("on_exception", error)
            raise
        self.call("on_fit_end")


def names(folder: Path) -> list[str]:
    """The checkpoints in a folder."""
    return sorted(path.name for path in folder.glob("*.ckpt"))
