"""What a rank holds: within the formula of docs/parallel.md, for every strategy and storage format."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pool import Pool

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_memory  # noqa: E402
from bench_memory import CASES, FULL, MB, PARTS, QUICK, STRATEGIES, TORCH  # noqa: E402

SIZES = (2, 4)


@pytest.mark.parametrize(
    ("ranks", "names"), [(2, STRATEGIES), (4, STRATEGIES), pytest.param(2, TORCH, marks=pytest.mark.slow)]
)
def test_a_rank_holds_what_the_formula_says(pool: Pool, ranks: int, names: Sequence[str]) -> None:
    rows = bench_memory.most(pool.run(ranks, bench_memory.measure_all, QUICK, *names))
    assert [(row["strategy"], row["form"]) for row in rows] == [(w, form.name) for w, form in CASES if w in names]
    assert all(row["bounds"] for row in rows if row["strategy"] in STRATEGIES)
    assert bench_memory.beyond(rows) == []
    for row in rows:
        most = row["most"]
        assert 0 < most["state"] < most["all"] and most["parameters"] < most["all"] and most["gradients"] < most["all"]
    assert len({len(line) for line in bench_memory.table(rows).splitlines()}) == 1


def test_a_row_that_has_too_much_or_too_little_is_named() -> None:
    row = {
        "strategy": "ddp",
        "form": "fp32",
        "ranks": 2,
        "most": {"parameters": 8},
        "bounds": {"parameters": {"formula": 8.0, "slack": 2.0}},
    }
    assert bench_memory.beyond([row]) == []
    for count in (7, 11):
        row["most"] = {"parameters": count}
        assert bench_memory.beyond([row]) == [f"ddp, fp32, 2 ranks: parameters of {count} bytes, expected 8 to 10"]


def test_storages_are_counted_once_and_with_all_their_bytes() -> None:
    a = torch.zeros(10)
    assert bench_memory.size_of([a, a[2:], None, a.view(2, 5), torch.zeros(3, dtype=torch.float64)]) == 40 + 24


def test_the_gauge_sees_what_lived_for_a_moment() -> None:
    with bench_memory.Gauge() as gauge:
        kept = torch.zeros(100)
        gauge.begin({"kept": lambda: [kept]})
        torch.zeros(1000)
        kept = kept + kept
    assert gauge.most == {"kept": 400, "all": 4400}


def test_the_table_in_the_docs_is_of_these_cases_and_this_formula() -> None:
    lines = (ROOT / "docs" / "parallel.md").read_text().splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("| strategy ") and "all at once" in line)
    rows = []
    for line in lines[begin + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert [row[:3] for row in rows] == [[which, form.name, str(ranks)] for ranks in SIZES for which, form in CASES]
    numels = [p.numel() for p in FULL.make().parameters()]
    forms = {form.name: form for form in bench_memory.FORMS}
    for which, form, ranks, *cells in rows:
        if which in TORCH:
            continue
        wanted = bench_memory.bounds(which, forms[form], numels, [0], int(ranks))
        for part, cell in zip(PARTS, cells[:3], strict=True):
            measured, formula = map(float, cell.split(" / "))
            if part != "gradients" or which != "zero2":  # which hang on the buckets
                assert formula == pytest.approx(wanted[part].formula / MB, abs=0.051) and measured >= formula - 0.1
