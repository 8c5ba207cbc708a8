"""Muon: torch.optim's results for matrices, AdamW's for all else, checkpoints, schedulers, GradScaler, arguments."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from optim_cases import error, gradients, like, make_params, run, same_bits
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from pytrain.optim import AdamW, muon
from pytrain.optim.muon import Muon, orthogonalize

OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": False, "weight_decay": 0.0},
    {"adjust_lr_fn": "match_rms_adamw", "momentum": 0.5, "weight_decay": 0.3},
    {"adjust_lr_fn": "original", "ns_steps": 2, "ns_coefficients": (1.5, -0.5, 0.0), "eps": 0.1},
    {"momentum": 0.0, "ns_steps": 1},
]
MATRICES = [(1, 1), (5, 1), (1, 4), (3, 8), (8, 3), (8, 3), (3, 8), (17, 16), (33, 7)]
MIXED = [(3, 8), (5,), (), (8, 3), (2, 3, 4), (3, 8), (0,)]
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], begin: int, end: int) -> None:
    """The steps from `begin` to `end` of the sequence that `run` takes."""
    for step in range(begin, end):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()


def moves(params: list[Tensor], before: list[Tensor]) -> list[Tensor]:
    """How far each parameter went."""
    return [p.detach().double() - b.detach().double() for p, b in zip(params, before, strict=True)]


def in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make both sides compute products in fp64 without rounding: what is left to compare is exact."""

    def ours(matrices: Tensor, *rest: Any, dtype: torch.dtype) -> Tensor:
        return orthogonalize(matrices, *rest, dtype=torch.float64)

    monkeypatch.setattr(muon, "orthogonalize", ours)
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.clone())


@pytest.mark.parametrize("batch", [1, 2**20])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_results_and_states_are_torchs_in_fp64(
    options: dict[str, Any], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_fp64(monkeypatch)
    monkeypatch.setattr(muon, "BATCH", batch)
    a = make_params(torch.float64, MATRICES)
    b = like(a)
    mine, theirs = Muon(a, lr=0.02, **options), torch.optim.Muon(b, lr=0.02, **options)
    steps(mine, a, 0, 6)
    steps(theirs, b, 0, 6)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)  # five Newton-Schulz steps let an ulp grow
        assert mine.state[p].keys() == theirs.state[q].keys()
        buffers = mine.state[p]["momentum_buffer"], theirs.state[q]["momentum_buffer"]
        torch.testing.assert_close(*buffers, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_error_is_at_most_twice_torchs(options: dict[str, Any], dtype: torch.dtype) -> None:
    """The error of bf16 products, as a share of what torch's own rounding does."""
    a = make_params(dtype, [(24, 40), (40, 24), (24, 40), (33, 7)])
    b, start = like(a), like(a)
    run(Muon(a, **options), a, a)
    run(torch.optim.Muon(b, **options), b, a)
    exact = like(start, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        in_fp64(patch)
        run(torch.optim.Muon(exact, **options), exact, a)
    assert error(moves(a, start), moves(exact, start)) <= 2 * error(moves(b, start), moves(exact, start))


@pytest.mark.parametrize("coefficients", [COEFFICIENTS, (1.5, -0.5, 0.0)])
@pytest.mark.parametrize("shape", [(16, 16), (24, 40), (40, 24), (3, 100)])
def test_products_in_fp32_round_as_those_in_bf16(
    shape: tuple[int, int], coefficients: tuple[float, float, float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, *shape, generator=generator)
    found = [
        orthogonalize(matrices, coefficients, 5, 1e-7, dtype=dtype).double()
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    ]
    theirs, mine = ((x - found[2]).norm() for x in found[:2])
    assert mine <= 2 * theirs and theirs <= 0.05 * found[2].norm()


def test_singular_values_end_near_one() -> None:
    """Jordan et al. 2024: their polynomial takes every singular value that is not tiny into [0.7, 1.2], about."""
    generator = torch.Generator().manual_seed(0)
    x = orthogonalize(torch.randn(2, 20, 60, generator=generator), COEFFICIENTS, 5, 1e-7, dtype=torch.float32)
    values = torch.linalg.svdvals(x)
    assert values.min() > 0.6 and values.max() < 1.3


def test_match_rms_adamw_moves_elements_by_a_fifth_of_lr() -> None:
    """Liu et al. 2025 (arXiv:2502.16982), section 2.2: the root mean square of an update is 0.2 lr, whatever the shape.

    That is for singular values of 1. None ends above 1.2, and most end above 0.6.
    """
    for shape in ((32, 32), (16, 64), (64, 16)):
        p = Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([p], lr=1.0, adjust_lr_fn="match_rms_adamw").step()
        assert 0.2 * 0.6 <= p.detach().square().mean().sqrt() <= 0.2 * 1.2


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_bf16_momentum_is_not_normalized_in_place(nesterov: bool) -> None:
    """torch 2.13 divides the momentum itself by its norm where it is bf16 and without Nesterov."""
    p = Parameter(torch.ones(3, 4, dtype=torch.bfloat16))
    p.grad = torch.full_like(p, 8.0)
    optimizer = Muon([p], momentum=0.5, nesterov=nesterov)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["momentum_buffer"], torch.full_like(p, 4.0))


def test_strides_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp64(monkeypatch)
    plain = torch.randn(6, 4, dtype=torch.float64)
    p, q = Parameter(plain.t()), Parameter(plain.t().contiguous())
    mine, theirs = Muon([p], lr=0.1), torch.optim.Muon([q], lr=0.1)
    for _ in range(3):
        q.grad = torch.randn(4, 6, dtype=torch.float64)
        p.grad = q.grad.t().contiguous().t()
        mine.step()
        theirs.step()
    torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-11)
    assert mine.state[p]["momentum_buffer"].stride() == p.stride()


@pytest.mark.parametrize("shape", [(0, 5), (7, 0), (0, 0)])
def test_empty_matrices_step(shape: tuple[int, int]) -> None:
    params = [Parameter(torch.empty(shape)), Parameter(torch.ones(2, 2))]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = Muon(params)
    optimizer.step()
    optimizer.step()
    assert optimizer.state[params[0]]["momentum_buffer"].shape == shape


def test_a_zero_gradient_only_decays() -> None:
    p = Parameter(torch.ones(2, 3))
    p.grad = torch.zeros(2, 3)
    Muon([p], lr=0.5, weight_decay=0.5).step()
    assert torch.equal(p.detach(), torch.full((2, 3), 0.75))


# ---- what AdamW steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_no_matrix_is_stepped_by_adamw(dtype: torch.dtype) -> None:
    a = make_params(dtype, MIXED)
    b = like(a)
    options = {"adamw_betas": (0.8, 0.9), "adamw_eps": 1e-6, "adamw_weight_decay": 0.2, "adamw_lr_ratio": 0.5}
    mine = Muon(a, lr=0.02, **options)  # type: ignore[arg-type]
    muons = [p for p in b if p.ndim == 2]
    rest = [p for p in b if p.ndim != 2]
    plain = Muon(muons, lr=0.02), AdamW(rest, lr=0.01, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2)
    for step in range(4):
        for p, q, g in zip(a, b, gradients(a, step), strict=True):
            p.grad, q.grad = g, g
        mine.step()
        for optimizer in plain:
            optimizer.step()
    assert same_bits(a, b)
    assert [sorted(mine.state[p]) for p in a] == [
        ["momentum_buffer"] if p.ndim == 2 else ["exp_avg", "exp_avg_sq", "step"] for p in a
    ]


def test_groups_choose_who_steps_them() -> None:
    a = make_params(torch.float32, [(3, 4), (3, 4)])
    b = like(a)
    mine = Muon([{"params": a[:1]}, {"params": a[1:], "use_muon": False, "lr": 0.3, "adamw_betas": (0.5, 0.6)}])
    plain = Muon(b[:1]), AdamW(b[1:], lr=0.3, betas=(0.5, 0.6), weight_decay=0.1)
    for step in range(3):
        for p, q, g in zip(a, b, gradients(a, step), strict=True):
            p.grad, q.grad = g, g
        mine.step()
        for optimizer in plain:
            optimizer.step()
    assert same_bits(a, b) and "exp_avg" in mine.state[a[1]]


def test_what_a_group_or_its_members_change_to_is_followed() -> None:
    p, q = Parameter(torch.ones(2, 2)), Parameter(torch.ones(2))
    optimizer = Muon([p], adamw_betas=(0.0, 0.0), weight_decay=0.0, lr=0.5)
    p.grad, q.grad = torch.ones(2, 2), torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [q]})
    optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((2,), 0.5))
    optimizer.param_groups[1]["adamw_lr_ratio"] = 0.5
    optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((2,), 0.25))
    optimizer.param_groups[1]["params"] = []
    optimizer.step()
    torch.testing.assert_close(q.detach(), torch.full((2,), 0.25))
    optimizer.param_groups[0]["use_muon"] = False
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


def test_clearing_the_state_begins_anew() -> None:
    params, fresh = make_params(torch.float32, MIXED), make_params(torch.float32, MIXED)
    optimizer = Muon(params)
    steps(optimizer, params, 0, 2)
    optimizer.state.clear()
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    steps(optimizer, params, 0, 2)
    steps(Muon(fresh), fresh, 0, 2)
    assert same_bits(params, fresh)


def test_choices_name_who_steps_a_group() -> None:
    optimizer = Muon([{"params": [Parameter(torch.ones(2))]}, {"params": [Parameter(torch.ones(2, 2))]}], fused=False)
    assert [choice.reason for choice in optimizer.choices] == [
        "fused=False",
        "Newton-Schulz steps by torch's matrix products",
    ]
    assert "Newton-Schulz" in repr(optimizer)


# ---- a drop-in -----------------------------------------------------------------------------------------------------


def test_signature_is_torchs_plus_keywords() -> None:
    theirs = inspect.signature(torch.optim.Muon).parameters
    mine = inspect.signature(Muon).parameters
    assert [(p.name, p.kind, p.default) for p in list(mine.values())[: len(theirs)]] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    extra = list(mine.values())[len(theirs) :]
    assert {p.kind for p in extra[:-1]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.default for p in extra[:-1]} == {None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_has_torchs_groups_keys_shapes_and_dtypes(dtype: torch.dtype) -> None:
    a, b = make_params(dtype, MATRICES), make_params(dtype, MATRICES)
    mine, theirs = Muon(a, weight_decay=0.3), torch.optim.Muon(b, weight_decay=0.3)
    run(mine, a, a, 1)
    run(theirs, b, b, 1)
    saved, wanted = mine.state_dict(), theirs.state_dict()
    assert saved["param_groups"] == wanted["param_groups"]
    assert [list(group) for group in saved["param_groups"]] == [list(group) for group in wanted["param_groups"]]
    for index, state in wanted["state"].items():
        kinds = [{k: (v.dtype, v.shape) for k, v in side.items()} for side in (saved["state"][index], state)]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("ours_first", [True, False])
def test_checkpoints_go_both_ways(ours_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    in_fp64(monkeypatch)
    exact, params = make_params(torch.float64, MATRICES), make_params(torch.float64, MATRICES)
    run(torch.optim.Muon(exact, lr=0.02), exact, exact, 6)
    makers: list[Any] = [Muon, torch.optim.Muon]
    first, second = makers if ours_first else makers[::-1]
    optimizer = first(params, lr=0.02)
    steps(optimizer, params, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = second(params, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    steps(other, params, 3, 6)
    assert error(params, exact) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_save_load_go_on_is_bit_for_bit(how: str, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {"adamw_betas": (0.5, 0.6), "adamw_lr_ratio": 2.0}
    params, whole = make_params(dtype, MIXED), make_params(dtype, MIXED)
    optimizer = Muon(params, **options)
    steps(optimizer, params, 0, 3)
    if how == "state_dict":
        params = like(params)
        fresh = Muon(params)
        steps(fresh, params, 0, 1)  # an inner AdamW of an earlier state
        with torch.no_grad():
            for p, group in zip(params, optimizer.param_groups[0]["params"], strict=True):
                p.copy_(group)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = fresh
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
    steps(optimizer, params, 3, 6)
    steps(Muon(whole, **options), whole, 0, 6)
    assert same_bits(params, whole)


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedulers_move_both_parts(tensor_lr: bool) -> None:
    a = make_params(torch.float32, MIXED)
    b = like(a)
    lr: Any = torch.tensor(0.25) if tensor_lr else 0.25
    mine = Muon(a, lr=lr, adamw_lr_ratio=0.5)
    plain = [Muon([p for p in b if p.ndim == 2], lr=0.25)]
    rest = [p for p in b if p.ndim != 2]
    plain += [AdamW(rest, lr=0.125, betas=(0.9, 0.95), weight_decay=0.1)]  # type: ignore[list-item]
    plans = [lr_scheduler.ExponentialLR(optimizer, 0.5) for optimizer in (mine, *plain)]
    for step in range(4):
        for p, q, g in zip(a, b, gradients(a, step), strict=True):
            p.grad, q.grad = g, g
        for optimizer in (mine, *plain):
            optimizer.step()
        for plan in plans:
            plan.step()
    assert same_bits(a, b)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("amp_scaling", [True, False])
def test_grad_scaler_steps_and_skips(bad: bool, amp_scaling: bool) -> None:
    params, plain = make_params(torch.float32, [(2, 3), (3,)]), make_params(torch.float32, [(2, 3), (3,)])
    before = like(params)
    optimizer, scaler = Muon(params, amp_scaling=amp_scaling), torch.amp.GradScaler("cpu", init_scale=1024.0)
    factors = gradients(params, 0)
    loss = sum((p * f).sum() for p, f in zip(params, factors, strict=True))
    scaler.scale(loss * (float("inf") if bad else 1.0)).backward()  # type: ignore[operator]
    scaler.step(optimizer)
    scaler.update()
    if bad:
        assert same_bits(params, before) and not optimizer.state and scaler.get_scale() == 512.0
        return
    for q, f in zip(plain, factors, strict=True):
        q.grad = f
    Muon(plain).step()
    assert same_bits(params, plain)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"lr": -1.0}, r"lr: expected >= 0, got -1"),
    ({"lr": torch.ones(2)}, r"lr: expected one element, got a tensor of shape \(2,\)"),
    ({"momentum": -0.1}, r"momentum: expected >= 0, got -0.1"),
    ({"weight_decay": -0.1}, r"weight_decay: expected >= 0, got -0.1"),
    ({"adjust_lr_fn": "best"}, r"adjust_lr_fn: expected one of .*, got 'best'"),
    ({"ns_steps": 100}, r"ns_steps: expected < 100, got 100"),
    ({"ns_coefficients": (1.0, 2.0)}, r"ns_coefficients: expected three numbers"),
    ({"adamw_lr_ratio": -1.0}, r"adamw_lr_ratio: expected >= 0"),
    ({"adamw_betas": (0.9, 1.0)}, r"adamw_betas\[1\]: expected in \[0, 1\)"),
    ({"adamw_eps": -1.0}, r"adamw_eps: expected >= 0"),
    ({"adamw_weight_decay": -1.0}, r"adamw_weight_decay: expected >= 0"),
    ({"use_muon": True}, r"use_muon: expected matrices, but params\[0\] of the group has shape \(1,\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Muon([Parameter(torch.ones(1))], **options)
    optimizer = Muon([Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], **options})
    assert len(optimizer.param_groups) == 1


def test_unsupported_options_are_named() -> None:
    with pytest.raises(ValueError, match="master_weights: Muon does not support it"):
        Muon([Parameter(torch.ones(1))], master_weights=True)


@pytest.mark.parametrize("how", ["complex", "sparse", "state", "adamw"])
def test_what_cannot_be_stepped_is_named_and_nothing_is_written(how: str) -> None:
    first, last = Parameter(torch.ones(2, 2)), Parameter(torch.ones(3))
    second = Parameter(torch.ones(2, 3, dtype=torch.complex64 if how == "complex" else torch.float32))
    first.grad, second.grad, last.grad = torch.ones_like(first), torch.ones_like(second), torch.ones_like(last)
    optimizer = Muon([first, second, last])
    place, message = 1, "is complex"
    if how == "sparse":
        second.grad, message = second.grad.to_sparse(), "layout torch.sparse_coo"
    elif how == "state":
        optimizer.state[second]["momentum_buffer"] = torch.zeros(3, 2)
        message = r"its state 'momentum_buffer' has shape \(3, 2\) on cpu, expected \(2, 3\)"
    elif how == "adamw":
        last.grad, place, message = last.grad.to_sparse(), 2, "layout torch.sparse_coo"
    with pytest.raises(ValueError, match=rf"Muon: param_groups\[0\]\['params'\]\[{place}\]: .*{message}"):
        optimizer.step()
    assert torch.equal(first.detach(), torch.ones(2, 2)) and torch.equal(last.detach(), torch.ones(3))
    assert first not in optimizer.state and last not in optimizer.state
