"""Callback: the moments of a run at which other code may take part; `Running` is what it may use of the trainer."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import os

    import torch

    from pytrain.ema import Average
    from pytrain.steps import StepInfo
    from pytrain.trainer import Module
    from pytrain.trainer.config import TrainerConfig


class Running(Protocol):
    """The trainer, as a callback sees it.

    Attributes:
        current_epoch: the epoch under way, from 0.
        global_step: optimizer steps applied. On a device it may have to be asked for; see `StepCount`.
        callback_metrics: the last validation metrics and the last written training metrics, the same on all ranks.
        should_stop: set it to True and the run ends after the step under way.
        enable_validation: whether this run validates at all.
        train_dataloader: this rank's training batches.
        num_training_batches: None where it is unknown.
        ema: the averages that follow the steps, or None. A callback may set it in `setup`; the trainer then passes it
            to each step, validates with it, and keeps it in checkpoints.
    """

    current_epoch: int
    should_stop: bool
    ema: Average | None

    @property
    def global_step(self) -> int: ...
    @property
    def callback_metrics(self) -> Mapping[str, float]: ...
    @property
    def enable_validation(self) -> bool: ...
    @property
    def is_global_zero(self) -> bool: ...
    @property
    def global_rank(self) -> int: ...
    @property
    def default_root_dir(self) -> Path: ...
    @property
    def optimizers(self) -> list[torch.optim.Optimizer]: ...
    @property
    def num_training_batches(self) -> int | None: ...
    @property
    def train_dataloader(self) -> Iterable[Any] | None: ...
    @property
    def config(self) -> TrainerConfig: ...
    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint; all ranks must call this."""


class Callback:
    """Override what you need; the trainer calls only what a class overrides.

    Hooks run on all ranks. What a callback must remember beyond an interruption goes through `state_dict`.
    """

    @property
    def state_key(self) -> str:
        """Under which name checkpoints keep the state; two callbacks of a run need two names."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback: tensors, numbers, strings and containers of them."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned; comes before `on_fit_start`."""

    def setup(self, trainer: Running, module: Module, stage: str) -> None:
        """A run begins, "fit", "validate", "test" or "predict"; no checkpoint was read yet."""

    def on_fit_start(self, trainer: Running, module: Module) -> None:
        """The run is set up, from a checkpoint or anew; nothing was trained yet."""

    def on_fit_end(self, trainer: Running, module: Module) -> None:
        """The run has come to its end."""

    def on_exception(self, trainer: Running, module: Module, exception: BaseException) -> None:
        """The run ends by this exception; `on_fit_end` does not come."""

    def on_train_epoch_start(self, trainer: Running, module: Module) -> None:
        """An epoch begins, or goes on in a resumed run."""

    def on_train_epoch_end(self, trainer: Running, module: Module) -> None:
        """An epoch has ended, and the validation that belongs to it."""

    def on_train_batch_start(self, trainer: Running, module: Module, batch: Any, batch_idx: int) -> None:
        """A micro-batch comes."""

    def on_train_batch_end(self, trainer: Running, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A micro-batch went forward and backward; `outputs` is what `training_step` returned."""

    def on_before_optimizer_step(self, trainer: Running, module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are whole and unscaled, and not clipped yet."""

    def on_train_step_end(self, trainer: Running, module: Module, info: StepInfo) -> None:
        """An optimizer step is over; where it was applied, `global_step` counts it. To read `info` may wait."""

    def on_validation_epoch_start(self, trainer: Running, module: Module) -> None:
        """A validation begins."""

    def on_validation_epoch_end(self, trainer: Running, module: Module) -> None:
        """A validation has ended; `trainer.callback_metrics` has its metrics."""

    def on_validation_batch_start(self, trainer: Running, module: Module, batch: Any, batch_idx: int) -> None:
        """A batch comes to be validated."""

    def on_validation_batch_end(
        self, trainer: Running, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch was validated; `outputs` is what `validation_step` returned."""

    def on_save_checkpoint(self, trainer: Running, module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; entries of yours may be added."""

    def on_load_checkpoint(self, trainer: Running, module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was read and is about to be used."""

    def log_metrics(self, trainer: Running, module: Module, metrics: dict[str, float]) -> None:
        """A line of metrics is about to be written; entries of yours may be added."""


class StepCount:
    """Tells when an applied step is reached; asks a device that counts only when that may be so, not at each step."""

    def __init__(self) -> None:
        self.known = 0
        self._since = 0

    def start(self, trainer: Running) -> None:
        """A run begins."""
        self.known, self._since = trainer.global_step, 0

    def tick(self) -> None:
        """A step was taken, and was applied or not."""
        self._since += 1

    def reached(self, trainer: Running, step: int) -> bool:
        """Whether so many steps are applied."""
        if self.known + self._since < step:
            return False
        self.start(trainer)
        return self.known >= step


def overrides(callback: Callback, hook: str) -> bool:
    """Whether a callback's class has this hook of its own."""
    return getattr(type(callback), hook) is not getattr(Callback, hook)


def say(trainer: Running, text: str) -> None:
    """Tell the user something, once for all ranks."""
    if trainer.is_global_zero:
        print(f"pytrain: {text}", file=sys.stderr, flush=True)
