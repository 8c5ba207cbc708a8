"""Folders of checkpoints: which one `ckpt_path="last"` goes on from, what is removed, and writing in the background."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import weakref
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("signals and process starts are tested on Linux", allow_module_level=True)
from kill_cases import processes, save_and_end, write_to_a_full_disk
from torch.optim.lr_scheduler import MultiStepLR
from trainer_cases import Classifier, Mean, assert_same_bits, batches, make_trainer

from pytrain import sealed
from pytrain.callbacks import ModelCheckpoint
from pytrain.launch import Team
from pytrain.sealed import CheckpointFolder, copied, read_checkpoint, write_checkpoint
from pytrain.trainer import CheckpointError, Trainer, load_checkpoint

SAVING: dict[str, Any] = {"enable_checkpointing": True, "checkpoint_every_n_steps": 1, "seed": 1}


def fit(folder: Path, steps: int, *callbacks: Any, ckpt_path: Any = "last", **settings: Any) -> tuple[Trainer, Any]:
    module = Classifier(make_schedule=lambda optimizer: MultiStepLR(optimizer, [1, 2]))
    trainer = make_trainer(folder, **{**SAVING, "max_steps": steps, "callbacks": list(callbacks), **settings})
    trainer.fit(module, batches(3), ckpt_path=ckpt_path)
    return trainer, module


def step_file(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step-{step:08d}.ckpt"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def damage(path: Path, kind: str) -> None:
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    path.write_bytes({"cut": whole[:-100], "flipped": bytes(flipped), "empty": b"", "foreign": b"x" * 500}[kind])


# ---- which one is the last ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut", "flipped", "empty", "foreign"])
def test_where_the_newest_is_damaged_the_one_before_is_used_and_it_is_said(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fit(tmp_path / "whole", 6)[1]
    fit(tmp_path, 4)
    damage(step_file(tmp_path, 4), kind)
    trainer, module = fit(tmp_path, 6)
    said = capsys.readouterr().err
    assert "step-00000004.ckpt is damaged" in said
    assert f"going on from {step_file(tmp_path, 3)}, the newest that is whole" in said
    assert trainer.global_step == 6 and len(module.seen) == 3
    assert_same_bits(dict(module.state_dict()), dict(whole.state_dict()))


def test_where_all_are_damaged_the_error_lists_them_and_nothing_is_begun(tmp_path: Path) -> None:
    fit(tmp_path, 4)
    for step, kind in ((3, "cut"), (4, "flipped")):
        damage(step_file(tmp_path, step), kind)
    before = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"none is whole; move them away(?s:.)*00000004(?s:.)*00000003"):
        fit(tmp_path, 6)
    assert before == {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_half_written_file_is_no_checkpoint_and_is_removed(tmp_path: Path) -> None:
    fit(tmp_path, 3)
    other = tmp_path / "best"
    other.mkdir()
    for left in (tmp_path / "checkpoints" / ".step-00000004.ckpt.tmp", other / ".epoch=1.ckpt.tmp"):
        left.write_bytes(b"half")
    trainer, _ = fit(tmp_path, 4, ModelCheckpoint(other, save_top_k=0))
    assert trainer.global_step == 4 and names(other) == []
    assert names(tmp_path / "checkpoints") == ["step-00000003.ckpt", "step-00000004.ckpt"]


def test_a_half_written_file_alone_is_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".step-00000004.ckpt.tmp").write_bytes(b"half")
    assert len(fit(tmp_path, 2)[1].seen) == 2


class Exploit:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, 3)
    evil = tmp_path / "checkpoints" / "evil.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda file: [])
        write_checkpoint(evil, {"format": 5, "module": Exploit(tmp_path / "owned")})
    for path in ("last", evil):
        with pytest.raises(CheckpointError, match=r"evil\.ckpt holds objects that are not safe to load(?s:.)*mkdir"):
            fit(tmp_path, 4, ckpt_path=path)
    torch.save({"module": Exploit(tmp_path / "owned")}, evil)  # without a seal: it is passed over, unread
    assert fit(tmp_path, 4)[0].global_step == 4
    assert not (tmp_path / "owned").exists()


def test_the_newest_of_all_folders_is_the_last(tmp_path: Path) -> None:
    """At the epoch's end, step 3, a ModelCheckpoint saves elsewhere; step 4 is newer, 3 of its own older."""
    best = ModelCheckpoint(tmp_path / "best", filename="{step}")
    whole = fit(tmp_path / "whole", 5)[1]
    fit(tmp_path, 4, best)
    assert names(tmp_path / "best") == ["step=3.ckpt"]
    now = time.time_ns()
    for number, path in enumerate([step_file(tmp_path, 4), step_file(tmp_path, 3), tmp_path / "best" / "step=3.ckpt"]):
        os.utime(path, ns=(now, now + number))
    (tmp_path / "best" / "gone.ckpt").symlink_to("nothing")
    _, module = fit(tmp_path, 5, ModelCheckpoint(tmp_path / "best", filename="{step}"))
    assert len(module.seen) == 2  # 4 and 5: it went on from step=3.ckpt
    assert_same_bits(dict(module.state_dict()), dict(whole.state_dict()))


def test_checkpoints_of_the_same_time_are_told_apart_by_their_step(tmp_path: Path) -> None:
    fit(tmp_path, 4)
    for path in (tmp_path / "checkpoints").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    assert len(fit(tmp_path, 5)[1].seen) == 1


# ---- what is removed ------------------------------------------------------------------------------------------------


def test_a_file_that_a_model_checkpoint_keeps_is_never_removed_by_the_resumed_run(tmp_path: Path) -> None:
    fit(tmp_path, 3, ModelCheckpoint(filename="best"))
    best = tmp_path / "checkpoints" / "best.ckpt"
    before = best.read_bytes()
    fit(tmp_path, 5, ModelCheckpoint(filename="best"), ckpt_path=best, keep_checkpoints=1)
    assert best.read_bytes() == before
    assert names(tmp_path / "checkpoints") == ["best.ckpt", "step-00000005.ckpt"]


def test_a_run_that_is_resumed_often_keeps_as_many_files_as_it_is_told(tmp_path: Path) -> None:
    for steps in range(1, 6):
        fit(tmp_path, steps, keep_checkpoints=3)
        assert len(names(tmp_path / "checkpoints")) == min(steps, 3)
    assert names(tmp_path / "checkpoints") == [step_file(tmp_path, step).name for step in (3, 4, 5)]


def test_a_run_that_goes_on_from_another_folder_removes_nothing_of_the_same_name(tmp_path: Path) -> None:
    fit(tmp_path / "a", 4)
    fit(tmp_path / "b", 4)
    fit(tmp_path / "b", 6, ckpt_path=step_file(tmp_path / "a", 4))
    assert names(tmp_path / "b" / "checkpoints") == [step_file(tmp_path, step).name for step in (3, 4, 5, 6)]
    assert names(tmp_path / "a" / "checkpoints") == [step_file(tmp_path, step).name for step in (3, 4)]


def test_a_file_whose_removal_a_kill_has_cut_off_goes_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 3 is written and step 1 still there when another checkpoint is taken, and the process is killed."""
    first = CheckpointFolder(tmp_path / "checkpoints", 2)
    with monkeypatch.context() as patch:
        patch.setattr(sealed, "remove", lambda paths: None)
        for step in (1, 2, 3):
            first.save(step, {"x": 1})
    second = CheckpointFolder(tmp_path / "checkpoints", 2)
    second.adopt(tmp_path / "best" / "another.ckpt", first.names)
    second.save(4, {"x": 1})
    assert names(tmp_path / "checkpoints") == ["step-00000003.ckpt", "step-00000004.ckpt"]


# ---- in the background ----------------------------------------------------------------------------------------------


class Gate:
    """Holds the writing of checkpoints until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.real = threading.Event(), sealed.write_checkpoint
        self.threads: list[str] = []
        monkeypatch.setattr(sealed, "write_checkpoint", self.write)

    def write(self, path: Path, payload: Any) -> None:
        self.threads.append(threading.current_thread().name)
        assert self.open.wait(60)
        self.real(path, payload)


def test_what_is_written_is_the_state_of_the_moment_of_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps are done before the first byte of step 1 is written; the files are those of a run that waits."""
    gate = Gate(monkeypatch)
    settings = {"keep_checkpoints": None, "ema_decay": 0.5, "checkpoint_every_n_steps": 3}

    class Opens(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.global_step == 5:
                assert len(gate.threads) == 1 and not list(self.trainer.default_root_dir.glob("checkpoints/*.ckpt"))
                gate.open.set()
            return super().training_step(batch, batch_idx)

    module = Opens(make_schedule=lambda optimizer: MultiStepLR(optimizer, [1, 2]))
    trainer = make_trainer(tmp_path, **{**SAVING, **settings}, max_steps=6, async_checkpoints=True)
    trainer.fit(module, batches(9))
    fit_whole = make_trainer(tmp_path / "whole", **{**SAVING, **settings}, max_steps=6)
    fit_whole.fit(Classifier(make_schedule=module.make_schedule), batches(9))
    assert gate.threads[0] == "pytrain-checkpoint" and gate.threads[-1] == "MainThread"
    for step in (3, 6):
        found, expected = (load_checkpoint(step_file(folder, step)) for folder in (tmp_path, tmp_path / "whole"))
        for each in (found, expected):
            each["callback_metrics"].pop("seconds", None)
        assert_same_bits(found, expected)


def test_a_stopped_run_says_so_when_its_file_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real, there = Gate(monkeypatch), CheckpointFolder.wait, []

    def opens(folder: CheckpointFolder) -> None:
        gate.open.set()
        real(folder)

    class Stops(Mean):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                monkeypatch.setattr(
                    CheckpointFolder, "wait", lambda folder: None if not gate.threads else opens(folder)
                )
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(Team, "say", lambda team, text: there.append((text, step_file(tmp_path, 3).exists())))
    trainer = make_trainer(tmp_path, max_steps=9, enable_checkpointing=True, async_checkpoints=True)
    with pytest.raises(SystemExit):
        trainer.fit(Stops(), [torch.ones(1)] * 9)
    assert there == [("stopped by a signal at step 3; ckpt_path='last' goes on from there", True)]


def test_a_full_disk_in_the_background_ends_the_run_at_the_next_save_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    steps: list[int] = []

    class Notes(Mean):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            steps.append(batch_idx)
            return super().training_step(batch, batch_idx)

    monkeypatch.setattr(os, "fsync", full)
    message = r"could not be written in the background: \[Errno 28\] No space left on device: '.*{}"
    for every, expected in ((2, 4), (100, 5)):  # at the next save; at the end
        steps.clear()
        folder = tmp_path / str(every)
        settings = {**SAVING, "checkpoint_every_n_steps": every, "async_checkpoints": True}
        file = f"step-{2 if every == 2 else 5:08d}.ckpt"
        with pytest.raises(CheckpointError, match=message.format(file)):
            make_trainer(folder, **settings, max_steps=5).fit(Notes(), [torch.ones(1)] * 9)
        assert len(steps) == expected and names(folder / "checkpoints") == []


def test_a_disk_that_is_full_while_the_tensors_are_written_is_named(tmp_path: Path) -> None:
    process = processes.Process(target=write_to_a_full_disk, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and names(tmp_path) == ["error.txt"]
    path = tmp_path / "big.ckpt"
    assert (tmp_path / "error.txt").read_text() == f"OSError: [Errno 27] File too large: '{path}'"


def test_a_process_that_ends_waits_for_the_file(tmp_path: Path) -> None:
    process = processes.Process(target=save_and_end, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0 and read_checkpoint(tmp_path / "step-00000001.ckpt")["x"].numel() == 1000


def test_there_is_never_more_than_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Any]] = []
    real = sealed.copied

    def watched(value: Any, *known: Any) -> Any:
        found = real(value, *known)
        if isinstance(value, torch.Tensor):
            assert not [one for one in alive if one() is not None]
            alive[:] = [weakref.ref(found)]
        return found

    monkeypatch.setattr(sealed, "copied", watched)
    folder = CheckpointFolder(tmp_path, 2, background=True)
    for step in range(4):
        folder.save(step, {"x": torch.zeros(1000)})
    folder.wait()
    assert alive[0]() is None and names(tmp_path) == ["step-00000002.ckpt", "step-00000003.ckpt"]


def test_a_copy_is_of_the_same_kind_and_shares_nothing() -> None:
    weight = torch.arange(6.0).view(2, 3)
    state = OrderedDict(a=weight, tied=weight.detach(), t=weight.t(), empty=torch.zeros(0))
    state._metadata = {"version": 2}  # type: ignore[attr-defined]
    given = {"module": state, "milestones": Counter({5: 2, 7: 1}), "rows": [weight[0], (1, {"s": {3}})]}
    found = copied(given)
    assert found["module"]._metadata == {"version": 2} and type(found["milestones"]) is Counter
    expected = {"a": weight.clone(), "t": weight.t().clone(), "empty": torch.zeros(0), "tied": weight.clone()}
    weight.zero_()
    given["rows"][1][1]["s"].add(4)  # type: ignore[index]
    given["milestones"][5] = 9  # type: ignore[index]
    assert_same_bits(dict(found["module"]), {name: expected[name] for name in state})
    assert found["module"]["a"] is found["module"]["tied"] and found["milestones"] == {5: 2, 7: 1}
    assert found["rows"][1] == (1, {"s": {3}}) and found["rows"][0].tolist() == [0.0, 1.0, 2.0]
