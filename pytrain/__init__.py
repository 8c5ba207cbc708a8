"""pytrain: everything between loss.backward() and the next forward, exact and at the speed of memory."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytrain import amp, optim
from pytrain._version import __version__
from pytrain.clip import ClipGroup
from pytrain.steps import StepInfo, open_step, step

if TYPE_CHECKING:
    from pytrain import ema
    from pytrain.trainer import Module, Trainer

__all__ = ["ClipGroup", "Module", "StepInfo", "Trainer", "__version__", "amp", "ema", "open_step", "optim", "step"]


def __getattr__(name: str) -> Any:
    """Load the trainer and the averages when they are first asked for, so that `import pytrain` stays small."""
    if name == "ema":
        return import_module("pytrain.ema")
    if name in ("Module", "Trainer"):
        from pytrain import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'pytrain' has no attribute {name!r}")
