"""Callback: the hooks do nothing, what overrides one is seen, and nothing heavy is loaded before it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

import pytrain
from pytrain import callbacks
from pytrain.callbacks import Callback
from pytrain.callbacks.base import overrides

HOOKS = [name for name in vars(Callback) if name.startswith("on_") or name in ("setup", "log_metrics")]
READY = [getattr(callbacks, name) for name in callbacks.__all__ if name != "Callback"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_does_nothing_unless_overridden(hook: str) -> None:
    parameters = list(inspect.signature(getattr(Callback, hook)).parameters)
    assert parameters[:3] == ["self", "trainer", "module"]
    assert getattr(Callback(), hook)(*([None] * (len(parameters) - 1))) is None
    assert not overrides(Callback(), hook)
    own: Any = type("Own", (Callback,), {hook: lambda *arguments: None})
    assert overrides(own(), hook) and not overrides(own(), next(name for name in HOOKS if name != hook))


@pytest.mark.parametrize("kind", READY)
def test_hooks_that_are_overridden_keep_their_arguments(kind: type[Callback]) -> None:
    own = [name for name in HOOKS if name in vars(kind)]
    assert own
    for name in own:
        ours, theirs = inspect.signature(getattr(kind, name)), inspect.signature(getattr(Callback, name))
        assert list(ours.parameters) == list(theirs.parameters)


def test_state_has_the_name_of_the_class_and_is_empty() -> None:
    own: Any = type("Own", (Callback,), {})
    assert own().state_key == "Own" and own().state_dict() == {}
    own().load_state_dict({})


def test_importing_callbacks_and_loggers_loads_nothing_heavy() -> None:
    program = (
        "import sys, pytrain\n"
        "assert not [name for name in sys.modules if name.startswith(('pytrain.callbacks', 'pytrain.loggers'))]\n"
        "pytrain.Callback, pytrain.callbacks.ModelCheckpoint, pytrain.loggers.CSVLogger\n"
        "heavy = ('pytrain.trainer', 'rich', 'tensorboard', 'torch.utils.tensorboard', 'wandb', 'mlflow')\n"
        "print(*[name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_the_package_offers_them() -> None:
    assert pytrain.Callback is Callback and pytrain.callbacks is callbacks
    assert {"Callback", "callbacks", "loggers"} <= set(pytrain.__all__)
