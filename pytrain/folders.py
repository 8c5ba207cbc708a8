"""Checkpoint folders of torch.distributed.checkpoint: parts of named tensors, written aside, sealed, read safely.

A folder holds the files of torch.distributed.checkpoint, and `plain.ckpt`, a sealed file of what is no tensor and of
the SHA-256 of every other file: torch.load passes over most flipped bits. All ranks see the same file system.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pytrain.sealed import CheckpointError, digest_of, read_checkpoint, read_pickle, sync_folder, write_checkpoint

PLAIN, METADATA = "plain.ckpt", ".metadata"
_DCP = "torch.distributed.checkpoint."
_CLASSES = "Metadata TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING ChunkStorageMetadata MetadataIndex"
ALLOWED = frozenset(
    {(_DCP + "metadata", name) for name in [*_CLASSES.split(), "StorageMeta"]}
    | {(_DCP + "filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout")}
    | {(module, f"{kind}Path") for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")}
)  # what `.metadata`, which is a pickle, may name
T = TypeVar("T")


@dataclass
class Chunk:
    """A part of a saved tensor, where it begins, and the whole's shape."""

    part: Tensor
    begin: Sequence[int]
    size: Sequence[int]

    def box(self) -> ChunkStorageMetadata:
        """Where it lies."""
        return ChunkStorageMetadata(torch.Size(self.begin), self.part.shape)


class _Save(DefaultSavePlanner):
    """Writes chunks; one that several ranks hold is written by one of them."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, chunk in self.state_dict.items():
            data = TensorWriteData(chunk.box(), TensorProperties(dtype=chunk.part.dtype), torch.Size(chunk.size))
            items.append(WriteItem(MetadataIndex(name, chunk.begin), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].part


class _Load(DefaultLoadPlanner):
    """Fills chunks with what they cover of what was saved, however that was cut."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items, saved = [], cast("dict[str, TensorStorageMetadata]", self.metadata.state_dict_metadata)
        for name, chunk in self.state_dict.items():
            items += create_read_items_for_chunk_list(name, saved[name], [chunk.box()])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].part


class _Reader(FileSystemReader):
    """Takes metadata that was read and checked before."""

    checked: Metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.checked


def together(group: ProcessGroup | None, run: Callable[[], T]) -> T:
    """What `run` returns, if it fails on no rank of the group; else every rank raises CheckpointError."""
    failed: BaseException | None = None
    try:
        result = run()
    except (CheckpointError, OSError, ValueError) as error:
        failed = error
    except CheckpointException as error:  # of torch.distributed.checkpoint; all ranks have it
        failed = next(iter(error.failures.values()))[0]
    errors: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(errors, failed and (str(failed) or repr(failed)), group=group)
    for rank, text in enumerate(errors):
        if text is not None:
            raise CheckpointError(text if text == str(failed) else f"rank {rank}: {text}") from failed
    return result


def write_folder(
    path: Path, chunks: Mapping[str, Chunk], plain: Mapping[str, Any], group: ProcessGroup | None = None
) -> None:
    """Write each rank's chunks, which together are whole tensors, and the plain data of rank 0, to a new folder.

    It is written beside `path` and then renamed: there is all of it, or nothing.

    Raises:
        CheckpointError: on all ranks: there is something at `path`, or it cannot be written.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    aside = path.with_name(f".{path.name}.tmp")

    def begin() -> None:
        if path.exists():
            raise CheckpointError(f"cannot save {path}: it exists already; give each checkpoint a name of its own")
        if rank == 0:
            shutil.rmtree(aside, ignore_errors=True)  # of a save that was cut short
            aside.mkdir(parents=True)

    def write() -> dict[str, bytes]:
        planner = _Save(flatten_state_dict=False, flatten_sharded_tensors=False)
        writer = FileSystemWriter(aside)
        state_dict_saver.save(dict(chunks), storage_writer=writer, planner=planner, process_group=group)
        return _digests(aside, sorted(os.listdir(aside))[rank::size])

    def end() -> None:
        if rank == 0:
            write_checkpoint(aside / PLAIN, {**plain, "files": {k: v for each in digests for k, v in each.items()}})
            aside.rename(path)
            sync_folder(path.parent)

    together(group, begin)
    digests: list[Any] = [None] * size
    dist.all_gather_object(digests, together(group, write), group=group)
    together(group, end)


def open_folder(path: Path, rank: int, size: int) -> tuple[dict[str, Any], Metadata]:
    """A folder's plain data and metadata. This rank of `size` checks its share of the files.

    Raises:
        CheckpointError: something is missing, is not what was written, or could run code.
        OSError: a file cannot be read.
    """
    plain = read_checkpoint(path / PLAIN)
    files = dict(plain.get("files", {}))
    for name, digest in _digests(path, [METADATA, *sorted(files)[rank::size]]).items():
        if digest != files.get(name) or os.path.basename(name) != name:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is not what was written")
    metadata = read_pickle((path / METADATA).read_bytes(), ALLOWED)
    outside = {info.relative_path for info in metadata.storage_data.values()} - set(files)
    if outside:
        raise CheckpointError(f"checkpoint {path} is damaged: it names {sorted(outside)}, which is none of its files")
    return plain, metadata


def read_chunks(path: Path, metadata: Metadata, chunks: Mapping[str, Chunk], group: ProcessGroup | None) -> None:
    """Fill chunks from an opened folder; all ranks must call this, each with its own.

    Raises:
        CheckpointError: on all ranks: something cannot be read.
    """
    reader = _Reader(path)
    reader.checked = metadata
    load = state_dict_loader.load
    together(group, lambda: load(dict(chunks), storage_reader=reader, planner=_Load(), process_group=group))


def _digests(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        with open(folder / name, "rb") as file:
            found[name] = digest_of(file, os.fstat(file.fileno()).st_size)
    return found
