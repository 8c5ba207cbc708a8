"""Trainer settings: one frozen record, checked once, before anything is built."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

from pytrain.launch import STRATEGIES, Maker, StrategyName, seconds_of, under_torchrun
from pytrain.trainer.precision import ALIASES, PRECISIONS

Precision = Literal["32", "bf16-mixed", "fp16-mixed", "bf16-true", "fp16-true"]
ClipAlgorithm = Literal["norm", "value"]
Accelerator = Literal["auto", "cpu", "cuda", "gpu"]
Limit: TypeAlias = "int | float | None"
CHOICES: dict[str, tuple[object, ...]] = {
    "gradient_clip_algorithm": ("norm", "value"),
    "accelerator": ("auto", "cpu", "cuda", "gpu"),
    "deterministic": (None, False, True, "warn"),
}
LIMITS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches", "overfit_batches")


def _check_count(name: str, value: Any, *, optional: bool = False, low: int = 1, also: str = "") -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        kind = f"an int >= {low}" + (" or None" if optional else also)
        raise ValueError(f"Trainer: {name} must be {kind}, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_limit(name: str, value: Any) -> None:
    """A number of batches, or a share of them."""
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if value is not None and not whole and not (isinstance(value, float) and 0 <= value <= 1):
        raise ValueError(f"Trainer: {name} must be an int >= 0, a float in [0, 1] or None, got {value!r}")


def take_of(name: str, limit: Limit, length: int | None, least: int = 0) -> int | None:
    """How many batches a limit leaves of `length` (None: unknown), but `least` if it is a share; None: all.

    Raises:
        ValueError: a share of an unknown length, or one of less than a batch.
    """
    if limit is None or isinstance(limit, int):
        return limit
    if limit == 1.0:
        return None
    if length is None:
        raise ValueError(f"Trainer: {name}={limit} is a share, and the loader has no length; give an int")
    taken = max(least, int(length * limit))
    if limit and length and not taken:
        raise ValueError(f"Trainer: {name}={limit} of {length} batches is less than one; give more, or an int")
    return taken


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The settings of a Trainer, described in its docstring.

    Raises:
        ValueError: a value is out of its range; the message names the argument, the value and the range.
    """

    max_epochs: int | None
    max_steps: int | None
    max_time: Any
    accelerator: Accelerator
    devices: int | Literal["auto"]
    num_nodes: int
    strategy: StrategyName | Maker
    precision: Precision
    accumulate_grad_batches: int | Mapping[int, int]
    gradient_clip_val: float | None
    gradient_clip_algorithm: ClipAlgorithm
    limit_train_batches: Limit
    limit_val_batches: Limit
    limit_test_batches: Limit
    limit_predict_batches: Limit
    overfit_batches: int | float
    fast_dev_run: int | bool
    val_check_interval: int | float | None
    check_val_every_n_epoch: int
    log_every_n_steps: int
    callbacks: Sequence[Any]
    logger: Any
    deterministic: bool | Literal["warn"] | None
    seed: int | None
    default_root_dir: Path
    enable_progress_bar: bool
    enable_checkpointing: bool
    checkpoint_every_n_steps: int | None
    keep_checkpoints: int | None
    async_checkpoints: bool
    ema_decay: float | None

    @staticmethod
    def of(settings: Mapping[str, Any]) -> TrainerConfig:
        """Bring what `Trainer` was given to a record."""
        own = {each.name: settings[each.name] for each in fields(TrainerConfig)}
        callbacks, precision = own["callbacks"], own["precision"]
        several = isinstance(callbacks, (list, tuple))
        listed = list(callbacks) if several else [] if callbacks is None else [callbacks]
        own["callbacks"] = tuple(sorted(listed, key=lambda each: hasattr(each, "dirpath")))  # what saves comes last
        own["precision"] = ALIASES.get(precision, precision) if isinstance(precision, (str, int)) else precision
        own |= {name: None for name in ("max_steps", "max_epochs") if own[name] == -1}  # as Lightning says "no limit"
        folder, own["max_time"] = own["default_root_dir"], seconds_of(own["max_time"])
        if not isinstance(folder, (str, os.PathLike)):
            raise ValueError(f"Trainer: default_root_dir must be a path, got {folder!r}")
        own["default_root_dir"] = Path(folder)
        config = TrainerConfig(**own)
        few = config.fast_dev_run
        if not few:
            return config
        limits: dict[str, Any] = dict.fromkeys(LIMITS[:-1], int(few))
        return replace(
            config, **limits, max_epochs=1, max_steps=None, logger=False, enable_checkpointing=False,
            checkpoint_every_n_steps=None, val_check_interval=None, check_val_every_n_epoch=1,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if self.max_epochs is None and self.max_steps is None and self.max_time is None and not self.fast_dev_run:
            raise ValueError(
                "Trainer: max_epochs and max_steps are both None, and so is max_time; give at least one, an int >= 1"
            )
        for name in ("max_epochs", "max_steps", "checkpoint_every_n_steps", "keep_checkpoints"):
            _check_count(name, getattr(self, name), optional=True)
        for name in ("log_every_n_steps", "check_val_every_n_epoch", "num_nodes"):
            _check_count(name, getattr(self, name))
        schedule = self.accumulate_grad_batches
        for epoch, count in schedule.items() if isinstance(schedule, Mapping) else [(0, schedule)]:
            _check_count("accumulate_grad_batches", count)
            _check_count("accumulate_grad_batches: an epoch", epoch, low=0)
        if self.devices != "auto":
            _check_count("devices", self.devices, also=', or "auto"')
        _check_count("seed", self.seed, optional=True, low=0)
        few = self.fast_dev_run
        _check_count("fast_dev_run", int(few) if isinstance(few, bool) else few, low=0)
        if self.seed is not None and self.seed >= 2**32:
            raise ValueError(f"Trainer: seed must be below 2**32 (numpy's limit), got {self.seed}")
        for name in ("enable_progress_bar", "enable_checkpointing", "async_checkpoints"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"Trainer: {name} must be True or False, got {getattr(self, name)!r}")
        for name in (*LIMITS, "val_check_interval"):
            _check_limit(name, getattr(self, name))
        if self.val_check_interval == 0:
            raise ValueError("Trainer: val_check_interval must be > 0 batches or a share > 0 of an epoch, got 0")
        if self.precision not in list(PRECISIONS):
            raise ValueError(f"Trainer: precision must be one of {sorted(PRECISIONS)}, got {self.precision!r}")
        if not (callable(self.strategy) or self.strategy in STRATEGIES):
            raise ValueError(
                f"Trainer: strategy must be one of {list(STRATEGIES)} or a callable (module, optimizer) -> "
                f"pytrain.parallel.Strategy, got {self.strategy!r}"
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"Trainer: {name} must be one of {list(choices)}, got {getattr(self, name)!r}")
        clip, decay = self.gradient_clip_val, self.ema_decay
        if clip is not None and not (_is_number(clip) and 0 < clip < math.inf):
            raise ValueError(f"Trainer: gradient_clip_val must be None or a finite number > 0, got {clip!r}")
        if decay is not None and not (_is_number(decay) and 0 <= decay < 1):
            raise ValueError(f"Trainer: ema_decay must be None or a number in [0, 1), got {decay!r}")
        if self.checkpoint_every_n_steps is not None and not self.enable_checkpointing:
            raise ValueError(
                f"Trainer: checkpoint_every_n_steps={self.checkpoint_every_n_steps} needs enable_checkpointing=True"
            )
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.num_nodes > 1 and not under_torchrun():
            raise ValueError(
                f"Trainer: num_nodes={self.num_nodes} needs a launcher on every node: torchrun --nnodes "
                f"{self.num_nodes} --nproc-per-node N --rdzv-backend c10d --rdzv-endpoint HOST:PORT script.py"
            )
        if under_torchrun() and self.devices != "auto" and self.devices * self.num_nodes != size:
            raise ValueError(
                f"Trainer: devices={self.devices} on num_nodes={self.num_nodes}, but the launcher has started {size} "
                'ranks; leave devices="auto", or start as many'
            )

    def alike(self) -> list[str]:
        """What must be the same on all ranks."""
        own = ("strategy", "default_root_dir", "enable_progress_bar", "callbacks", "logger")
        return [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name not in own]

    def accumulate_in(self, epoch: int) -> int:
        """Micro-batches a step in this epoch: the last entry of a schedule that has begun."""
        schedule = self.accumulate_grad_batches
        if not isinstance(schedule, Mapping):
            return schedule
        return schedule[max(begun)] if (begun := [first for first in schedule if first <= epoch]) else 1

    def total_steps(self, length: int | None) -> int | None:
        """Return the applied step at which a run will end, as far as it is known; `length` is in batches an epoch."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.max_epochs is not None and length is not None:
            limits.append(sum(-(-length // self.accumulate_in(epoch)) for epoch in range(self.max_epochs)))
        return min(limits, default=None)

    def device_for(self, own: torch.device) -> torch.device:
        """Where a module on `own` trains.

        Raises:
            ValueError: there is no such device.
        """
        there = torch.cuda.is_available()
        if self.accelerator == "cpu":
            return torch.device("cpu")
        if self.accelerator != "auto" and not there:
            raise ValueError(f"Trainer: accelerator={self.accelerator!r}, but torch sees no CUDA device")
        if not there or (self.accelerator == "auto" and own.type not in ("cpu", "cuda")):
            return own
        local = int(os.environ.get("LOCAL_RANK", "0")) if under_torchrun() else own.index or 0
        return torch.device("cuda", local)

    def apply(self) -> None:
        """Set what holds for the whole process."""
        if self.deterministic is not None:
            if self.deterministic:
                os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(bool(self.deterministic), warn_only=self.deterministic == "warn")
