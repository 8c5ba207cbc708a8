"""The benchmark of trainers trains the same weights with all of them, counts, and its rows are complete."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import bench_trainer

from pytrain.optim import AdamW


def test_rows_are_complete_and_pytrain_makes_the_fewest_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_trainer.main(["--quick", "--threads", str(torch.get_num_threads()), "--json", str(file)]) == 0
    rows = {row["trainer"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == list(bench_trainer.CONTESTANTS)
    assert all(row["seconds"] > 0 and row["calls"] > 100 for row in rows.values())
    ours = rows["pytrain"]
    others = min(rows[name]["calls"] for name in ("Accelerate", "Lightning"))
    assert ours["calls"] <= rows["torch loop"]["calls"] < others
    assert ours["frames"]["training_step"] <= 4 and ours["frames"]["optimizer"] <= 3
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1


def test_a_trainer_that_trains_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = AdamW.hyper
    monkeypatch.setattr(AdamW, "hyper", lambda self, group: tuple(2 * value for value in right(self, group)))
    with pytest.raises(AssertionError, match="^pytrain: .* from the plain loop's after 20 steps"):
        bench_trainer.check(20)
