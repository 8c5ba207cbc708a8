"""The benchmark refuses wrong results, and its table and JSON lines can be read. No test asserts a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_formats
import bench_optim
import bench_release
import bench_rules
import bench_step
import loss_parity
from common import interleaved, markdown, nothing
from contestants import Case, Contestant, gpt2, resnet50

from pytrain import backend
from pytrain.optim import REGISTRY, AdamW

needs_kernels = pytest.mark.skipif(backend.facts is None, reason=f"needs the kernels: {backend.why_not_loaded}")


def test_a_wrong_optimizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    bench_optim.check("adamw", bench_optim.QUICK[1], torch.float32)
    right = AdamW.hyper
    monkeypatch.setattr(AdamW, "hyper", lambda self, group: tuple(1.01 * value for value in right(self, group)))
    with pytest.raises(AssertionError, match="adamw, 100 x 16: error"):
        bench_optim.check("adamw", bench_optim.QUICK[1], torch.float32)


@pytest.mark.parametrize("optimizer", ["sgd", "lion", "nadam"])
def test_rows_are_complete(optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_optim.main(["--quick", "--optimizer", optimizer, "--cases", "5 x 3", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["gradients"] for row in rows] == ["fresh", "kept"]
    assert all(row["machine"]["torch"] == torch.__version__ and row["share_of_triad"] > 0 for row in rows)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({len(line) for line in table}) == 1


def test_fresh_gradients_are_new_tensors_with_the_wanted_values() -> None:
    case = Case("two", [(3,), (4, 5)])
    contestant = Contestant(lambda params: AdamW(params), case, torch.float32, fresh=True)
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
    assert (len(gpt2()), sum(map(_numel, gpt2()))) == (148, 124_439_808)
    assert (len(resnet50()), sum(map(_numel, resnet50()))) == (161, 25_557_032)
    assert markdown(["a", "b"], [["1", "22"]]).splitlines()[1] == "| - | -- |"


def test_bytes_of_a_step_are_counted_from_what_is_held() -> None:
    case = Case("coded", [(4096,)])
    plain = Contestant(lambda params: AdamW(params), case, torch.float32, fresh=False)
    coded = Contestant(lambda params: AdamW(params, state_dtype="8bit"), case, torch.float32, fresh=False)
    for contestant in (plain, coded):
        contestant.run()
    assert plain.step_bytes() == 28 * 4096
    assert coded.state_bytes() == 2 * (4096 + 4 * 4096 // 256)


@needs_kernels
@pytest.mark.parametrize(
    "names", ["adagrad,radam,lamb,adamw", pytest.param(",".join(REGISTRY), marks=pytest.mark.slow)]
)
def test_rules_have_complete_rows(names: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_rules.main(["--quick", "--optimizers", names, "--json", str(file)]) == 0
    rows = {row["optimizer"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert {name.partition(",")[0].lower() for name in rows} == set(names.split(","))
    for name, row in rows.items():
        theirs = getattr(torch.optim, name.partition(",")[0], None)
        assert ("foreach" in row["ratios"]) == (theirs is not None)
        assert ("our AdamW" in row["ratios"]) == (name != "AdamW")
    assert "fused" in rows["Adagrad"]["ratios"] and "fused" not in rows["RAdam"]["ratios"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1


@pytest.mark.parametrize(
    ("name", "ratios", "expected"),
    [
        ("radam", {"foreach": 4.9, "our AdamW": 1.0}, ("foreach / ours >= 5", False)),
        ("radam", {"foreach": 5.0, "our AdamW": 1.0}, ("foreach / ours >= 5", True)),
        ("adagrad", {"foreach": 5.0, "fused": 1.0, "our AdamW": 1.0}, (None, None)),
        ("lamb", {"our AdamW": 0.5}, ("ours / AdamW <= 1.5", False)),
        ("lamb", {"our AdamW": 0.8}, ("ours / AdamW <= 1.5", True)),
        ("adan", {"our AdamW": 0.8}, (None, None)),
    ],
)
def test_targets_are_those_of_the_rule(name: str, ratios: dict[str, float], expected: tuple[str, bool]) -> None:
    found = bench_rules.target(bench_rules.Subject(REGISTRY[name], {}), bench_rules.GPT2, ratios)
    assert (found["target"], found["met"]) == expected


@needs_kernels
def test_every_format_has_a_complete_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_formats.main(["--quick", "--json", str(file)]) == 0
    rows = {row["format"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == [form.name for form in bench_formats.FORMATS]
    assert rows["fp32"]["state_bytes"] == 8 and rows["bf16, master"]["state_bytes"] == 12
    assert rows["bf16, Kahan"]["state_bytes"] == 6 and rows["fp32, 8-bit state"]["state_bytes"] < 2.3
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1


def test_a_wrong_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    form = bench_formats.Format("wrong", options={"state_dtype": "8bit"})
    right = AdamW.hyper
    form.check()
    monkeypatch.setattr(
        AdamW,
        "hyper",
        lambda self, group: tuple((1 if group["fused"] is False else 1.01) * value for value in right(self, group)),
    )
    with pytest.raises(AssertionError, match="wrong, sample: error"):
        form.check()


def test_both_ways_of_gradient_release_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_release.main(["--quick", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["way"] for row in rows] == ["all gradients, then step", "step_in_backward"]
    assert all(row["peak"] > 12 * row["parameters"] for row in rows)  # parameters and two states in fp32
    assert "the losses agree" in capsys.readouterr().out


def test_loss_parity_of_a_tiny_model_writes_page_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, which draws the plot")
    tiny = ["--steps", "20", "--width", "32", "--layers", "1", "--context", "16", "--batch", "4", "--threads", "1"]
    before = torch.get_num_threads()
    try:
        assert loss_parity.main([*tiny, "--docs", str(tmp_path), "--json", str(tmp_path / "curves.json")]) == 0
    finally:
        torch.set_num_threads(before)
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert list(curves) == list(loss_parity.FORMATS)
    fp32 = curves[loss_parity.FP32_RUN][0]
    for name, (losses,) in curves.items():
        assert len(losses) == 20 and losses[-1] < losses[0], name
        assert loss_parity.final(losses) == pytest.approx(loss_parity.final(fp32), rel=0.01), name
    page = (tmp_path / "loss-parity.md").read_text()
    assert all(f"| {name} " in page for name in curves)
    assert (tmp_path / "loss-parity.svg").read_text().startswith("<?xml")
    assert "| fp32 " in capsys.readouterr().out


def test_products_of_bf16_are_those_of_fp32_rounded() -> None:
    x, w = torch.randn(5, 300).bfloat16(), torch.randn(7, 300).bfloat16()
    with loss_parity.Fp32Sums():
        found = torch.nn.functional.linear(x, w)
        wide = torch.nn.functional.linear(x.float(), w.float())
    assert found.dtype == torch.bfloat16 and torch.equal(found, wide.bfloat16())


def test_the_final_loss_is_the_mean_of_the_last_steps() -> None:
    assert loss_parity.final([9.0] * 10 + [1.0] * 25 + [3.0] * 25) == 2.0


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def test_step_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_step.main(["--quick", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["what"], row["case"]) for row in rows] == [
        (what, case.name) for what in (bench_step.WHOLE, bench_step.CLIP) for case in bench_step.QUICK
    ]
    assert "torch / pytrain" in capsys.readouterr().out


def test_step_refuses_results_that_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_step, "MAX_NORM", 1e-9)
    monkeypatch.setattr(bench_step.Ours, "run", lambda self: self.optimizer.step())
    with pytest.raises(AssertionError, match="results differ"):
        bench_step.check(bench_step.QUICK[1], whole=False)
