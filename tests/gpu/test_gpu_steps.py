"""Steps on the GPU: the CPU's bits, no wait for the device, and sizes that only memory limits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_cases import CASES, DEVICE, HAS_CUDA, STEPS, Case, give_gradients, needs_launches, parameters, run_native
from gpu_cases import without_waiting as no_wait
from optim_cases import error, largest, same_bits
from step_cases import everything
from torch import Tensor, nn

import pytrain
from pytrain.amp import LossScaler
from pytrain.ema import EMA
from pytrain.optim import REGISTRY, SGD, AdamW

pytestmark = needs_launches


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Tensor]]:
    """What the CPU's own kernels make of every case."""
    file: Path = tmp_path_factory.mktemp("reference") / "results.pt"
    run_native("gpu_reference.py", file)
    found: dict[str, list[Tensor]] = torch.load(file)
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_results_are_the_cpu_s(case: Case, on_cpu: dict[str, list[Tensor]]) -> None:
    """To the bit, but for sums over tensors, which are rounded in another order: an ulp of the factor each step."""
    found, expected = case.results(DEVICE), on_cpu[case.name]
    if not case.sums:
        assert same_bits(found, expected)
        return
    for x, y in zip(found, expected, strict=True):
        if x.numel():
            assert error([x], [y.double()]) <= 2 * STEPS * torch.finfo(torch.float32).eps * largest([y])


@pytest.mark.parametrize("name", REGISTRY)
def test_a_whole_step_waits_for_nothing(name: str) -> None:
    params = parameters()
    optimizer, scaler, ema = Case(name).make(params), LossScaler(init_scale=8.0), EMA(nn.ParameterList(params), 0.9)
    give_gradients(params, 0, 8.0)
    pytrain.step(optimizer, scaler, max_norm=1.0, ema=ema)
    before = [p.detach().clone() for p in params if p.numel()]
    with no_wait():
        for _ in range(3):
            info = pytrain.step(optimizer, scaler, max_norm=1.0, ema=ema)
    assert bool(info.applied) and float(info.grad_norm) > 0
    assert not any(torch.equal(p, q) for p, q in zip([p for p in params if p.numel()], before, strict=True))


@pytest.mark.parametrize("name", REGISTRY)
def test_a_plain_step_waits_for_nothing(name: str) -> None:
    params = parameters()
    optimizer = Case(name).make(params)
    give_gradients(params, 0)
    optimizer.step()
    with no_wait():
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("case", [Case("adamw"), Case("lamb"), Case("adamw", {}, torch.bfloat16)], ids=lambda c: str(c))
def test_a_bad_gradient_leaves_all_as_it_was_and_lowers_the_scale(case: Case, bad: float) -> None:
    params = parameters(DEVICE, case.dtype)
    optimizer, scaler = case.make(params), LossScaler(init_scale=8.0)
    give_gradients(params, 0, 8.0)
    pytrain.step(optimizer, scaler, max_norm=1.0)
    before = [x.clone() for x in everything(optimizer)]
    assert params[-1].grad is not None
    params[-1].grad[-1, -1] = bad
    with no_wait():
        info = pytrain.step(optimizer, scaler, max_norm=1.0)
    assert not bool(info.applied) and float(info.scale) == 8.0 and scaler.get_scale() == 4.0
    assert same_bits(everything(optimizer), before)
    give_gradients(params, 1, 4.0)
    assert bool(pytrain.step(optimizer, scaler, max_norm=1.0).applied)
    assert not same_bits(everything(optimizer), before)


def test_the_norm_is_that_of_the_gradients_and_the_same_bits_each_time() -> None:
    norms = []
    for _ in range(3):
        params = parameters()
        give_gradients(params, 0)
        norms.append(float(pytrain.step(AdamW(params), max_norm=1.0).grad_norm))
    exact = sum(float(p.grad.double().square().sum()) for p in params if p.grad is not None) ** 0.5
    assert norms[0] == norms[1] == norms[2] == pytest.approx(exact, rel=1e-6)


def test_gradients_are_zeroed_and_averages_move_on_the_way() -> None:
    params = parameters()
    optimizer = AdamW(params, zero_grad_in_step=True)
    ema = EMA(nn.ParameterList(params), 0.9)
    give_gradients(params, 0)
    with no_wait():
        pytrain.step(optimizer, ema=ema)
    assert not any(bool(p.grad.any()) for p in params if p.grad is not None)
    assert same_bits([ema.averages[id(p)] for p in params], [p.detach() for p in params])


@pytest.mark.parametrize("groups", [1, 30])
def test_thousands_of_tiny_tensors(groups: int) -> None:
    count = 20_000 if HAS_CUDA else 300
    shapes: list[tuple[int, ...]] = [(i % 7,) for i in range(count)]
    both: list[list[Tensor]] = []
    for split in (1, groups):
        params = parameters(shapes=shapes)
        given = [{"params": params[i::split]} for i in range(split)]
        give_gradients(params, 0)
        AdamW(given).step()
        both.append([p.detach() for p in params])
    assert same_bits(*both)


def test_more_elements_than_31_bits_count() -> None:
    """In one tensor: the ends and what lies at 2^31 are stepped like all."""
    count = 2**31 + 5000 if HAS_CUDA else 50_000
    if HAS_CUDA and torch.cuda.mem_get_info()[0] < 6 * count:
        pytest.skip(f"needs {6 * count / 2**30:.0f} GiB of GPU memory")
    p = nn.Parameter(torch.ones(count, dtype=torch.bfloat16, device=DEVICE))
    p.grad = torch.ones_like(p)
    SGD([p], lr=0.5).step()
    for part in p.detach().split(2**28):
        assert bool((part == 0.5).all())
