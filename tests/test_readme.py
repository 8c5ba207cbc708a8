"""The README's first run works from an empty folder, and every other Python block of it and of the trainer's pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("step", "trainer", "migration"))]
BLOCKS = [
    block
    for page in PAGES
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
]
FILES = {block.split()[1]: block for block in BLOCKS if re.match(r"# \w+\.py\n", block)}
BLOCKS = [block for block in BLOCKS if block not in FILES.values()]


def test_the_readme_has_examples() -> None:
    assert len(BLOCKS) >= 3 and set(FILES) == {"train.py", "export.py"}


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_example_runs(block: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_first_run_works_from_an_empty_folder(tmp_path: Path) -> None:
    """Its files, and its commands in their order: train, draw, resume, export; then the exports, without pytrain."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    section = README[README.index("## Your first run") : README.index("## Use it in your own loop")]
    commands = [line.split("#")[0].split() for line in section.splitlines() if line.startswith("python ")]
    assert [command[1] for command in commands] == ["train.py", "-m", "train.py", "export.py"]
    said = []
    for command in commands:
        done = subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout + done.stderr)
    assert "epoch 20" in said[0] and "epoch 21" not in said[0]
    assert (
        "after 20 epochs and 320 steps" in said[2]
        and "epoch 21" in said[2]
        and "epoch 20 " not in said[2]
        and "epoch 40" in said[2]
    )
    lines = [json.loads(line) for line in (tmp_path / "pytrain_logs" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["val_loss"] for line in lines if "val_loss" in line]
    assert len(held_out) == 40 and held_out[-1] < 0.02 < held_out[0]  # twice the variance of the noise in the data
    assert "<html" in (tmp_path / "pytrain_logs" / "report.html").read_text()
    program = (
        "import sys, numpy, onnxruntime, torch\n"
        "x = numpy.linspace(-1, 1, 5, dtype='float32')[:, None]\n"
        "(onnx,) = onnxruntime.InferenceSession('curve.onnx').run(None, {'x': x})\n"
        "torch_ = torch.export.load('curve.pt2').module()(torch.from_numpy(x)).detach().numpy()\n"
        "assert numpy.abs(onnx - torch_).max() < 1e-5\n"
        "assert numpy.abs(onnx - numpy.sin(2 * x)).max() < 0.3\n"
        "assert 'pytrain' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
