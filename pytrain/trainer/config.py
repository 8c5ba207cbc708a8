"""Trainer settings: one frozen record, checked once, before anything is built."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pytrain.trainer.precision import PRECISIONS
from pytrain.trainer.ranks import STRATEGIES, Maker, StrategyName

Precision = Literal["32", "bf16-mixed", "fp16-mixed"]
ClipAlgorithm = Literal["norm", "value"]
CLIP_ALGORITHMS = ("norm", "value")


def _check_count(name: str, value: Any, *, optional: bool = False, low: int = 1) -> None:
    if optional and value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        kind = f"an int >= {low}" + (" or None" if optional else "")
        raise ValueError(f"Trainer: {name} must be {kind}, got {value!r}")


def _check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"Trainer: {name} must be True or False, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The settings of a Trainer, described in its docstring.

    Raises:
        ValueError: a value is out of its range; the message names the argument, the value and the range.
    """

    max_epochs: int | None
    max_steps: int | None
    precision: Precision
    strategy: StrategyName | Maker
    accumulate_grad_batches: int
    gradient_clip_val: float | None
    gradient_clip_algorithm: ClipAlgorithm
    seed: int | None
    log_every_n_steps: int
    default_root_dir: Path
    enable_progress_bar: bool
    enable_checkpointing: bool
    checkpoint_every_n_steps: int | None
    keep_checkpoints: int | None
    ema_decay: float | None

    def __post_init__(self) -> None:
        if self.max_epochs is None and self.max_steps is None:
            raise ValueError("Trainer: max_epochs and max_steps are both None; give at least one, an int >= 1")
        for name in ("max_epochs", "max_steps", "checkpoint_every_n_steps", "keep_checkpoints"):
            _check_count(name, getattr(self, name), optional=True)
        for name in ("accumulate_grad_batches", "log_every_n_steps"):
            _check_count(name, getattr(self, name))
        _check_count("seed", self.seed, optional=True, low=0)
        if self.seed is not None and self.seed >= 2**32:
            raise ValueError(f"Trainer: seed must be below 2**32 (numpy's limit), got {self.seed}")
        for name in ("enable_progress_bar", "enable_checkpointing"):
            _check_bool(name, getattr(self, name))
        if self.precision not in PRECISIONS:
            raise ValueError(f"Trainer: precision must be one of {sorted(PRECISIONS)}, got {self.precision!r}")
        if not (callable(self.strategy) or self.strategy in STRATEGIES):
            raise ValueError(
                f"Trainer: strategy must be one of {list(STRATEGIES)} or a callable (module, optimizer) -> "
                f"pytrain.parallel.Strategy, got {self.strategy!r}"
            )
        if self.gradient_clip_algorithm not in CLIP_ALGORITHMS:
            raise ValueError(
                f"Trainer: gradient_clip_algorithm must be one of {list(CLIP_ALGORITHMS)}, "
                f"got {self.gradient_clip_algorithm!r}"
            )
        clip = self.gradient_clip_val
        if clip is not None and not (
            isinstance(clip, (int, float)) and not isinstance(clip, bool) and 0 < clip < math.inf
        ):
            raise ValueError(f"Trainer: gradient_clip_val must be None or a finite number > 0, got {clip!r}")
        decay = self.ema_decay
        if decay is not None and not (
            isinstance(decay, (int, float)) and not isinstance(decay, bool) and 0 <= decay < 1
        ):
            raise ValueError(f"Trainer: ema_decay must be None or a number in [0, 1), got {decay!r}")
        if self.checkpoint_every_n_steps is not None and not self.enable_checkpointing:
            raise ValueError(
                f"Trainer: checkpoint_every_n_steps={self.checkpoint_every_n_steps} needs enable_checkpointing=True"
            )

    def alike(self) -> list[str]:
        """What must be the same on all ranks."""
        own = ("strategy", "default_root_dir", "enable_progress_bar")
        return [f"{each.name}={getattr(self, each.name)!r}" for each in fields(self) if each.name not in own]

    def total_steps(self, length: int | None) -> int | None:
        """Return the applied step at which a run will end, as far as it is known; `length` is in batches an epoch."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.max_epochs is not None and length is not None:
            limits.append(self.max_epochs * -(-length // self.accumulate_grad_batches))
        return min(limits, default=None)

    @property
    def checkpoint_dir(self) -> Path:
        """The folder of the automatic checkpoints."""
        return self.default_root_dir / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The JSON lines file of the metrics."""
        return self.default_root_dir / "metrics.jsonl"
