"""Callback: the hooks do nothing, what overrides one is seen, and nothing heavy is loaded before it is used."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import callback_cases
import pytest
from callback_cases import Net, SmallTrainer, rows

import pytrain
from pytrain import callbacks
from pytrain.callbacks import Callback, ModelCheckpoint, Profiler
from pytrain.callbacks.base import StepCount
from pytrain.callbacks.hooks import HOOKS, Hooks
from pytrain.trainer import Module

READY = [getattr(callbacks, name) for name in callbacks.__all__ if name != "Callback"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_does_nothing_unless_overridden(hook: str) -> None:
    parameters = list(inspect.signature(getattr(Callback, hook)).parameters)
    assert parameters[:3] == ["self", "trainer", "module"]
    assert getattr(Callback(), hook)(*([None] * (len(parameters) - 1))) is None
    own: Any = type("Own", (Callback,), {hook: lambda *arguments: None})
    trainer, module = object(), Module()
    found = Hooks(trainer, module, [Callback(), own()])
    assert {name: len(found[name]) for name in HOOKS} == {name: int(name == hook) for name in HOOKS}


@pytest.mark.parametrize("kind", READY)
def test_hooks_that_are_overridden_keep_their_arguments(kind: type[Callback]) -> None:
    own = [name for name in HOOKS if name in vars(kind)]
    assert own
    for name in own:
        ours, theirs = inspect.signature(getattr(kind, name)), inspect.signature(getattr(Callback, name))
        assert list(ours.parameters) == list(theirs.parameters)


class Counting:
    """A trainer that notes how often it is asked for the applied steps."""

    def __init__(self) -> None:
        self.steps, self.asked = 0, 0

    @property
    def global_step(self) -> int:
        self.asked += 1
        return self.steps


@pytest.mark.parametrize(("skipped", "asked"), [((), 2), ((3,), 3), ((1, 2, 9, 10), 3)])
def test_a_device_is_asked_for_its_count_only_when_a_step_may_be_reached(skipped: tuple[int, ...], asked: int) -> None:
    trainer, count, reached = Counting(), StepCount(), []
    count.start(trainer)
    for tried in range(1, 11):
        trainer.steps += tried not in skipped
        count.tick()
        if len(reached) < 1 and count.reached(trainer, 6):
            reached.append(trainer.steps)
    assert reached == [6] and trainer.asked == asked


@pytest.mark.parametrize(
    ("callback", "at"),
    [
        (ModelCheckpoint(every_n_train_steps=40), {0, 40, 80}),
        (Profiler(10, 12), {0, 9, 12}),
        (Profiler(200, 201), {0}),
    ],
)
def test_callbacks_seldom_ask_a_device(tmp_path: Path, callback: Callback, at: set[int]) -> None:
    class Asked(SmallTrainer):
        asked: set[int] = set()

        @property
        def global_step(self) -> int:
            if sys._getframe(1).f_code.co_filename != callback_cases.__file__:
                self.asked.add(self.steps)
            return self.steps

        @global_step.setter
        def global_step(self, steps: int) -> None:
            self.steps = steps

    trainer = Asked(tmp_path, [callback], epochs=1, loader=rows(100))
    trainer.fit(Net())
    assert trainer.steps == 100 and trainer.asked == at


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
