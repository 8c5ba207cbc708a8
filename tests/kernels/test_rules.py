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
VALUES = {
    "lr": 0.1, "beta1": 0.85, "beta2": 0.97, "beta3": 0.99, "eps": 1e-3, "weight_decay": 0.07, "decay": 0.05,
    "momentum": 0.8, "dampening": 0.3, "momentum_decay": 0.3, "lr_decay": 0.2, "rho": 0.8, "alpha": 0.7, "lambd": 0.3,
    "t0": 2.0, "etaminus": 0.4, "etaplus": 1.3, "step_size_min": 1e-3, "step_size_max": 0.3, "T_alpha_beta3": 5.0,
    "trust_coefficient": 0.2, "warmup_steps": 3.0, "r": 0.5, "weight_lr_power": 2.0,
}  # fmt: skip
NONE = {"weight_decay": 0.0, "decay": 0.0}
FORGETFUL = {**VALUES, **NONE, "beta1": 0.2, "beta2": 0.4, "beta3": 0.3}  # the other form of lerp, and no decay
FORGOTTEN = {**VALUES, "beta1": 0.0, "beta2": 0.0, "T_alpha_beta3": 0.0, "warmup_steps": 0.0}
BEGIN = {"mu_product": 1.0, "eta": VALUES["lr"], "mu": 1.0, "step_size": 0.02}  # what does not begin at 0
STEPS = 8  # RAdam changes its ways in the sixth
COMPILER = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")


def build(csrc: Path, folder: Path, *more: str) -> Path:
    """Compile the rules in `csrc` into a shared library in `folder`, with more flags."""
    library = folder / "rules.so"
    source = ROOT / "tests" / "kernels" / "rule_runner.cpp"
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", *more, f"-I{csrc}", "-shared"]
    subprocess.run([COMPILER, *flags, str(source), "-o", str(library)], check=True, capture_output=True)
    return library


def compare(library: Path, name: str) -> None:
    """Some steps of a rule from both sides; the last digits may differ (libm's pow, fused and ordered sums)."""
    for values in (VALUES, FORGETFUL, FORGOTTEN):
        compare_with(library, RULES[name], values)


def compare_with(library: Path, rule: Rule, values: dict[str, float]) -> None:
    """`compare` with these hyperparameters."""
    step = ctypes.CDLL(str(library)).pytrain_step
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(64, generator=generator, dtype=torch.float64)
    states = [p.clone() if name == "z" else torch.full_like(p, BEGIN.get(name, 0.0)) for name in rule.states]
    q, exact = p.clone(), [s.clone() for s in states]
    scalars = [torch.tensor(BEGIN.get(name, 0.0)) for name in rule.scalars]
    hypers = {n: values[n] for n in rule.hypers}
    packed = (ctypes.c_double * len(hypers))(*hypers.values())
    addresses = (ctypes.c_void_p * max(1, len(states)))(*[s.data_ptr() for s in states])
    for t in range(1, STEPS + 1):
        g = torch.randn(64, generator=generator, dtype=torch.float64)
        g[:4] = 0.0  # where the momentum decides
        if t % 3 == 0:
            g[6:10] = 0.0  # beside a momentum of either sign
        g[5] = 1e-9 if t % 2 == 0 else 1e6  # what is left of a momentum that is forgotten would show
        g[4] = q[4] * -values["weight_decay"]
        if rule.sums:
            g[5] = 1e-9 if t % 2 == 0 else 3.0  # but not in a norm, where it would hide all else
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (p, g)]
        held = (ctypes.c_double * max(1, len(scalars)))(*[s.item() for s in scalars])
        how = ctypes.c_double(t), *pointers, addresses, held, ctypes.c_int64(64)
        assert step(rule.name.encode(), packed, *how) == 0
        q = q - rule.reference(q, g, *exact, *scalars, t=float(t), **hypers)
        for found, wanted in zip((p, *states), (q, *exact), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
        # Scalars are stored in fp32, by either side.
        assert [torch.tensor(x).item() for x in list(held)[: len(scalars)]] == [s.item() for s in scalars]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not COMPILER:
        pytest.skip("there is no C++ compiler to build the rules with")
    return build(ROOT / "csrc", tmp_path_factory.mktemp("rules"))


@pytest.mark.parametrize("name", RULES)
def test_rule_agrees_with_its_reference(library: Path, name: str) -> None:
    compare(library, name)
