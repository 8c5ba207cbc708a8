"""Hooks: the methods of a module and of callbacks that the trainer calls at fixed points; empty ones are not called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pytrain.callbacks.base import Callback
from pytrain.lightning import check_hooks

# The methods of `Callback`; a module's have the same arguments but for trainer and module.
HOOKS = tuple(name for name, found in vars(Callback).items() if callable(found) and not name.endswith("state_dict"))
CALLBACKS_ONLY = ("setup", "log_metrics")  # a module's setup is called with the data's
EPOCH_ENDS = ("on_train_epoch_end", "on_validation_epoch_end")  # a module's come before the epoch's metrics are written
Hook = Callable[..., Any]


class Hooks:
    """For each of HOOKS what there is to call: the callbacks' first, in their order, then the module's.

    At an epoch's end the module's comes first, by `call_own`, so that what it logs is among the epoch's metrics.

    Raises:
        ValueError: two callbacks have one state_key.
        TypeError: a callback has no hook at all, or it or the module one of Lightning's that pytrain has not.
    """

    def __init__(self, trainer: Any, module: Any, callbacks: Sequence[Any]) -> None:
        for owner in (module, *callbacks):
            check_hooks(owner)
        self._found: dict[str, tuple[Hook, ...]] = {}
        self._own: dict[str, Hook] = {}
        for name in HOOKS:
            found: list[Hook] = [
                partial(hook, trainer, module) for each in callbacks if (hook := _own(each, name)) is not None
            ]
            own = None if name in CALLBACKS_ONLY else _own(module, name)
            if own is not None and name in EPOCH_ENDS:
                self._own[name] = own
            elif own is not None:
                found.append(own)
            self._found[name] = tuple(found)
        for i, each in enumerate(callbacks):
            if isinstance(each, type) or not any(hasattr(each, name) for name in HOOKS):
                raise TypeError(
                    f"Trainer: callbacks[{i}] must be an object with a hook such as on_fit_start (see "
                    f"pytrain.callbacks.Callback), got {each!r}"
                )
        keys = [key_of(each) for each in callbacks]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise ValueError(f"Trainer: callbacks[{i}] and [{keys.index(key)}] have the same state_key, {key!r}")

    def __getitem__(self, name: str) -> tuple[Hook, ...]:
        return self._found[name]

    def call(self, name: str, *arguments: Any) -> None:
        """Call all of one name."""
        for hook in self._found[name]:
            hook(*arguments)

    def call_own(self, name: str) -> None:
        """Call the module's, of EPOCH_ENDS."""
        if name in self._own:
            self._own[name]()


def _own(owner: Any, name: str) -> Hook | None:
    """A hook, unless it is the empty one of Callback."""
    hook: Hook | None = getattr(owner, name, None)
    return None if hook is None or getattr(hook, "__func__", hook) is getattr(Callback, name) else hook


def key_of(callback: Any) -> str:
    """Under which name checkpoints keep a callback's state."""
    return str(getattr(callback, "state_key", type(callback).__name__))
