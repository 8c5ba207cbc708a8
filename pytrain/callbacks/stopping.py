"""EarlyStopping: ends a run when a metric no longer gets better."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pytrain.callbacks.base import Callback, say
from pytrain.callbacks.monitor import Mode, Monitor

if TYPE_CHECKING:
    from pytrain.trainer import Module, Trainer


class EarlyStopping(Callback):
    """Sets `trainer.should_stop` when a metric has not improved for some time, and says why.

    All ranks decide alike, by rank 0's value.

    Args:
        monitor: the metric's name.
        min_delta: an improvement counts where it is larger than this, >= 0.
        patience: so many looks in a row without an improvement end the run, >= 0; 0 is as 1.
        mode: "min" where less is better, "max" where more is.
        strict: a missing metric is an error; False: a look without it is none.
        check_finite: stop as soon as the metric is inf or nan.
        stopping_threshold: stop as soon as the metric is better than this.
        divergence_threshold: stop as soon as the metric is worse than this.
        check_on_train_epoch_end: look at the end of the training epoch (True) or after each validation (False);
            None: after each validation where the run validates, else at the end of the epoch.

    Attributes:
        wait_count: how many looks in a row have shown no improvement.
        stopped_epoch: the epoch in which it ended the run; 0 where it has not.
        best_score: the best value so far; inf or -inf before the first.
        stopping_reason: in words; None where it has not ended the run.

    Raises:
        ValueError: an argument is out of its range, or, at a look, the metric is not among those that there are.
    """

    def __init__(
        self,
        monitor: str,
        min_delta: float = 0.0,
        patience: int = 3,
        mode: Mode = "min",
        *,
        strict: bool = True,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        check_on_train_epoch_end: bool | None = None,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int) or patience < 0:
            raise ValueError(f"EarlyStopping: patience must be an int >= 0, got {patience!r}")
        if not min_delta >= 0:
            raise ValueError(f"EarlyStopping: min_delta must be a number >= 0, got {min_delta!r}")
        self._monitor = Monitor("EarlyStopping", monitor, mode, check_on_train_epoch_end)
        self.monitor, self.mode, self.min_delta, self.patience = monitor, mode, min_delta, patience
        self.strict, self.check_finite = strict, check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self.wait_count = self.stopped_epoch = 0
        self.best_score = math.inf if mode == "min" else -math.inf
        self.stopping_reason: str | None = None
        self._looked_at = [-1, -1]  # epoch and step; a run that resumes from there comes by once more

    @property
    def state_key(self) -> str:
        return f"EarlyStopping(monitor={self.monitor!r}, mode={self.mode!r})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "wait_count": self.wait_count,
            "stopped_epoch": self.stopped_epoch,
            "best_score": self.best_score,
            "stopping_reason": self.stopping_reason,
            "looked_at": self._looked_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.wait_count, self.stopped_epoch = state_dict["wait_count"], state_dict["stopped_epoch"]
        self.best_score, self.stopping_reason = state_dict["best_score"], state_dict["stopping_reason"]
        self._looked_at = list(state_dict["looked_at"])

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        self._monitor.start()

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        self._looked_at = [-1, -1]

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        self._looked_at = [-1, -1]

    def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if self._monitor.looks_after_validation():
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if self._monitor.looks_at_epoch_end(trainer):
            self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        now = [trainer.current_epoch, trainer.global_step]
        if now == self._looked_at or (not self.strict and self.monitor not in trainer.callback_metrics):
            return
        value = self._monitor.read(trainer)
        if value is None:
            return
        self._looked_at = now
        reason = self._judge(value)
        if reason is not None:
            self.stopping_reason = f"{self.monitor} {value:.6g} {reason}"
            self.stopped_epoch = trainer.current_epoch
            trainer.should_stop = True
            say(trainer, f"EarlyStopping ends the run in epoch {trainer.current_epoch + 1}: {self.stopping_reason}")

    def _judge(self, value: float) -> str | None:
        """Count a look; return why to stop, or None."""
        rank = self._monitor.rank
        if self.check_finite and not math.isfinite(value):
            return "is not finite"
        if self.stopping_threshold is not None and rank(value) < rank(self.stopping_threshold):
            return f"is better than the threshold {self.stopping_threshold:.6g}"
        if self.divergence_threshold is not None and rank(value) > rank(self.divergence_threshold):
            return f"is worse than the threshold {self.divergence_threshold:.6g}"
        if rank(value) < rank(self.best_score) - self.min_delta:
            self.best_score, self.wait_count = value, 0
            return None
        self.wait_count += 1
        if self.wait_count < self.patience:
            return None
        return f"has not improved on {self.best_score:.6g} by more than {self.min_delta:.6g} {self.wait_count} times"
