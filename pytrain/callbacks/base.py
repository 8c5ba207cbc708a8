"""Callback: the moments of a run at which other code may take part."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pytrain.steps import StepInfo
    from pytrain.trainer import Module, Trainer


class Callback:
    """Override what you need; the trainer calls only what a class overrides.

    Hooks run on all ranks, callbacks' in their order and then the module's own, which at the end of an epoch or
    validation comes first, so that what it logs is among the metrics. What a callback must remember beyond an
    interruption goes through `state_dict`. `trainer.global_step` may have to be asked of a device: not at every step.
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

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        """A run begins; no checkpoint was used yet. `stage` is "fit": callbacks take no part in validate or test."""

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        """The run is set up, from a checkpoint or anew; nothing was trained yet."""

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        """The run has come to its end."""

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        """The run ends by this exception; `on_fit_end` does not come."""

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """An epoch begins, or goes on in a resumed run."""

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """An epoch has ended, and the validation that belongs to it."""

    def on_train_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        """A micro-batch comes."""

    def on_train_batch_end(self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A micro-batch went forward and backward; `outputs` is what `training_step` returned."""

    def on_before_optimizer_step(self, trainer: Trainer, module: Module, optimizer: torch.optim.Optimizer) -> None:
        """Gradients are whole and unscaled, and not clipped yet."""

    def on_train_step_end(self, trainer: Trainer, module: Module, info: StepInfo) -> None:
        """An optimizer step is over; where it was applied, `global_step` counts it. To read `info` may wait."""

    def on_validation_epoch_start(self, trainer: Trainer, module: Module) -> None:
        """A validation begins."""

    def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
        """A validation has ended; `trainer.callback_metrics` has its metrics."""

    def on_validation_batch_start(self, trainer: Trainer, module: Module, batch: Any, batch_idx: int) -> None:
        """A batch comes to be validated."""

    def on_validation_batch_end(
        self, trainer: Trainer, module: Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A batch was validated; `outputs` is what `validation_step` returned."""

    def on_save_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint is about to be written; entries of yours may be added."""

    def on_load_checkpoint(self, trainer: Trainer, module: Module, checkpoint: dict[str, Any]) -> None:
        """A checkpoint was read and is about to be used."""

    def log_metrics(self, trainer: Trainer, module: Module, metrics: dict[str, float]) -> None:
        """A line of metrics is about to be written; entries of yours may be added."""


class StepCount:
    """Tells when an applied step is reached; asks a device that counts only when that may be so, not at each step."""

    def __init__(self) -> None:
        self.known = 0
        self._since = 0

    def start(self, trainer: Trainer) -> None:
        """A run begins."""
        self.known, self._since = trainer.global_step, 0

    def tick(self) -> None:
        """A step was taken, and was applied or not."""
        self._since += 1

    def reached(self, trainer: Trainer, step: int) -> bool:
        """Whether so many steps are applied."""
        if self.known + self._since < step:
            return False
        self.start(trainer)
        return self.known >= step


def validates(trainer: Trainer) -> bool:
    """Whether the run has validations."""
    run = trainer.run
    return run is not None and run.val_loader is not None and trainer.config.limit_val_batches != 0


def say(trainer: Trainer, text: str) -> None:
    """Tell the user something, once for all ranks."""
    if trainer.is_global_zero:
        print(f"pytrain: {text}", file=sys.stderr, flush=True)
