"""Every optimizer, option, dtype, instruction set and layout against torch.optim in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import (
    CASES,
    DTYPES,
    LAYOUTS,
    LEVELS,
    LISTED,
    LR,
    VARIANTS,
    error,
    fastest,
    gradients,
    isa,
    largest,
    like,
    make_params,
    needs_kernels,
    ours,
    reference64,
    run,
    same_bits,
    threads,
    torch_class,
)

from pytrain import backend
from pytrain.optim import REGISTRY

# One rounding of a parameter to its dtype a step, and the like of it from the state: the floor under any result.
STEPS = 4


def test_every_optimizer_has_variants() -> None:
    assert LISTED.keys() <= REGISTRY.keys() and all(VARIANTS.values())


def check(name: str, options: dict[str, Any], dtype: torch.dtype, found: list[torch.Tensor]) -> None:
    """Ours is at most twice as far from fp64 as torch's own steps in that dtype, or within the dtype's roundings."""
    start = make_params(dtype)
    exact = reference64(name, start, options, STEPS)
    rounding = torch.finfo(dtype).eps * largest(exact)
    if dtype == torch.float64:
        assert error(found, exact) <= STEPS * rounding
        return
    theirs = like(start)
    cls = torch_class(name)
    if cls is None:
        optimizer: torch.optim.Optimizer = ours(name, theirs, fused=False, **options)
    else:
        optimizer = cls(theirs, lr=LR, **fastest(name), **options)  # type: ignore[call-arg]
    run(optimizer, theirs, start, STEPS)
    assert error(found, exact) <= max(2 * error(theirs, exact), rounding)


@needs_kernels
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_kernels_agree_with_torch(name: str, options: dict[str, Any], dtype: torch.dtype, level: str) -> None:
    params = make_params(dtype)
    with isa(level):
        optimizer = ours(name, params, **options)
        assert optimizer.backend == "native"
        run(optimizer, params, make_params(dtype), STEPS)
    check(name, options, dtype, params)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_torch_path_agrees_with_torch(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    params = make_params(dtype)
    optimizer = ours(name, params, fused=False, **options)
    assert optimizer.backend == "torch"
    run(optimizer, params, make_params(dtype), STEPS)
    check(name, options, dtype, params)


@needs_kernels
@pytest.mark.parametrize(("name", "options"), CASES)
def test_kernels_agree_with_our_reference_over_a_hundred_steps(name: str, options: dict[str, Any]) -> None:
    params, exact = make_params(torch.float64), make_params(torch.float64)
    run(ours(name, params, **options), params, params, 100)
    run(ours(name, exact, fused=False, **options), exact, exact, 100)
    assert error(params, exact) <= 100 * torch.finfo(torch.float64).eps * largest(exact)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_all_levels_and_thread_counts_give_the_same_bits(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    shapes = [(301,), (17, 5), (1,), (200_003,), (2, 65_537)]
    results = []
    for level in [level for level in LEVELS if backend.facts.isa_levels()[level]]:
        for count in (1, 2, 3):
            params = make_params(dtype, shapes)
            with isa(level), threads(count):
                run(ours(name, params, **options), params, params, 2)
            results.append(params)
    assert all(same_bits(results[0], other) for other in results[1:])


@needs_kernels
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "options"), [(name, VARIANTS[name][-1]) for name in VARIANTS])
def test_layouts_do_not_matter(name: str, options: dict[str, Any], layout: str, grad_layout: str) -> None:
    start = make_params(torch.float32, [(4, 6, 3, 5), (2, 3, 1, 1)])
    plain, odd = like(start), [torch.nn.Parameter(LAYOUTS[layout](p.detach())) for p in start]
    a, b = ours(name, plain, **options), ours(name, odd, **options)
    for step in range(3):
        for p, q, g in zip(plain, odd, gradients(start, step), strict=True):
            p.grad, q.grad = g, LAYOUTS[grad_layout](g)
        a.step()
        b.step()
    assert same_bits(plain, odd)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_outside_a_parameter_is_written(name: str, level: str, dtype: torch.dtype) -> None:
    """Every count from 0 to 70 at every misalignment, with sentinels on both sides, against one tensor at a time."""
    with isa(level):
        for offset in range(4):
            buffers = [torch.full((n + 2 * 16,), 7.0, dtype=dtype) for n in range(71)]
            views = [b[16 + offset : 16 + offset + n] for n, b in enumerate(buffers)]
            start = [torch.linspace(-1, 1, max(n, 1))[:n].to(dtype) for n in range(71)]
            for view, value in zip(views, start, strict=True):
                view.copy_(value)
            params, alone = [torch.nn.Parameter(v) for v in views], like([torch.nn.Parameter(s) for s in start])
            for p, q in zip(params, alone, strict=True):
                p.grad = q.grad = torch.linspace(2, -1, max(p.numel(), 1))[: p.numel()].to(dtype)
            ours(name, params).step()
            for q in alone:
                ours(name, [q]).step()
            assert same_bits(params, alone)
            for n, buffer in enumerate(buffers):
                assert (buffer[: 16 + offset] == 7).all() and (buffer[16 + offset + n :] == 7).all()


@needs_kernels
@pytest.mark.parametrize("name", VARIANTS)
def test_nan_and_inf_gradients_propagate_as_in_fp64(name: str) -> None:
    grad = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, 0.0, -0.0, 1e-30, 3e38])
    params, exact = [torch.nn.Parameter(torch.ones(8))], [torch.nn.Parameter(torch.ones(8).double())]
    for p in (*params, *exact):
        p.grad = grad.to(p.dtype)
    ours(name, params).step()
    ours(name, exact, fused=False).step()
    assert torch.equal(params[0].isnan()[:1], torch.tensor([True]))
    if any(rule.sums for rule in REGISTRY[name].rules):  # what is summed up with a nan is nan
        assert torch.equal(params[0].isnan(), exact[0].isnan())
        return
    finite = exact[0].isfinite() & params[0].isfinite()
    assert finite[3:7].all()
    assert torch.allclose(params[0].double()[3:7], exact[0][3:7], rtol=2**-22, atol=0)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_codecs_round_as_torch_does(dtype: torch.dtype) -> None:
    """SGD with lr 1 computes p - g: with g = 0 all 65,536 values pass through decode and encode."""
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    p = torch.nn.Parameter(every.clone())
    p.grad = torch.zeros_like(every)
    ours_sgd = REGISTRY["sgd"]([p], lr=1.0)  # type: ignore[call-arg, arg-type]
    ours_sgd.step()
    assert torch.equal(p.detach()[every.isfinite()], every[every.isfinite()])
    assert p.detach()[every.isnan()].isnan().all()
    # p - g in fp32, rounded to the dtype: ties, subnormals, overflow.
    a = every[every.isfinite()]
    for shift in (1, 77, 1234, 40_000):
        b = a.roll(shift)
        p = torch.nn.Parameter(a.clone())
        p.grad = b.clone()
        REGISTRY["sgd"]([p], lr=1.0).step()  # type: ignore[call-arg, arg-type]
        assert torch.equal(p.detach(), (a.float() - b.float()).to(dtype))
