"""Budgets that keep the project small: lines a file and a folder, columns, and modules that `import pytrain` loads."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path
    for folder in ("pytrain", "csrc", "tests", "benchmarks", "tools", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
)


def code_lines(path: Path) -> int:
    """Lines with code: no blanks, comments or docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        return sum(1 for line in text.splitlines() if line.strip() and not line.strip().startswith("//"))
    left_out = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
        and isinstance(node.body[0].value, ast.Constant)
        and isinstance(node.body[0].value.value, str)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    used = {line for t in tokens if t.type not in blank for line in range(t.start[0], t.end[0] + 1)}
    return len(used - left_out)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_has_more_than_400_code_lines_or_120_columns(path: Path) -> None:
    assert code_lines(path) <= 400
    wide = [number for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120]
    assert not wide


def test_the_trainer_stays_thin() -> None:
    assert sum(code_lines(path) for path in (ROOT / "pytrain" / "trainer").glob("*.py")) <= 1500


def test_what_several_ranks_take_stays_thin() -> None:
    files = [ROOT / "pytrain" / "grads.py", *(ROOT / "pytrain" / "parallel").glob("*.py")]
    assert len(files) > 4 and sum(map(code_lines, files)) <= 1200


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_first_line_says_what_the_file_is(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert re.match(r'^(// |"""|#!)', first) and len(first) > 15


def test_import_pytrain_loads_few_modules() -> None:
    program = (
        "import sys, torch, numpy, torch.optim\n"
        "before = set(sys.modules)\n"
        "import pytrain\n"
        "print(*sorted(set(sys.modules) - before), sep='\\n')"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(loaded) <= 40 and "rich" not in loaded and "pytrain.trainer" not in loaded


def test_the_project_names_no_path_of_a_machine() -> None:
    pattern = re.compile(r"/(work|tmp|root|home)/")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in tracked if name != "tests/test_budgets.py"]
    found = [
        str(f) for f in files if f.suffix != ".png" and f.exists() and pattern.search(f.read_text(errors="replace"))
    ]
    assert not found
