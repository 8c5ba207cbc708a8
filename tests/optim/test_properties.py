"""Properties over random shapes, strides, groups and steps; and torch's own inputs for its optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import randn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from optim_cases import LAYOUTS, VARIANTS, error, gradients, like, ours, same_bits, torch_class
from torch.testing._internal.common_optimizers import optim_db

from pytrain.optim import REGISTRY

SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
shapes = st.lists(st.lists(st.integers(0, 9), max_size=4).map(tuple), min_size=1, max_size=6)
cases = st.sampled_from([(name, options) for name in VARIANTS for options in VARIANTS[name]])


def random_params(sizes: list[Any], seed: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(randn(size, generator=generator).to(dtype)) for size in sizes]


@SETTINGS
@given(case=cases, sizes=shapes, seed=st.integers(0, 99), data=st.data())
def test_any_layout_and_any_missing_gradient_equals_the_contiguous_run(
    case: tuple[str, dict[str, Any]], sizes: list[Any], seed: int, data: st.DataObject
) -> None:
    name, options = case
    plain = random_params(sizes, seed)
    makers = [data.draw(st.sampled_from([n for n in LAYOUTS if fits(n, p)])) for p in plain]
    odd = [torch.nn.Parameter(LAYOUTS[n](p.detach())) for n, p in zip(makers, plain, strict=True)]
    a, b = ours(name, plain, **options), ours(name, odd, **options)
    for step in range(3):
        for p, q, g in zip(plain, odd, gradients(plain, step), strict=True):
            p.grad = q.grad = None
            if data.draw(st.booleans()):
                layout = data.draw(st.sampled_from([n for n in LAYOUTS if fits(n, p)]))
                p.grad, q.grad = g, LAYOUTS[layout](g)
        a.step()
        b.step()
    assert same_bits(plain, odd)


def fits(layout: str, p: torch.Tensor) -> bool:
    """Whether a layout can be made from a tensor of these dimensions."""
    return {"channels_last": p.dim() == 4, "transposed": p.dim() >= 2, "rows_apart": p.dim() >= 2}.get(layout, True)


@SETTINGS
@given(case=cases, sizes=shapes, seed=st.integers(0, 99), cut=st.integers(0, 6))
def test_order_and_grouping_do_not_matter(
    case: tuple[str, dict[str, Any]], sizes: list[Any], seed: int, cut: int
) -> None:
    name, options = case
    together = random_params(sizes, seed)
    apart = like(together)
    a = ours(name, together, **options)
    groups = [{"params": part} for part in (apart[:cut][::-1], apart[cut:][::-1]) if part]
    b = ours(name, groups, **options)  # type: ignore[arg-type]
    for step in range(2):
        for p, q, g in zip(together, apart, gradients(together, step), strict=True):
            p.grad, q.grad = g, g.clone()
        a.step()
        b.step()
    assert same_bits(together, apart)


@SETTINGS
@given(case=cases, seed=st.integers(0, 99), scale=st.integers(-20, 20))
def test_a_power_of_two_loss_scale_changes_no_bit(case: tuple[str, dict[str, Any]], seed: int, scale: int) -> None:
    name, options = case
    plain = random_params([(33,), (2, 3)], seed)
    scaled = like(plain)
    a, b = ours(name, plain, **options), ours(name, scaled, **options)
    for p, q, g in zip(plain, scaled, gradients(plain, 0), strict=True):
        p.grad, q.grad = g, g * 2.0**scale
    b.grad_scale = torch.tensor(2.0**scale)  # type: ignore[attr-defined]
    a.step()
    b.step()
    assert same_bits(plain, scaled)


# ---- torch's own inputs ------------------------------------------------------------------------------------------

DATABASE = {info.optim_cls.__name__.lower(): info for info in optim_db}
INPUTS = [
    pytest.param(name, i, id=f"{name}-{i}-{entry.desc}")
    for name in REGISTRY
    if name in DATABASE and torch_class(name) is not None
    for i, entry in enumerate(DATABASE[name].optim_inputs_func(device="cpu"))
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "index"), INPUTS)
def test_torchs_own_inputs_give_torchs_results(name: str, index: int, dtype: torch.dtype) -> None:
    entry = DATABASE[name].optim_inputs_func(device="cpu")[index]
    options = dict(entry.kwargs)
    if options.get("differentiable"):
        with pytest.raises(RuntimeError, match="differentiable"):
            REGISTRY[name]([torch.nn.Parameter(torch.ones(1))], **options)  # type: ignore[call-arg, arg-type]
        return
    options.pop("capturable", None)  # torch refuses it on the CPU outside of torch.compile
    params, theirs = random_params([(10, 5), (10,), ()], 0, dtype), random_params([(10, 5), (10,), ()], 0, dtype)
    for ps, make, extra in ((params, REGISTRY[name], {}), (theirs, torch_class(name), {"foreach": False})):
        optimizer = make(ps, **{**extra, **options})  # type: ignore[call-arg, arg-type, misc]
        for step in range(6):
            for p, g in zip(ps, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()
    largest = max(p.detach().abs().max().item() for p in theirs)
    assert error(params, [p.double() for p in theirs]) <= 6 * 4 * torch.finfo(dtype).eps * max(1.0, largest)


ERRORS = [
    pytest.param(name, i, id=f"{name}-{i}")
    for name in REGISTRY
    if name in DATABASE and torch_class(name) is not None
    for i, _ in enumerate(DATABASE[name].optim_error_inputs_func(device="cpu", dtype=torch.float32))
]


@pytest.mark.parametrize(("name", "index"), ERRORS)
def test_what_torch_refuses_is_refused_with_the_same_type(name: str, index: int) -> None:
    entry = DATABASE[name].optim_error_inputs_func(device="cpu", dtype=torch.float32)[index]
    source = entry.optimizer_error_input
    if "foreach=True" in entry.error_regex or "both floats or both Tensors" in entry.error_regex:
        pytest.skip("torch does not take tensors for lr or betas here; ours does")
    refused = pytest.warns if issubclass(entry.error_type, Warning) else pytest.raises
    with refused(entry.error_type):
        optimizer = REGISTRY[name](source.params, **source.kwargs)  # type: ignore[call-arg, arg-type]
        optimizer.step()
