"""docs/migration.md is true: a Lightning training goes on as the same one when only its imports are changed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pytrain
from pytrain.parity import main as parity

ROOT = Path(__file__).parents[2]
SOURCE = Path(__file__).with_name("lightning_training.py")


@pytest.fixture
def migrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same source, with pytrain's names as the page's table has them."""
    monkeypatch.chdir(tmp_path)
    text = SOURCE.read_text().replace("import pytorch_lightning as pl", "import pytrain as pl")
    path = tmp_path / "migrated.py"
    path.write_text(text.replace("pl.LightningModule", "pl.Module"))
    return path


def test_changing_the_imports_changes_no_bit(migrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity([str(SOURCE), str(migrated), "--steps", "10"]) == 0
    assert "10 steps: loss, gradients and parameters are equal bit for bit" in capsys.readouterr().out


def test_weights_of_a_lightning_checkpoint_load(migrated: Path) -> None:
    text = SOURCE.read_text() + '    trainer.save_checkpoint("lightning.ckpt")\n'
    subprocess.run([sys.executable, "-c", text], check=True, capture_output=True)
    weights = torch.load("lightning.ckpt", weights_only=True)["state_dict"]
    space: dict[str, type[pytrain.Module]] = {}
    exec(compile(migrated.read_text(), "migrated", "exec"), space)
    model = space["Model"]()
    model.load_state_dict(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_page_names_what_there_is() -> None:
    text = (ROOT / "docs" / "migration.md").read_text()
    names = set(re.findall(r"`pytrain\.([\w.]+)`", text))
    assert {"Module", "DataModule", "Trainer", "Callback", "seed_everything", "callbacks", "loggers"} <= names
    for name in names:
        found = pytrain
        for part in name.split("."):
            found = getattr(found, part)
