"""Checkpoints: saved on one number of ranks under one strategy, loaded on another under another, and damaged ones."""

from __future__ import annotations

import os
import pickle
from pathlib import Path, PosixPath
from typing import Any

import checkpoint_jobs as jobs
import pytest
import torch
from jobs import KINDS, NAMES
from pool import Pool
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from pytrain.folders import ALLOWED
from pytrain.sealed import CheckpointError, digest_of, read_checkpoint, read_pickle, write_checkpoint

STRATEGIES = ["DDP", "Zero1", "Zero2"]
ADAMW: tuple[str, dict[str, Any], torch.dtype] = ("AdamW", {}, torch.float32)


def same(found: list[dict[str, torch.Tensor]], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for one in found for name, value in one.items())


@pytest.mark.parametrize("portable", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_four_ranks_saved_any_number_goes_on_with(
    pool: Pool, tmp_path: Path, strategy: str, portable: bool
) -> None:
    path = str(tmp_path / "run")
    (expected, *_) = found = pool.run(4, jobs.begun, strategy, *ADAMW, path, portable)
    assert same(found, expected) and sorted(os.listdir(tmp_path)) == ["run"]
    for size in (1, 2, 3, 4):
        for other in STRATEGIES:
            assert same(pool.run(size, jobs.resumed, other, *ADAMW, path), expected)


@pytest.mark.parametrize("portable", [False, True], ids=["folder", "file"])
@pytest.mark.parametrize(("name", "options", "dtype"), KINDS, ids=NAMES)
def test_every_storage_format_is_kept_to_the_bit(
    pool: Pool, tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype, portable: bool
) -> None:
    for size, strategy, others in ((3, "Zero1", [(1, "DDP"), (2, "Zero2")]), (2, "DDP", [(3, "Zero1")])):
        path = str(tmp_path / strategy)
        (expected, *_) = pool.run(size, jobs.begun, strategy, name, options, dtype, path, portable)
        for count, other in others:
            assert same(pool.run(count, jobs.resumed, other, name, options, dtype, path), expected)


@pytest.mark.parametrize("name", ["Adafactor", "Muon", "LAMB", "torch.AdamW", "torch.NAdam"])
def test_what_only_ddp_takes(pool: Pool, tmp_path: Path, name: str) -> None:
    path = str(tmp_path / "run")
    (expected, *_) = pool.run(2, jobs.begun, "DDP", name, {}, torch.float32, path)
    assert same(pool.run(3, jobs.resumed, "DDP", name, {}, torch.float32, path), expected)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_element_is_written_once_and_by_its_owner(pool: Pool, tmp_path: Path, strategy: str) -> None:
    path = tmp_path / "run"
    pool.run(4, jobs.begun, strategy, *ADAMW, str(path))
    metadata = read_pickle((path / ".metadata").read_bytes(), ALLOWED)
    for saved in metadata.state_dict_metadata.values():
        assert sum(chunk.sizes.numel() for chunk in saved.chunks) == saved.size.numel()
    files: dict[str, set[str]] = {}
    for index, info in metadata.storage_data.items():
        files.setdefault(index.fqn, set()).add(info.relative_path)
    assert len(set().union(*files.values())) == 4
    assert len(files["elements.exp_avg.wide.2.weight"]) == (1 if strategy == "DDP" else 4)  # a bucket of its own
    assert files["module.norm.running_mean"] == {"__0_0.distcp"}


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that two ranks wrote."""
    path = tmp_path_factory.mktemp("saved") / "run"
    pool.run(2, jobs.begun, "Zero1", *ADAMW, str(path))
    return path


def copied(saved: Path, tmp_path: Path) -> Path:
    path = tmp_path / "copy"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("name", ["__0_0.distcp", "__1_0.distcp", ".metadata", "plain.ckpt"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "empty"])
def test_damage_is_named_on_all_ranks_and_nothing_is_loaded(
    pool: Pool, saved: Path, tmp_path: Path, name: str, damage: str
) -> None:
    path = copied(saved, tmp_path)
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 16
    if damage == "missing":
        (path / name).unlink()
    else:
        (path / name).write_bytes({"cut": data[:-1], "flipped": data, "empty": b""}[damage])
    texts = pool.run(3, jobs.refused, "Zero2", str(path))
    assert all(name in text for text in texts) and len({text.rpartition("rank ")[2][3:] for text in texts}) <= 2
    assert all(("does not exist" if damage == "missing" else "damaged") in text or "No such" in text for text in texts)


class Exploit:
    """Runs a program where it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploited",)


@pytest.mark.parametrize("what", ["posix.mkdir", "torch.distributed.checkpoint.metadata.os.mkdir"])
def test_metadata_that_could_run_code_is_refused(pool: Pool, saved: Path, tmp_path: Path, what: str) -> None:
    path = copied(saved, tmp_path)
    evil = pickle.dumps(Exploit())
    if "metadata" in what:  # by an attribute of a module that is allowed
        evil = b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93\x8c\x09exploited\x85R."
    (path / ".metadata").write_bytes(evil)
    plain = read_checkpoint(path / "plain.ckpt")
    with open(path / ".metadata", "rb") as file:
        plain["files"][".metadata"] = digest_of(file, len(evil))
    write_checkpoint(path / "plain.ckpt", plain)
    for text in pool.run(2, jobs.refused, "DDP", str(path)):
        assert f"it names {what}, which could run code" in text
    with pytest.raises(CheckpointError):
        read_pickle(evil, ())
    assert torch.float32 is read_pickle(pickle.dumps(torch.float32), ())


class Got:
    """Pickled as what `getattr` gives: so do Python 3.11.0 to 3.11.3 with members of enums."""

    def __init__(self, owner: object, name: str) -> None:
        self.words = (owner, name)

    def __reduce__(self) -> Any:
        return getattr, self.words


def test_metadata_written_by_any_python_is_read_and_getattr_reaches_nothing_else() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read_pickle(pickle.dumps(Got(_MEM_FORMAT_ENCODING, member.name)), ALLOWED) is member
    for owner, name in ((_MEM_FORMAT_ENCODING, "__class__"), (PosixPath, "home"), (torch.Size, "__new__")):
        with pytest.raises(CheckpointError, match=f"it names {name!r} of .*, which could run code"):
            read_pickle(pickle.dumps(Got(owner, name)), ALLOWED)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("shape", "is of another model: last.bias is (3,) there, (4,) here"),
        ("more", "is of another model: more.bias is nothing there, (2,) here"),
        ("fewer", "is of another model: norm.bias is (3,) there, nothing here"),
        ("strides", "wide.2.weight was saved with strides (1, 66), the model has (70, 1)"),
        ("groups", "has no param group of just the parameters of number 0"),
    ],
)
def test_what_does_not_fit_is_named(pool: Pool, saved: Path, strategy: str, change: str, message: str) -> None:
    for text in pool.run(2, jobs.refused, strategy, str(saved), change):
        assert text.startswith(f"checkpoint {saved}") and message in text


def test_a_file_does_not_hang_on_strides(pool: Pool, tmp_path: Path) -> None:
    pool.run(2, jobs.begun, "Zero1", *ADAMW, str(tmp_path / "run"), True)
    assert pool.run(2, jobs.refused, "DDP", str(tmp_path / "run"), "strides") == ["no error"] * 2


@pytest.mark.parametrize("portable", [False, True], ids=["folder", "file"])
def test_codes_do_not_go_to_shards_that_cut_their_blocks(pool: Pool, tmp_path: Path, portable: bool) -> None:
    path = str(tmp_path / "run")
    pool.run(1, jobs.begun, "DDP", "AdamW", {"state_dtype": "8bit"}, torch.float32, path, portable)
    for text in pool.run(3, jobs.refused, "Zero1", path):
        assert "the state has 8-bit codes, and the optimizer was made without state_dtype='8bit'" in text
    assert pool.run(3, jobs.refused, "Zero1", path, "", {"state_dtype": "8bit"}) == ["no error"] * 3


def test_what_cannot_be_saved_is_named_and_leaves_nothing_at_the_path(pool: Pool, tmp_path: Path) -> None:
    for what, message in (("state", "state 'note' of"), ("extra", "holds objects of ['pathlib")):
        path = tmp_path / what
        for text in pool.run(2, jobs.unsaved, "Zero1", str(path), what):
            assert message in text and not path.exists()
        (tmp_path / f".{what}.tmp").mkdir(exist_ok=True)  # what a killed run leaves is in nobody's way
        assert pool.run(2, jobs.unsaved, "Zero1", str(path), "") == ["no error"] * 2
        for text in pool.run(2, jobs.unsaved, "Zero1", str(path), ""):
            assert text == f"cannot save {path}: it exists already; give each checkpoint a name of its own"


def test_a_missing_checkpoint_is_named(pool: Pool, tmp_path: Path) -> None:
    for text in pool.run(2, jobs.refused, "DDP", str(tmp_path / "nothing")):
        assert text == f"checkpoint {tmp_path / 'nothing'} does not exist or is not a file"
