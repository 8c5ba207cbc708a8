"""Hooks: the methods of a module and of callbacks that the trainer calls at fixed points; none is called that is empty."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pytrain.lightning import check_hooks

# Of modules and callbacks alike; a callback's have (trainer, module) before what is named here.
HOOKS = (
    "setup",  # stage, "fit", "validate", "test" or "predict": before a checkpoint is read; a module's has a place of its own
    "on_fit_start",
    "on_fit_end",
    "on_exception",  # exception
    "on_train_epoch_start",
    "on_train_epoch_end",
    "on_train_batch_start",  # batch, batch_idx
    "on_train_batch_end",  # outputs, batch, batch_idx
    "on_train_step_end",  # info: pytrain.StepInfo of the step just taken
    "on_before_optimizer_step",  # optimizer; gradients are unscaled in place for it
    "on_validation_epoch_start",
    "on_validation_epoch_end",
    "on_validation_batch_start",  # batch, batch_idx
    "on_validation_batch_end",  # outputs, batch, batch_idx
    "on_save_checkpoint",  # checkpoint: may put plain data and tensors into it
    "on_load_checkpoint",  # checkpoint
    "log_metrics",  # metrics: a line that is about to be written; may put more into it
)
Hook = Callable[..., Any]


class Hooks:
    """For each of HOOKS what there is to call: the callbacks' first, in their order, then the module's.

    Raises:
        TypeError: a callback has no hook at all, or the module one of Lightning's that pytrain has not.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: Sequence[Any]) -> None:
        check_hooks(module)
        self._found: dict[str, tuple[Hook, ...]] = {}
        for name in HOOKS:
            found = [partial(hook, trainer, module) for each in callbacks if (hook := _own(each, name)) is not None]
            own = _own(module, name) if name != "setup" else None
            self._found[name] = (*found, *(() if own is None else (own,)))
        for i, each in enumerate(callbacks):
            if isinstance(each, type) or not any(hasattr(each, name) for name in HOOKS):
                raise TypeError(
                    f"Trainer: callbacks[{i}] must be an object with a hook such as on_fit_start (see "
                    f"pytrain.callbacks.Callback), got {each!r}"
                )

    def __getitem__(self, name: str) -> tuple[Hook, ...]:
        return self._found[name]

    def call(self, name: str, *arguments: Any) -> None:
        """Call all of one name."""
        for hook in self._found[name]:
            hook(*arguments)


def _own(owner: Any, name: str) -> Hook | None:
    """A hook, unless it is the empty one that a base class of pytrain has."""
    hook: Hook | None = getattr(owner, name, None)
    return None if getattr(hook, "__func__", hook) in _EMPTY else hook


_EMPTY: set[Any] = {None}


def empty(hook: Hook) -> Hook:
    """Mark a method as one that does nothing and need not be called."""
    _EMPTY.add(hook)
    return hook
