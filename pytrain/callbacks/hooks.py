"""Hooks: the methods of a module and of callbacks that the trainer calls at fixed points; empty ones are not called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pytrain.callbacks.base import Callback
from pytrain.lightning import check_hooks

# The methods of `Callback`; a module's have the same arguments but for trainer and module.
HOOKS = tuple(name for name, found in vars(Callback).items() if callable(found) and not name.endswith("state_dict"))
Hook = Callable[..., Any]


class Hooks:
    """For each of HOOKS what there is to call: the callbacks' first, in their order, then the module's.

    Raises:
        ValueError: two callbacks have one state_key.
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


def _own(owner: Any, name: str) -> Hook | None:
    """A hook, unless it is the empty one of Callback or Module."""
    hook: Hook | None = getattr(owner, name, None)
    return None if hook is None or getattr(hook, "__func__", hook) is getattr(Callback, name) else hook


def key_of(callback: Any) -> str:
    """Under which name checkpoints keep a callback's state."""
    return str(getattr(callback, "state_key", type(callback).__name__))
