"""The benchmark refuses wrong results, and its table and JSON lines can be read. No test asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_optim
from common import interleaved, markdown, nothing

from pytrain.optim import AdamW


def test_a_wrong_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_optim.check_agreement("adamw", bench_optim.QUICK[1], torch.float32)
    right = AdamW.hyper
    monkeypatch.setattr(AdamW, "hyper", lambda self, group: tuple(1.01 * value for value in right(self, group)))
    with pytest.raises(AssertionError, match="adamw, 100 x 16: error"):
        bench_optim.check_agreement("adamw", bench_optim.QUICK[1], torch.float32)


@pytest.mark.parametrize("optimizer", ["sgd", "lion"])
def test_rows_are_complete(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_optim.main(["--quick", "--optimizer", optimizer, "--cases", "5 x 3", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["gradients"] for row in rows] == ["fresh", "kept"]
    assert all(row["machine"]["torch"] == torch.__version__ and row["share_of_triad"] > 0 for row in rows)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({len(line) for line in table}) == 1


def test_fresh_gradients_are_new_tensors_with_the_wanted_values() -> None:
    case = bench_optim.Case("two", [(3,), (4, 5)], None)
    contestant = bench_optim.Contestant(lambda params: AdamW(params), case, torch.float32, fresh=True)
    addresses = set()
    for _ in range(2):
        contestant.prepare()
        for p, g in zip(contestant.params, contestant.sources, strict=True):
            assert p.grad is not None and torch.equal(p.grad, g) and p.grad.data_ptr() != g.data_ptr()
            addresses.add(id(p.grad))


def test_contestants_take_turns() -> None:
    order: list[str] = []
    times = interleaved(
        {name: (nothing, lambda name=name: order.append(name)) for name in "ab"},  # type: ignore[misc]
        repeat=4,
        budget=60.0,
    )
    assert "".join(order) == "ab" * 5 and set(times) == {"a", "b"}


def test_shapes_are_those_of_the_models() -> None:
    assert (len(bench_optim.gpt2()), sum(map(_numel, bench_optim.gpt2()))) == (148, 124_439_808)
    assert (len(bench_optim.resnet50()), sum(map(_numel, bench_optim.resnet50()))) == (161, 25_557_032)
    assert markdown(["a", "b"], [["1", "22"]]).splitlines()[1] == "| - | -- |"


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
