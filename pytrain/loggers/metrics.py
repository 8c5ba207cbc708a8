"""What a module has logged: values of this step, means over the epoch, and torchmetrics objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from pytrain.launch import Team

RESERVED_METRICS = ("step", "epoch", "nonfinite")
Options: TypeAlias = "tuple[bool, bool, bool | None, bool | None, bool]"  # bar, logger, on_step, on_epoch, sync_dist
PLAIN: Options = (False, True, None, None, False)


class Metric(Protocol):
    """A torchmetrics metric."""

    def compute(self) -> Any:
        """The value over all that it has seen, on all ranks."""

    def reset(self) -> None:
        """Forget it."""


class MetricLog:
    """The metrics of the step under way, and of the epoch. Nothing is read from a device before it is written."""

    def __init__(self) -> None:
        self.step: dict[str, Tensor | float] = {}
        self.batch: Any = None  # whose first dimension weighs a mean
        self.size: int | None = None  # weighs it in place of that, since the last `take`
        self._options: dict[str, Options] = {}
        self._sums: dict[str, tuple[Tensor | float, int]] = {}
        self._metrics: dict[str, Metric] = {}
        self.training = False

    def add(self, name: str, value: Any, options: Options, batch_size: int | None) -> None:
        """See `Module.log`."""
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"log: value of {name!r} must have exactly 1 element, got shape {tuple(value.shape)}")
            value = value.detach()
        elif hasattr(value, "compute") and hasattr(value, "reset"):
            self._metrics[name] = value
            value = getattr(value, "_forward_cache", None) if options[2] else None
        elif not isinstance(value, (int, float)):
            raise TypeError(f"log: value of {name!r} must be a number or a tensor, got {type(value).__name__}")
        if name not in self._options or self._options[name] != options:
            if name in RESERVED_METRICS:
                raise ValueError(f"log: name {name!r} is reserved; choose another than {list(RESERVED_METRICS)}")
            self._options[name] = options
        if batch_size is not None:
            self.size = batch_size
        if value is None:
            return
        on_step, on_epoch = options[2], options[3]
        if on_epoch and self.training:
            weight = batch_size_of(self.batch) if batch_size is None else batch_size
            total, weights = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value * weight, weights + weight)
        if not self.training or (not on_epoch if on_step is None else on_step):
            self.step[name] = value

    def take(self) -> tuple[dict[str, Tensor | float], int]:
        """Return what was logged since the last call and what it weighs, and forget it."""
        found, self.step = self.step, {}
        size, self.size = batch_size_of(self.batch) if self.size is None else self.size, None
        return found, size

    def shown(self) -> dict[str, float]:
        """What the progress bar shows of the step under way."""
        return {name: float(value) for name, value in self.step.items() if self._options.get(name, PLAIN)[0]}

    def read(self, team: Team, loss: float) -> dict[str, float]:
        """Return the loss as a mean over the ranks, and this step's values; those with sync_dist are means too."""
        found = {name: float(value) for name, value in self.take()[0].items()}
        shared = [name for name in found if self._options[name][4]]
        loss, *means = team.means([loss, *(found[name] for name in shared)])
        found.update(zip(shared, means, strict=True))
        return {"loss": loss} | {name + "_step" * (self._options[name][3] is True): x for name, x in found.items()}

    def close_epoch(self, team: Team) -> dict[str, float]:
        """Return the epoch's means and metrics, over all ranks, and forget them."""
        sums, self._sums = self._sums, {}
        names = sorted(set(team.gather(sorted(sums))[0])) if team.size > 1 else list(sums)
        flat = [number for name in names for number in map(float, sums.get(name, (0.0, 0)))]
        flat = [mean * team.size for mean in team.means(flat)]
        found = {}
        for i, name in enumerate(names):
            key = name + "_epoch" * (self._options[name][2] is True)
            found[key] = flat[2 * i] / flat[2 * i + 1] if flat[2 * i + 1] else float("nan")
        return found | self.close_metrics()

    def close_metrics(self) -> dict[str, float]:
        """Compute and reset the torchmetrics objects."""
        metrics, self._metrics = self._metrics, {}
        found = {name: float(metric.compute()) for name, metric in metrics.items()}
        for metric in metrics.values():
            metric.reset()
        return found

    def for_loggers(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those of the metrics that loggers get."""
        hidden = {name for name, options in self._options.items() if not options[1]}
        return {
            name: value
            for name, value in metrics.items()
            if name not in hidden and name.removesuffix("_step").removesuffix("_epoch") not in hidden
        }


def batch_size_of(batch: Any) -> int:
    """Return the first dimension of the first tensor in the batch that has one; 1 where there is none."""
    found = _first_dimension(batch)
    return 1 if found is None else found


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() > 0 else None
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_first_dimension, items) if size is not None), None)
