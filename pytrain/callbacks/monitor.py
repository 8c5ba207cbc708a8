"""Monitor: the metric that a callback watches, which of two values is better, and when to look."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pytrain.callbacks.base import validates

if TYPE_CHECKING:
    from pytrain.trainer import Trainer

Mode = Literal["min", "max"]


class Monitor:
    """A metric by name.

    Args:
        owner: the callback's name, for errors.
        name: of the metric.
        mode: "min" where less is better, "max" where more is.
        at_epoch_end: look at the end of the training epoch (True) or after each validation (False); None: after each
            validation where the run validates, else at the end of the epoch.

    Raises:
        ValueError: the mode is neither.
    """

    def __init__(self, owner: str, name: str, mode: Mode, at_epoch_end: bool | None) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"{owner}: mode must be 'min' or 'max', got {mode!r}")
        self._owner, self.name, self._sign = owner, name, 1.0 if mode == "min" else -1.0
        self._at_epoch_end = at_epoch_end
        self._validated = False

    def start(self) -> None:
        """A run begins."""
        self._validated = False

    def looks_at_epoch_end(self, trainer: Trainer) -> bool:
        """Whether now, at the end of a training epoch, is the time."""
        return not validates(trainer) if self._at_epoch_end is None else self._at_epoch_end

    def looks_after_validation(self) -> bool:
        """Whether now, after a validation, is the time."""
        self._validated = True
        return not self._at_epoch_end

    def read(self, trainer: Trainer, name: str | None = None) -> float | None:
        """The value of the metric, or of another one, as rank 0 has it; None where it may still come.

        All ranks must call this.

        Raises:
            ValueError: there are metrics, and it is not and will not be among them.
        """
        name, metrics = name or self.name, trainer.callback_metrics
        value = metrics.get(name)
        if trainer.run is not None:  # a training metric may be another on each rank
            value = trainer.run.team.gather(value)[0]
        if value is not None:
            return float(value)
        if metrics and (self._validated or not validates(trainer)):
            raise ValueError(
                f"{self._owner}: {name!r} is not among the metrics {sorted(metrics)}; log it with "
                f"self.log({name!r}, value)"
            )
        return None

    def rank(self, value: float) -> float:
        """A number that is the lower the better the value is; nan is worse than all."""
        return math.inf if math.isnan(value) else self._sign * value
