"""Rows B10 to B14 and the bug classes of fused optimizers: layouts, counts, skips, caches, errors before writes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import defaultdict
from typing import Any

import pytest
import torch
from devices import not_second
from optim_cases import VARIANTS, began, gradients, like, make_params, needs_kernels, ours, run, same_bits
from torch.nn import Parameter

from pytrain import backend
from pytrain.optim import SGD, Adam, AdamW, FusedOptimizer, Lion

NAMES = list(VARIANTS)


def pair(value: torch.Tensor, **options: Any) -> tuple[Parameter, AdamW, Parameter, torch.optim.AdamW]:
    """A parameter under our AdamW, and a contiguous fp64 copy under torch's plain one."""
    p, q = Parameter(value), Parameter(value.detach().clone().double().contiguous())
    return p, AdamW([p], lr=0.1, **options), q, torch.optim.AdamW([q], lr=0.1, foreach=False, **options)


def close(p: torch.Tensor, q: torch.Tensor) -> bool:
    return torch.allclose(p.double(), q, rtol=4 * torch.finfo(p.dtype).eps, atol=4 * torch.finfo(p.dtype).eps)


def test_b10_gradient_strides_unlike_the_parameters() -> None:
    p, a, q, b = pair(torch.randn(5, 7))
    for _ in range(3):
        g = torch.randn(7, 5).t()
        p.grad, q.grad = g, g.double()
        a.step()
        b.step()
    assert close(p, q)


def test_b11_expanded_gradient_is_read_as_what_it_is() -> None:
    p, a, q, b = pair(torch.randn(64, 64))
    g = torch.tensor(0.5).expand(64, 64)
    p.grad, q.grad = g, g.double()
    a.step()
    b.step()
    assert close(p, q)


def test_b12_strided_parameter_writes_only_its_own_rows() -> None:
    base = torch.randn(20, 3)
    before = base.clone()
    p, a, q, b = pair(base[::2])
    p.grad, q.grad = torch.ones(10, 3), torch.ones(10, 3).double()
    a.step()
    b.step()
    assert close(p, q) and torch.equal(base[1::2], before[1::2])
    assert torch.equal(base[::2], p.detach())


@pytest.mark.parametrize("name", NAMES)
def test_b13_any_found_inf_but_zero_skips_and_changes_nothing(name: str) -> None:
    params = make_params(torch.float32)
    optimizer = ours(name, params)
    for flag in (2.0, 1.0, 1e-30, float("nan")):
        before, grads = like(params), [torch.full_like(p, float("nan")) for p in params]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.found_inf = torch.tensor(flag)  # type: ignore[attr-defined]
        optimizer.step()
        assert same_bits(params, before) and optimizer.step_was_skipped and not began(optimizer)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    run(optimizer, params, params, 1)
    assert not optimizer.step_was_skipped and not same_bits(params[4:], before[4:])


def test_b14_loading_keeps_each_states_dtype() -> None:
    p = Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = torch.full((4,), 1.001, dtype=torch.float32)
    saved["state"][0]["codes"] = torch.arange(4, dtype=torch.uint8)
    saved["state"][0]["low_bits"] = torch.arange(4, dtype=torch.int16)
    fresh = AdamW([p])
    fresh.load_state_dict(saved)
    state = fresh.state[p]
    assert [state[k].dtype for k in ("exp_avg", "codes", "low_bits")] == [torch.float32, torch.uint8, torch.int16]
    assert torch.equal(state["exp_avg"], torch.full((4,), 1.001))
    p.grad = torch.ones_like(p)
    fresh.step()
    assert fresh.backend == ("torch" if backend.facts is None else "native")
    assert [fresh.state[p][k].dtype for k in ("exp_avg", "exp_avg_sq")] == [torch.float32, torch.bfloat16]


def test_expanded_parameter_is_an_error_that_names_it_before_anything_is_written() -> None:
    good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(1).expand(3))
    optimizer = SGD([{"params": [good]}, {"params": [good.detach().clone().requires_grad_(), bad]}], lr=1.0)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones(3)
    if backend.facts is not None:
        with pytest.raises(ValueError, match=r"SGD: param_groups\[1\]\['params'\]\[1\]: .* share memory"):
            optimizer.step()
        assert torch.equal(good.detach(), torch.ones(3)) and not optimizer.state


def test_an_unfit_last_tensor_of_another_dtype_stops_all_writes() -> None:
    good, bad = Parameter(torch.ones(3)), Parameter(torch.ones(4, dtype=torch.float64))
    optimizer = AdamW([good, bad])
    good.grad, bad.grad = torch.ones(3), torch.ones(4, dtype=torch.float64)
    optimizer.step()
    before = good.detach().clone()
    bad.data = torch.ones(5, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"param_groups\[0\]\['params'\]\[1\].*shape"):
        optimizer.step()
    assert torch.equal(good.detach(), before) and optimizer.state[good]["step"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_without_a_gradient_is_left_alone(name: str) -> None:
    params = make_params(torch.float32, [(5,), (6,), (7,)])
    optimizer = ours(name, params)
    run(optimizer, params, params, 2)
    optimizer.zero_grad()
    before = like(params)
    for missing in (0, 1, 2):
        optimizer.zero_grad()
        for i, (p, g) in enumerate(zip(params, gradients(params, 9), strict=True)):
            p.grad = None if i == missing else g
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert not any(same_bits([p], [b]) for p, b in zip(params, before, strict=True))
    if optimizer.steps_in_state:
        assert [optimizer.state[p]["step"].item() for p in params] == [4.0, 4.0, 4.0]


def test_steps_are_counted_per_parameter() -> None:
    params = [Parameter(torch.ones(3)) for _ in range(4)]
    optimizer = AdamW(params)
    for step in range(6):
        for i, p in enumerate(params):
            p.grad = torch.ones(3) if step % (i + 1) == 0 else None
        optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [6, 3, 2, 2]


@pytest.mark.parametrize("name", NAMES)
def test_data_replaced_between_steps_is_what_gets_stepped(name: str) -> None:
    p, q = Parameter(torch.ones(4, 4)), Parameter(torch.ones(4, 4))
    a, b = ours(name, [p]), ours(name, [q], fused=False)
    old = p.data
    for new in (lambda x: x.clone(), lambda x: x.t().contiguous().t(), lambda x: x.repeat(2, 1)[:4]):
        for x, o in ((p, a), (q, b)):
            x.grad = torch.full((4, 4), 0.5)
            o.step()
        kept = old.clone()
        old = p.data
        p.data, q.data = new(p.data), new(q.data)
        for x, o in ((p, a), (q, b)):
            x.grad = torch.full((4, 4), -0.25)
            o.step()
        assert torch.allclose(p, q) and (kept.shape == (4, 4))


def test_module_to_another_dtype_between_steps() -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = AdamW(model.parameters())
    model(torch.ones(4)).sum().backward()
    optimizer.step()
    model.double()
    model.zero_grad()
    model(torch.ones(4).double()).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]
    assert model.weight.dtype == torch.float64 == state["exp_avg"].dtype and state["step"] == 2


def test_swap_tensors_works_and_the_new_memory_is_stepped() -> None:
    p, other = Parameter(torch.ones(3)), Parameter(torch.full((3,), 5.0))
    optimizer = SGD([p], lr=1.0)
    p.grad = torch.ones(3)
    optimizer.step()
    del p.grad
    torch.utils.swap_tensors(p, other)
    p.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), 4.0)) and torch.equal(other.detach(), torch.zeros(3))


@pytest.mark.parametrize("name", NAMES)
def test_state_replaced_moved_or_cleared_is_seen(name: str) -> None:
    options = {"momentum": 0.9} if name == "sgd" else {}
    p, q = Parameter(torch.ones(6)), Parameter(torch.ones(6))
    a, b = ours(name, [p], **options), ours(name, [q], fused=False, **options)

    def both() -> None:
        for x, o in ((p, a), (q, b)):
            x.grad = torch.linspace(-1, 1, 6)
            o.step()
        assert torch.allclose(p, q, rtol=1e-6), name

    def each(change: Any) -> None:
        for x, o in ((p, a), (q, b)):
            key = next(k for k in o.state[x] if o.state[x][k].numel() == 6)
            change(o, x, key)
        both()

    both()
    each(lambda o, x, k: o.state[x].__setitem__(k, torch.full((6,), 0.25)))
    each(lambda o, x, k: setattr(o.state[x][k], "data", torch.full((6,), 0.5)))
    each(lambda o, x, k: o.state[x][k].share_memory_())
    each(lambda o, x, k: o.state[x][k].mul_(0.5))
    each(lambda o, x, k: o.state[x][k].set_(torch.full((6,), 0.125)))
    each(lambda o, x, k: o.state.clear())
    each(lambda o, x, k: setattr(o, "state", defaultdict(dict)))


def test_hyperparameters_changed_in_any_way_are_seen() -> None:
    p, q = Parameter(torch.ones(6)), Parameter(torch.ones(6))
    a, b = AdamW([p]), AdamW([q], fused=False)

    def both() -> None:
        for x, o in ((p, a), (q, b)):
            x.grad = torch.linspace(-1, 1, 6)
            o.step()
        assert torch.allclose(p, q, rtol=1e-6)

    both()
    changes: list[Any] = [
        lambda g: g.update(lr=0.3),
        lambda g: g.update(betas=[0.5, 0.5]),
        lambda g: g["betas"].__setitem__(0, 0.1),
        lambda g: g.update(lr=torch.tensor(0.2)),
        lambda g: g["lr"].fill_(0.01),
        lambda g: g.update(amsgrad=True),
        lambda g: g.update(maximize=True),
        lambda g: g.update(weight_decay=0.5, eps=0.1),
        lambda g: g.update(decoupled_weight_decay=False),
    ]
    for change in changes:
        for o in (a, b):
            change(o.param_groups[0])
        both()
    for o in (a, b):
        o.param_groups[0]["params"][0] = o.param_groups[0]["params"][0]
    both()


def test_no_gradient_outlives_zero_grad() -> None:
    params = [Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = AdamW(params)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones(3)
        refs = [weakref.ref(p.grad) for p in params]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        assert all(ref() is None for ref in refs)


@needs_kernels
def test_a_freed_optimizer_frees_its_state() -> None:
    p = Parameter(torch.ones(100_000))
    optimizer = AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = weakref.ref(optimizer.state[p]["exp_avg"])
    del optimizer
    gc.collect()
    assert state() is None


def test_shared_step_tensors_are_told_apart() -> None:
    params = [Parameter(torch.ones(2)), Parameter(torch.ones(2))]
    optimizer = AdamW(params)
    run(optimizer, params, params, 1)
    shared = torch.tensor(3.0)
    for p in params:
        optimizer.state[p]["step"] = shared
    run(optimizer, params, params, 1)
    assert [optimizer.state[p]["step"].item() for p in params] == [4.0, 4.0]


def test_a_parameter_listed_twice_is_stepped_once() -> None:
    p = Parameter(torch.zeros(3))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = SGD([p, p], lr=1.0, momentum=0.9)
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()
    assert torch.allclose(p.detach(), torch.full((3,), -2.9))


def test_an_earlier_failure_leaves_the_first_step_a_first_step() -> None:
    """SGD's dampening does not apply to a parameter's first step, even where an attempt before it failed."""
    p, bad = Parameter(torch.zeros(3)), Parameter(torch.ones(1).expand(3))
    optimizer = SGD([p, bad], lr=1.0, momentum=0.9, dampening=0.5)
    p.grad = bad.grad = torch.ones(3)
    if backend.facts is not None:
        with pytest.raises(ValueError, match="share memory"):
            optimizer.step()
    bad.grad = None
    optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -1.0))


def test_autograd_versions_rise_so_that_stale_graphs_are_refused() -> None:
    p = Parameter(torch.ones(3))
    optimizer = AdamW([p])
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    optimizer.step()
    state = optimizer.state[p]
    versions = [p._version, state["exp_avg"]._version, state["exp_avg_sq"]._version, state["step"]._version]
    optimizer.step()
    after = [p._version, state["exp_avg"]._version, state["exp_avg_sq"]._version, state["step"]._version]
    assert all(b > a for a, b in zip(versions, after, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_kernels
def test_two_threads_at_once_are_right_or_refused() -> None:
    p = Parameter(torch.zeros(2_000_000))
    optimizer = SGD([p], lr=1.0)
    p.grad = torch.ones_like(p)
    optimizer.step()
    errors: list[str] = []

    def step() -> None:
        try:
            optimizer.step()
        except RuntimeError as error:
            errors.append(str(error))

    workers = [threading.Thread(target=step) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert torch.equal(p.detach(), torch.full_like(p, -1.0 - (4 - len(errors))))
    assert all("two threads" in error for error in errors)


@not_second("20,000 tensors take minutes where each operation on one is looked at")
@needs_kernels
@pytest.mark.parametrize("name", NAMES)
def test_twenty_thousand_tiny_tensors(name: str) -> None:
    params = [Parameter(torch.full((i % 5,), float(i))) for i in range(20_000)]
    some = like(params[19_990:])
    for p in (*params, *some):
        p.grad = torch.ones_like(p)
    ours(name, params).step()
    ours(name, some).step()
    assert same_bits(params[19_990:], some)


@needs_kernels
def test_wildly_different_sizes_in_two_groups() -> None:
    shapes = [(3,), (300_000,), (0,), (1,), (70_000, 2), ()]
    params, exact = make_params(torch.float64, shapes), make_params(torch.float64, shapes)
    a = AdamW([{"params": params[:3], "lr": 0.1}, {"params": params[3:], "maximize": True}])
    b = torch.optim.AdamW([{"params": exact[:3], "lr": 0.1}, {"params": exact[3:], "maximize": True}], foreach=False)
    run(a, params, params, 2)
    run(b, exact, exact, 2)
    assert all(torch.allclose(x, y, rtol=1e-14, atol=1e-14) for x, y in zip(params, exact, strict=True))


@needs_kernels
@pytest.mark.slow
def test_more_elements_than_an_int32_counts() -> None:
    """SGD over 2^31 + 3 elements of fp16 (8.6 GB with the gradient); the last ones must move."""
    n = 2**31 + 3
    p = Parameter(torch.zeros(n, dtype=torch.float16))
    p.grad = torch.ones(1, dtype=torch.float16).expand(n).contiguous()
    SGD([p], lr=0.5).step()
    for part in (slice(0, 100), slice(2**31 - 50, n)):
        assert (p.detach()[part] == -0.5).all()


# ---- fallbacks and their reasons ---------------------------------------------------------------------------------


def test_sparse_gradients_step_under_sgd_and_are_named_elsewhere() -> None:
    for options in ({}, {"momentum": 0.9, "weight_decay": 0.1}):
        weights = [Parameter(torch.ones(10, 3)) for _ in range(2)]
        a = SGD([weights[0]], lr=0.1, **options)
        b = SGD([weights[1]], lr=0.1, **options)
        g = torch.sparse_coo_tensor(torch.tensor([[1, 4, 1]]), torch.ones(3, 3), (10, 3), check_invariants=True)
        weights[0].grad, weights[1].grad = g, g.to_dense()
        with pytest.warns(UserWarning, match="no kernels for gradients of layout torch.sparse_coo"):
            a.step()
        a.step()
        b.step()
        b.step()
        assert torch.allclose(weights[0], weights[1])
    optimizer = Lion([weights[0]])
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"Lion: param_groups\[0\]\['params'\]\[0\].*sparse_coo.*pytrain.optim.SGD"),
    ):
        optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_complex_parameters_take_the_torch_path_and_agree_with_torch(name: str) -> None:
    p = Parameter(torch.randn(5, dtype=torch.complex128))
    q = Parameter(p.detach().clone())
    options = {"momentum": 0.9} if name == "sgd" else {}
    a = ours(name, [p], **options)
    b = getattr(torch.optim, type(a).__name__)([q], lr=0.01, **options)
    with pytest.warns(UserWarning, match="no kernels for torch.complex128"):
        for _ in range(3):
            p.grad = torch.randn(5, dtype=torch.complex128)
            q.grad = p.grad.clone()
            a.step()
            b.step()
    assert a.backend == "torch" and torch.allclose(p, q, rtol=1e-13)


def test_a_reason_is_said_once() -> None:
    optimizer = SGD([Parameter(torch.zeros(2, dtype=torch.complex64)) for _ in range(3)])
    with pytest.warns(UserWarning) as seen:
        for _ in range(3):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = torch.ones_like(p)
            optimizer.step()
    assert len(seen) == 1


def test_native_is_an_error_where_no_kernel_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_BACKEND", "native")
    p = Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(backend.BackendError, match="PYTRAIN_BACKEND=native, but"):
        SGD([p]).step()


def test_fused_true_demands_and_fused_false_declines_the_kernels() -> None:
    p = Parameter(torch.zeros(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(backend.BackendError, match="fused=True, but"):
        AdamW([p], fused=True).step()
    assert AdamW([Parameter(torch.zeros(2))], fused=False).choices == [backend.Choice("torch", "fused=False")]


def test_a_bad_backend_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_BACKEND", "cuda")
    p = Parameter(torch.zeros(2))
    p.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"PYTRAIN_BACKEND: expected one of auto, native, torch, got 'cuda'"):
        SGD([p]).step()


def test_torch_backend_is_used_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_BACKEND", "torch")
    optimizer = Adam([Parameter(torch.zeros(2))])
    assert optimizer.backend == "torch" and "PYTRAIN_BACKEND=torch" in repr(optimizer)


def test_other_devices_take_the_torch_path() -> None:
    p = Parameter(torch.zeros(2, device="meta"))
    p.grad = torch.ones(2, device="meta")
    optimizer = AdamW([p])
    with pytest.warns(UserWarning, match="no kernels for device meta"):
        optimizer.step()


class Wrapped(torch.Tensor):
    """A subclass with an operator table of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def test_tensor_subclasses_with_their_own_operators_are_named() -> None:
    value = torch.zeros(2).as_subclass(Wrapped)
    assert backend.select(value).backend == "torch"
    assert "Wrapped is a tensor subclass" in backend.select(value).reason or backend.facts is None


def test_optimizers_are_fused_optimizers() -> None:
    assert all(issubclass(cls, FusedOptimizer) for cls in (SGD, Adam, AdamW, Lion))
