"""The trainer's checkpoints: sealed files (see `pytrain.sealed`), what stands in them, checked before loading."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pytrain.sealed import CheckpointError, read_checkpoint, write_checkpoint
from pytrain.trainer.optimizers import OptimizerSetup

FORMAT = 4
KEYS = frozenset(
    {
        "format", "precision", "module", "optimizers", "schedulers", "scaler", "ema", "epoch", "global_step", "batch_idx",
        "skipped_steps", "skipped_in_a_row", "metrics_lines", "callback_metrics", "callbacks", "hyper_parameters",
        "hiddens", "loader", "rng", "epoch_rng", "data_seed",
    }
)  # fmt: skip
NAMES = {"scaler": "a loss scaler", "ema": "weight averages"}

__all__ = ["CheckpointError", "CheckpointFolder", "check_fits", "load_checkpoint", "write_checkpoint"]


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint to the CPU: verified by its checksum, then loaded with `weights_only=True`.

    Args:
        path: a file that `Trainer` wrote. `load_checkpoint(path)["module"]` is the module's state_dict.

    Raises:
        CheckpointError: the file is missing, damaged, no pytrain checkpoint or of another format.
    """
    payload = read_checkpoint(path)
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {found!r}, this version of pytrain reads format {FORMAT}")
    _check_keys(f"checkpoint {path}", KEYS, payload, more=True)  # more: what on_save_checkpoint has put into it
    return dict(payload)


def check_fits(
    path: str | os.PathLike[str],
    payload: Mapping[str, Any],
    *,
    module: torch.nn.Module,
    setups: Sequence[OptimizerSetup],
    precision: str,
    scaler: object,
    ema: object,
) -> None:
    """Check, before anything is changed, that a checkpoint fits a module, optimizer, schedule and precision.

    Raises:
        CheckpointError: it does not; the message names the keys, shapes or counts that differ.
    """
    name = f"checkpoint {path}"
    if payload["precision"] != precision:
        raise CheckpointError(
            f"{name} was taken with precision={payload['precision']!r}, the trainer has {precision!r}"
        )
    state = module.state_dict()
    _check_keys(f"{name}: module state", state.keys(), payload["module"])
    for key, saved in payload["module"].items():
        own = state[key]
        if isinstance(own, Tensor) and isinstance(saved, Tensor) and own.shape != saved.shape:
            raise CheckpointError(
                f"{name}: module state {key!r} has shape {tuple(saved.shape)}, the module's is {tuple(own.shape)}"
            )
    if len(payload["optimizers"]) != len(setups):
        raise CheckpointError(
            f"{name} was taken with {len(payload['optimizers'])} optimizers, configure_optimizers returned {len(setups)}"
        )
    for setup, optimizer, schedule in zip(setups, payload["optimizers"], payload["schedulers"], strict=True):
        saved_groups = [len(group["params"]) for group in optimizer["param_groups"]]
        own_groups = [len(group["params"]) for group in setup.optimizer.param_groups]
        if saved_groups != own_groups:
            raise CheckpointError(
                f"{name}: the optimizer was saved with parameter groups of {saved_groups} parameters, "
                f"this one has {own_groups}"
            )
        if (schedule is None) != (setup.scheduler is None):
            saved_word, own_word = ("a", "none") if schedule is not None else ("no", "one")
            raise CheckpointError(
                f"{name} was taken with {saved_word} learning rate schedule, configure_optimizers returned {own_word}"
            )
    for key, own in (("scaler", scaler), ("ema", ema)):
        if (payload[key] is None) != (own is None):
            word = "without" if payload[key] is None else "with"
            raise CheckpointError(f"{name} was taken {word} {NAMES[key]}, this run is not")


def _check_keys(what: str, expected: Any, found: Mapping[str, Any], *, more: bool = False) -> None:
    missing = sorted(set(expected) - found.keys())
    unexpected = [] if more else sorted(found.keys() - set(expected))
    if missing or unexpected:
        raise CheckpointError(f"{what} does not fit: missing keys {missing}, unexpected keys {unexpected}")


def copied(value: Any) -> Any:
    """Return a copy of a tree of plain data and tensors, on the CPU: what is written while training goes on."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(copied(each) for each in value)
    return value


class CheckpointFolder:
    """The automatic checkpoints of one run: step-<n>.ckpt, of which the newest `keep` stay (None: all).

    Only files that this run wrote, or resumed from, are ever removed.

    Args:
        folder: where they are.
        keep: how many stay.
        background: write in a thread, of a copy in the CPU's memory; at most one is under way.
    """

    def __init__(self, folder: Path, keep: int | None, *, background: bool = False) -> None:
        self._folder, self._keep, self._background = folder, keep, background
        self._own: list[Path] = []
        self._writing: Future[None] | None = None

    def newest(self, others: Sequence[Path] = ()) -> Path | None:
        """Return the last written checkpoint that is whole, in this folder and others; None: there is none.

        Says so where it had to pass over a damaged one.
        """
        found = {path for folder in (self._folder, *others) for path in folder.glob("*.ckpt")}
        for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
            try:
                load_checkpoint(path)
            except CheckpointError as error:
                print(f"pytrain: {error}; going on from the one before", file=sys.stderr, flush=True)
            else:
                return path
        return None

    def adopt(self, path: Path) -> None:
        """Count `path`, where it lies in this folder, as the newest of this run; remove the oldest beyond `keep`."""
        if path.parent.resolve() != self._folder.resolve():
            return
        self._own = [own for own in self._own if own != path] + [path]
        while self._keep is not None and len(self._own) > self._keep:
            self._own.pop(0).unlink(missing_ok=True)

    def save(self, step: int, payload: Mapping[str, Any]) -> Path:
        """Write the checkpoint of an applied step, then remove the oldest ones. Return its path."""
        path = self._folder / f"step-{step:08d}.ckpt"
        self.wait()
        if not self._background:
            self._write(path, payload)
            return path
        pool = ThreadPoolExecutor(1, thread_name_prefix="pytrain-checkpoint")
        self._writing = pool.submit(self._write, path, copied(payload))
        pool.shutdown(wait=False)
        return path

    def wait(self) -> None:
        """Return when all is written; raises what writing has raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, path: Path, payload: Mapping[str, Any]) -> None:
        write_checkpoint(path, payload)
        self.adopt(path)
