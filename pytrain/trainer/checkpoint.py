"""The trainer's checkpoints: sealed files (see `pytrain.sealed`), what stands in them, checked before loading."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pytrain.sealed import CheckpointError, CheckpointFolder, read_checkpoint, write_checkpoint
from pytrain.trainer.optimizers import OptimizerSetup

FORMAT = 5
KEYS = frozenset(
    {
        "format", "precision", "module", "optimizers", "schedulers", "scaler", "ema", "epoch", "global_step",
        "batch_idx", "skipped_steps", "skipped_in_a_row", "metrics_lines", "callback_metrics", "callbacks",
        "hyper_parameters", "hiddens", "loader", "rng", "epoch_rng", "data_seed", "validated_at", "logged",
        "epoch_ended", "checkpoints",
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
            f"{name} was taken with {len(payload['optimizers'])} optimizers, configure_optimizers gave {len(setups)}"
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
