"""EarlyStopping: after which look a run ends, why, and that an interruption does not change it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from callback_cases import Net, SmallTrainer

from pytrain.callbacks import EarlyStopping, ModelCheckpoint


def epochs_of(folder: Path, stopping: EarlyStopping, scores: list[float], **settings: Any) -> int:
    trainer = SmallTrainer(folder, [stopping], epochs=len(scores), scores=scores, loader=[], **settings)
    trainer.fit(Net())
    return trainer.current_epoch


@pytest.mark.parametrize(
    ("arguments", "scores", "epochs", "reason"),
    [
        ({"patience": 2}, [3.0, 2.0, 2.5, 2.0, 1.0], 4, "has not improved on 2 by more than 0 2 times"),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5], 6, "has not improved on 1"),
        ({"patience": 0}, [3.0, 2.0, 2.0, 1.0], 3, "1 times"),
        ({"patience": 3}, [3.0, 2.0, 2.0, 1.0], 4, None),
        ({"patience": 1, "min_delta": 0.5}, [3.0, 2.4, 2.0, 1.0], 3, "by more than 0.5"),
        ({"patience": 1, "mode": "max"}, [1.0, 2.0, 1.5, 3.0], 3, "has not improved on 2"),
        ({}, [3.0, math.nan, 1.0], 2, "nan is not finite"),
        ({"mode": "max"}, [3.0, math.inf, 1.0], 2, "inf is not finite"),
        ({"check_finite": False, "patience": 2}, [math.nan, 3.0, math.nan, math.nan, 1.0], 4, "on 3"),
        ({"stopping_threshold": 1.0}, [3.0, 1.0, 0.9, 0.8], 3, "0.9 is better than the threshold 1"),
        ({"stopping_threshold": 2.0, "mode": "max"}, [1.0, 2.5, 3.0], 2, "is better than the threshold 2"),
        ({"divergence_threshold": 4.0}, [3.0, 4.0, 4.5, 1.0], 3, "4.5 is worse than the threshold 4"),
    ],
)
def test_a_run_ends_where_it_should(
    tmp_path: Path, arguments: dict[str, Any], scores: list[float], epochs: int, reason: str | None
) -> None:
    stopping = EarlyStopping("val_loss", **arguments)
    assert epochs_of(tmp_path, stopping, scores) == epochs
    if reason is None:
        assert stopping.stopping_reason is None and stopping.stopped_epoch == 0
    else:
        assert stopping.stopping_reason is not None and reason in stopping.stopping_reason
        assert stopping.stopped_epoch == epochs - 1


def test_it_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epochs_of(tmp_path, EarlyStopping("val_loss", patience=1), [1.0, 2.0, 3.0])
    epochs_of(tmp_path, EarlyStopping("val_loss", patience=1), [1.0, 2.0, 3.0], rank=1)
    assert capsys.readouterr().err.splitlines() == [
        "pytrain: EarlyStopping ends the run in epoch 2: val_loss 2 has not improved on 1 by more than 0 1 times"
    ]


def test_without_validation_it_looks_at_the_training_metrics_of_an_epochs_end(tmp_path: Path) -> None:
    stopping = EarlyStopping("loss", patience=1, min_delta=1e9)
    trainer = SmallTrainer(tmp_path, [stopping], epochs=4)
    trainer.fit(Net())
    assert trainer.current_epoch == 2 and stopping.wait_count == 1 and trainer.global_step == 8


def test_a_missing_metric_is_an_error_unless_not_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"EarlyStopping: 'acc' is not among the metrics \['val_loss'\]"):
        epochs_of(tmp_path, EarlyStopping("acc"), [1.0, 1.0])
    assert epochs_of(tmp_path, EarlyStopping("acc", strict=False, patience=1), [1.0, 1.0]) == 2


def test_an_interrupted_run_stops_where_the_undisturbed_one_does(tmp_path: Path) -> None:
    scores = [3.0, 2.0, 2.5, 2.6, 2.7, 1.0, 0.5]

    def run(folder: Path, **settings: Any) -> EarlyStopping:
        stopping = EarlyStopping("val_loss", patience=3)
        callbacks = [stopping, ModelCheckpoint(save_last=True)]
        path = settings.pop("ckpt_path", None)
        SmallTrainer(folder, callbacks, epochs=7, scores=scores, **settings).fit(Net(), path)
        return stopping

    whole = run(tmp_path / "whole")
    assert whole.stopped_epoch == 4
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", kill_at=17)  # in the fifth epoch
    resumed = run(tmp_path / "cut", ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert resumed.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "auto"}, "mode must be 'min' or 'max', got 'auto'"),
        ({"patience": -1}, "patience must be an int >= 0, got -1"),
        ({"min_delta": -0.1}, "min_delta must be a number >= 0, got -0.1"),
        ({"min_delta": math.nan}, "min_delta must be a number >= 0, got nan"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"EarlyStopping: {message}"):
        EarlyStopping("val_loss", **arguments)
