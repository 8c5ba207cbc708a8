"""Gradient release: the same bits as a step after backward, one gradient at a time, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from devices import randn
from optim_cases import same_bits
from torch import nn

from pytrain.optim import SGD, AdamW, Lion

OPTIONS: list[dict[str, Any]] = [
    {},
    {"rounding": "stochastic", "state_dtype": "8bit", "seed": 5},
    {"master_weights": True, "ema_decay": 0.9},
    {"fused": False},
]


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 600), nn.Tanh(), nn.Linear(600, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    dtype = next(model.parameters()).dtype
    x = randn(4, 8, generator=torch.Generator().manual_seed(step)).to(dtype)
    model(x).square().mean().backward()


@pytest.mark.parametrize("cls", [AdamW, SGD, Lion])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_bits_are_those_of_a_step_after_backward(cls: Any, options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "rounding" in options or "master_weights" in options else torch.float32
    a = make_model(dtype)
    b = copy.deepcopy(a)
    released = cls(a.parameters(), lr=0.01, step_in_backward=True, **options)
    plain = cls(b.parameters(), lr=0.01, **options)
    for step in range(5):
        if step == 3:  # a scheduler's work
            released.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.003
        backward(a, step)
        backward(b, step)
        released.step()
        plain.step()
        plain.zero_grad()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert p.grad is None and same_bits([p], [q])
        assert released.state[p].keys() == plain.state[q].keys()
        assert same_bits(list(released.state[p].values()), [plain.state[q][key] for key in released.state[p]])


def test_one_gradient_at_a_time_is_alive() -> None:
    model = make_model()
    optimizer = AdamW(model.parameters(), step_in_backward=True)
    alive = []
    for p in model.parameters():  # hooks that run after the optimizer's
        p.register_post_accumulate_grad_hook(lambda _: alive.append([q.grad is None for q in model.parameters()]))
    backward(model, 0)
    optimizer.step()
    assert len(alive) == 6 and all(all(freed) for freed in alive)


def test_a_second_backward_before_step_is_refused() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1, step_in_backward=True)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"a second gradient of shape \(2,\) arrived before step\(\).*accumulat"):
        backward(model, 1)
    optimizer.step()
    backward(model, 2)


def test_a_loss_scaler_is_refused() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1, step_in_backward=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(torch.ones(1, 8)).sum()).backward()
    with pytest.raises(RuntimeError, match="step_in_backward=True: .* gradients that were still scaled"):
        scaler.step(optimizer)


def test_an_unused_parameter_keeps_its_count() -> None:
    model, unused = make_model(), nn.Parameter(torch.ones(3))
    optimizer = AdamW([*model.parameters(), unused], step_in_backward=True)
    backward(model, 0)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(3)) and not optimizer.state.get(unused, {}).get("step", 0.0)


def test_parameters_that_are_added_later_are_released_too() -> None:
    model, late = make_model(), nn.Parameter(torch.ones(3))
    optimizer = SGD(model.parameters(), lr=0.5, step_in_backward=True)
    optimizer.add_param_group({"params": [late]})
    late.sum().backward()
    assert late.grad is None and late.tolist() == [0.5] * 3
    optimizer.step()
