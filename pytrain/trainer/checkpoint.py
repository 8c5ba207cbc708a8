"""Checkpoint files: written atomically, sealed with a checksum, read without running code, checked before loading.

Layout: a plain torch.save archive, then a seal of 48 bytes: b"PTRNCKPT", the archive's length (8 bytes, little
endian), its SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

from pytrain.trainer.optimizers import OptimizerSetup

FORMAT = 2
KEYS = frozenset(
    {
        "format", "precision", "module", "optimizer", "scheduler", "scaler", "ema", "epoch", "global_step", "batch_idx",
        "skipped_steps", "skipped_in_a_row", "metrics_lines", "rng", "epoch_rng",
    }
)  # fmt: skip
NAMES = {"scaler": "a loss scaler", "ema": "weight averages"}
_MAGIC = b"PTRNCKPT"
_SEAL_BYTES = len(_MAGIC) + 8 + 32
_CHUNK = 1 << 20


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not fit what it is loaded into."""


class _HashingFile(io.RawIOBase):
    """A write-only file that hashes and counts what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.length += len(data)
        return self._file.write(data)

    def seal(self) -> bytes:
        return _MAGIC + self.length.to_bytes(8, "little") + self.digest.digest()


def write_checkpoint(path: str | os.PathLike[str], payload: Mapping[str, Any]) -> None:
    """Write `payload` to `path` so that the path holds the old file or the new one, never a part.

    Raises:
        CheckpointError: the payload holds an object that cannot be read back without running code.
        OSError: the file cannot be written; what stood at `path` is untouched.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w+b") as file:
            archive = _HashingFile(file)
            torch.save(dict(payload), cast("IO[bytes]", archive))
            file.flush()
            file.seek(0)
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(file)
            if unsafe:
                raise CheckpointError(
                    f"cannot save {path}: the state holds objects of {sorted(unsafe)}, which could not be loaded back "
                    "safely; keep only tensors, numbers, strings and containers of them in module, optimizer and "
                    "scheduler state"
                )
            file.seek(0, os.SEEK_END)
            file.write(archive.seal())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut (POSIX; elsewhere the system offers no such call)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint to the CPU: verified by its checksum, then loaded with `weights_only=True`.

    Args:
        path: a file that `Trainer` wrote. `load_checkpoint(path)["module"]` is the module's state_dict.

    Raises:
        CheckpointError: the file is missing, damaged, no pytrain checkpoint or of another format.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file")
    with open(path, "rb") as file:
        _verify_seal(file, path)
        file.seek(0)
        try:
            payload = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {path} holds objects that are not safe to load: {error}") from error
    found = payload.get("format") if isinstance(payload, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {found!r}, this version of pytrain reads format {FORMAT}")
    _check_keys(f"checkpoint {path}", KEYS, payload)
    return dict(payload)


def _verify_seal(file: BinaryIO, path: Path) -> None:
    advice = "use an earlier checkpoint, or start again from the beginning"
    length = max(0, file.seek(0, os.SEEK_END) - _SEAL_BYTES)
    file.seek(length)
    seal = file.read()
    if len(seal) != _SEAL_BYTES or not seal.startswith(_MAGIC):
        raise CheckpointError(
            f"checkpoint {path} is damaged: its end mark is missing, so it was cut short (or pytrain did not write "
            f"it); {advice}"
        )
    expected_length = int.from_bytes(seal[len(_MAGIC) : len(_MAGIC) + 8], "little")
    if expected_length != length:
        raise CheckpointError(
            f"checkpoint {path} is damaged: it holds {length} bytes, {expected_length} were written; {advice}"
        )
    file.seek(0)
    digest = hashlib.sha256()
    while length > 0:
        chunk = file.read(min(_CHUNK, length))
        digest.update(chunk)
        length -= len(chunk)
    if digest.digest() != seal[-32:]:
        raise CheckpointError(f"checkpoint {path} is damaged: its content does not match its checksum; {advice}")


def check_fits(
    path: str | os.PathLike[str],
    payload: Mapping[str, Any],
    *,
    module: torch.nn.Module,
    setup: OptimizerSetup,
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
    saved_groups = [len(group["params"]) for group in payload["optimizer"]["param_groups"]]
    own_groups = [len(group["params"]) for group in setup.optimizer.param_groups]
    if saved_groups != own_groups:
        raise CheckpointError(
            f"{name}: the optimizer was saved with parameter groups of {saved_groups} parameters, "
            f"this one has {own_groups}"
        )
    for key, own in (("scaler", scaler), ("ema", ema)):
        if (payload[key] is None) != (own is None):
            word = "without" if payload[key] is None else "with"
            raise CheckpointError(f"{name} was taken {word} {NAMES[key]}, this run is not")
    if (payload["scheduler"] is None) != (setup.scheduler is None):
        saved_word, own_word = ("a", "none") if payload["scheduler"] is not None else ("no", "one")
        raise CheckpointError(
            f"{name} was taken with {saved_word} learning rate schedule, configure_optimizers returned {own_word}"
        )


def _check_keys(what: str, expected: Any, found: Mapping[str, Any]) -> None:
    missing = sorted(set(expected) - found.keys())
    unexpected = sorted(found.keys() - set(expected))
    if missing or unexpected:
        raise CheckpointError(f"{what} does not fit: missing keys {missing}, unexpected keys {unexpected}")


class CheckpointFolder:
    """The automatic checkpoints of one run: step-<n>.ckpt, of which the newest `keep` stay (None: all).

    Only files that this run wrote, or resumed from, are ever removed.
    """

    def __init__(self, folder: Path, keep: int | None) -> None:
        self._folder = folder
        self._keep = keep
        self._own: list[Path] = []

    def newest(self) -> Path | None:
        """Return the last written checkpoint in the folder, or None."""
        return max(self._folder.glob("step-*.ckpt"), key=lambda path: path.stat().st_mtime_ns, default=None)

    def adopt(self, path: Path) -> None:
        """Count `path`, where it lies in this folder, as the newest of this run; remove the oldest beyond `keep`."""
        if path.parent.resolve() != self._folder.resolve():
            return
        self._own = [own for own in self._own if own != path] + [path]
        while self._keep is not None and len(self._own) > self._keep:
            self._own.pop(0).unlink(missing_ok=True)

    def save(self, step: int, payload: Mapping[str, Any]) -> None:
        """Write the checkpoint of an applied step, then remove the oldest ones."""
        path = self._folder / f"step-{step:08d}.ckpt"
        write_checkpoint(path, payload)
        self.adopt(path)
