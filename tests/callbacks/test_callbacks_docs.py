"""docs/callbacks.md: it names every callback, hook and logger with the arguments that it has, and its examples run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from pytrain import callbacks, loggers
from pytrain.callbacks.hooks import HOOKS

PAGE = (Path(__file__).parents[2] / "docs" / "callbacks.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| `")]


def arguments(kind: Any) -> str:
    """As the page writes them."""
    marks = {inspect.Parameter.KEYWORD_ONLY: "*"}
    return ", ".join(marks.get(one.kind, "") + name for name, one in inspect.signature(kind).parameters.items())


@pytest.mark.parametrize("name", sorted(set(callbacks.__all__) - {"Callback"}))
def test_the_page_has_every_callback_and_its_arguments(name: str) -> None:
    (row,) = [row for row in ROWS if row[0] == f"`{name}`"]
    kind = getattr(callbacks, name)
    assert row[2] == f"`{arguments(kind)}`"
    example = eval(row[3].strip("`| "), vars(callbacks))
    assert type(example) is kind


@pytest.mark.parametrize("name", sorted(set(loggers.__all__) - {"Logger", "JsonLinesLogger"}))
def test_the_page_has_every_logger_and_its_arguments(name: str) -> None:
    assert f"`{name}({arguments(getattr(loggers, name))})`" in [row[0] for row in ROWS]


def test_the_page_has_every_hook() -> None:
    named = [name for row in ROWS for name in re.findall(r"`(\w+)`", row[0])]
    assert set(HOOKS) <= set(named)


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, {"__name__": "example"})
