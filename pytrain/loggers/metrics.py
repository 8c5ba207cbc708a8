"""What a module has logged: values of this step, means over the epoch, and torchmetrics objects."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from pytrain.launch import Team
from pytrain.tbptt import TimePart

RESERVED_METRICS = ("step", "epoch", "nonfinite")
Options: TypeAlias = "tuple[bool, bool, bool | None, bool | None, bool]"  # bar, logger, on_step, on_epoch, sync_dist
PLAIN: Options = (False, True, None, None, False)
Number: TypeAlias = "Tensor | float"


class Metric(Protocol):
    """A torchmetrics metric."""

    def compute(self) -> Any:
        """The value over all that it has seen, on all ranks."""

    def reset(self) -> None:
        """Forget it."""


class MetricLog:
    """The metrics of the step under way, and of the epoch. Nothing is read from a device before it is written.

    Attributes:
        step: the values of the step under way, until they are taken.
        sums: of values times weights, and of weights, for means over the training epoch.
        metrics: the torchmetrics objects that will be computed at the epoch's end.
        batch: whose first dimension weighs a mean.
        training: whether values are of a training step.
    """

    def __init__(self) -> None:
        self.step: dict[str, Number] = {}
        self.sums: dict[str, tuple[Number, int]] = {}
        self.metrics: dict[str, Metric] = {}
        self.batch: Any = None
        self.training = False
        self._options: dict[str, Options] = {}
        self._sizes: dict[str, int] = {}  # weights that were given
        self._shown: dict[str, Number] = {}

    def add(self, name: str, value: Any, options: Options, batch_size: int | None) -> None:
        """See `Module.log`."""
        on_step, on_epoch = options[2], options[3]
        computed = False
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"log: value of {name!r} must have exactly 1 element, got shape {tuple(value.shape)}")
            value = value.detach()
        elif hasattr(value, "compute") and hasattr(value, "reset"):
            self.metrics[name], computed = value, True
            cached = getattr(value, "_forward_cache", None) if on_step or on_epoch is False else None
            value = cached.detach() if isinstance(cached, Tensor) else cached
        elif not isinstance(value, Real):
            raise TypeError(f"log: value of {name!r} must be a number or a tensor, got {type(value).__name__}")
        if name not in self._options or self._options[name] != options:
            if name in RESERVED_METRICS:
                raise ValueError(f"log: name {name!r} is reserved; choose another than {list(RESERVED_METRICS)}")
            self._options[name] = options
        if batch_size is not None and not batch_size > 0:
            raise ValueError(f"log: batch_size of {name!r} must be > 0, got {batch_size!r}")
        if batch_size is not None and not self.training:
            self._sizes[name] = batch_size
        if value is None or (computed and not self.training):
            return
        if on_epoch and self.training and not computed:
            weight = batch_size_of(self.batch) if batch_size is None else batch_size
            total, weights = self.sums.get(name, (0.0, 0))
            if isinstance(value, Tensor):  # a sum in bf16 would stand still after some hundred values
                total = total + value.to(torch.promote_types(value.dtype, torch.float32)) * weight
            else:
                total = total + value * weight
            self.sums[name] = (total, weights + weight)
        if not self.training or (not on_epoch if on_step is None else on_step):
            self.step[name] = value

    def forget(self) -> None:
        """A run begins."""
        self.step, self.sums, self.metrics, self._shown = {}, {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """What the epoch's means, and their names, depend on: for a run that goes on inside the epoch."""
        return {"sums": dict(self.sums), "options": dict(self._options)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.sums, self._options = dict(state["sums"]), dict(state["options"])

    def take(self) -> dict[str, Number]:
        """Return what was logged since the last call, and forget it."""
        self._shown, self.step = self.step, {}
        return self._shown

    def take_weighed(self) -> dict[str, tuple[Number, int]]:
        """`take`, each with what it weighs in a mean."""
        sizes, self._sizes = self._sizes, {}
        size = batch_size_of(self.batch)
        return {name: (value, sizes.get(name, size)) for name, value in self.take().items()}

    def shown(self) -> dict[str, float]:
        """What the progress bar shows of the last step."""
        last = self.step or self._shown
        return {name: float(value) for name, value in last.items() if self._options.get(name, PLAIN)[0]}

    def read(self, team: Team, loss: float, weight: float) -> dict[str, float]:
        """Return the loss, if it weighs anything, as a mean over the ranks by their weights, and this step's values."""
        if team.size > 1:
            product, weight = team.means([loss * weight, weight])
            loss = product / weight if weight else loss
        return ({"loss": loss} if weight else {}) | {
            name + "_step" * (self._options[name][3] is True): x for name, x in self.read_step(team).items()
        }

    def read_step(self, team: Team) -> dict[str, float]:
        """Return this step's values: rank 0's, but those with sync_dist, which are means over the ranks."""
        found = {name: float(value) for name, value in self.take().items()}
        shared = sorted(name for name in found if self._options[name][4])
        found.update(zip(shared, team.means([found[name] for name in shared]), strict=True))
        return found

    def close_epoch(self, team: Team) -> dict[str, float]:
        """Return the training epoch's means and metrics, over all ranks, and what came last; forget them."""
        last = self.read_step(team)
        sums, self.sums = self.sums, {}
        names = sorted(set(team.gather(sorted(sums))[0])) if team.size > 1 else list(sums)
        flat = [number for name in names for number in map(float, sums.get(name, (0.0, 0)))]
        flat = [mean * team.size for mean in team.means(flat)]
        means = zip(names, flat[::2], flat[1::2], strict=True)
        found = {self.epoch_name(name): total / weight if weight else float("nan") for name, total, weight in means}
        return last | found | self.close_metrics()

    def close_metrics(self) -> dict[str, float]:
        """Compute and reset the torchmetrics objects; return the values of those that are wanted of an epoch."""
        metrics, self.metrics = self.metrics, {}
        found: dict[str, float] = {}
        for name, metric in metrics.items():
            on_step, on_epoch = self._options[name][2:4]
            if not self.training or on_epoch or (on_epoch is None and not on_step):
                value = metric.compute()
                if not isinstance(value, (Real, Tensor)) or (isinstance(value, Tensor) and value.numel() != 1):
                    raise TypeError(
                        f"log: the metric {name!r} must compute one number, {type(metric).__name__} gives a "
                        f"{type(value).__name__}; log its values by log_dict"
                    )
                found[self.epoch_name(name)] = float(value)
        for metric in metrics.values():
            metric.reset()
        return found

    def epoch_name(self, name: str) -> str:
        """The name of an epoch's value: one of two where the step's is written too."""
        options = self._options.get(name, PLAIN)
        return name + "_epoch" * bool(options[2] and options[3])

    def by_plain_name(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The epochs' values of what has two names under the name that it was logged by: callbacks know it so too."""
        both = {self.epoch_name(name): name for name in self._options}
        return {both[name]: value for name, value in metrics.items() if both.get(name, name) != name}

    def for_loggers(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Those of the metrics that loggers get."""
        names = [name for name, options in self._options.items() if not options[1]]
        hidden = {f"{name}{end}" for name in names for end in ("", "_step", "_epoch")}
        return {name: value for name, value in metrics.items() if name.split("/dataloader_idx_")[0] not in hidden}


def batch_size_of(batch: Any) -> int:
    """Return the first dimension of the first tensor in the batch that has one; 1 where there is none."""
    found = _first_dimension(batch.batch if isinstance(batch, TimePart) else batch)
    return 1 if found is None else found


def _first_dimension(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() > 0 else None
    items = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for size in map(_first_dimension, items) if size is not None), None)
