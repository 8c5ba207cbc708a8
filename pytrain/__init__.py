"""pytrain: everything between loss.backward() and the next forward, exact and at the speed of memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytrain import amp, optim
from pytrain._version import __version__
from pytrain.clip import ClipGroup
from pytrain.steps import StepInfo, open_step, step

if TYPE_CHECKING:
    from pytrain import callbacks, ema, grads, loggers, parallel
    from pytrain.callbacks import Callback
    from pytrain.rng import seed_everything
    from pytrain.trainer import DataModule, Module, Trainer

__all__ = [
    "Callback",
    "ClipGroup",
    "DataModule",
    "Module",
    "StepInfo",
    "Trainer",
    "__version__",
    "amp",
    "callbacks",
    "ema",
    "grads",
    "loggers",
    "open_step",
    "optim",
    "parallel",
    "seed_everything",
    "step",
]


def __getattr__(name: str) -> Any:
    """Load the trainer, averages, strategies and so on when they are first asked for: `import pytrain` stays small."""
    if name in ("callbacks", "ema", "grads", "loggers", "parallel"):
        return import_module(f"pytrain.{name}")
    if name == "Callback":
        return import_module("pytrain.callbacks").Callback
    if name == "seed_everything":
        return import_module("pytrain.rng").seed_everything
    if name in ("DataModule", "Module", "Trainer"):
        from pytrain import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'pytrain' has no attribute {name!r}")
