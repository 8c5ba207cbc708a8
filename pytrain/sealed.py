"""Sealed files: written atomically, with a checksum at their end, read without running code.

Layout: a plain torch.save archive, then a seal of 48 bytes: b"PTRNCKPT", the archive's length (8 bytes, little
endian), its SHA-256.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from enum import EnumMeta
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

import torch
from torch import Tensor

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
                read_checkpoint(path)
            except CheckpointError as error:
                print(f"pytrain: {error}; going on from the one before", file=sys.stderr, flush=True)
            else:
                return path
        return None

    def adopt(self, path: Path) -> None:
        """Count `path`, where it lies in this folder, as the newest of this run; remove the oldest beyond `keep`."""
        if path.parent.resolve() != self._folder.resolve() or not path.name.startswith("step-"):
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


def copied(value: Any) -> Any:
    """Return a copy of a tree of plain data and tensors, on the CPU: what is written while training goes on."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, copied(each)) for key, each in value.items())
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(copied(each) for each in value)
    return value
