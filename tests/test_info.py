"""`python -m pytrain`: info says what is there and why, and wrong words are answered with the usage."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pytrain import __version__, backend, optim


def pytrain(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytrain", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_info_names_versions_kernels_and_each_optimizers_backend() -> None:
    text = pytrain("info").stdout
    assert f"pytrain    {__version__}\n" in text
    for cls in optim.REGISTRY.values():
        line = next(line for line in text.splitlines() if line.split()[:1] == [cls.__name__])
        assert ("native: CPU kernels" in line) == (backend.facts is not None)


@pytest.mark.skipif(backend.facts is None, reason="needs the kernels")
def test_info_says_for_what_the_cuda_kernels_are_or_why_there_are_none() -> None:
    line = next(line for line in pytrain("info").stdout.splitlines() if line.startswith("cuda "))
    assert (backend.why_no_cuda or backend.cuda_build) in line


def test_info_gives_the_reason_for_the_torch_path() -> None:
    assert "torch: PYTRAIN_BACKEND=torch" in pytrain("info", PYTRAIN_BACKEND="torch").stdout


@pytest.mark.skipif(backend.facts is None, reason="needs the kernels")
def test_a_bad_level_is_an_error_in_info_and_in_a_step() -> None:
    assert "expected baseline, avx2 or avx512, got 'sse9'" in pytrain("info", PYTRAIN_ISA="sse9").stdout
    program = (
        "import torch, pytrain; p = torch.nn.Parameter(torch.ones(1)); p.grad = p.data; pytrain.optim.SGD([p]).step()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTRAIN_ISA": "sse9"},
        check=False,
    )
    assert done.returncode != 0 and "got 'sse9'" in done.stderr


def test_unknown_commands_show_the_usage() -> None:
    for words in (("fly",), ("info", "now")):
        done = pytrain(*words)
        assert done.returncode == 2 and "unknown command" in done.stdout and "usage:" in done.stdout
    assert pytrain("--help").returncode == 0 and pytrain().returncode == 2
