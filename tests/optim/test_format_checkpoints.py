"""Checkpoints of every storage format: bit for bit, between formats, from and to torch, and by torch.distributed."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from format_cases import ALL_FORMATS_OF_ADAMW, BF16, FORMATS, SOME_FORMATS_OF_ALL, equal, state_of
from optim_cases import gradients, like, make_params, ours, same_bits, torch_class
from torch import Tensor

from pytrain.optim import AdamW, FusedOptimizer


def steps(optimizer: torch.optim.Optimizer, params: list[Tensor], begin: int, end: int) -> None:
    for step in range(begin, end):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()


def saved(optimizer: FusedOptimizer, **how: Any) -> dict[str, Any]:
    """A checkpoint, through a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(**how), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("how", ["state_dict", "deepcopy"])
@pytest.mark.parametrize(("name", "form"), ALL_FORMATS_OF_ADAMW + SOME_FORMATS_OF_ALL)
def test_save_load_go_on_is_bit_for_bit_in_every_format(name: str, form: str, how: str) -> None:
    dtype, storage = FORMATS[form]
    shapes = [(7,), (5000,), (4, 3)]
    params, whole = make_params(dtype, shapes), make_params(dtype, shapes)
    optimizer = ours(name, params, **storage)
    steps(optimizer, params, 0, 2)
    if how == "deepcopy":
        optimizer = copy.deepcopy(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
    else:
        params = like(params)
        fresh = ours(name, params, **storage)
        fresh.load_state_dict(saved(optimizer))
        optimizer = fresh
    steps(optimizer, params, 2, 4)
    straight = ours(name, whole, **storage)
    steps(straight, whole, 0, 4)
    assert equal(state_of(optimizer), state_of(straight))


@pytest.mark.parametrize(
    ("name", "form"), [case for case in ALL_FORMATS_OF_ADAMW + SOME_FORMATS_OF_ALL if torch_class(case[0])]
)
def test_checkpoints_go_from_torch_into_every_format_and_back(name: str, form: str) -> None:
    dtype, storage = FORMATS[form]
    params = make_params(dtype, [(7,), (5000,)])
    theirs: Any = torch_class(name)(params)  # type: ignore[misc]
    steps(theirs, params, 0, 2)
    good = all(p.isfinite().all() for p in params)  # torch's own Adam in fp16 divides by an eps of zero
    mine = ours(name, params, **storage)
    mine.load_state_dict(theirs.state_dict())
    steps(mine, params, 2, 3)
    back: Any = torch_class(name)(params)  # type: ignore[misc]
    portable = saved(mine, portable=True)
    back.load_state_dict(portable)
    assert portable["state"].keys() == theirs.state_dict()["state"].keys()
    for index, state in portable["state"].items():
        keys = {key for key, value in theirs.state_dict()["state"][index].items() if value is not None}
        assert state.keys() == keys
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        assert all(value.dtype == wide for key, value in state.items() if value.dim() and key != "step")
    assert all(p.isfinite().all() for p in params) or not good
    steps(back, params, 3, 4)


@pytest.mark.parametrize("to", ["compact master", "kahan", "8-bit state, master", "stochastic"])
@pytest.mark.parametrize("begin", ["master", "compact master", "kahan", "8-bit state, master"])
def test_checkpoints_go_from_one_format_into_another(begin: str, to: str) -> None:
    params = make_params(BF16, [(7,), (5000,)])
    first = AdamW(params, **FORMATS[begin][1])
    steps(first, params, 0, 3)
    second = AdamW(params, **FORMATS[to][1])
    second.load_state_dict(saved(first))
    steps(second, params, 3, 4)
    wanted = AdamW(like(params), **FORMATS[to][1])
    steps(wanted, wanted.param_groups[0]["params"], 0, 1)
    for p, q in zip(params, wanted.param_groups[0]["params"], strict=True):
        kinds = [{k: v.dtype for k, v in o.state[x].items()} for o, x in ((second, p), (wanted, q))]
        if FORMATS[to][1].get("state_dtype") or ("master" in to and "8-bit" not in begin):
            assert kinds[0].keys() == kinds[1].keys()
        assert second.state[p]["step"] == 4


@pytest.mark.parametrize("form", ["master", "8-bit state", "average", "kahan"])
def test_dcps_own_step_changes_neither_parameters_nor_averages(form: str) -> None:
    """get_optimizer_state_dict steps a fresh optimizer once by itself, with zero gradients and a rate of zero."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    dtype, storage = FORMATS[form]
    model = torch.nn.Linear(70, 70).to(dtype)
    before = like(list(model.parameters()))
    optimizer = AdamW(model.parameters(), lr=0.5, weight_decay=0.5, **storage)
    found = get_optimizer_state_dict(model, optimizer)
    assert same_bits(before, list(model.parameters())) and optimizer.param_groups[0]["lr"] == 0.5
    for p in model.parameters():
        if "ema" in optimizer.state[p]:
            assert torch.equal(optimizer.state[p]["ema"], p.detach())
    for step in range(2):
        for p, g in zip(model.parameters(), gradients(list(model.parameters()), step), strict=True):
            p.grad = g
        optimizer.step()
    found = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other = AdamW(model.parameters(), **storage)
    set_optimizer_state_dict(model, other, found)
    assert equal(state_of(optimizer), state_of(other))
