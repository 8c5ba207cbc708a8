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
    """One optimizer, its schedule (or None), when the schedule advances and the metric that it watches."""

    optimizer: Optimizer
    scheduler: LRScheduler | None
    interval: Interval
    monitor: str | None


def read_optimizers(returned: Any) -> OptimizerSetup:
    """Bring the value of `configure_optimizers` to one OptimizerSetup.

    Raises:
        NotImplementedError: several optimizers or schedulers.
        TypeError: none of the known forms.
        ValueError: a known form with a bad value in it.
    """
    optimizer, schedule = _split(returned)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"configure_optimizers must return {FORMS}, got {_describe(returned)}")
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            f"configure_optimizers returned {type(optimizer).__name__}, whose step needs a closure; the trainer "
            "evaluates the loss once a step and does not support such optimizers: write the loop yourself"
        )
    scheduler, interval, monitor = _read_schedule(schedule)
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError("configure_optimizers: the scheduler was made for another optimizer than the one returned")
    return OptimizerSetup(optimizer, scheduler, interval, monitor)


def check_release(optimizer: Optimizer, config: TrainerConfig, strategy: str) -> None:
    """Raise ValueError where an optimizer that steps in backward meets a setting that needs all gradients together."""
    storage = getattr(optimizer, "storage", None)
    if not getattr(storage, "in_backward", False):
        return
    for setting, released in (
        (f"gradient_clip_val={config.gradient_clip_val!r}", config.gradient_clip_val is None),
        (f"accumulate_grad_batches={config.accumulate_grad_batches!r}", config.accumulate_grad_batches == 1),
        (f"precision={config.precision!r}", config.precision != "fp16-mixed"),
        (strategy, strategy == "strategy='single'"),
    ):
        if not released:
            raise ValueError(
                f"Trainer: {setting} needs all gradients of a step together, but the optimizer was made with "
                "step_in_backward=True and frees each as it arrives; leave one of the two out"
            )


def _split(returned: Any) -> tuple[Any, Any]:
    """Split the returned value into (optimizer, schedule or None)."""
    if isinstance(returned, dict):
        unknown = sorted(str(key) for key in returned.keys() - {"optimizer", "lr_scheduler"})
        if unknown:
            raise ValueError(f'configure_optimizers: unknown keys {unknown}; known are "optimizer" and "lr_scheduler"')
        return returned.get("optimizer"), returned.get("lr_scheduler")
    if not isinstance(returned, (list, tuple)):
        return returned, None
    if len(returned) > 1 and all(isinstance(item, Optimizer) for item in returned):
        raise _several("optimizers", len(returned))
    if len(returned) == 1:
        return returned[0], None
    if len(returned) != 2:
        raise TypeError(f"configure_optimizers must return {FORMS}, got {_describe(returned)}")
    return _only(returned[0], "optimizers"), _only(returned[1], "schedulers")


def _only(item: Any, kind: str) -> Any:
    """Take the one element out of a list; None from an empty one."""
    if not isinstance(item, (list, tuple)):
        return item
    if len(item) > 1:
        raise _several(kind, len(item))
    return item[0] if item else None


def _several(kind: str, count: int) -> NotImplementedError:
    return NotImplementedError(
        f"configure_optimizers returned {count} {kind}; the trainer does not support several {kind} yet: "
        "write the training loop yourself (pytrain's optimizers are drop-ins for torch.optim)"
    )


def _read_schedule(schedule: Any) -> tuple[LRScheduler | None, Interval, str | None]:
    interval: Interval = "epoch"
    monitor: str | None = None
    if isinstance(schedule, dict):
        unknown = sorted(str(key) for key in schedule.keys() - {"scheduler", "interval", "monitor", "frequency"})
        if unknown:
            raise ValueError(
                f"configure_optimizers: unknown lr_scheduler keys {unknown}; "
                'known are "scheduler", "interval", "monitor"'
            )
        if schedule.get("frequency", 1) != 1:
            raise ValueError(f"configure_optimizers: lr_scheduler frequency must be 1, got {schedule['frequency']!r}")
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
    return schedule, interval, monitor


def _describe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of [{', '.join(_describe(item) for item in value)}]"
    return type(value).__name__
