"""Adafactor: torch.optim's results, states, checkpoints and arguments, and what torch refuses."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
from typing import Any

import pytest
import torch
from optim_cases import error, gradients, like, make_params, needs_kernels, run, same_bits
from torch import Tensor
from torch.nn import Parameter

from pytrain import backend
from pytrain.backend import BackendError
from pytrain.optim.adafactor import Adafactor

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.5, "weight_decay": 0.1, "maximize": True},
    {"lr": 1e-4, "d": 3.0},
    {"lr": torch.tensor(0.3).double(), "beta2_decay": -0.3},
    {"beta2_decay": -2.0, "eps": (0.4, 0.2)},
    {"beta2_decay": 0.0, "eps": (1e-30, 1e-3)},
]
SHAPES = [(), (1,), (5,), (1, 1), (1, 6), (6, 1), (33, 7), (3, 4, 5), (4, 3, 3, 5), (1000,)]
# Several items a tensor, with a rest: a vector, many small matrices, few rows, few columns, a batch of large matrices.
LARGE = [(70001,), (900, 13, 3), (3, 40001), (20011, 5), (2, 300, 301), (515, 513)]


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
def test_results_and_states_are_torchs_in_fp64(
    shapes: list[tuple[int, ...]], options: dict[str, Any], fused: bool | None
) -> None:
    a = make_params(torch.float64, shapes)
    b = like(a)
    mine, theirs = Adafactor(a, fused=fused, **options), torch.optim.Adafactor(b, **options)
    for step in range(6 if shapes is SHAPES else 2):
        scale = 10.0 ** (step % 3 - 1)  # both sides of the clipping threshold
        for p, q, g in zip(a, b, gradients(a, step), strict=True):
            p.grad, q.grad = g * scale, g * scale
        mine.step()
        theirs.step()
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)
        assert mine.state[p].keys() == theirs.state[q].keys()
        for name, value in theirs.state[q].items():
            torch.testing.assert_close(mine.state[p][name], value, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_error_is_at_most_twice_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    a = make_params(dtype, SHAPES)
    b, exact = like(a), like(a, torch.float64)
    run(Adafactor(a, **options), a, a)
    run(torch.optim.Adafactor(b, **options), b, a)
    eps = (torch.finfo(dtype).eps, 1e-3)
    run(torch.optim.Adafactor(exact, eps=eps, **options), exact, a)
    assert error(a, exact) <= 2 * error(b, exact)


@pytest.mark.parametrize("dims", [(1, 0), (0, 2, 1), (2, 1, 0)])
def test_strides_do_not_matter(dims: tuple[int, ...]) -> None:
    plain = torch.randn(4, 6, dtype=torch.float64) if len(dims) == 2 else torch.randn(4, 6, 5, dtype=torch.float64)
    p, q = Parameter(plain.permute(dims)), Parameter(plain.permute(dims).contiguous())
    assert not p.is_contiguous()
    mine, theirs = Adafactor([p], weight_decay=0.1), torch.optim.Adafactor([q], weight_decay=0.1)
    for _ in range(3):
        q.grad = torch.randn(q.shape, dtype=torch.float64)
        p.grad = q.grad.clone()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", [(0,), (7, 0), (0, 3), (2, 0, 4)])
def test_empty_parameters_are_counted_and_left_alone(shape: tuple[int, ...]) -> None:
    p = Parameter(torch.empty(shape))
    p.grad = torch.empty(shape)
    optimizer = Adafactor([p])
    optimizer.step()
    state = optimizer.state[p]
    assert state["step"] == 1 and all(not value.isnan().any() for value in state.values())


def test_eps_none_is_each_parameters_own_dtypes() -> None:
    params = [Parameter(torch.full((3, 2), 0.5, dtype=dtype)) for dtype in (torch.float64, torch.float32)]
    for p in params:
        p.grad = torch.full_like(p, 1e-9)  # below fp32's eps, above fp64's
    optimizer = Adafactor(params)
    optimizer.step()
    moved = [(0.5 - p.detach().double()).max().item() for p in params]
    assert math.isclose(moved[0], 0.5 * 0.01, rel_tol=1e-6) and 0 <= moved[1] < 0.1 * moved[0]


def test_a_nan_gradient_shows_in_the_parameter() -> None:
    p = Parameter(torch.ones(3, 2))
    p.grad = torch.tensor([[1.0, 1.0], [float("nan"), 1.0], [1.0, 1.0]])
    Adafactor([p]).step()
    assert p.detach()[1, 0].isnan()


def test_signature_is_torchs_plus_fused_and_options() -> None:
    theirs = inspect.signature(torch.optim.Adafactor).parameters
    mine = dict(inspect.signature(Adafactor).parameters)
    assert mine.pop("options").kind is inspect.Parameter.VAR_KEYWORD
    assert mine.pop("fused").kind is inspect.Parameter.KEYWORD_ONLY
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_has_torchs_groups_keys_shapes_and_dtypes(dtype: torch.dtype) -> None:
    a, b = make_params(dtype, SHAPES), make_params(dtype, SHAPES)
    mine, theirs = Adafactor(a, weight_decay=0.1), torch.optim.Adafactor(b, weight_decay=0.1)
    run(mine, a, a, 1)
    run(theirs, b, b, 1)
    saved, wanted = mine.state_dict(), theirs.state_dict()
    assert saved["param_groups"] == wanted["param_groups"]
    assert [list(group) for group in saved["param_groups"]] == [list(group) for group in wanted["param_groups"]]
    for index, state in wanted["state"].items():
        kinds = [{k: (v.dtype, v.shape) for k, v in side.items()} for side in (saved["state"][index], state)]
        assert kinds[0] == kinds[1] and list(kinds[0]) == list(kinds[1])


@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_go_both_ways(ours_first: bool) -> None:
    exact, params = make_params(torch.float64, SHAPES), make_params(torch.float64, SHAPES)
    run(torch.optim.Adafactor(exact, lr=0.1), exact, exact, 6)
    makers: list[Any] = [Adafactor, torch.optim.Adafactor]
    first, second = makers if ours_first else makers[::-1]
    optimizer = first(params, lr=0.1)
    steps(optimizer, params, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = second(params, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    steps(other, params, 3, 6)
    assert error(params, exact) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_save_load_go_on_is_bit_for_bit(how: str, dtype: torch.dtype) -> None:
    params, whole = make_params(dtype, SHAPES), make_params(dtype, SHAPES)
    optimizer = Adafactor(params, weight_decay=0.1)
    steps(optimizer, params, 0, 3)
    if how == "state_dict":
        params = like(params)
        fresh = Adafactor(params)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = fresh
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
    steps(optimizer, params, 3, 6)
    steps(Adafactor(whole, weight_decay=0.1), whole, 0, 6)
    assert same_bits(params, whole)


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], begin: int, end: int) -> None:
    """The steps from `begin` to `end` of the sequence that `run` takes."""
    for step in range(begin, end):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()


def test_the_schedulers_lr_and_added_groups_are_followed() -> None:
    results = []
    for make in (Adafactor, torch.optim.Adafactor):
        params = make_params(torch.float64, [(4, 3), (5,)])
        optimizer = make(params[:1], lr=0.1)  # type: ignore[operator]
        optimizer.add_param_group({"params": params[1:], "lr": 0.3, "d": 2.0})
        plan = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for step in range(4):
            steps(optimizer, params, step, step + 1)
            plan.step()
        results.append(params)
    assert error(results[0], results[1]) <= 1e-12


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("amp_scaling", [True, False])
def test_grad_scaler_steps_and_skips(bad: bool, amp_scaling: bool) -> None:
    p, q = Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2))
    factors = torch.arange(1.0, 7.0).view(3, 2)
    optimizer, scaler = Adafactor([p], amp_scaling=amp_scaling), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * factors * (float("inf") if bad else 1.0)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    if bad:
        assert torch.equal(p, torch.ones(3, 2)) and not optimizer.state and scaler.get_scale() == 512.0
        return
    q.grad = factors
    Adafactor([q]).step()
    assert same_bits([p], [q])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, r"lr: expected >= 0, got -1"),
    ({"lr": torch.ones(2)}, r"lr: expected one element, got a tensor of shape \(2,\)"),
    ({"beta2_decay": 0.1}, r"beta2_decay: expected <= 0, got 0.1"),
    ({"beta2_decay": float("nan")}, r"beta2_decay: expected <= 0, got nan"),
    ({"eps": (-1.0, 1e-3)}, r"eps\[0\]: expected >= 0, got -1"),
    ({"eps": (None, -1.0)}, r"eps\[1\]: expected >= 0, got -1"),
    ({"d": 0.5}, r"d: expected >= 1, got 0.5"),
    ({"weight_decay": -0.1}, r"weight_decay: expected >= 0, got -0.1"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adafactor([Parameter(torch.ones(1))], **options)
    optimizer = Adafactor([Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], **options})
    assert len(optimizer.param_groups) == 1


def test_unsupported_options_are_named() -> None:
    with pytest.raises(ValueError, match="kahan: Adafactor does not support it"):
        Adafactor([Parameter(torch.ones(1))], kahan=True)
    Adafactor([Parameter(torch.ones(1))], kahan=False, state_dtype=None, rounding="nearest", seed=3)


@pytest.mark.parametrize("how", ["bfloat16", "transposed", "state"])
def test_demanded_kernels_that_cannot_serve_are_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = Parameter(torch.ones(2, 3, dtype=torch.bfloat16 if how == "bfloat16" else torch.float32))
    if how == "transposed":
        p = Parameter(torch.ones(3, 2).T)
    p.grad = torch.ones_like(p)
    message = "kernels are not built|there are no kernels for Adafactor with|'row_var' is torch.float64"
    demanding, optimizer = Adafactor([p], fused=True), Adafactor([p])
    if how == "state":
        for each in (demanding, optimizer):
            each.state[p]["row_var"] = torch.zeros(2, 1, dtype=torch.float64)
    with pytest.raises(BackendError, match=f"fused=True, but .*({message})"):
        demanding.step()
    monkeypatch.setenv("PYTRAIN_BACKEND", "native")
    with pytest.raises(BackendError, match=f"PYTRAIN_BACKEND=native, but .*({message})"):
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones_like(p))
    monkeypatch.setenv("PYTRAIN_BACKEND", "auto")
    with pytest.warns(UserWarning, match=message):
        optimizer.step()
    assert not torch.equal(p.detach(), torch.ones_like(p))


@needs_kernels
def test_backend_says_what_steps() -> None:
    groups = [{"params": make_params(dtype, [(3, 2), (4,)])} for dtype in (torch.float32, torch.bfloat16)]
    optimizer = Adafactor(groups)
    assert [choice.backend for choice in optimizer.choices] == ["native", "torch"] and optimizer.backend == "mixed"
    assert "group 1: torch (there are no kernels for Adafactor with torch.bfloat16 parameters)" in repr(optimizer)
    assert Adafactor(groups[0]["params"]).backend == "native"
    assert Adafactor(groups[0]["params"], fused=False).choices == [backend.Choice("torch", "fused=False")]


@pytest.mark.parametrize("how", ["complex", "sparse", "state", "shared"])
def test_what_cannot_be_stepped_is_named_and_nothing_is_written(how: str) -> None:
    first = Parameter(torch.ones(2, 2))
    second = Parameter(torch.ones(2, 3, dtype=torch.complex64 if how == "complex" else torch.float32))
    first.grad, second.grad = torch.ones_like(first), torch.ones_like(second)
    optimizer = Adafactor([first, second])
    message = {"complex": "is complex", "sparse": "layout torch.sparse_coo", "shared": "share memory"}.get(how, "")
    if how == "sparse":
        second.grad = second.grad.to_sparse()
    elif how == "state":
        optimizer.state[second]["row_var"] = torch.zeros(3, 1)
        message = r"its state 'row_var' has shape \(3, 1\) on cpu, expected \(2, 1\)"
    elif how == "shared":
        second = Parameter(torch.ones(1, 3).expand(2, 3))
        second.grad = torch.ones(2, 3)
        optimizer = Adafactor([first, second])
    with pytest.raises(ValueError, match=rf"Adafactor: param_groups\[0\]\['params'\]\[1\]: .*{message}"):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(2, 2)) and first not in optimizer.state
