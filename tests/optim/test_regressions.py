"""Faults that the optimizers once had: each test is the one that showed it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import CASES, LR, VARIANTS, error, like, make_params, ours, same_bits, threads, torch_class
from torch import Tensor
from torch.nn import Parameter

from pytrain import backend
from pytrain.optim import REGISTRY, SGD, AdamW, Lion

NAMES = list(VARIANTS)
INFINITE = [float("-inf"), float("inf"), 1.0]
PATHS = pytest.mark.parametrize("fused", [None, False])


def walk(optimizer: torch.optim.Optimizer, p: Tensor, grads: list[Tensor]) -> Tensor:
    """Step a parameter along gradients, cast to its dtype."""
    for g in grads:
        p.grad = g.to(p.dtype)
        optimizer.step()
    return p


# ---- numbers ------------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize(("name", "options"), CASES)
def test_infinite_parameters_stay_what_they_are(name: str, options: dict[str, Any], fused: bool | None) -> None:
    """Masks of -inf among the parameters are stepped with zero gradients, by torch too, and must not become nan."""
    grads = [torch.tensor([0.0, 0.0, 1.0])] * 3
    p = Parameter(torch.tensor(INFINITE))
    if torch_class(name) is None and any(rule.sums or rule.exact for rule in REGISTRY[name].rules):
        return  # a norm of, or an average with, an infinite parameter is infinite
    walk(ours(name, [p], fused=fused, **options), p, grads)
    cls = torch_class(name)
    if cls is None:
        assert p.detach()[:2].tolist() == INFINITE[:2]
        return
    q = Parameter(torch.tensor(INFINITE))
    walk(cls([q], lr=LR, foreach=False, **options), q, grads)  # type: ignore[call-arg]
    assert torch.equal(p.isnan(), q.isnan())


@PATHS
@pytest.mark.parametrize("name", ["adam", "adamw"])
def test_betas_of_zero_forget_the_past(name: str, fused: bool | None) -> None:
    """m + 1 (g - m) is not g where m is large: each step here is the sign of the gradient, times lr."""
    finals = []
    for dtype, make in ((torch.float64, torch_class(name)), (torch.float32, torch_class(name)), (torch.float32, None)):
        p = Parameter(torch.zeros(3, dtype=dtype))
        options: dict[str, Any] = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 0.0, "weight_decay": 0.0}
        cls: Any = make or REGISTRY[name]
        optimizer = cls([p], **options) if make else cls([p], fused=fused, **options)
        walk(optimizer, p, [torch.tensor([1.0, -1.0, 100.0]), torch.tensor([1e-9, 1e-4, -1e-6])])
        finals.append(p)
    rounding = torch.finfo(torch.float32).eps
    assert error([finals[2]], [finals[0]]) <= max(2 * error([finals[1]], [finals[0]]), rounding)


@PATHS
def test_lions_momentum_forgets_with_a_beta_of_zero(fused: bool | None) -> None:
    p = Parameter(torch.zeros(2))
    optimizer = Lion([p], lr=1.0, betas=(0.9, 0.0), fused=fused)
    walk(optimizer, p, [torch.tensor([1.0, -1.0]), torch.tensor([1e-9, 3e-8])])
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.tensor([1e-9, 3e-8]))


@PATHS
@pytest.mark.parametrize("default", [torch.float64, torch.float16])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_torchs_default_dtype_does_not_matter(
    name: str, options: dict[str, Any], default: torch.dtype, fused: bool | None
) -> None:
    finals = []
    for dtype in (default, torch.float32):
        p = Parameter(torch.linspace(-1, 1, 9, dtype=torch.float32))
        torch.set_default_dtype(dtype)
        try:
            walk(ours(name, [p], fused=fused, **options), p, [torch.linspace(1, 2, 9, dtype=torch.float32)] * 3)
        finally:
            torch.set_default_dtype(torch.float32)
        finals.append(p)
    assert same_bits([finals[0]], [finals[1]])


# ---- what is remembered between steps -----------------------------------------------------------------------------


def test_a_fused_option_changed_between_steps_is_obeyed() -> None:
    """opt.backend says what the next step does."""
    p = Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = AdamW([p])
    optimizer.step()
    optimizer.param_groups[0]["fused"] = False
    optimizer.step()
    assert optimizer.backend == "torch"
    assert optimizer._settled is not None
    assert len(optimizer._settled.slow) == 1 and not optimizer._settled.plans


@PATHS
@pytest.mark.parametrize("key", ["weight_decay", "eps", "momentum", "dampening"])
def test_hyperparameters_held_in_tensors_may_be_edited_in_place(key: str, fused: bool | None) -> None:
    params, held = make_params(torch.float32, [(9,), (9,)], seed=3), torch.tensor(0.0)
    for p, in_place in zip(params, (True, False), strict=True):
        optimizer: Any = AdamW([p], lr=0.1, fused=fused)
        if key in ("momentum", "dampening"):
            optimizer = SGD([p], lr=0.1, momentum=0.5, fused=fused)
        p.data.copy_(torch.linspace(-1, 1, 9))
        for value in (0.125, 0.25, 0.5):
            held.fill_(value)
            optimizer.param_groups[0][key] = held if in_place else value
            p.grad = torch.linspace(1, 2, 9)
            optimizer.step()
    assert same_bits([params[0]], [params[1]])


@pytest.mark.parametrize("holder", [list, tuple, type("Params", (list,), {})], ids=["list", "tuple", "subclass"])
def test_a_group_may_hold_its_parameters_in_any_sequence(holder: Any) -> None:
    params = [Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = SGD([params[0]], lr=1.0)
    for p in params:
        optimizer.param_groups[0]["params"] = holder([p])
        p.grad = torch.ones(3)
        optimizer.step()
    assert all(torch.equal(p.detach(), -torch.ones(3)) for p in params)


def tied(fused: bool | None) -> Tensor:
    """A small tensor that two parameters share, the second standing where the second of two threads begins."""
    shared = torch.ones(64)
    params = [Parameter(x) for x in (torch.zeros(300_000), shared, shared, torch.zeros(300_000))]
    optimizer = SGD(params, lr=0.5, weight_decay=1.0, fused=fused)
    for p, value in zip(params, (0.0, 1.0, 8.0, 0.0), strict=True):
        p.grad = torch.full_like(p, value)
    optimizer.step()
    return shared


@PATHS
def test_parameters_in_shared_memory_are_stepped_one_after_the_other(fused: bool | None) -> None:
    """As torch does, fused or not: 0.5 - 0.5 from the first, then 0.5 (0 - 8) from the second."""
    with threads(2):
        assert torch.equal(tied(fused), torch.full((64,), -4.0))


# ---- errors and what is said --------------------------------------------------------------------------------------


def test_a_bad_state_on_the_torch_path_stops_all_writes() -> None:
    params = make_params(torch.float32, [(3,), (3,)])
    optimizer = AdamW([{"params": params[:1]}, {"params": params[1:], "fused": False}])
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[params[1]]["exp_avg"] = torch.zeros(5)
    before = like(params)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\['params'\]\[0\].*'exp_avg' has shape \(5,\)"):
        optimizer.step()
    assert same_bits(params, before) and optimizer.state[params[0]]["step"] == 1


def test_an_overlapping_parameter_on_the_torch_path_stops_all_writes() -> None:
    good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(1).expand(3))
    optimizer = SGD([good, bad], lr=1.0, fused=False)
    good.grad = bad.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\].*share memory"):
        optimizer.step()
    assert torch.equal(good.detach(), torch.ones(3))


def test_repr_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    complex_one = Parameter(torch.ones(2, dtype=torch.complex64))
    assert "fused=True, but" in repr(AdamW([complex_one], fused=True))
    monkeypatch.setenv("PYTRAIN_BACKEND", "cuda")
    assert "expected one of auto, native, torch" in repr(AdamW([Parameter(torch.ones(2))]))


def test_the_backend_that_is_named_is_the_one_that_steps() -> None:
    sparse = Parameter(torch.ones(3, 3))
    optimizer = SGD([sparse], lr=1.0)
    sparse.grad = torch.ones(3, 3).to_sparse()
    with pytest.warns(UserWarning, match="layout torch.sparse_coo"):
        optimizer.step()
    assert optimizer.backend == "torch" and "sparse_coo" in repr(optimizer)


def test_a_loss_scale_that_has_sunk_to_zero_divides_as_torch_does() -> None:
    """After a thousand overflows the scale is 0: gradients are 0 / 0, which is nan, not an exception."""
    finals = []
    for make in (SGD, torch.optim.SGD):
        p = Parameter(torch.ones(2))
        p.grad = torch.zeros(2)
        optimizer: Any = make([p], lr=1.0, fused=True)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(0.0), torch.tensor(0.0)
        optimizer.step()
        finals.append(p)
    assert backend.facts is None or torch.equal(finals[0].isnan(), finals[1].isnan())
