"""A resumed run is, bit for bit, the run that was never interrupted."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader
from trainer_cases import (
    OPTIMIZERS,
    Classifier,
    NoisyData,
    Validated,
    assert_same_bits,
    batches,
    make_trainer,
    noisy_loader,
    read_metrics,
)

from pytrain.trainer import load_checkpoint

SETTINGS: dict[str, Any] = {
    "max_epochs": 3,
    "enable_checkpointing": True,
    "checkpoint_every_n_steps": 1,
    "keep_checkpoints": None,
    "seed": 1,
}


def disturb() -> None:
    """Leave the global generators as a new process might have them."""
    torch.manual_seed(999)
    random.seed(999)
    np.random.seed(999)


def check_resume(
    tmp_path: Path, make_module: Any, make_loader: Any, steps: list[int], val_loader: Any = None, **settings: Any
) -> None:
    """Train once without a break, then again from the checkpoints of `steps`; compare all that can be compared."""
    whole = tmp_path / "whole"
    module = make_module()
    disturb()
    make_trainer(whole, **{**SETTINGS, **settings}).fit(module, make_loader(), val_loader)
    final = max((whole / "checkpoints").iterdir(), key=lambda path: path.name)
    for step in steps:
        resumed = tmp_path / f"resumed-{step}"
        again = make_module()
        disturb()
        trainer = make_trainer(resumed, **{**SETTINGS, **settings})
        trainer.fit(again, make_loader(), val_loader, ckpt_path=whole / "checkpoints" / f"step-{step:08d}.ckpt")
        for name, value in module.state_dict().items():
            assert torch.equal(value, again.state_dict()[name]), (step, name)
        saved, expected = load_checkpoint(resumed / "checkpoints" / final.name), load_checkpoint(final)
        assert saved.pop("metrics_lines") == len(read_metrics(resumed)) < expected.pop("metrics_lines")
        assert_same_bits(saved, expected)
        rows = read_metrics(resumed)
        assert rows == read_metrics(whole)[-len(rows) :]


def one_cycle(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"scheduler": OneCycleLR(optimizer, max_lr=0.1, total_steps=40), "interval": "step"}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_resume_is_bitwise_with_shuffling_dropout_noise_and_a_schedule(kind: str, tmp_path: Path) -> None:
    """Steps 1 to 5 lie inside the first epoch, 6 is its end (saved after it), 9 is inside the second."""
    check_resume(
        tmp_path,
        lambda: Validated(OPTIMIZERS[kind], make_schedule=one_cycle),
        noisy_loader,
        [1, 5, 6, 9, 17],
        batches(2),
    )


def test_resume_is_bitwise_with_worker_processes(tmp_path: Path) -> None:
    check_resume(tmp_path, Validated, lambda: noisy_loader(2), [3, 6, 8], noisy_loader(2), max_epochs=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_is_bitwise_with_a_loader_that_owns_its_generator(num_workers: int, tmp_path: Path) -> None:
    check_resume(
        tmp_path,
        Classifier,
        lambda: noisy_loader(num_workers, torch.Generator().manual_seed(42)),
        [2, 6, 9],
        max_epochs=2,
    )


def test_resume_is_bitwise_with_a_sampler_that_draws_as_it_goes(tmp_path: Path) -> None:
    def make_loader() -> DataLoader[Any]:
        data = NoisyData()
        sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=40)
        return DataLoader(data, batch_size=4, sampler=sampler)

    check_resume(tmp_path, Classifier, make_loader, [4, 10, 13], max_epochs=2)


def test_resume_is_bitwise_with_accumulation_and_clipping(tmp_path: Path) -> None:
    """Windows of 4 and 2 batches."""
    check_resume(
        tmp_path, Validated, noisy_loader, [1, 2, 3], batches(2), accumulate_grad_batches=4, gradient_clip_val=0.1
    )


@pytest.mark.parametrize("kind", ["torch-adamw-fused", "pytrain-adamw"])
def test_resume_is_bitwise_with_a_moving_loss_scale_and_skipped_steps(kind: str, tmp_path: Path) -> None:
    check_resume(
        tmp_path,
        lambda: Validated(OPTIMIZERS[kind], make_schedule=lambda opt: StepLR(opt, 1, gamma=0.5), overflow_at=(2,)),
        noisy_loader,
        [2, 3, 5, 6],
        batches(2),
        precision="fp16-mixed",
        gradient_clip_val=0.5,
        ema_decay=0.8,
        max_epochs=2,
    )


def test_a_run_stopped_by_max_steps_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    modules = []
    for limits in ([13], [3, 6, 8, 13]):
        folder = tmp_path / f"{len(limits)}"
        for max_steps in limits:
            module = Validated(make_schedule=lambda opt: StepLR(opt, 1, gamma=0.5))
            settings = {**SETTINGS, "max_epochs": None, "max_steps": max_steps, "checkpoint_every_n_steps": None}
            trainer = make_trainer(folder, **settings)
            trainer.fit(module, noisy_loader(), batches(2), ckpt_path="last")
        modules.append(module)
    assert_same_bits(dict(modules[0].state_dict()), dict(modules[1].state_dict()))


def test_metrics_written_after_the_checkpoint_are_not_doubled(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    class Stops(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(self.seen) == stop_at:
                raise Stopped
            return super().training_step(batch, batch_idx)

    settings = {**SETTINGS, "checkpoint_every_n_steps": 4}
    stop_at = 10**9
    make_trainer(tmp_path / "whole", **settings).fit(Stops(), noisy_loader(), batches(2))
    stop_at = 11  # steps 9 to 11 are written, and lost: the last checkpoint is step 8
    folder = tmp_path / "broken"
    with pytest.raises(Stopped):
        make_trainer(folder, **settings).fit(Stops(), noisy_loader(), batches(2))
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 12, "epo')  # the half line of a killed process
    stop_at = 10**9
    make_trainer(folder, **settings).fit(Stops(), noisy_loader(), batches(2), ckpt_path="last")
    assert read_metrics(folder) == read_metrics(tmp_path / "whole")


FP16 = {"precision": "fp16-mixed", "gradient_clip_val": 0.5, "ema_decay": 0.8}
KILLED_RUN = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from trainer_cases import Validated, batches, make_trainer, noisy_loader

saves = 0
torch_save, fsync, replace = torch.save, os.fsync, os.replace

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def save(payload, file):
    global saves
    saves += 1
    if saves == 4 and {stage!r} == "write":
        file.write(b"half a checkpoint")
        file._file.flush()
        die()
    torch_save(payload, file)

def sync(handle):
    if saves == 4 and {stage!r} == "fsync":
        die()
    fsync(handle)

def rename(source, target):
    if saves == 4 and {stage!r} == "rename":
        die()
    replace(source, target)

torch.save, os.fsync, os.replace = save, sync, rename
settings = dict(max_epochs=2, enable_checkpointing=True, checkpoint_every_n_steps=2, seed=1, **{settings!r})
make_trainer(Path({folder!r}), **settings).fit(Validated(overflow_at=(2,)), noisy_loader(), batches(2))
"""


@pytest.mark.parametrize("stage", ["write", "fsync", "rename"])
def test_a_process_killed_while_it_saves_resumes_bitwise(stage: str, tmp_path: Path) -> None:
    """The fourth save, at step 6, dies; the third, at step 6 of the epoch's end or step 4, must be whole."""
    folder = tmp_path / "killed"
    code = KILLED_RUN.format(tests=str(Path(__file__).parent), stage=stage, folder=str(folder), settings=FP16)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert (folder / "checkpoints" / ".step-00000006.ckpt.tmp").exists()
    settings: dict[str, Any] = {**SETTINGS, "max_epochs": 2, "checkpoint_every_n_steps": 2, "keep_checkpoints": 2}
    modules = []
    for run_folder in (tmp_path / "whole", folder):
        module = Validated(overflow_at=(2,))
        disturb()
        make_trainer(run_folder, **settings, **FP16).fit(module, noisy_loader(), batches(2), ckpt_path="last")
        modules.append(module)
    assert_same_bits(dict(modules[0].state_dict()), dict(modules[1].state_dict()))
    assert read_metrics(folder) == read_metrics(tmp_path / "whole")
    assert len(modules[1].seen) < len(modules[0].seen)
    assert not list((folder / "checkpoints").glob(".*.tmp"))
