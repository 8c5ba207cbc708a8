"""pytrain.step: two passes that are the same step as torch's composition, or nothing at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import (
    CASES,
    LAYOUTS,
    LEVELS,
    SHAPES,
    VARIANTS,
    began,
    gradients,
    isa,
    like,
    make_params,
    needs_kernels,
    ours,
    same_bits,
    threads,
)
from step_cases import INF, NAN, PATHS, copies, everything, norm_of, scaled_by
from torch import Tensor
from torch.nn import Parameter

import pytrain
from pytrain.amp import LossScaler
from pytrain.optim import SGD, Adafactor, AdamW, Muon

# ---- one step is unscaling, clipping and the update -----------------------------------------------------------------


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_step_is_the_plain_step_of_the_unscaled_clipped_gradient(
    name: str, options: dict[str, Any], fused: bool | None
) -> None:
    params = make_params(torch.float32)
    twins = like(params)
    a, b = ours(name, params, fused=fused, **options), ours(name, twins, fused=fused, **options)
    scaler = scaled_by(8.0)
    for step in range(3):
        grads = gradients(params, step)
        norm = norm_of(grads)
        coef = torch.tensor(min(1.0, 1.5 / (norm + 1e-6)), dtype=torch.float64)
        for p, q, g in zip(params, twins, grads, strict=True):
            p.grad, q.grad = g * 8.0, g * 8.0 * (coef / 8.0).float()
        kept = copies([p.grad for p in params])  # type: ignore[misc]
        info = pytrain.step(a, scaler, max_norm=1.5)
        b.step()
        assert info.applied and info.scale == 8.0 and info.first_bad == -1
        assert info.grad_norm.item() == pytest.approx(norm, rel=1e-14)
        assert same_bits(kept, [p.grad for p in params])  # type: ignore[misc]
    assert same_bits(everything(a), everything(b))


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_values_are_clamped_after_unscaling(name: str, fused: bool | None) -> None:
    for dtype in (torch.float32, torch.float64):
        params = make_params(dtype)
        twins = like(params)
        a, b = ours(name, params, fused=fused), ours(name, twins, fused=fused)
        for step in range(3):
            for p, q, g in zip(params, twins, gradients(params, step), strict=True):
                p.grad, q.grad = g * 4.0, g.clamp(-0.25, 0.25)
            assert pytrain.step(a, scaled_by(4.0), clip_value=0.25).applied
            b.step()
        assert same_bits(everything(a), everything(b))


@pytest.mark.parametrize(
    "options",
    [
        {"master_weights": True},
        {"rounding": "stochastic"},
        {"kahan": True},
        {"state_dtype": "8bit"},
        {"master_weights": True, "ema_decay": 0.9, "zero_grad_in_step": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_takes_the_same_two_passes(dtype: torch.dtype, options: dict[str, Any]) -> None:
    shapes = [(5000,), (33, 7)]
    for fused in (None, False):
        params = make_params(dtype, shapes)
        twins = like(params)
        a, b = AdamW(params, lr=0.01, fused=fused, **options), AdamW(twins, lr=0.01, fused=fused, **options)
        for step in range(3):
            for p, q, g in zip(params, twins, gradients(params, step), strict=True):
                p.grad, q.grad = g * 8.0, g.clone()
            assert pytrain.step(a, scaled_by(4.0), grad_divisor=2.0, max_norm=1e9).applied
            b.step()
        assert same_bits(everything(a), everything(b))
    if options.get("zero_grad_in_step"):
        assert all(p.grad is not None and not p.grad.any() for p in params + twins)


def test_limits_may_be_numpys_numbers() -> None:
    p = Parameter(torch.zeros(2))
    for limits in ({"max_norm": np.float32(2.5)}, {"clip_value": np.float64(2.5)}, {"max_norm": 2}):
        p.grad = torch.tensor([3.0, 4.0])
        assert pytrain.step(SGD([p], lr=1.0), **limits).grad_norm == 5.0  # type: ignore[arg-type]


def test_the_divisor_divides_before_the_norm_is_taken() -> None:
    p = Parameter(torch.zeros(2))
    p.grad = torch.tensor([6.0, 8.0]) * 16.0
    info = pytrain.step(SGD([p], lr=1.0), scaled_by(16.0), grad_divisor=2.0, max_norm=2.5)
    assert info.grad_norm == 5.0
    assert torch.allclose(p.detach(), torch.tensor([-1.5, -2.0]), rtol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_any_layout_have_the_same_norm_and_step(layout: str) -> None:
    shape = (4, 3, 5, 6)
    params, twins = make_params(torch.float32, [shape]), make_params(torch.float32, [shape])
    grad = gradients(params, 0)[0]
    params[0].grad, twins[0].grad = LAYOUTS[layout](grad), grad.clone()
    a, b = AdamW(params, lr=0.1), AdamW(twins, lr=0.1)
    one, two = pytrain.step(a, max_norm=0.5), pytrain.step(b, max_norm=0.5)
    assert one.grad_norm.item() == pytest.approx(two.grad_norm.item(), rel=1e-14)
    assert torch.allclose(params[0], twins[0], rtol=1e-6, atol=0)


def test_an_expanded_gradient_counts_every_element() -> None:
    for make in (AdamW, torch.optim.AdamW):
        p = Parameter(torch.ones(6, 5))
        p.grad = torch.ones(1, 1).expand(6, 5)
        assert pytrain.step(make([p]), max_norm=0.1).grad_norm.item() == pytest.approx(math.sqrt(30))


# ---- pass 1 ---------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_norm_has_the_same_bits_for_any_threads_and_level(dtype: torch.dtype) -> None:
    params = make_params(dtype, [(300_001,), (17,), (0,), (), (5, 4099)])
    for p, g in zip(params, gradients(params, 1), strict=True):
        p.grad = g
    found = set()
    for level in LEVELS:
        if not pytrain.backend.facts.isa_levels()[level]:
            continue
        for count in (1, 2, 3, 7):
            with isa(level), threads(count):
                found.add(pytrain.step(SGD(params, lr=0.0)).grad_norm.item())
    assert len(found) == 1
    exact = norm_of([p.grad for p in params if p.grad is not None])
    assert found.pop() == pytest.approx(exact, rel=1e-14)


def test_a_norm_beyond_fp32_is_no_overflow() -> None:
    p = Parameter(torch.zeros(4))
    p.grad = torch.full((4,), 3e38)
    info = pytrain.step(SGD([p], lr=1.0), max_norm=1.0)
    assert info.applied and info.grad_norm.item() == pytest.approx(6e38)
    assert torch.allclose(p.detach(), torch.full((4,), -0.5), rtol=1e-5)


def test_finite_fp64_gradients_whose_squares_overflow_are_not_bad() -> None:
    for fused in (None, False):
        p = Parameter(torch.zeros(2, dtype=torch.float64))
        p.grad = torch.full((2,), 1e200, dtype=torch.float64)
        assert pytrain.step(SGD([p], lr=1e-200, fused=fused)).applied and p[0] == -1.0


def test_group_norms_and_the_first_bad_parameter() -> None:
    params = [Parameter(torch.zeros(3)) for _ in range(5)]
    for optimizer in (
        AdamW([{"params": params[:2]}, {"params": params[2:]}]),
        AdamW([{"params": params[:2]}, {"params": params[2:]}], fused=False),
        torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}]),
    ):
        for i, p in enumerate(params):
            p.grad = torch.full((3,), float(i))
        info = pytrain.step(optimizer, scaled_by(2.0))
        assert info.group_norms[0].tolist() == [math.sqrt(3) / 2, math.sqrt(3 * (4 + 9 + 16)) / 2]
        params[4].grad[1], params[3].grad[0] = NAN, -INF  # type: ignore[index]
        info = pytrain.step(optimizer)
        assert not info.applied and info.first_bad == 3 and math.isnan(info.grad_norm)


# ---- skipped means that nothing happened ----------------------------------------------------------------------------


@pytest.mark.parametrize("fused", PATHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_skip_leaves_everything_bit_for_bit(name: str, fused: bool | None) -> None:
    params = make_params(torch.float32)
    optimizer = ours(name, params, fused=fused)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    scaler = LossScaler(init_scale=4.0)
    for step, bad in enumerate((INF, None, -INF, None, NAN)):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g * 4.0
        if bad is not None:
            params[-1].grad[-1] = bad  # type: ignore[index]
        before, lr = copies(everything(optimizer)), schedule.get_last_lr()
        info = pytrain.step(optimizer, scaler, max_norm=1.0, schedule=schedule)
        assert bool(info.applied) == (bad is None) and optimizer.step_was_skipped == (bad is not None)
        if bad is None:
            assert schedule.get_last_lr()[0] == lr[0] / 2 and not same_bits(before, everything(optimizer))
        else:
            assert same_bits(before, everything(optimizer)) and schedule.get_last_lr() == lr
        assert step or not began(optimizer)
    assert scaler.get_scale() == 0.5


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimizers_with_loops_of_their_own_step_and_skip_too(name: str) -> None:
    make: Any = {"muon": Muon, "adafactor": Adafactor}[name]
    params, twins = make_params(torch.float32, [(8, 6), (6, 8)]), make_params(torch.float32, [(8, 6), (6, 8)])
    a, b = make(params), make(twins)
    for p, q, g in zip(params, twins, gradients(params, 0), strict=True):
        p.grad, q.grad = g * 4.0, g.clone()
    torch.nn.utils.clip_grad_norm_(twins, 1.0)
    assert pytrain.step(a, scaled_by(4.0), max_norm=1.0).applied
    b.step()
    assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in zip(params, twins, strict=True))
    params[1].grad[0, 0] = INF  # type: ignore[index]
    before = copies(everything(a))
    assert not pytrain.step(a).applied and a.step_was_skipped and same_bits(before, everything(a))


def test_a_skip_zeroes_the_gradients_only_where_that_was_asked_for() -> None:
    for asked in (False, True):
        p, q = Parameter(torch.ones(2)), Parameter(torch.ones(3))
        optimizer = AdamW([p, q], zero_grad_in_step=asked)
        p.grad, q.grad = torch.tensor([INF, 1.0]), torch.ones(3)
        assert not pytrain.step(optimizer).applied
        assert bool(p.grad.any()) != asked and bool(q.grad.any()) != asked


def test_an_unfit_gradient_is_an_error_before_anything_is_written() -> None:
    params = make_params(torch.float32, [(3,), (4,)])
    optimizer, scaler = AdamW(params), LossScaler()
    params[0].grad = torch.ones(3)
    params[1].grad = torch.ones(4)
    params[1].grad.data = torch.ones(5)
    before = copies(params)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\].*\(5,?\).*\(4,?\)"):
        pytrain.step(optimizer, scaler, max_norm=1.0)
    assert same_bits(before, params) and not began(optimizer)
    params[1].grad = torch.ones(4)
    assert pytrain.step(optimizer, scaler).applied  # the scaler has forgotten the step that failed


# ---- clip groups ----------------------------------------------------------------------------------------------------


def two_optimizers() -> tuple[list[Tensor], list[torch.optim.Optimizer]]:
    params = [Parameter(torch.zeros(1)) for _ in range(4)]
    for p, value in zip(params, (3.0, 4.0, 12.0, 84.0), strict=True):
        p.grad = torch.tensor([value])
    groups = [[{"params": params[:1]}, {"params": params[1:2]}], [{"params": params[2:3]}, {"params": params[3:]}]]
    return params, [SGD(groups[0], lr=1.0), torch.optim.SGD(groups[1], lr=1.0)]


@pytest.mark.parametrize(
    ("per", "norms"),
    [
        ("group", [3.0, 4.0, 12.0, 84.0]),
        ("optimizer", [5.0, 5.0, math.hypot(12, 84), math.hypot(12, 84)]),
        ("all", [math.sqrt(9 + 16 + 144 + 84**2)] * 4),
    ],
)
def test_a_norm_is_that_of_each_group_each_optimizer_or_all(per: Any, norms: list[float]) -> None:
    params, optimizers = two_optimizers()
    info = pytrain.step(optimizers, max_norm=1.0, clip_per=per)
    assert info.applied.tolist() == [True, True] and info.grad_norm.shape == (2,)
    found = [-p.item() for p in params]
    assert found == pytest.approx([g / n for g, n in zip((3.0, 4.0, 12.0, 84.0), norms, strict=True)], rel=1e-6)


def test_a_clip_group_across_optimizers() -> None:
    params, (a, b) = two_optimizers()
    across = pytrain.ClipGroup([a.param_groups[1], b.param_groups[0]], max_norm=1.0)
    pytrain.step([a, b], max_norm=[across])
    norm = math.hypot(4, 12)
    assert [-p.item() for p in params] == pytest.approx([3.0, 4 / norm, 12 / norm, 84.0], rel=1e-6)


def test_who_shares_a_norm_with_a_bad_gradient_is_skipped_with_it() -> None:
    per: Any
    for per, applied in (("optimizer", [True, False]), ("all", [False, False])):
        params, optimizers = two_optimizers()
        params[3].grad = torch.tensor([NAN])
        assert pytrain.step(optimizers, max_norm=1.0, clip_per=per).applied.tolist() == applied
        assert [p.item() != 0 for p in params] == [applied[0]] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_norm": 0.0}, "max_norm: expected a number > 0, got 0.0"),
        ({"max_norm": NAN}, "max_norm: expected a number > 0, got nan"),
        ({"max_norm": "1"}, r"max_norm\[0\]: expected a pytrain.ClipGroup, got str"),
        ({"max_norm": True}, "max_norm: expected a number > 0, got True"),
        ({"clip_value": INF}, "clip_value: expected a finite number > 0, got inf"),
        ({"clip_value": 1.0, "max_norm": 1.0}, "exclude each other"),
        ({"clip_per": "tensor"}, "clip_per: expected one of 'optimizer', 'group', 'all', got 'tensor'"),
        ({"grad_divisor": 0}, "grad_divisor: expected a finite number > 0, got 0"),
        ({"max_norm": [pytrain.ClipGroup([{}], 1.0)]}, r"max_norm\[0\].groups\[0\] is not an entry"),
        ({"max_norm": [pytrain.ClipGroup([], -1.0)]}, r"max_norm\[0\].max_norm: expected a number > 0, got -1.0"),
    ],
)
def test_bad_arguments_are_named_before_anything_is_written(arguments: dict[str, Any], message: str) -> None:
    p = Parameter(torch.ones(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=message):
        pytrain.step(SGD([p], lr=1.0), **arguments)
    assert p.tolist() == [1.0, 1.0]


def test_a_param_group_in_two_clip_groups_is_refused() -> None:
    _, (a, b) = two_optimizers()
    groups = [pytrain.ClipGroup(a.param_groups, 1.0), pytrain.ClipGroup([a.param_groups[1]], 1.0)]
    with pytest.raises(ValueError, match=r"max_norm\[1\].groups\[0\] is in max_norm\[0\].groups too"):
        pytrain.step([a, b], max_norm=groups)


def test_wrong_objects_are_named() -> None:
    p = Parameter(torch.ones(2))
    optimizer = SGD([p], lr=1.0)
    with pytest.raises(TypeError, match="LossScaler, got GradScaler"):
        pytrain.step(optimizer, torch.amp.GradScaler("cpu"))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizers\[1\]: expected a torch.optim.Optimizer, got int"):
        pytrain.step([optimizer, 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="at least one"):
        pytrain.step([])
    with pytest.raises(ValueError, match="twice"):
        pytrain.step([optimizer, optimizer])
    other = torch.optim.lr_scheduler.StepLR(SGD([p], lr=1.0), 1)
    with pytest.raises(ValueError, match="StepLR was made for another optimizer"):
        pytrain.step(optimizer, schedule=other)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(TypeError, match="needs no metric"):
        pytrain.step(optimizer, schedule=plateau)


def test_an_optimizer_that_steps_in_backward_refuses_what_needs_all_gradients() -> None:
    p = Parameter(torch.ones(2))
    optimizer = SGD([p], lr=1.0, step_in_backward=True)
    p.sum().backward()
    for arguments, what in (({"max_norm": 1.0}, "max_norm"), ({"scaler": LossScaler()}, "a loss scaler")):
        with pytest.raises(ValueError, match=f"{what} needs all"):
            pytrain.step(optimizer, **arguments)  # type: ignore[arg-type]
    assert p.tolist() == [0.0, 0.0]
    info = pytrain.step(optimizer)
    assert info.applied and math.isnan(info.grad_norm)


# ---- any other optimizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_torchs_optimizers_take_the_same_step_as_with_gradscaler(make: Any) -> None:
    params, twins = make_params(torch.float32, SHAPES), make_params(torch.float32, SHAPES)
    a, b = make(params, lr=0.01), make(twins, lr=0.01)
    ours_, theirs = (
        LossScaler(init_scale=8.0, growth_interval=2),
        torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2),
    )
    for step in range(6):
        for p, q, g in zip(params, twins, gradients(params, step), strict=True):
            p.grad, q.grad = ours_.scale(g.clone()), theirs.scale(g.clone())
        if step == 3:
            params[-1].grad[0] = twins[-1].grad[0] = INF  # type: ignore[index]
        theirs.unscale_(b)
        torch.nn.utils.clip_grad_norm_(twins, 1.0)
        theirs.step(b)
        theirs.update()
        pytrain.step(a, ours_, max_norm=1.0)
        assert ours_.get_scale() == theirs.get_scale()
    assert all(torch.allclose(p, q, rtol=2e-6, atol=1e-7) for p, q in zip(params, twins, strict=True))


def test_sparse_and_complex_gradients() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    for make in (SGD, torch.optim.SGD):
        optimizer = make(embedding.parameters(), lr=0.5)
        before = embedding.weight.detach().clone()
        optimizer.zero_grad()
        embedding(torch.tensor([1, 1, 3])).sum().backward()
        info = pytrain.step(optimizer, max_norm=1.0)
        norm = math.sqrt(4 * (2**2 + 1))
        assert info.grad_norm.item() == pytest.approx(norm)
        moved = before - embedding.weight.detach()
        assert moved[1].tolist() == pytest.approx([1.0 / norm] * 4, rel=1e-5) and not moved[0].any()
    z = Parameter(torch.zeros(2, dtype=torch.complex64))
    z.grad = torch.tensor([3 + 4j, 0j])
    assert pytrain.step(SGD([z], lr=1.0), max_norm=1.0).grad_norm == 5.0
    assert torch.allclose(z.detach(), torch.tensor([-0.6 - 0.8j, 0]))
