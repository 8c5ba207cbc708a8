"""`python -m pytrain report`: every metric is in the page, nothing is fetched, and what cannot be read is said."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the report's extra is not installed")
import pytrain
from pytrain.__main__ import main
from pytrain.loggers.jsonlines import JsonLinesLogger
from pytrain.report import figure, is_far_apart, is_noisy, plots, read_run, smoothed


def write(folder: Path, rows: list[dict[str, float]]) -> Path:
    """Write a run as the trainer does: one row a step."""
    logger = JsonLinesLogger(folder / "metrics.jsonl", keep_lines=None)
    for step, metrics in enumerate(rows, 1):
        logger.log_metrics(metrics, step, epoch=step // 4)
    logger.finalize("success")
    return folder / "metrics.jsonl"


def curves(run: Path) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """What is drawn: for each plot's title its labelled curves, as (step, value)."""
    return {
        axes.get_title(loc="left"): {
            str(line.get_label()): [(float(x), float(y)) for x, y in zip(*line.get_data(), strict=True)]
            for line in axes.get_lines()
            if not str(line.get_label()).startswith("_")
        }
        for axes in figure(read_run(run)).axes
    }


class Tiny(pytrain.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(3, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.log("<b>mine & yours</b>", 2.0 * batch_idx)
        return self.net(batch).square().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return pytrain.optim.SGD(self.parameters(), lr=0.1)


def test_a_trainers_run_becomes_one_page_that_fetches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False, "log_every_n_steps": 1}
    trainer = pytrain.Trainer(max_epochs=2, default_root_dir=tmp_path, **quiet)
    trainer.fit(Tiny(), [torch.ones(2, 3)] * 3, [torch.ones(2, 3)])
    assert main(["report", str(tmp_path)]) == 0
    assert f"report: {tmp_path / 'report.html'} (" in capsys.readouterr().out
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r'(src|href|srcset)=(?!"data:)', text)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in rows for name in row} - {"step", "epoch"}
    assert "&lt;b&gt;mine &amp; yours&lt;/b&gt;" in text and "<b>mine" not in text
    for name in names - {"<b>mine & yours</b>"}:
        assert f"<td>{name}</td>" in text
    image = base64.b64decode(re.search(r"base64,([A-Za-z0-9+/=]+)", text)[1])
    assert image.startswith(b"\x89PNG")
    drawn = curves(tmp_path)["loss and val_loss"]
    assert drawn["loss"] == [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert drawn["val_loss"] == [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]


def test_every_metric_is_drawn_once() -> None:
    names = ["val_loss", "loss", "lr", "train_acc", "acc", "val_acc", "val_only"]
    assert plots(names) == [("loss", "val_loss"), ("lr",), ("train_acc", "val_acc"), ("acc",), ("val_only",)]


def test_inf_and_nan_are_gaps_that_are_marked_and_counted(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": 1.0}, {"loss": float("nan")}, {"loss": float("inf")}, {"loss": 0.5}])
    drawn = curves(tmp_path)
    assert list(drawn) == ["loss (dotted: inf or nan)"]
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "4, 2 not finite" in text and "<td class=number>0.5</td><td class=number>4</td>" in text


def test_noise_is_averaged_and_a_schedule_is_not(tmp_path: Path) -> None:
    write(tmp_path, [{"loss": step % 2, "lr": 1e-3 * step} for step in range(400)])
    drawn = curves(tmp_path)
    assert [x for x, _ in drawn["lr"]["lr"]] == list(range(1, 401))
    mean = drawn["loss"]["loss, mean of 8"]
    assert mean[0] == (1, 0.0) and all(value == 0.5 for _, value in mean[7:])


def test_the_running_mean_is_that_of_what_there_is() -> None:
    assert smoothed([(1, 2.0), (3, 4.0), (5, 12.0)], 2) == ([1, 3, 5], [2.0, 3.0, 8.0])


def test_scales_follow_the_values() -> None:
    assert is_far_apart([1.0, 0.1, 0.001]) and not is_far_apart([1.0, 0.1, 0.0]) and not is_far_apart([0.001, 1.0])
    assert not is_far_apart([]) and not is_noisy([1.0]) and is_noisy([0.0, 1.0, 0.0, 1.0])


def test_damaged_lines_are_skipped_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, [{"loss": 1.0}, {"loss": 0.5}])
    file.write_bytes(b'[1]\n{"step": "x"}\n' + file.read_bytes() + b'\n\xff\n{"step": 3, "lo')
    assert main(["report", str(file), "--out", str(tmp_path / "other.html")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert [re.search(r"line (\d+) is damaged and was skipped", line)[1] for line in said] == ["1", "2", "6", "7"]
    assert curves(file) == {"loss": {"loss": [(1.0, 1.0), (2.0, 0.5)]}}
    assert "line 7 is damaged" in (tmp_path / "other.html").read_text()


def test_what_keeps_a_report_from_being_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, nested = tmp_path / "empty", tmp_path / "nested"
    empty.mkdir()
    write(nested / "run1", [{"loss": 1.0}])
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"step": 1, "epoch": 0}\nnot json\n')
    for arguments, expected in (
        ([str(tmp_path / "nowhere")], "nowhere: there is no such folder; expected a run's default_root_dir"),
        ([str(empty)], "empty: there is no metrics.jsonl in it; has a Trainer written to it?"),
        ([str(nested)], "nested: there is no metrics.jsonl in it; there are some in run1"),
        ([str(blank)], "blank.jsonl: there are no metrics in it; 1 lines could not be read"),
        ([str(nested / "run1"), "--out", str(tmp_path / "no" / "x.html")], "--out: cannot write"),
    ):
        assert main(["report", *arguments]) == 2
        assert expected in capsys.readouterr().err
