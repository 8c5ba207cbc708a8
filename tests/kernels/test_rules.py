"""The C++ rules, compiled alone, against the references in torch, element by element in fp64."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pytrain.optim import REGISTRY
from pytrain.optim.base import Rule

ROOT = Path(__file__).parents[2]
RULES = {rule.name: rule for cls in REGISTRY.values() for rule in cls.rules}
VALUES = {"lr": 0.1, "beta1": 0.85, "beta2": 0.97, "eps": 1e-3, "weight_decay": 0.07, "momentum": 0.8, "dampening": 0.3}
FORGETFUL = {**VALUES, "beta1": 0.2, "beta2": 0.4, "weight_decay": 0.0}  # the other form of lerp, and no decay
FORGOTTEN = {**VALUES, "beta1": 0.0, "beta2": 0.0}
COMPILER = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")


def build(csrc: Path, folder: Path) -> Path:
    """Compile the rules in `csrc` into a shared library in `folder`."""
    library = folder / "rules.so"
    source = ROOT / "tests" / "kernels" / "rule_runner.cpp"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{csrc}"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True, capture_output=True)
    return library


def compare(library: Path, name: str) -> None:
    """Four steps of a rule from both sides; the fifth digit from the end may differ (libm's pow, fused sums)."""
    for values in (VALUES, FORGETFUL, FORGOTTEN):
        compare_with(library, RULES[name], values)


def compare_with(library: Path, rule: Rule, values: dict[str, float]) -> None:
    """`compare` with these hyperparameters."""
    step = ctypes.CDLL(str(library)).pytrain_step
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(64, generator=generator, dtype=torch.float64)
    states = [torch.zeros_like(p) for _ in rule.states]
    q, exact = p.clone(), [s.clone() for s in states]
    hypers = {n: values[n] for n in rule.hypers}
    packed = (ctypes.c_double * len(hypers))(*hypers.values())
    addresses = (ctypes.c_void_p * max(1, len(states)))(*[s.data_ptr() for s in states])
    for t in range(1, 5):
        g = torch.randn(64, generator=generator, dtype=torch.float64)
        g[:4] = 0.0  # where the momentum decides
        g[5] = 1e-9 if t % 2 == 0 else 1e6  # what is left of a momentum that is forgotten would show
        g[4] = q[4] * -values["weight_decay"]
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (p, g)]
        assert step(rule.name.encode(), packed, ctypes.c_double(t), *pointers, addresses, ctypes.c_int64(64)) == 0
        q = q - rule.reference(q, g, *exact, t=float(t), **hypers)
        for found, wanted in zip((p, *states), (q, *exact), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not COMPILER:
        pytest.skip("there is no C++ compiler to build the rules with")
    return build(ROOT / "csrc", tmp_path_factory.mktemp("rules"))


@pytest.mark.parametrize("name", RULES)
def test_rule_agrees_with_its_reference(library: Path, name: str) -> None:
    compare(library, name)
