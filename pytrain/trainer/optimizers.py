"""Reads what configure_optimizers returned: Lightning's forms, brought to one record."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pytrain.trainer.config import TrainerConfig

Interval = Literal["step", "epoch"]
FORMS = 'an optimizer, (optimizer, scheduler), ([optimizer], [scheduler]) or {"optimizer": ..., "lr_scheduler": ...}'


@dataclass(frozen=True)
class OptimizerSetup:
    """One optimizer, its schedule (or None), when the schedule advances and the metric that it watches.

    Attributes:
        frequency: the schedule advances at every so-manieth end of an interval.
    """

    optimizer: Optimizer
    scheduler: LRScheduler | None
    interval: Interval
    monitor: str | None
    frequency: int = 1


def read_optimizers(returned: Any, *, automatic: bool = True) -> list[OptimizerSetup]:
    """Bring the value of `configure_optimizers` to one OptimizerSetup an optimizer.

    Args:
        returned: any of FORMS.
        automatic: the trainer steps, so that there can be one optimizer only.

    Raises:
        NotImplementedError: several optimizers or schedulers, and the trainer is to step them.
        TypeError: none of the known forms.
        ValueError: a known form with a bad value in it.
    """
    pairs = _split(returned)
    if automatic and len(pairs) > 1:
        raise NotImplementedError(
            f"configure_optimizers returned {len(pairs)} optimizers, and one loss cannot say which of them steps; set "
            "automatic_optimization = False on the module and step them in training_step (self.optimizers()), or write "
            "the training loop yourself (pytrain's optimizers are drop-ins for torch.optim)"
        )
    return [_read_one(optimizer, schedule, returned) for optimizer, schedule in pairs]


def _read_one(optimizer: Any, schedule: Any, returned: Any) -> OptimizerSetup:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"configure_optimizers must return {FORMS}, got {_describe(returned)}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"configure_optimizers returned {type(optimizer).__name__}, whose step needs a closure; the trainer "
            "evaluates the loss once a step and does not support such optimizers: write the loop yourself"
        )
    scheduler, interval, monitor, frequency = _read_schedule(schedule)
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("configure_optimizers: the scheduler was made for another optimizer than the one returned")
    return OptimizerSetup(optimizer, scheduler, interval, monitor, frequency)


def check_release(optimizer: Optimizer, config: TrainerConfig, strategy: str) -> None:
    """Raise ValueError where an optimizer that steps in backward meets a setting that needs all gradients together."""
    storage = getattr(optimizer, "storage", None)
    if not getattr(storage, "in_backward", False):
        return
    for setting, released in (
        (f"gradient_clip_val={config.gradient_clip_val!r}", config.gradient_clip_val is None),
        (f"accumulate_grad_batches={config.accumulate_grad_batches!r}", config.accumulate_grad_batches == 1),
        (f"precision={config.precision!r}", not config.precision.startswith("fp16")),
        (strategy, strategy == "strategy='single'"),
    ):
        if not released:
            raise ValueError(
                f"Trainer: {setting} needs all gradients of a step together, but the optimizer was made with "
                "step_in_backward=True and frees each as it arrives; leave one of the two out"
            )


def _split(returned: Any) -> list[tuple[Any, Any]]:
    """Split the returned value into (optimizer, schedule or None), an optimizer each."""
    if isinstance(returned, dict):
        unknown = sorted(str(key) for key in returned.keys() - {"optimizer", "lr_scheduler"})
        if unknown:
            raise ValueError(f'configure_optimizers: unknown keys {unknown}; known are "optimizer" and "lr_scheduler"')
        return [(returned.get("optimizer"), returned.get("lr_scheduler"))]
    if not isinstance(returned, (list, tuple)):
        return [(returned, None)]
    if returned and all(
        isinstance(item, Optimizer) or (type(item) is dict and "optimizer" in item) for item in returned
    ):
        return [pair for item in returned for pair in _split(item)]
    if len(returned) != 2:
        raise TypeError(f"configure_optimizers must return {FORMS}, got {_describe(returned)}")
    optimizers, schedules = (list(item) if isinstance(item, (list, tuple)) else [item] for item in returned)
    places = {id(optimizer): i for i, optimizer in enumerate(optimizers)}
    found: list[Any] = [None] * len(optimizers)
    for i, schedule in enumerate(schedules):
        inner = schedule.get("scheduler") if isinstance(schedule, dict) else schedule
        place = places.get(id(getattr(inner, "optimizer", None)), i)
        if place >= len(found) or found[place] is not None:
            raise NotImplementedError(
                f"configure_optimizers returned {len(schedules)} schedulers, several of them for one optimizer; chain "
                "them by torch.optim.lr_scheduler.ChainedScheduler or SequentialLR"
            )
        found[place] = schedule
    return list(zip(optimizers, found, strict=True))


def _read_schedule(schedule: Any) -> tuple[LRScheduler | None, Interval, str | None, int]:
    interval: Interval = "epoch"
    frequency = 1
    monitor: str | None = None
    if isinstance(schedule, dict):
        known = {"scheduler", "interval", "monitor", "frequency", "name", "strict"}
        unknown = sorted(str(key) for key in schedule.keys() - known)
        if unknown:
            raise ValueError(
                f"configure_optimizers: unknown lr_scheduler keys {unknown}; "
                'known are "scheduler", "interval", "frequency", "monitor"'
            )
        frequency = schedule.get("frequency", 1)
        if not isinstance(frequency, int) or frequency < 1:
            raise ValueError(f"configure_optimizers: lr_scheduler frequency must be an int >= 1, got {frequency!r}")
        interval, monitor = schedule.get("interval", "epoch"), schedule.get("monitor")
        schedule = schedule.get("scheduler")
        if schedule is None:
            raise ValueError('configure_optimizers: the lr_scheduler dict has no "scheduler"')
    if interval not in ("step", "epoch"):
        raise ValueError(f'configure_optimizers: interval must be "step" or "epoch", got {interval!r}')
    if schedule is not None and not isinstance(schedule, LRScheduler):
        raise TypeError(f"configure_optimizers: the scheduler must be a torch LRScheduler, got {_describe(schedule)}")
    if isinstance(schedule, ReduceLROnPlateau) != (monitor is not None) or (monitor and interval != "epoch"):
        raise ValueError(
            'configure_optimizers: ReduceLROnPlateau, and no other scheduler, takes {"monitor": name of a validation '
            f'metric}} and interval "epoch"; got {_describe(schedule)}, monitor={monitor!r}, interval={interval!r}'
        )
    return schedule, interval, monitor, frequency


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of [{', '.join(_describe(item) for item in value)}]"
    return type(value).__name__
