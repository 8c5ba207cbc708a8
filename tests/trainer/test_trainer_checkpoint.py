"""Checkpoint files: atomic, sealed, safe to read, and refused by name when they do not fit."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from trainer_cases import Classifier, Mean, assert_same_bits, batches, make_trainer

from pytrain.trainer import CheckpointError, Trainer, load_checkpoint
from pytrain.trainer.checkpoint import write_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The checkpoint of a short run."""
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.fit(Classifier(), batches(3))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    return tmp_path / "run.ckpt"


def resume(path: Path, module: Any = None, **settings: Any) -> Trainer:
    trainer = make_trainer(path.parent, **{"max_steps": 3, **settings})
    trainer.fit(Classifier() if module is None else module, batches(3), ckpt_path=path)
    return trainer


def test_a_file_cut_at_any_length_is_refused_as_damaged(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    lengths = [0, 1, 47, 48, 49, len(whole) // 2, len(whole) - 49, len(whole) - 48, len(whole) - 1]
    for length in lengths + random.Random(0).sample(range(len(whole)), 40):
        checkpoint.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"run\.ckpt is damaged.*use an earlier checkpoint"):
            load_checkpoint(checkpoint)


def test_a_file_with_any_bit_flipped_is_refused_as_damaged(checkpoint: Path) -> None:
    whole = checkpoint.read_bytes()
    places = [0, len(whole) // 2, *range(len(whole) - 48, len(whole))]
    for place in places + random.Random(1).sample(range(len(whole)), 60):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << (place % 8)
        checkpoint.write_bytes(flipped)
        with pytest.raises(CheckpointError, match=r"run\.ckpt is damaged.*use an earlier checkpoint"):
            load_checkpoint(checkpoint)


def test_a_damaged_file_changes_nothing_in_the_module(checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError):
        resume(checkpoint, module)
    assert_same_bits(dict(module.state_dict()), before)


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.ckpt", tmp_path):
        with pytest.raises(CheckpointError, match=f"{path.name} does not exist or is not a file"):
            load_checkpoint(path)


def test_a_file_that_pytrain_did_not_write_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.ckpt"
    torch.save({"module": {}, "padding": torch.zeros(100)}, path)
    with pytest.raises(CheckpointError, match="its end mark is missing"):
        load_checkpoint(path)


def test_the_file_is_also_a_plain_torch_archive(checkpoint: Path) -> None:
    assert_same_bits(torch.load(checkpoint, weights_only=True)["module"], load_checkpoint(checkpoint)["module"])


def test_reading_never_runs_code_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Exploit:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "owned"),)

    path = tmp_path / "evil.ckpt"
    with pytest.raises(CheckpointError, match=r"holds objects of \['posix.mkdir'\]"):
        write_checkpoint(path, {"format": 1, "module": Exploit()})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda file: [])
    write_checkpoint(path, {"format": 1, "module": Exploit()})
    with pytest.raises(CheckpointError, match="not safe to load"):
        load_checkpoint(path)
    assert not (tmp_path / "owned").exists()


def test_another_format_and_missing_top_level_keys_are_named(tmp_path: Path, checkpoint: Path) -> None:
    payload = load_checkpoint(checkpoint)
    write_checkpoint(tmp_path / "a.ckpt", {**payload, "format": 99})
    with pytest.raises(CheckpointError, match="format 99, this version of pytrain reads format 5"):
        load_checkpoint(tmp_path / "a.ckpt")
    payload["extra"] = payload.pop("rng")  # more keys than there are is what on_save_checkpoint may do
    write_checkpoint(tmp_path / "b.ckpt", payload)
    with pytest.raises(CheckpointError, match=r"missing keys \['rng'\]"):
        load_checkpoint(tmp_path / "b.ckpt")


class Renamed(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.body = self.net
        del self.net


class Wider(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.net[3] = torch.nn.Linear(8, 4)


class Frozen(Classifier):
    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.net[3].parameters())


class Scheduled(Classifier):
    def __init__(self) -> None:
        super().__init__(make_schedule=lambda opt: StepLR(opt, 1))


@pytest.mark.parametrize(
    ("module_type", "settings", "words"),
    [
        (Renamed, {}, r"missing keys \['body.0.bias', .*unexpected keys \['net.0.bias'"),
        (Wider, {}, r"'net.3.weight' has shape \(3, 8\), the module's is \(4, 8\)"),
        (Frozen, {}, r"groups of \[4\] parameters, this one has \[2\]"),
        (Scheduled, {}, "taken with no learning rate schedule, configure_optimizers returned one"),
        (Classifier, {"precision": "bf16-mixed"}, "taken with precision='32', the trainer has 'bf16-mixed'"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_changes(
    module_type: Any, settings: dict[str, Any], words: str, checkpoint: Path
) -> None:
    module = module_type()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(CheckpointError, match=words):
        resume(checkpoint, module, **settings)
    assert_same_bits(dict(module.state_dict()), before)


def test_a_loader_shorter_than_the_position_is_refused(checkpoint: Path) -> None:
    trainer = make_trainer(checkpoint.parent, max_steps=3)
    with pytest.raises(ValueError, match="taken after batch 2 of its epoch, but train_dataloaders gives only 1"):
        trainer.fit(Classifier(), batches(1), ckpt_path=checkpoint)


def test_saving_replaces_the_old_file_or_leaves_it_whole(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = checkpoint.read_bytes()
    payload = load_checkpoint(checkpoint)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full_disk)
            with pytest.raises(OSError, match="No space left"):
                write_checkpoint(checkpoint, payload)
        assert checkpoint.read_bytes() == before
        assert not list(checkpoint.parent.glob(".*.tmp"))


def test_saving_syncs_the_file_before_the_rename_and_the_folder_after(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(handle: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    def spy_replace(source: Any, target: Any) -> None:
        assert Path(source).parent == Path(target).parent
        calls.append("rename")
        replace(source, target)

    payload = load_checkpoint(checkpoint)
    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    write_checkpoint(checkpoint, payload)
    assert calls == ["file", "rename", "folder"]


def test_saving_before_fit_or_inside_a_step_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1)
    with pytest.raises(RuntimeError, match="nothing to save before fit"):
        trainer.save_checkpoint(tmp_path / "x.ckpt")

    class Impatient(Mean):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            trainer.save_checkpoint(tmp_path / "x.ckpt")

    with pytest.raises(RuntimeError, match="only be taken between optimizer steps"):
        trainer.fit(Impatient(), [torch.ones(1)])
    assert not (tmp_path / "x.ckpt").exists()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def test_automatic_checkpoints_come_every_epoch_every_n_steps_and_at_the_end(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"enable_checkpointing": True, "checkpoint_every_n_steps": 2, "keep_checkpoints": None}
    make_trainer(tmp_path, max_steps=8, **settings).fit(Mean(), [torch.ones(1)] * 3)
    assert names(tmp_path) == [f"step-{step:08d}.ckpt" for step in (2, 3, 4, 6, 8)]


def test_only_the_newest_of_this_runs_checkpoints_stay_and_foreign_ones_are_not_touched(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    foreign = tmp_path / "checkpoints" / "step-00000001.ckpt.bak", tmp_path / "checkpoints" / "step-99999999.ckpt"
    for path in foreign:
        path.write_bytes(b"foreign")
    make_trainer(tmp_path, max_epochs=5, enable_checkpointing=True).fit(Mean(), [torch.ones(1)])
    assert names(tmp_path) == ["step-00000001.ckpt.bak", "step-00000004.ckpt", "step-00000005.ckpt", foreign[1].name]


def test_last_resumes_from_the_newest_and_starts_fresh_where_there_is_none(tmp_path: Path) -> None:
    data = [torch.ones(1)] * 2
    for max_epochs in (2, 5):
        trainer = make_trainer(tmp_path, max_epochs=max_epochs, enable_checkpointing=True)
        module = Mean()
        trainer.fit(module, data, ckpt_path="last")
        assert (trainer.global_step, module.w.item()) == (2 * max_epochs, -2.0 * max_epochs)
    assert names(tmp_path) == [f"step-{step:08d}.ckpt" for step in (8, 10)]  # it is one run, and keeps two


def test_a_finished_run_resumed_does_nothing(checkpoint: Path) -> None:
    module = Classifier()
    trainer = resume(checkpoint, module, max_steps=2)
    assert trainer.global_step == 2 and module.seen == []
    assert_same_bits(dict(module.state_dict()), dict(load_checkpoint(checkpoint)["module"]))
