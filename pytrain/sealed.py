"""Sealed files: written atomically, with a checksum at their end, read without running code.

Layout: a plain torch.save archive, then a seal of 48 bytes: b"PTRNCKPT", the archive's length (8 bytes, little
endian), its SHA-256.
"""

from __future__ import annotations

import copy
import hashlib
import io
import os
import pickle
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import EnumMeta
from pathlib import Path
from threading import Thread
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

_MAGIC = b"PTRNCKPT"
_SEAL_BYTES = len(_MAGIC) + 8 + 32
_CHUNK = 1 << 20
NAME = re.compile(r"step-\d{8,}\.ckpt")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged, or does not fit what it is loaded into."""


class _HashingFile(io.RawIOBase):
    """A write-only file that hashes and counts what passes through."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file
        self.digest = hashlib.sha256()
        self.length = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.length += len(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

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
            try:
                torch.save(dict(payload), cast("IO[bytes]", archive))
            except RuntimeError:
                if archive.error is None:
                    raise
                raise archive.error from None  # torch's says nothing of a full disk
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
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # a full disk does not say what it was to hold
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut (POSIX; elsewhere the system offers no such call)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Read what `write_checkpoint` wrote, to the CPU: verified by its checksum, then loaded with `weights_only=True`.

    Raises:
        CheckpointError: the file is missing, damaged, or holds objects that only code could read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist or is not a file")
    with open(path, "rb") as file:
        _verify_seal(file, path)
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise CheckpointError(f"checkpoint {path} holds objects that are not safe to load: {error}") from error


def verify_seal(path: Path) -> None:
    """Read a file once, and raise CheckpointError where it is damaged."""
    with open(path, "rb") as file:
        _verify_seal(file, path)


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
    if digest_of(file, length) != seal[-32:]:
        raise CheckpointError(f"checkpoint {path} is damaged: its content does not match its checksum; {advice}")


def digest_of(file: BinaryIO, length: int) -> bytes:
    """The SHA-256 of the next `length` bytes of a file, or of what there is of them."""
    digest = hashlib.sha256()
    while length > 0 and (chunk := file.read(min(_CHUNK, length))):
        digest.update(chunk)
        length -= len(chunk)
    return digest.digest()


class _Unpickler(pickle.Unpickler):
    """Makes objects of the allowed classes only."""

    allowed: Collection[tuple[str, str]] = ()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in self.allowed or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(f"it names {module}.{name}, which could run code")


def _member(kind: Any, name: str) -> Any:
    """A member of an enum, which Python 3.11.0 to 3.11.3 have pickled as what `getattr` gives; no other attribute."""
    if isinstance(kind, EnumMeta) and name in kind.__members__:
        return kind[name]
    raise CheckpointError(f"it names {name!r} of {kind!r}, which could run code")


def read_pickle(data: bytes, allowed: Collection[tuple[str, str]]) -> Any:
    """Unpickle, and run nothing but what (module, name) pairs allow, and torch's dtypes.

    Raises:
        CheckpointError: the data names anything else.
    """
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.allowed = allowed
    return unpickler.load()


class CheckpointFolder:
    """The automatic checkpoints of one run: step-<n>.ckpt, of which the newest `keep` stay (None: all).

    Only files that this run wrote, before or after it was resumed, are ever removed.

    Args:
        folder: where they are.
        keep: how many stay.
        background: write in a thread, of a copy in the CPU's memory; at most one is under way.
    """

    def __init__(self, folder: Path, keep: int | None, *, background: bool = False) -> None:
        self._folder, self._keep, self._background = folder, keep, background
        self._own: list[Path] = []
        self._writing: Thread | None = None
        self._error: BaseException | None = None

    def newest(self, others: Sequence[Path] = ()) -> Path | None:
        """Return the last written checkpoint that is whole, in this folder and others; None: there is none at all.

        Says so where it had to pass over a damaged one, and removes what a kill has left half written.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        folders = {folder.resolve() for folder in (self._folder, *others)}
        found = [path for folder in folders for path in folder.glob("*.ckpt") if path.is_file()]
        damaged: list[str] = []
        chosen = None
        for path in sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
            try:
                verify_seal(path)
            except CheckpointError as error:
                damaged.append(str(error))
            else:
                chosen = path
                break
        if chosen is None and damaged:
            raise CheckpointError(
                "ckpt_path='last': there are checkpoints, but none is whole; move them away to start anew, or name one "
                "that lies elsewhere:\n  " + "\n  ".join(damaged)
            )
        for line in [*damaged, f"going on from {chosen}, the newest that is whole"] if damaged else ():
            print(f"pytrain: {line}", file=sys.stderr, flush=True)
        remove(path for folder in folders for path in folder.glob(".*.ckpt.tmp"))
        return chosen

    @property
    def names(self) -> list[str]:
        """Of the files that this run has, or has just removed, the newest last; none where all stay."""
        return [path.name for path in self._own]

    def adopt(self, path: Path, names: Sequence[str]) -> None:
        """Go on from `path`, where the run had files of these names, if they are in this run's folders."""
        home = self._folder.resolve()
        if not path.resolve().is_relative_to(home.parent):
            return
        self._own = [self._folder / name for name in names]
        if path.parent.resolve() == home and NAME.fullmatch(path.name):  # else a ModelCheckpoint looks after it
            remove(self._count(self._folder / path.name))

    def save(self, step: int, payload: Mapping[str, Any]) -> Path:
        """Write the checkpoint of an applied step, then remove the oldest ones. Return its path.

        Raises:
            CheckpointError: as `write_checkpoint`; or the one before could not be written in the background.
            OSError: this one cannot be written.
        """
        path = self._folder / f"step-{step:08d}.ckpt"
        self.wait()
        if not self._background:
            write_checkpoint(path, payload)
            remove(self._count(path))
            return path
        work = path, copied(payload), self._count(path)
        self._writing = Thread(target=self._write, args=work, name="pytrain-checkpoint")
        self._writing.start()
        return path

    def wait(self) -> None:
        """Return when all is written.

        Raises:
            CheckpointError: it could not be.
        """
        if self._writing is not None:
            self._writing.join()
        error, self._writing, self._error = self._error, None, None
        if error is not None:
            raise CheckpointError(f"an automatic checkpoint could not be written in the background: {error}") from error

    def _count(self, path: Path) -> list[Path]:
        """Count `path` as the newest; return those that are to go for it.

        One more than `keep` is remembered: it may be there yet while the newest is being written.
        """
        if self._keep is None:
            return []
        own = [own for own in self._own if own != path] + [path]
        self._own = own[-self._keep - 1 :]
        return own[: -self._keep]

    def _write(self, path: Path, payload: Mapping[str, Any], surplus: Sequence[Path]) -> None:
        try:
            write_checkpoint(path, payload)
            remove(surplus)
        except BaseException as error:  # noqa: BLE001  whatever it is, the thread that waits has to see it
            self._error = error


def remove(paths: Iterable[Path]) -> None:
    """Remove files, those that are there."""
    for path in paths:
        path.unlink(missing_ok=True)


def copied(value: Any, known: dict[Any, Tensor] | None = None) -> Any:
    """Return a copy of a tree of plain data and tensors, on the CPU: what is written while training goes on.

    A tensor that stands in it twice, such as a tied weight, is copied once.
    """
    known = {} if known is None else known
    if isinstance(value, Tensor):
        plain = value.layout == torch.strided and value.numel() > 0
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride()) if plain else id(value)
        if key not in known:
            known[key] = value.detach().to("cpu", copy=True)
        return known[key]
    if isinstance(value, dict):
        twin = copy.copy(value)  # of its own class, such as a Counter, and with its attributes
        for name, each in value.items():
            twin[name] = copied(each, known)
        return twin
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(copied(each, known) for each in value)
    return copy.copy(value) if isinstance(value, (set, bytearray)) else value
