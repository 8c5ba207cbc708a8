"""Counts on a device, which the host learns late: the same run as on the CPU, exact limits, and few questions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from trainer_cases import Classifier, Validated, assert_same_bits, batches, make_trainer, read_metrics

from pytrain.optim import AdamW
from pytrain.trainer import Trainer
from pytrain.trainer import trainer as trainer_module

BAD = (1, 4, 5)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every run one whose device counts; notes after how many steps the host has asked."""
    questions: list[int] = []
    settle = Trainer._settle

    def watched(self: Trainer, run: Any) -> bool:
        questions.append(len(self._pending))
        return settle(self, run)

    monkeypatch.setattr(Trainer, "_settle", watched)
    monkeypatch.setattr("pytrain.trainer.run.is_remote", lambda device: True)
    return questions


def module(frequency: int = 1, bad: tuple[int, ...] = BAD) -> Classifier:
    def schedule(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step", "frequency": frequency}

    return Validated(lambda params: AdamW(params, lr=0.01), make_schedule=schedule, overflow_at=bad)


def fit(folder: Path, frequency: int = 1, **settings: Any) -> tuple[Any, ...]:
    own = module(frequency)
    trainer = make_trainer(folder, precision="fp16-mixed", **{"seed": 1, **settings})
    trainer.fit(own, batches(8), batches(1))
    saved = (
        sorted(path.name for path in (folder / "checkpoints").glob("*")) if (folder / "checkpoints").exists() else []
    )
    counts = trainer.global_step, trainer.skipped_steps, trainer.current_epoch, trainer.batch_idx
    return dict(own.state_dict()), counts, saved, read_metrics(folder)


CASES: list[dict[str, Any]] = [
    {"max_epochs": 2},
    {"max_epochs": 2, "log_every_n_steps": 3},
    {"max_steps": 6, "log_every_n_steps": 100},
    {"max_steps": 7, "log_every_n_steps": 4, "accumulate_grad_batches": 2},
    {"max_epochs": 2, "log_every_n_steps": 100, "frequency": 3},
    {"max_steps": 9, "log_every_n_steps": 100, "enable_checkpointing": True, "checkpoint_every_n_steps": 2,
     "keep_checkpoints": None},
    {"max_epochs": 2, "log_every_n_steps": 5, "val_check_interval": 3},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_device_that_counts_ends_where_the_host_does(case: dict[str, Any], asked: list[int], tmp_path: Path) -> None:
    remote = fit(tmp_path / "remote", **case)
    assert asked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pytrain.trainer.run.is_remote", lambda device: False)
        plain = fit(tmp_path / "plain", **case)
    assert remote[1:3] == plain[1:3] and remote[1][1] > 0
    assert remote[3] == plain[3]
    assert_same_bits(remote[0], plain[0])


def test_the_host_asks_only_where_something_hangs_on_the_count(asked: list[int], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1, log_every_n_steps=10)
    trainer.fit(module(bad=()), batches(25))
    assert trainer.global_step == 25 and asked == [10, 10, 5]
    asked.clear()
    trainer = make_trainer(tmp_path, max_steps=7, log_every_n_steps=10, precision="fp16-mixed")
    trainer.fit(module(bad=(2, 3, 6)), batches(25))
    assert (trainer.global_step, trainer.skipped_steps, trainer.batch_idx) == (7, 3, 10)
    assert asked == [7, 3]  # seven were hoped for, and four were applied


def test_what_is_pending_stays_little(asked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_module, "MOST_PENDING", 4)
    trainer = make_trainer(tmp_path, max_epochs=1, log_every_n_steps=100)
    trainer.fit(module(bad=()), batches(10))
    assert trainer.global_step == 10 and asked == [4, 4, 2]


def test_an_endless_row_of_skips_is_found_on_a_device_too(asked: list[int], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1000, log_every_n_steps=100)
    with pytest.raises(FloatingPointError, match="64 steps in a row met an inf or nan.*first bad gradient: AdamW"):
        trainer.fit(module(bad=tuple(range(1000))), batches(200))


def test_a_gan_counts_the_same_on_a_device(asked: list[int], tmp_path: Path) -> None:
    from test_trainer_manual import Gan, data

    ends = []
    for remote in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("pytrain.trainer.run.is_remote", lambda device, remote=remote: remote)
            gan = Gan(bad_d=(1, 3), bad_g=(2, 3), no_g=(4,))
            trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed", log_every_n_steps=100)
            trainer.fit(gan, data(6))
            ends.append((trainer.global_step, trainer.skipped_steps, dict(gan.state_dict())))
    assert ends[0][:2] == (5, 1) and asked == [6]
    assert_same_bits(ends[0], ends[1])


PROGRAM = """
import sys
sys.path[:0] = [{tests!r}, {here!r}]
import devices
devices.choose()
import torch
from pathlib import Path
import test_trainer_counts as cases
from pytrain import backend
from pytrain.trainer import Trainer

remote = backend.is_remote(torch.device("cpu"))
ends = [cases.fit(Path({folder!r}) / str(i), **case) for i, case in enumerate(cases.CASES)]
print(remote, [(counts, saved, rows) for _, counts, saved, rows in ends])
"""


@pytest.mark.slow
def test_the_simulated_device_counts_as_the_host(tmp_path: Path) -> None:
    """The CUDA kernels' own source on the CPU, where it is built (tests/simt/build.py)."""
    tests = Path(__file__).parents[1]
    outs = []
    for name in ("simt", "native"):
        env = {**os.environ, "PYTRAIN_BACKEND": name, "PYTRAIN_SIMT_REMOTE": "1"}
        folder = str(tmp_path / name)
        program = PROGRAM.format(tests=str(tests), here=str(tests / "trainer"), folder=folder)
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
        if name == "simt" and done.returncode:
            assert "simt" in done.stderr, done.stderr
            pytest.skip("the simulated device is not built")
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout.split(" ", 1))
    assert [out[0] for out in outs] == ["True", "False"]
    assert outs[0][1] == outs[1][1]
