"""Runs a training under the recorder: a file in a process of its own, or a callable in this one."""

from __future__ import annotations

import ast
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from pytrain.parity.record import Recorder, step_file
from pytrain.rng import preserved_rng, seed_all
from pytrain.sealed import read_checkpoint

Training: TypeAlias = "str | os.PathLike[str] | Callable[[], object]"


class ParityError(RuntimeError):
    """A training could not be run or recorded, so that there is nothing to compare."""


@dataclass(frozen=True)
class Recording:
    """What one training did.

    Args:
        label: what messages call it.
        folder: where the records of its steps are.
        steps: how many there are.
    """

    label: str
    folder: Path
    steps: int

    def step(self, number: int) -> dict[str, Any]:
        """The record of a step, from 1; see `Recorder`."""
        record: dict[str, Any] = read_checkpoint(step_file(self.folder, number))
        return record


def record(training: Training, folder: Path, *, label: str, steps: int, seed: int) -> Recording:
    """Run a training until it has made `steps` applied optimizer steps, and record them.

    Args:
        training: a file, with its arguments as on a command line, or a callable; see `pytrain.testing`.
        folder: an empty folder for the records.
        label: what messages call it.
        steps: >= 1.
        seed: of torch, python and numpy when it starts.

    Raises:
        ParityError: the file does not exist, it failed, or it made no optimizer step.
    """
    if callable(training):
        recorder = Recorder(folder, steps)
        with preserved_rng(torch.device("cuda" if torch.cuda.is_available() else "cpu"), ()):
            seed_all(seed)
            with recorder.recording():
                _finish(training(), steps)
    else:
        _run_file(command_of(training), folder, steps=steps, seed=seed)
    made = sum(1 for _ in folder.glob("step-*.ckpt"))
    if made == 0:
        raise ParityError(
            f"{label}: no optimizer step was made; expected a training loop with a torch.optim.Optimizer, or a "
            "function make() that returns (module, batches)"
        )
    return Recording(label, folder, made)


def command_of(training: str | os.PathLike[str]) -> list[str]:
    """The file of a training and its arguments.

    Raises:
        ParityError: there is no such file.
    """
    text = os.fspath(training)
    command = [text] if Path(text).exists() else shlex.split(text)
    if not command or not Path(command[0]).is_file():
        raise ParityError(f"{text}: expected a Python file, and its arguments if it takes any; there is no such file")
    return command


def _run_file(command: list[str], folder: Path, *, steps: int, seed: int) -> None:
    program = [sys.executable, "-m", "pytrain.parity.run", str(folder), str(steps), str(seed), *command]
    # The same order of sets in both; pytrain as it is here, whatever the file's own folder holds; and what a file says
    # stays before its error.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    fixed = {"PYTHONHASHSEED": "0", "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment = {**os.environ, **fixed}
    done = subprocess.run(
        program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        tail = "\n".join(f"  {line}" for line in done.stdout.splitlines()[-20:])
        raise ParityError(f"{command[0]}: ended with exit status {done.returncode}; its last lines:\n{tail}")


def _finish(made: object, steps: int) -> None:
    """Train what a training has returned, if that is a module and batches; a loop has made its steps itself."""
    from pytrain import Module, Trainer

    if not (isinstance(made, tuple) and made and isinstance(made[0], Module)):
        return
    if len(made) not in (2, 3):
        raise TypeError(f"make: expected (module, batches) or (module, batches, trainer), got {len(made)} values")
    module, batches = made[:2]
    with tempfile.TemporaryDirectory(prefix="pytrain-parity-") as folder:
        trainer = made[2] if len(made) == 3 else None
        if trainer is None:
            trainer = Trainer(
                max_steps=steps, default_root_dir=folder, enable_progress_bar=False, enable_checkpointing=False
            )
        trainer.fit(module, batches)


def defines_make(path: Path) -> bool:
    """Whether a file has a function `make` of its own, without running it."""
    body = ast.parse(path.read_bytes(), str(path)).body
    return any(isinstance(statement, ast.FunctionDef) and statement.name == "make" for statement in body)


def _main(folder: str, steps: str, seed: str, file: str, *arguments: str) -> None:
    """The process of one file."""
    sys.argv = [file, *arguments]
    sys.path[0] = str(Path(file).resolve().parent)
    import numpy  # noqa: F401 - so that it is seeded, even if the file imports it later

    seed_all(int(seed))
    with Recorder(Path(folder), int(steps)).recording():
        if not defines_make(Path(file)):
            runpy.run_path(file, run_name="__main__")
            return
        spec = importlib.util.spec_from_file_location(Path(file).stem, file)
        assert spec is not None and spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _finish(module.make(), int(steps))


if __name__ == "__main__":
    _main(*sys.argv[1:])
