"""The pages that are made from the code are those of the code, and a stale or left-over one is found."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pytrain import backend
from pytrain.optim import AdamW
from pytrain.trainer import Trainer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import make_docs  # noqa: E402

needs_kernels = pytest.mark.skipif(backend.facts is None, reason=f"needs the kernels: {backend.why_not_loaded}")


@pytest.mark.slow
@needs_kernels
def test_the_pages_are_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    assert make_docs.main(["--check"]) == 0, capsys.readouterr().out


def test_the_optimizers_pages_are_those_of_their_docstrings() -> None:
    """The fast half of --check: what needs no combination to be run."""
    folder = ROOT / "docs" / "optimizers"
    wanted = {f"{cls.__name__.lower()}.md": make_docs.page(cls) for cls in make_docs.optimizers()}
    wanted["README.md"] = make_docs.index()
    assert {path.name: path.read_text() for path in folder.glob("*.md")} == wanted


def test_no_cell_of_the_tables_is_empty() -> None:
    text = (ROOT / "docs" / "tables.md").read_text()
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == 3
    for heading in headings:
        table = make_docs.read_table(text, heading)
        assert list(table) == [subject.name for subject in make_docs.subjects()]
        assert len({len(row) for row in table.values()}) == 1
        assert all(cell for row in table.values() for cell in row.values())


def test_stale_and_left_over_pages_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    tables = (ROOT / "docs" / "tables.md").read_text()
    monkeypatch.setattr(make_docs, "tables", lambda known, *, check: tables)
    arguments = ["--check", "--docs", str(tmp_path / "docs")]
    assert make_docs.main(arguments) == 0
    (tmp_path / "docs" / "optimizers" / "adamw.md").write_text("stale")
    (tmp_path / "docs" / "optimizers" / "former.md").write_text("left over")
    assert make_docs.main(arguments) == 1
    assert [Path(line.partition(":")[0]).name for line in capsys.readouterr().out.splitlines()] == [
        "adamw.md",
        "former.md",
    ]
    assert make_docs.main(arguments[1:]) == 0 and make_docs.main(arguments) == 0


def test_a_combination_that_steps_wrongly_is_no_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_docs.Subject(AdamW, {})
    assert make_docs.with_format(subject, make_docs.Format()) == make_docs.YES
    right = make_docs.Subject.make

    def wrong(self: make_docs.Subject, params: list[Tensor], **more: bool | None) -> AdamW:
        optimizer = right(self, params, **more)
        if more.get("fused") is None:
            optimizer.param_groups[0]["lr"] *= 1.01
        return optimizer

    monkeypatch.setattr(make_docs.Subject, "make", wrong)
    assert make_docs.with_format(subject, make_docs.Format()).startswith("off by ")


def test_an_error_is_its_sentence() -> None:
    subject = make_docs.Subject(AdamW, {})
    form = make_docs.Format(torch.float64, {"state_dtype": "8bit"})
    assert make_docs.with_format(subject, form).startswith("state_dtype='8bit', but the parameter is float64")


def test_a_level_that_is_missing_here_keeps_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = make_docs.Subject(AdamW, {})
    monkeypatch.setattr(make_docs, "subjects", lambda: [subject])
    monkeypatch.setattr(make_docs, "FORMATS", [])
    monkeypatch.setattr(make_docs, "which_backend", lambda subject, kind: "kernels")
    monkeypatch.setattr(make_docs, "on_kernels", lambda subject, level: f"ran {level}")

    class Facts:
        @staticmethod
        def isa_levels() -> dict[str, bool]:
            return {"baseline": True, "avx2": True, "avx512": False}

    monkeypatch.setattr(make_docs.backend, "facts", Facts)
    header = f"## Rules and instruction sets\n\n| rule | baseline | avx2 | avx512 |\n|-|-|-|-|\n| {subject.name} |"
    known = f"{header} old | this machine does not have it | yes |\n"
    levels = [
        make_docs.read_table(make_docs.tables(known, check=check), "## Rules and instruction sets")[subject.name]
        for check in (False, True)
    ]
    assert [list(row.values())[1:] for row in levels] == [
        ["ran baseline", "ran avx2", "yes"],
        ["ran baseline", "this machine does not have it", "yes"],
    ]


def test_formulas_and_continued_lines_become_markdown() -> None:
    text, sections = make_docs.split("One.\n\n.. math::\n    a \\cdot\n    b\n\nArgs:\n    x, y: long\n        line.\n")
    assert text == "One.\n\n```math\na \\cdot\nb\n```"
    assert make_docs.arguments(sections["Args"]) == "- `x`, `y`: long line."


def test_the_trainers_table_has_every_argument_with_its_default() -> None:
    text = (ROOT / "docs" / "trainer.md").read_text()
    table = text[text.index("| argument | default |") :].partition("\n\n")[0]
    rows = [[cell.strip().strip("`") for cell in line.split(" | ")[:2]] for line in table.splitlines()[2:]]
    documented = {name.removeprefix("| `"): default for name, default in rows}
    parameters = inspect.signature(Trainer).parameters.values()
    assert documented == {
        one.name: json.dumps(one.default) if isinstance(one.default, str) else repr(one.default)
        for one in parameters
        if one.kind is one.KEYWORD_ONLY
    }
    assert len(rows) == len(documented) > 30
