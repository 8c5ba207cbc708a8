"""CSVLogger: the table holds each line of metrics, whatever comes late, is cut short or is killed in between."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

import pytrain.loggers.base
from pytrain.loggers import CSVLogger, Logger


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def steps(path: Path) -> list[int]:
    return [int(row["step"]) for row in table(path)]


def test_rows_are_on_their_way_to_the_disk_at_once(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 0.1}, 1, 0)
    assert logger.path == tmp_path / "pytrain_logs" / "version_0" / "metrics.csv"
    assert logger.path.read_text() == "step,epoch,loss\n1,0,0.1\n"
    logger.finalize("success")


def test_numbers_come_back_as_they_were(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": math.nan, "d": math.inf, "e": -math.inf, "f, g": 7, 'h"i\nj': 2.5}
    logger.log_metrics(values, 3)
    row = table(logger.path)[0]
    assert list(row) == ["step", "epoch", *values] and row["epoch"] == ""
    for name, value in values.items():
        assert float(row[name]) == value or (math.isnan(value) and math.isnan(float(row[name])))
    logger.finalize("success")


def test_a_late_metric_adds_a_column_and_loses_no_row(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1, 0)
    logger.log_metrics({"val_loss": 2.0}, 1, 0)
    logger.log_metrics({"loss": 3.0, "lr": 0.5}, 2, 1)
    logger.finalize("success")
    assert logger.path.read_text() == "step,epoch,loss,val_loss,lr\n1,0,1.0,,\n1,0,,2.0,\n2,1,3.0,,0.5\n"


def test_a_kill_while_the_columns_grow_leaves_the_old_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1, 0)

    def die(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", die)
        logger.log_metrics({"loss": 2.0, "late": 3.0}, 2, 0)
    assert logger.path.read_text() == "step,epoch,loss\n1,0,1.0\n"
    resumed = CSVLogger(tmp_path)
    resumed.resume(1)
    resumed.log_metrics({"loss": 2.0, "late": 3.0}, 2, 0)
    assert steps(resumed.path) == [1, 2] and resumed.path == logger.path
    resumed.finalize("success")


@pytest.mark.parametrize("cut", [0, 1, 2, 10, 24, 25, 26, 30, 38, 39])
def test_a_resumed_run_gives_the_table_of_the_undisturbed_one(tmp_path: Path, cut: int) -> None:
    """Whatever is left of the file's end: steps after the checkpoint's, a validation of its step, half a line."""

    def log(logger: CSVLogger, first: int, last: int) -> None:
        for step in range(first, last + 1):
            logger.log_metrics({"loss": 1 / step}, step, (step - 1) // 4)
            if step % 4 == 0:
                logger.log_metrics({"val_loss": 2 / step, "acc": 0.5}, step, (step - 1) // 4)
        logger.finalize("success")

    whole = CSVLogger(tmp_path, "whole")
    log(whole, 1, 12)
    killed = CSVLogger(tmp_path, "cut")
    log(killed, 1, 9)
    data = killed.path.read_bytes()
    assert data.endswith(b"\n8,1,,0.25,0.5\n9,2,0.1111111111111111,,\n")  # of these, and no more, is cut
    killed.path.write_bytes(data[: len(data) - cut])
    resumed = CSVLogger(tmp_path, "cut")
    resumed.resume(8)
    resumed.log_metrics({"val_loss": 2 / 8, "acc": 0.5}, 8, 1)  # the checkpoint came before the validation
    log(resumed, 9, 12)
    assert resumed.path.read_text() == whole.path.read_text()


def test_lines_of_the_checkpoints_step_that_come_again_stand_there_once(tmp_path: Path) -> None:
    first = CSVLogger(tmp_path)
    first.log_metrics({"loss": 1.0}, 4, 0)
    first.log_metrics({"val_loss": 2.0}, 4, 0)
    first.log_metrics({"loss": 3.0}, 5, 1)
    first.finalize("interrupted")
    resumed = CSVLogger(tmp_path)
    resumed.resume(4)
    resumed.log_metrics({"val_loss": 2.0}, 4, 0)
    resumed.log_metrics({"loss": 3.5}, 5, 1)
    assert [(row["step"], row["loss"], row["val_loss"]) for row in table(resumed.path)] == [
        ("4", "1.0", ""),
        ("4", "", "2.0"),
        ("5", "3.5", ""),
    ]
    resumed.finalize("success")


def test_each_run_has_a_folder_of_its_own_and_a_resumed_one_the_newest(tmp_path: Path) -> None:
    for expected in (0, 1, 2):
        logger = CSVLogger(tmp_path)
        logger.log_metrics({"loss": 1.0}, 1)
        logger.finalize("success")
        assert logger.version == expected
    (tmp_path / "pytrain_logs" / "version_x").mkdir()
    resumed = CSVLogger(tmp_path)
    resumed.resume(1)
    assert resumed.log_dir.name == "version_2"
    fresh = CSVLogger(tmp_path)
    fresh.resume(1)
    assert CSVLogger(tmp_path / "empty").log_dir.name == "version_0"


def test_a_named_version_that_exists_is_moved_aside(tmp_path: Path) -> None:
    for value in (1.0, 2.0, 3.0):
        logger = CSVLogger(tmp_path, "", "mine")
        logger.log_metrics({"loss": value}, 1)
        logger.finalize("success")
    folder = tmp_path / "mine"
    assert [table(folder / name)[0]["loss"] for name in ("metrics.1.csv", "metrics.2.csv", "metrics.csv")] == [
        "1.0",
        "2.0",
        "3.0",
    ]


def test_nothing_is_written_before_the_first_line(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "a")
    logger.save()
    logger.finalize("success")
    assert not (tmp_path / "a").exists()


def test_a_second_fit_goes_on_in_the_same_table(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.0}, 1)
    logger.finalize("success")
    logger.finalize("success")
    logger.log_metrics({"loss": 2.0}, 2)
    assert steps(logger.path) == [1, 2]
    logger.finalize("success")


def test_hyperparameters_are_a_json_file(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"lr": 0.1, "net": {"width": 8, "act": pytrain.loggers.base.Logger}, "name": "a"})
    found = json.loads((logger.log_dir / "hparams.json").read_text())
    assert found == {"lr": 0.1, "net/width": 8, "net/act": str(Logger), "name": "a"}
    logger.finalize("success")


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the metric's name 'step' is that of a column already"):
        CSVLogger(tmp_path).log_metrics({"step": 1.0}, 1)
    with pytest.raises(TypeError, match=r"CSVLogger: version must be an int, a str or None, got float"):
        CSVLogger(tmp_path, version=1.5)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="Mine must define log_metrics"):
        type("Mine", (Logger,), {})().log_metrics({}, 1)
