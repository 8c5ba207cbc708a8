"""pytrain: everything between loss.backward() and the next forward, exact and at the speed of memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pytrain import optim
from pytrain._version import __version__

if TYPE_CHECKING:
    from pytrain.trainer import Module, Trainer

__all__ = ["Module", "Trainer", "__version__", "optim"]


def __getattr__(name: str) -> Any:
    """Load the trainer when it is first asked for, so that `import pytrain` stays small."""
    if name in ("Module", "Trainer"):
        from pytrain import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'pytrain' has no attribute {name!r}")
