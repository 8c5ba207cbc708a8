"""Tables kept between steps never lie: what the user changes, replaces, swaps or shares is seen by the next step."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from optim_cases import LAYOUTS, VARIANTS, error, gradients, like, make_params, ours, run, same_bits
from torch import Tensor
from torch.nn import Parameter

from pytrain import backend
from pytrain.optim import SGD, Adam, AdamW

NAMES = list(VARIANTS)
SHAPES = [(3, 4, 2, 2), (5,), ()]


class Twins:
    """An optimizer of ours by the kernels, and one on the torch path, over equal parameters."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.mine, self.plain = make_params(dtype, SHAPES), make_params(dtype, SHAPES)
        self.a, self.b = ours(name, self.mine, **options), ours(name, self.plain, fused=False, **options)
        self.steps = 0

    def step(self) -> None:
        """One step of both, and a comparison: a few roundings a step apart at most."""
        self.steps += 1
        for p, q, g in zip(self.mine, self.plain, gradients(self.plain, self.steps), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        self.a.step()
        self.b.step()
        scale = 4 * self.steps * torch.finfo(self.mine[0].dtype).eps
        assert error(self.mine, [q.detach().double() for q in self.plain]) <= scale


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_format_of_parameters_may_change_between_steps(name: str) -> None:
    twins = Twins(name, **VARIANTS[name][-1])
    for layout in LAYOUTS.values():
        twins.step()
        twins.mine[0].data = layout(twins.mine[0].data)
    twins.step()
    assert twins.a.backend == "native" or backend.facts is None


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_of_a_parameter_may_change_with_its_state(name: str) -> None:
    twins = Twins(name, **VARIANTS[name][-1])
    twins.step()
    for params, optimizer in ((twins.mine, twins.a), (twins.plain, twins.b)):
        params[1].grad = None
        params[1].data = torch.linspace(-1, 1, 9).double()
        optimizer.state.pop(params[1], None)
    twins.step()
    twins.step()


def test_the_list_of_groups_may_be_replaced() -> None:
    p, q = Parameter(torch.zeros(3)), Parameter(torch.zeros(3))
    optimizer = SGD([p], lr=1.0)
    p.grad = q.grad = torch.ones(3)
    optimizer.step()
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": [q], "lr": 0.5}]
    optimizer.step()
    assert p.detach().tolist() == [-1.0] * 3 and q.detach().tolist() == [-0.5] * 3


# ---- shared memory ------------------------------------------------------------------------------------------------


def test_views_of_one_buffer_are_stepped_apart() -> None:
    whole, apart = torch.linspace(-1, 1, 40), torch.linspace(-1, 1, 40)
    views = [Parameter(whole[:7]), Parameter(whole[7:8]), Parameter(whole[8:32].view(4, 6)), Parameter(whole[32:].t())]
    alone = [Parameter(apart[:7].clone()), Parameter(apart[7:8].clone()), Parameter(apart[8:32].view(4, 6).clone())]
    alone.append(Parameter(apart[32:].clone()))
    run(AdamW(views), views, views, 3)
    run(AdamW(alone), alone, alone, 3)
    assert same_bits(views, alone) and torch.equal(whole, torch.cat([p.detach().flatten() for p in alone]))


def test_one_state_tensor_under_two_parameters_is_told_apart() -> None:
    params = make_params(torch.float32, [(6,), (6,)])
    optimizer = AdamW(params)
    run(optimizer, params, params, 1)
    one, two = (optimizer.state[p] for p in params)
    two["exp_avg"] = one["exp_avg"]
    expected = copy.deepcopy(optimizer)
    copies = expected.param_groups[0]["params"]
    expected.state[copies[1]]["exp_avg"] = expected.state[copies[1]]["exp_avg"].clone()
    run(optimizer, params, params, 2)
    run(expected, copies, params, 2)
    assert same_bits(params, copies)


def test_two_optimizers_over_the_same_parameters_keep_their_own_state() -> None:
    p, q = make_params(torch.float64, [(6,)])[0], make_params(torch.float64, [(6,)])[0]
    mine = [Adam([p], lr=0.1), SGD([p], lr=0.1, momentum=0.9)]
    theirs = [torch.optim.Adam([q], lr=0.1), torch.optim.SGD([q], lr=0.1, momentum=0.9)]
    for _ in range(3):
        for ours_, other in zip(mine, theirs, strict=True):
            p.grad = torch.linspace(1, 2, 6).double()
            q.grad = p.grad.clone()
            ours_.step()
            other.step()
    assert error([p], [q]) <= 24 * torch.finfo(torch.float64).eps


def test_a_lazy_copy_of_a_parameter_keeps_the_old_values() -> None:
    """torch's copy-on-write tensors: writing through a remembered address would change the copy too."""
    if not hasattr(torch, "_lazy_clone"):
        pytest.skip(f"torch {torch.__version__} has no copy-on-write tensors")
    p = Parameter(torch.ones(4))
    optimizer = SGD([p], lr=1.0)
    p.grad = torch.ones(4)
    optimizer.step()
    snapshot, grad = torch._lazy_clone(p.detach()), torch.ones(4)
    p.grad = torch._lazy_clone(grad)
    optimizer.step()
    assert snapshot.tolist() == [0.0] * 4 and p.detach().tolist() == [-1.0] * 4 and grad.tolist() == [1.0] * 4


# ---- what is kept alive, and what is not --------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_model_converted_by_swapping_is_stepped(name: str) -> None:
    """`set_swap_module_params_on_conversion` refuses parameters that anything in C++ still holds."""
    model = torch.nn.Linear(3, 2)
    optimizer = ours(name, list(model.parameters()))
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    weight = model.weight
    optimizer.zero_grad()
    gc.collect()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert model.weight is weight and weight.dtype == torch.float64
    optimizer.state.clear()
    before = like([weight])
    model(torch.ones(3).double()).sum().backward()
    optimizer.step()
    assert not same_bits([weight], before)


def test_an_optimizer_goes_with_its_last_reference() -> None:
    p = Parameter(torch.ones(100))
    optimizer = AdamW([p])
    p.grad = torch.ones(100)
    optimizer.step()
    refs = [weakref.ref(optimizer), weakref.ref(optimizer.state[p]["exp_avg"])]
    gc.disable()
    try:
        del optimizer
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


def test_replaced_state_is_let_go_at_the_next_step() -> None:
    p = Parameter(torch.ones(50_000))
    optimizer = AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    old = weakref.ref(optimizer.state[p]["exp_avg"])
    optimizer.state[p]["exp_avg"] = torch.zeros_like(p)
    optimizer.step()
    gc.collect()
    assert old() is None


@pytest.mark.parametrize("name", NAMES)
def test_gradients_replaced_by_another_kind_are_seen(name: str) -> None:
    """Another layout, one that requires grad, one of a view, none, and back."""
    twins = Twins(name)
    twins.step()
    kinds: list[Any] = [
        lambda g: g.clone().requires_grad_(),
        lambda g: g.t() if g.dim() == 2 else g.clone(),
        lambda g: torch.stack([g, g])[1],
        lambda g: torch.stack([g, g], -1)[..., 0],
        lambda g: None,
        lambda g: g.clone(),
    ]
    for kind in kinds:
        for p, q in zip(twins.mine, twins.plain, strict=True):
            g = torch.linspace(-1, 1, p.numel()).double().reshape(p.shape)
            p.grad, q.grad = kind(g), kind(g)
        twins.a.step()
        twins.b.step()
        assert error(twins.mine, [q.detach() for q in twins.plain]) <= 1e-13


@pytest.mark.parametrize("name", NAMES)
def test_stepping_from_a_post_accumulate_hook(name: str) -> None:
    """One optimizer a parameter, stepped inside backward, its gradient freed at once."""
    models = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    together = ours(name, list(models[0].parameters()))
    each = {p: ours(name, [p]) for p in models[1].parameters()}

    def step(p: Tensor) -> None:
        each[p].step()
        each[p].zero_grad()

    for p in models[1].parameters():
        p.register_post_accumulate_grad_hook(step)
    for _ in range(3):
        for model in models:
            model(torch.ones(3, 4)).square().sum().backward()
        together.step()
        together.zero_grad()
    assert same_bits(*(list(model.parameters()) for model in models))
    assert all(p.grad is None for p in models[1].parameters())


def test_steps_in_other_threads_give_the_same_bits() -> None:
    results = []
    for elsewhere in (False, True):
        params = make_params(torch.float32, [(200_003,), (5,)])
        optimizer = AdamW(params)
        work = threading.Thread(target=run, args=(optimizer, params, params, 2)) if elsewhere else None
        if work is None:
            run(optimizer, params, params, 2)
        else:
            work.start()
            work.join()
        results.append(params)
    assert same_bits(*results)


def test_steps_inside_inference_mode_leave_a_usable_optimizer() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    a, b = AdamW([p]), AdamW([q])
    p.grad = q.grad = torch.ones(3)
    with torch.inference_mode():
        a.step()
    a.step()
    b.step()
    b.step()
    assert same_bits([p], [q])
