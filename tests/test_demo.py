"""The demo: its data, its checks, and one self-contained report. The training itself is a short one on the digits."""

from __future__ import annotations

import gzip
import re
import struct
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="the demo's extra is not installed")
pytest.importorskip("sklearn", reason="the demo's extra is not installed")
from pytrain import demo
from pytrain.demo.data import DemoError, decode, encode, load_idx_images, load_text, read_idx, shuffled


def idx(path: Path, values: torch.Tensor, kind: int = 8) -> None:
    """Write an IDX file, gzipped by its name."""
    header = struct.pack(">HBB", 0, kind, values.dim()) + struct.pack(f">{values.dim()}I", *values.shape)
    content = header + bytes(values.flatten().tolist())
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def test_idx_files_are_read_gzipped_or_not(tmp_path: Path) -> None:
    values = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 4)
    for name in ("images", "images.gz"):
        idx(tmp_path / name, values)
        assert torch.equal(read_idx(tmp_path / name, dimensions=3), values)


def test_damaged_idx_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "images"
    idx(path, torch.zeros(2, 3, 4, dtype=torch.uint8))
    whole = path.read_bytes()
    for damage in (whole[:-1], whole + b"x", whole[:3], b"", b"\x01" + whole[1:]):
        path.write_bytes(damage)
        with pytest.raises(DemoError, match="images"):
            read_idx(path, dimensions=3)
    with pytest.raises(DemoError):
        load_idx_images(tmp_path / "nowhere")


def test_text_is_the_same_each_time_and_survives_encoding() -> None:
    a, b = load_text(context=8, max_chars=1_000_000), load_text(context=8, max_chars=1_000_000)
    assert torch.equal(a.train_inputs, b.train_inputs) and torch.equal(a.test_inputs, b.test_inputs)
    assert decode(encode("def f(x):\n    return x")) == "def f(x):\n    return x"


def test_a_file_more_leaves_all_others_where_they_were(tmp_path: Path) -> None:
    """Distributions of Python have a module more or less."""
    for number in range(40):
        (tmp_path / f"{number:02d}.py").write_text(f"# the text of module {number}\n" * 9)
    before = load_text(context=8, folder=tmp_path)
    (tmp_path / "00a.py").write_text("")
    after = load_text(context=8, folder=tmp_path)
    assert torch.equal(before.train_inputs, after.train_inputs) and torch.equal(before.test_inputs, after.test_inputs)


def test_the_order_of_batches_depends_on_the_seed_only() -> None:
    first = [shuffled(100, batch=7, steps=30, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


class Page(HTMLParser):
    """Collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.images = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "srcset") and not (value or "").startswith(("data:", "#")):
                self.fetched.append(f"{tag} {value}")
        self.images += tag == "img"


def test_a_short_run_writes_a_report_that_fetches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out.html"
    assert demo.main(["--quick", "--tasks", "digits", "--out", str(out)]) == 0
    page = Page()
    page.feed(out.read_text())
    text = re.sub(r"base64,[A-Za-z0-9+/=]*", "", out.read_text())  # where any four letters come up by chance
    assert page.images >= 1 and not page.fetched and "http" not in text.replace("http-equiv", "")
    printed = capsys.readouterr().out
    assert "digits, fp16: 150 steps in fp16 with a loss scale" in printed
    assert "digits" in printed and "pytrain" in printed and "FAIL" not in printed


def test_bad_options_are_refused_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(["--quick", "--out", str(tmp_path)]) == 2
    assert "--out: expected a file name" in capsys.readouterr().err
    for words in (["--seed", "-1"], ["--tasks", "cifar"]):
        with pytest.raises(SystemExit):
            demo.main(words)
    assert demo.main(["--tasks", "fashion", "--data-dir", str(tmp_path / "none")]) == 2
