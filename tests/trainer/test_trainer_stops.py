"""What ends a run early: SIGTERM and SIGUSR1, in any phase and on any rank, and max_time; and how it goes on."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

if sys.platform != "linux" or not torch.distributed.is_available():
    pytest.skip("signals and ranks are tested on Linux", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parents[1] / "parallel"))
import rank_cases as cases
from pool import Pool
from trainer_cases import Mean, Validated, assert_same_bits, make_trainer, noisy_loader, read_metrics

from pytrain.callbacks import ModelCheckpoint
from pytrain.trainer import load_checkpoint

STOPPED = 143
SAVING: dict[str, Any] = {"enable_checkpointing": True, "seed": 1, "max_epochs": 2, "log_every_n_steps": 4}
PHASES = ("setup", "start", "step", "last step", "validation", "epoch end")


@pytest.fixture(autouse=True)
def handlers_are_left_as_found() -> Iterator[None]:
    watched = signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(one) for one in watched]
    assert before == [signal.SIG_DFL, signal.SIG_DFL]
    yield
    assert [signal.getsignal(one) for one in watched] == before


class Stopped(Validated):
    """Sends its own process a signal in one phase of the first epoch; 6 batches an epoch."""

    def __init__(self, phase: str = "", number: int = signal.SIGTERM) -> None:
        super().__init__()
        self.phase, self.number = phase, number

    def come_by(self, phase: str) -> None:
        if phase == self.phase:
            self.phase = ""
            os.kill(os.getpid(), self.number)

    def configure_optimizers(self) -> Any:
        self.come_by("setup")
        return super().configure_optimizers()

    def on_fit_start(self) -> None:
        self.come_by("start")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.come_by({2: "step", 5: "last step"}.get(batch_idx, "another"))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.come_by("validation")
        return super().validation_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.come_by("epoch end")


def fit(folder: Path, module: Any, **settings: Any) -> Any:
    trainer = make_trainer(folder, **{**SAVING, **settings})
    trainer.fit(module, noisy_loader(), noisy_loader(), ckpt_path="last")
    return trainer


def end_of(trainer: Any, folder: Path) -> Any:
    trainer.save_checkpoint(folder / "end.ckpt")
    state = load_checkpoint(folder / "end.ckpt")
    state["callback_metrics"].pop("seconds", None)
    del state["checkpoints"]  # the one that the stop has written is among them
    return state, read_metrics(folder)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_in_any_phase_ends_the_run_with_a_checkpoint_to_go_on_from(
    phase: str, number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        fit(tmp_path, Stopped(phase, number))
    assert left.value.code == STOPPED
    step = {"setup": 0, "start": 0, "step": 3}.get(phase, 6)
    assert f"stopped by a signal at step {step}; ckpt_path='last' goes on from there" in capsys.readouterr().err
    files = sorted(path.name for path in tmp_path.glob("checkpoints/*"))
    assert files == ([f"step-{step:08d}.ckpt"] if step else [])
    resumed = fit(tmp_path, Stopped())
    whole = fit(tmp_path / "whole", Stopped())
    (state, lines), (expected, expected_lines) = end_of(resumed, tmp_path), end_of(whole, tmp_path / "whole")
    assert lines == expected_lines
    assert_same_bits(state, expected)


def test_a_handler_of_ones_own_is_left_alone(tmp_path: Path) -> None:
    got: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:
        trainer = fit(tmp_path, Stopped("step", signal.SIGTERM))
        assert got == [signal.SIGTERM] and trainer.global_step == 12
        with pytest.raises(SystemExit):  # the other one still stops
            fit(tmp_path / "other", Stopped("step", signal.SIGUSR1))
        signal.raise_signal(signal.SIGTERM)
        assert len(got) == 2
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_a_handler_that_is_set_during_the_run_stays(tmp_path: Path) -> None:
    got: list[int] = []

    class Sets(Stopped):
        def on_fit_start(self) -> None:
            signal.signal(signal.SIGUSR1, lambda number, frame: got.append(number))

    try:
        fit(tmp_path, Sets("step", signal.SIGUSR1))
        signal.raise_signal(signal.SIGUSR1)
        assert len(got) == 2
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)


def test_signals_are_not_watched_without_checkpoints_nor_outside_the_main_thread(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Looks(Mean):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(signal.getsignal(signal.SIGTERM))
            return super().training_step(batch, batch_idx)

    def train(saves: bool) -> None:
        make_trainer(tmp_path / str(saves), max_steps=1, enable_checkpointing=saves).fit(Looks(), [torch.ones(1)])

    train(False)
    thread = threading.Thread(target=train, args=(True,))
    thread.start()
    thread.join()
    train(True)
    assert seen[:2] == [signal.SIG_DFL] * 2 and seen[2] is not signal.SIG_DFL


def test_a_signal_when_all_is_done_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []

    class Late(Mean):
        def on_fit_end(self) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr(signal, "raise_signal", raised.append)
    make_trainer(tmp_path, max_steps=1, enable_checkpointing=True).fit(Late(), [torch.ones(1)])
    assert raised == [signal.SIGUSR1]


def test_after_max_time_the_run_ends_with_a_checkpoint_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    class Waits(Validated):
        """The fourth step of the first run is not done before the time is over."""

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            while waits and self.global_step == 3 and not self.trainer.should_stop:
                over.wait(0.01)
            return super().training_step(batch, batch_idx)

    over, waits = threading.Event(), True
    trainer = fit(tmp_path, Waits(), max_epochs=None, max_time=0.3)
    waits, step = False, trainer.global_step
    assert 1 <= step <= 4 and (tmp_path / "checkpoints" / f"step-{step:08d}.ckpt").exists()
    resumed, whole = (fit(folder, Waits()) for folder in (tmp_path, tmp_path / "whole"))
    state, expected = end_of(resumed, tmp_path)[0], end_of(whole, tmp_path / "whole")[0]
    for each in (state, expected):
        del each["metrics_lines"]  # the end of a run is a line, with whatever max_time
    assert_same_bits(state, expected)


def test_time_that_is_over_before_the_first_step_is_over(tmp_path: Path) -> None:
    class Slow(Mean):
        def train_dataloader(self) -> Any:
            while not self.trainer.should_stop:
                threading.Event().wait(0.01)
            return [torch.ones(1)]

    trainer = make_trainer(tmp_path, max_time=0.05, enable_checkpointing=True)
    trainer.fit(Slow())
    assert trainer.global_step == 0


@pytest.mark.parametrize("file", ["ended.ckpt", "step-00000006.ckpt"])
def test_what_was_done_at_an_epochs_end_is_not_done_again_and_nothing_is_left_out(file: str, tmp_path: Path) -> None:
    """From inside the epoch's end, and from the last step, which no line was due for."""

    class Ends(Stopped):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("ended", torch.zeros(()))

        def on_train_epoch_end(self) -> None:
            self.ended += 1

    def train(folder: Path, ckpt_path: Path | None) -> Any:
        saves = ModelCheckpoint(
            tmp_path / folder.name / "best", filename="ended", save_top_k=-1, save_on_train_epoch_end=True
        )
        settings = {**SAVING, "checkpoint_every_n_steps": 1, "keep_checkpoints": None, "callbacks": saves}
        module, trainer = Ends(), make_trainer(folder, **settings)
        if ckpt_path is not None:
            folder.mkdir()
            shutil.copy(tmp_path / "whole" / "metrics.jsonl", folder)
        trainer.fit(module, noisy_loader(), noisy_loader(), ckpt_path=ckpt_path)
        return module, read_metrics(folder)

    whole, lines = train(tmp_path / "whole", None)
    path = next((tmp_path / "whole").rglob(file))
    resumed, resumed_lines = train(tmp_path / "resumed", path)
    assert resumed_lines == lines and [row["step"] for row in lines if "lr" in row] == [4, 6, 8, 12]
    assert whole.ended == 2
    assert_same_bits(dict(resumed.state_dict()), dict(whole.state_dict()))


# ---- on two ranks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    ranks = Pool(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2"])
@pytest.mark.parametrize("phase", PHASES[1:])
def test_a_signal_on_one_rank_stops_both_at_the_same_step(two: Pool, phase: str, strategy: str, tmp_path: Path) -> None:
    settings = {**SAVING, "strategy": strategy}
    found = two.run(2, cases.stopped, tmp_path, settings, phase)
    assert found[0][:2] == found[1][:2] == (STOPPED, {"start": 0, "step": 2}.get(phase, 3))
    assert [writes for *_, writes in found] == [int(phase != "start"), 0]
    resumed = two.run(2, cases.stopped, tmp_path, settings, "")
    whole = two.run(2, cases.stopped, tmp_path / "whole", settings, "")
    assert_same_bits(resumed[0][0], whole[0][0])
    assert resumed[0][1] == whole[0][1] == 6 and read_metrics(tmp_path) == read_metrics(tmp_path / "whole")
