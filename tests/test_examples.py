"""The examples are short, and each learns from real data: quickly here, in full in `make test-full`."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
Learned = Callable[[float, float], bool]

# For each its quick arguments, and what (untrained, trained) must be after them and after all steps: accuracy, loss
# in nats (3.2 a character is what knowing the letters' frequencies gives), an error or distance, steps of a game.
CASES: dict[str, tuple[list[str], Learned, Learned]] = {
    "autoencoder": (["--max-steps", "150"], lambda a, b: b < a / 2, lambda a, b: b < a / 4),
    "character_gpt": (["--max-steps", "40"], lambda a, b: b < 3.2 < a, lambda a, b: b < 2.2 < a),
    "gan": (["--max-epochs", "5"], lambda a, b: b < a / 1.5, lambda a, b: b < a / 2),
    "huggingface": (["--max-steps", "15"], lambda a, b: b < a - 1.5, lambda a, b: b < 2.7 < a),
    "image_classifier": (["--max-steps", "40"], lambda a, b: b > a + 0.5, lambda a, b: b > 0.95 > a),
    "lstm_tbptt": (["--max-steps", "60"], lambda a, b: b < 3.2 < a, lambda a, b: b < 2.2 < a),
    "policy_gradient": (["--max-steps", "15"], lambda a, b: b > 2 * a, lambda a, b: b > 4 * a),
}


def run(path: Path, arguments: list[str]) -> tuple[float, float]:
    """What its `main` returns: how well the untrained model does, and the trained one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of which small models gain, where other tests run beside them
    try:
        before, after = runpy.run_path(str(path))["main"](arguments)
    finally:
        torch.set_num_threads(threads)
    return float(before), float(after)


def test_every_example_has_a_case() -> None:
    assert [path.stem for path in EXAMPLES] == sorted(CASES)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_under_80_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_learns_quickly(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, learned, _ = CASES[path.stem]
    found = run(path, arguments)
    assert learned(*found), found
    said = capsys.readouterr().out.splitlines()[-1]
    assert "untrained" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"], "an example writes below runs/ only"


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_learns_in_full(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = run(path, [])
    assert CASES[path.stem][2](*found), found
