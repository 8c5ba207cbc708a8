"""The benchmark refuses wrong results, and its table and JSON lines can be read. No test asserts a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench_buckets
import bench_formats
import bench_gpu
import bench_looks
import bench_optim
import bench_release
import bench_rules
import bench_step
import loss_parity
import trace_parallel
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


@needs_kernels
def test_each_part_of_a_look_is_told_warm_and_cold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads, file = torch.get_num_threads(), tmp_path / "rows.jsonl"
    try:
        assert bench_looks.main(["--quick", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(threads)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["part"] for row in rows] == list(bench_looks.PARTS.values())
    assert all(row["warm_ns"] > 0 and row["cold_ns"] > 0 for row in rows)
    assert "warm, ns" in capsys.readouterr().out


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


SIMULATED = Path(backend.__file__).with_name("_kernels_simt.so")
needs_simulation = pytest.mark.skipif(
    not SIMULATED.exists() or torch.cuda.is_available(),
    reason="needs the kernels that are simulated (python tests/simt/build.py) and no CUDA device",
)


def simulate(*command: str | Path) -> str:
    """What a command prints that runs the CUDA kernels on the CPU."""
    environment = {**os.environ, "PYTRAIN_BACKEND": "simt", "PYTRAIN_SIMT_REMOTE": "1", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, *map(str, command)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@needs_simulation
def test_what_waits_for_a_gpu_runs_without_one(tmp_path: Path) -> None:
    file, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    printed = simulate(Path(bench_gpu.__file__), "--quick", "--json", file, "--page", page)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["case"] for row in rows} == {case.name for case in bench_gpu.QUICK}
    assert {row["rival"] for row in rows} == {"torch fused", "torch foreach", "torch fused fp32", "torch's parts"}
    assert all(row["ms"]["ours"] > 0 and row["wall_ms"]["copy"] > 0 and row["met"] is None for row in rows)
    formats = {f"AdamW {form.name}" for form in bench_formats.FORMATS if form.name != "fp32"}
    assert {row["what"] for row in rows} == {"AdamW", *formats, bench_step.WHOLE, bench_step.CLIP}
    assert "mean nothing" in page.read_text() and page.read_text() in printed
    table = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1


@needs_simulation
@pytest.mark.parametrize("some", ["tiny or devices or bad_gradient", pytest.param("", marks=pytest.mark.slow)])
def test_the_tests_of_the_gpu_run_without_one(some: str) -> None:
    folder = Path(__file__).parent / "gpu"
    printed = simulate("-m", "pytest", folder, "-q", "-p", "no:cacheprovider", "-k", some)
    assert " passed" in printed and "failed" not in printed


@pytest.mark.parametrize(
    ("case", "ratios", "share", "expected"),
    [
        (bench_gpu.SMALL, (1.0, 0.5), 0.92, True),
        (bench_gpu.SMALL, (0.99, 2.0), 0.92, False),
        (bench_gpu.SMALL, (1.0, 2.0), 0.91, False),
        (bench_gpu.TINY, (1.0, 3.0), 0.1, True),
        (bench_gpu.TINY, (9.0, 2.9), 0.1, False),
    ],
)
def test_targets_of_the_gpu_are_kept_apart(
    case: Case, ratios: tuple[float, float], share: float, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "HAS_CUDA", True)
    assert bench_gpu.target("AdamW", case, "torch fused", ratios, share)["met"] is expected
    assert bench_gpu.target("AdamW", case, "torch foreach", ratios, share)["met"] is None


def test_gpt2_has_its_sizes() -> None:
    sizes = {case.name: case.elements for case in bench_gpu.CASES}
    assert sizes["GPT-2 XL"] == 1_557_611_200 and sizes["GPT-2 medium"] == 354_823_168


def test_overlap_counts_the_time_within_backward_once() -> None:
    def event(name: str, lane: int, begin: float, end: float) -> dict[str, object]:
        return {"name": name, "lane": lane, "begin": begin, "end": end}

    events = [event("backward", 0, 1.0, 5.0), event("bucket 0", 1, 2.0, 4.0), event("bucket 1", 1, 3.0, 6.0)]
    assert trace_parallel.overlap(events) == 0.75  # 2 to 6, of which 2 to 5
    assert trace_parallel.overlap(events[:1]) == 0.0


def test_buckets_have_complete_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert bench_buckets.main(["--quick", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    each = list(bench_buckets.Gradients(bench_buckets.QUICK).rows())
    assert [(row["threads"], row["what"]) for row in rows] == [
        (n, what) for n in bench_buckets.THREADS for what in each
    ]
    assert {row["what"] for row in rows if row["target"] is not None} == {bench_buckets.ALL}
    assert all(row["share"] == 1.0 for row in rows if row["what"] == bench_buckets.YARDSTICK)
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(rows) and len({len(line) for line in table}) == 1


def test_buckets_that_hold_something_else_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    copy = bench_buckets.Gradients.copy

    def wrong(self: bench_buckets.Gradients) -> None:
        copy(self)
        self.buckets.buckets[0].flat.mul_(2.0)

    gradients = bench_buckets.Gradients(bench_buckets.QUICK)
    gradients.check()
    monkeypatch.setattr(bench_buckets.Gradients, "copy", wrong)
    with pytest.raises(AssertionError, match=r"^copy: gradients differ"):
        gradients.check()


def test_a_gradient_that_is_all_of_a_bucket_counts_for_nothing() -> None:
    case = Case("one is a bucket", [(4,), (8_000_000,), (2, 3)])
    gradients = bench_buckets.Gradients(case)
    assert gradients.copied == 10 and gradients.total >= 8_000_010
    gradients.check()
