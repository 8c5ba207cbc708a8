"""Callbacks and loggers under pytrain.Trainer: all of them at once, over an interruption, bit for bit."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_cases import Net, names, rows
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import pytrain
from pytrain import Trainer
from pytrain.callbacks import (
    EMA,
    Callback,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    Profiler,
    RichProgressBar,
    StochasticWeightAveraging,
    Throughput,
)
from pytrain.loggers import CSVLogger

CLOCK = ("seconds", "device/samples_per_second", "device/flops_per_second")


class Validated(Net):
    """With a validation and a schedule."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        optimizer = pytrain.optim.AdamW(self.parameters(), lr=self.lr)
        return [optimizer], [{"scheduler": StepLR(optimizer, 5, 0.9), "interval": "step"}]


class Killed(Callback):
    """Raises KeyboardInterrupt after some applied steps."""

    def __init__(self, at: int | None) -> None:
        self.at = at

    def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
        if trainer.global_step == self.at:
            raise KeyboardInterrupt


def make(folder: Path, *, kill_at: int | None = None, epochs: int = 5, **settings: Any) -> Trainer:
    callbacks = [
        EMA(0.8, every=2),
        StochasticWeightAveraging(0.02, 2, 2),
        EarlyStopping("val_loss", patience=50),
        LearningRateMonitor(),
        Throughput(count_flops=True),
        Profiler(2, 3),
        RichProgressBar(),
        ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
        ModelCheckpoint(every_n_train_steps=3, filename="at-{step}", save_top_k=2),
        Killed(kill_at),
    ]
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    return Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=CSVLogger(folder / "logs"),
        default_root_dir=folder,
        **quiet | settings,
    )


def table(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with open(path, newline="") as file:
        return [{name: cell for name, cell in row.items() if name not in CLOCK} for row in csv.DictReader(file)]


def assert_same(ours: nn.Module, other: nn.Module) -> None:
    for name, value in other.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


@pytest.mark.parametrize("kill_at", [7, 13, *(pytest.param(at, marks=pytest.mark.slow) for at in (4, 8, 9, 16, 19))])
def test_an_interrupted_run_with_all_callbacks_ends_as_the_undisturbed_one(tmp_path: Path, kill_at: int) -> None:
    whole, cut, resumed = Validated(norm=True), Validated(norm=True), Validated(norm=True)
    first = make(tmp_path / "whole")
    first.fit(whole, rows(), rows(2))
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", kill_at=kill_at).fit(cut, rows(), rows(2))
    second = make(tmp_path / "cut")
    second.fit(resumed, rows(), rows(2), ckpt_path="last")
    assert_same(resumed, whole)
    with first.ema.swap(), second.ema.swap():  # type: ignore[union-attr]
        assert_same(resumed, whole)
    assert table(tmp_path / "cut") == table(tmp_path / "whole")
    assert names(tmp_path / "cut" / "checkpoints") == names(tmp_path / "whole" / "checkpoints")
    for ours, other in zip(second.callbacks[7:9], first.callbacks[7:9], strict=True):
        assert ours.state_dict() == other.state_dict()


def test_the_lines_of_a_run_have_what_the_callbacks_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path).fit(Validated(), rows(), rows(2))
    training = [row for row in table(tmp_path) if row["loss"]]
    assert [int(row["step"]) for row in training] == list(range(1, 21))
    assert [float(row["lr"]) for row in training] == [float(row["lr-AdamW"]) for row in training]
    assert float(training[-1]["lr"]) == 0.02
    assert (tmp_path / "traces" / "steps-2-3-rank0.json").is_file()
    shown = capsys.readouterr().out
    assert "epoch 5  step 20/20" in shown and "epoch 5  validation  val_loss " in shown


class Terminal(io.StringIO):
    """Text that counts as a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("enable_progress_bar", [True, False])
def test_the_bar_is_drawn_as_often_as_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enable_progress_bar: bool
) -> None:
    class Shown(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("acc", 0.25, prog_bar=True)
            return super().training_step(batch, batch_idx)

    drawn = []
    for seconds in (1e-9, 1e9):
        monkeypatch.setattr("sys.stdout", Terminal())
        trainer = Trainer(
            max_epochs=2, callbacks=RichProgressBar(seconds), logger=False, default_root_dir=tmp_path,
            enable_progress_bar=enable_progress_bar, enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(Shown(), rows(), rows(2))
        text = sys.stdout.getvalue()  # type: ignore[attr-defined]
        assert "epoch 2  validation  acc 0.25  val_loss " in text and "8/8" in text
        assert "/8 loss 0.5409  acc 0.25" in text or seconds > 1
        drawn.append(text.count("steps/s"))
    assert drawn[0] >= 8 + 2 and 2 <= drawn[1] < 8


def test_the_bar_needs_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"RichProgressBar needs the package rich .*: pip install rich$"):
        RichProgressBar()
    with pytest.raises(ValueError, match="refresh_seconds must be > 0 or None, got 0"):
        RichProgressBar(0)


def test_early_stopping_ends_a_fit(tmp_path: Path) -> None:
    stopping = EarlyStopping("val_loss", patience=2, min_delta=1e9)
    trainer = Trainer(
        max_epochs=50, callbacks=[stopping], logger=False, default_root_dir=tmp_path, enable_progress_bar=False
    )
    trainer.fit(Validated(), rows(), rows(2))
    assert trainer.current_epoch == 3 and trainer.global_step == 12 and stopping.stopped_epoch == 2


def test_a_monitor_that_is_missing_ends_the_first_epoch(tmp_path: Path) -> None:
    for data in ((rows(), rows(2)), (rows(),)):
        trainer = Trainer(
            max_epochs=5, callbacks=ModelCheckpoint(monitor="acc"), default_root_dir=tmp_path, enable_progress_bar=False
        )
        with pytest.raises(ValueError, match=r"ModelCheckpoint: 'acc' is not among the metrics \['loss', 'lr'"):
            trainer.fit(Validated(), *data)
        assert trainer.current_epoch == 0


def test_ema_is_that_of_the_trainers_own_argument(tmp_path: Path) -> None:
    seen: list[list[float]] = []
    for settings in ({"ema_decay": 0.9}, {"callbacks": EMA(0.9)}):
        trainer = Trainer(
            max_epochs=3, default_root_dir=tmp_path / str(len(seen)), enable_progress_bar=False, logger=False,
            **settings,
        )  # fmt: skip
        module = Validated()
        trainer.fit(module, rows(), rows(2))
        with trainer.ema.swap():  # type: ignore[union-attr]
            seen.append([trainer.callback_metrics["val_loss"], *(p.sum().item() for p in module.parameters())])
    assert seen[0] == seen[1]


def test_a_device_mode_for_flops_changes_no_bit(tmp_path: Path) -> None:
    modules = []
    for callbacks in ([], [Throughput(count_flops=True), Profiler(1, 3)]):
        module = Validated()
        trainer = Trainer(
            max_epochs=2, callbacks=callbacks, logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
            accumulate_grad_batches=2, precision="bf16-mixed",
        )  # fmt: skip
        trainer.fit(module, rows())
        modules.append(module)
    assert_same(*modules)


def test_hooks_come_in_order_and_get_what_they_should(tmp_path: Path) -> None:
    calls: list[str] = []

    class Note(Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            calls.append(f"setup {stage}")

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert isinstance(outputs, Tensor)
            calls.append(f"batch {batch_idx}")

        def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
            assert bool(info.applied)
            calls.append(f"step {trainer.global_step}")

        def log_metrics(self, trainer: Any, module: Any, metrics: dict[str, float]) -> None:
            calls.append("line " + next(iter(metrics)))

    for hook in ("on_fit_start", "on_train_epoch_start", "on_validation_epoch_start", "on_validation_epoch_end",
                 "on_train_epoch_end", "on_fit_end"):  # fmt: skip
        setattr(Note, hook, lambda self, trainer, module, hook=hook: calls.append(hook))
    trainer = Trainer(
        max_epochs=1, callbacks=Note(), logger=False, default_root_dir=tmp_path, enable_progress_bar=False,
        enable_checkpointing=False, accumulate_grad_batches=2, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(Validated(), rows(), rows(2))
    assert calls == [
        "setup fit", "on_fit_start", "on_train_epoch_start",
        "batch 0", "batch 1", "line loss", "step 1", "batch 2", "batch 3", "line loss", "step 2",
        "on_validation_epoch_start", "line val_loss", "on_validation_epoch_end", "on_train_epoch_end", "on_fit_end",
    ]  # fmt: skip


class Normed(Net):
    """With a BatchNorm, an optimizer with masters, and parts in time where `tbptt_steps` is set."""

    def __init__(self) -> None:
        super().__init__(norm=True)
        self.seen: list[tuple[torch.dtype, bool]] = []

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any = None) -> Any:
        self.seen.append((batch.dtype, torch.is_grad_enabled()))
        loss = self.net(batch).float().square().mean()
        return loss if self.tbptt_steps is None else {"loss": loss, "hiddens": loss}

    def configure_optimizers(self) -> Any:
        return pytrain.optim.SGD(self.parameters(), lr=0.1, master_weights=True)


def swa(folder: Path, module: Normed, **settings: Any) -> Normed:
    settings = {"enable_progress_bar": False, "enable_checkpointing": False, "logger": False, **settings}
    width = module.net[0].in_features
    batches = list(torch.randn(2, 6, width, generator=torch.Generator().manual_seed(0)).unbind())
    callbacks = StochasticWeightAveraging(0.1, 0)
    Trainer(max_epochs=1, callbacks=callbacks, default_root_dir=folder, **settings).fit(module, batches)
    return module


def test_statistics_are_renewed_in_the_runs_precision(tmp_path: Path) -> None:
    module = swa(tmp_path, Normed(), precision="bf16-true")
    assert module.seen == [(torch.bfloat16, True)] * 2 + [(torch.bfloat16, False)] * 2
    assert module.net[1].running_mean.dtype == torch.bfloat16 and module.net[1].num_batches_tracked == 2


def test_statistics_are_renewed_by_parts_in_time(tmp_path: Path) -> None:
    module = Normed()
    module.tbptt_steps = 3
    module.tbptt_split = lambda batch, steps: list(batch.split(steps))  # type: ignore[method-assign]
    assert swa(tmp_path, module).net[1].num_batches_tracked == 4


def test_statistics_that_manual_optimization_cannot_renew_are_refused_at_the_start(tmp_path: Path) -> None:
    module = Normed()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="StochasticWeightAveraging: .*BatchNorm.*automatic_optimization"):
        swa(tmp_path, module)
    assert not module.seen
