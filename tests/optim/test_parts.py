"""Parameters that are parts of larger ones, as shards have them: stepped as if they were whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from format_cases import equal
from optim_cases import gradients, like, make_params
from step_cases import everything
from torch import Tensor
from torch.nn import Parameter

import pytrain
from pytrain import backend
from pytrain.amp import LossScaler, name_of
from pytrain.optim import LAMB, REGISTRY, AdamW
from pytrain.optim.base import FusedOptimizer
from pytrain.optim.storage import Cut, random_bits

RULES = sorted(name for name, cls in REGISTRY.items() if cls.takes_control)
SHAPES = [(9, 800), (5000,), (7,), ()]
CUT = 4096  # the kernels' own sums begin anew here, so that a whole one has those of the parts
FORMATS: list[tuple[dict[str, Any], torch.dtype]] = [
    ({}, torch.float32),
    ({}, torch.float64),
    ({"rounding": "stochastic", "seed": 7}, torch.bfloat16),
    ({"rounding": "stochastic", "state_dtype": "8bit", "ema_decay": 0.5}, torch.float32),
    ({"master_weights": True, "state_dtype": "bf16"}, torch.float16),
]
NAMES = ["-".join([str(dtype), *options]) for options, dtype in FORMATS]
needs_kernels = pytest.mark.skipif(backend.wanted() == "torch", reason="what only kernels do")


def pieces_of(tensor: Tensor) -> list[Tensor]:
    """Its elements before and from `CUT` on, in the order of their memory."""
    return [piece.clone() for piece in tensor.detach().reshape(-1).split(CUT)]


def cut(params: list[Tensor]) -> list[Parameter]:
    """All pieces of all parameters, each of which knows what it is."""
    pieces = []
    for number, p in enumerate(params):
        for i, values in enumerate(pieces_of(p)):
            pieces.append(Parameter(values))
            pieces[-1].cut = Cut(number, i * CUT, p.numel())  # type: ignore[attr-defined]
    return pieces


def join(parts: list[tuple[Tensor, Tensor]]) -> None:
    """Add up what was found of the pieces of each parameter; all of them are in one process here."""
    for numbers, sums in parts:
        totals = torch.zeros(len(SHAPES), sums.shape[1], dtype=sums.dtype, device=sums.device)
        sums.copy_(totals.index_add_(0, numbers, sums)[numbers])


def pair(name: str, dtype: torch.dtype, options: dict[str, Any]) -> tuple[Any, Any, list[Tensor], list[Parameter]]:
    """An optimizer of whole parameters, and one of their pieces."""
    whole = like(make_params(torch.float64, SHAPES), dtype)
    pieces = cut(whole)
    apart: FusedOptimizer = REGISTRY[name](pieces, lr=0.1, **options)  # type: ignore[arg-type, call-arg]
    if any(rule.sums for rule in apart.rules):
        apart.join_sums = join
    return REGISTRY[name](whole, lr=0.1, **options), apart, whole, pieces  # type: ignore[arg-type, call-arg]


def give(whole: list[Tensor], pieces: list[Parameter], seed: int, without: int | None = None) -> None:
    """The same gradients for both; none for parameter `without`."""
    left = iter(pieces)
    for number, (p, grad) in enumerate(zip(whole, gradients(whole, seed), strict=True)):
        p.grad = None if number == without else grad
        for values in pieces_of(grad):
            next(left).grad = None if number == without else values


@needs_kernels
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("options", "dtype"), FORMATS, ids=NAMES)
def test_parts_are_stepped_as_their_whole(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """To the bit, in both ways to step; and so where one of the parameters takes no part in a step."""
    together, apart, whole, pieces = pair(name, dtype, options)
    for step, without in enumerate([None, 0, None, 2]):
        give(whole, pieces, step, without)
        together.step()
        if step % 3 == 2:
            apart.step()
        else:
            pytrain.step(apart, max_norm=None)
    left = iter(pieces)
    for p in whole:
        parts = [next(left) for _ in pieces_of(p)]
        assert equal([x for part in parts for x in pieces_of(part)], pieces_of(p))
        for key, value in together.state[p].items():
            own = [apart.state[part][key] for part in parts]
            if value.dim() == 0 and p.dim():  # a count, or what a rule keeps of a whole parameter
                assert all(torch.equal(x, value) for x in own), key
            else:
                assert torch.equal(torch.cat([x.reshape(-1) for x in own]), value.reshape(-1)), key


@pytest.mark.parametrize(("options", "dtype"), [FORMATS[2], FORMATS[3]])
def test_the_torch_path_rounds_a_part_as_the_whole(options: dict[str, Any], dtype: torch.dtype) -> None:
    """By a rule without roots: torch's may differ in their last bit with where a tensor begins."""
    together, apart, whole, pieces = pair("sgd", dtype, {**options, "momentum": 0.9, "fused": False})
    for step in range(3):
        give(whole, pieces, step)
        together.step()
        apart.step()
    assert equal([x for p in whole for x in pieces_of(p)], [p.detach().reshape(-1) for p in pieces])


def test_random_bits_of_a_part_are_those_of_the_whole() -> None:
    whole = random_bits(3, 5, 1, 2.0, 3000)
    for begin, numel in ((0, 3000), (512, 512), (700, 1), (1023, 1977), (2999, 1), (5, 0)):
        assert torch.equal(random_bits(3, 5, 1, 2.0, numel, begin), whole[begin : begin + numel])


@needs_kernels
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", [name for name in RULES if any(rule.sums for rule in REGISTRY[name].rules)])
def test_a_skipped_step_writes_nothing_of_a_part(name: str, bad: float) -> None:
    _, apart, whole, pieces = pair(name, torch.float32, {})
    scaler = LossScaler(init_scale=4.0)
    give(whole, pieces, 0)
    pytrain.step(apart, scaler)
    before = [x.clone() for x in everything(apart)]
    pieces[2].grad[3] = bad  # type: ignore[index]
    info = pytrain.step(apart, scaler)
    assert not info.applied and info.first_bad == 1 and equal(before, everything(apart))
    give(whole, pieces, 1)
    assert pytrain.step(apart, scaler).applied and scaler.get_scale() == 2.0
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(apart), strict=False) if a.numel() > 1)


def test_a_bad_gradient_names_the_whole_parameter() -> None:
    """Which need not be at its place among the parts that a rank has."""
    named = [("weight", Parameter(torch.zeros(5))), ("bias", Parameter(torch.zeros(4)))]
    named[0][1].cut, named[1][1].cut = Cut(0, 0, 9), Cut(2, 0, 4)  # type: ignore[attr-defined]
    optimizer = AdamW(named)
    optimizer.param_groups[0]["param_names"] = ["weight", "middle", "bias"]
    for (_, p), grad in zip(named, (0.0, float("inf")), strict=True):
        p.grad = torch.full_like(p, grad)
    found = int(pytrain.step(optimizer).first_bad)
    assert found == 2 and name_of(optimizer, found).endswith("['params'][1] (bias), of shape (4,)")
    assert name_of(optimizer, 1) == "AdamW: an unknown parameter"


@needs_kernels
def test_a_part_that_cuts_a_tile_of_random_numbers_is_refused() -> None:
    p = Parameter(torch.zeros(8, dtype=torch.bfloat16))
    p.cut, p.grad = Cut(3, 100, 200), torch.ones_like(p)  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match=r"adamw_: parts\[0\] begins with element 100 .* a multiple of 512"):
        AdamW([p], rounding="stochastic").step()


def test_the_torch_path_takes_no_sums_over_parts() -> None:
    p = Parameter(torch.ones(8))
    p.grad = torch.ones(8)
    optimizer = LAMB([p], fused=False)
    optimizer.join_sums = join
    with pytest.raises(ValueError, match=r"\[0\]: on the torch path lamb steps no parts of parameters; use DDP"):
        optimizer.step()
    assert torch.equal(p, torch.ones(8)) and not optimizer.state
