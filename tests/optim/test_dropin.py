"""A change of one import line: signatures, groups, checkpoints both ways, schedulers, hooks, copies, GradScaler."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from optim_cases import VARIANTS, began, error, fastest, like, make_params, ours, run, same_bits, torch_class
from torch.nn import Parameter
from torch.optim import lr_scheduler

import pytrain.optim
from pytrain.optim import SGD, AdamW, Lion

TORCH_NAMES = [name for name in VARIANTS if torch_class(name) is not None]
TORCH_CASES = [
    pytest.param(name, options, id=f"{name}-{options}") for name in TORCH_NAMES for options in VARIANTS[name]
]


def cls(name: str) -> Any:
    return pytrain.optim.REGISTRY[name]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_signature_is_torchs_plus_options(name: str) -> None:
    theirs = inspect.signature(torch_class(name)).parameters  # type: ignore[arg-type]
    mine = dict(inspect.signature(cls(name)).parameters)
    assert mine.pop("options").kind is inspect.Parameter.VAR_KEYWORD
    if "fused" not in theirs:
        assert mine.pop("fused").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(mine) == list(theirs)
    assert [(p.kind, p.default) for p in mine.values()] == [(p.kind, p.default) for p in theirs.values()]


@pytest.mark.parametrize(("name", "options"), TORCH_CASES)
def test_param_groups_and_state_dict_have_torchs_keys_and_dtypes(name: str, options: dict[str, Any]) -> None:
    a, b = make_params(torch.bfloat16), make_params(torch.bfloat16)
    mine, theirs = cls(name)(a, **options), torch_class(name)(b, **options)  # type: ignore[misc]
    run(mine, a, a, 1)
    run(theirs, b, b, 1)
    mine, theirs = mine.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for index in theirs["state"]:
        kinds = [{k: (v.dtype, v.shape) for k, v in side["state"][index].items()} for side in (mine, theirs)]
        assert kinds[0] == kinds[1]


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize(("name", "options"), TORCH_CASES)
def test_checkpoints_go_both_ways(name: str, options: dict[str, Any], ours_first: bool) -> None:
    exact = make_params(torch.float64)
    run(torch_class(name)(exact, lr=0.01, **options), exact, exact, 6)  # type: ignore[misc, call-arg]
    params = make_params(torch.float64)
    makers = [cls(name), torch_class(name)]
    first, second = makers if ours_first else makers[::-1]
    run(first(params, lr=0.01, **options), params, params, 0)
    optimizer = first(params, lr=0.01, **options)
    steps(optimizer, params, 0, 3)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = second(params, lr=0.5)
    other.load_state_dict(torch.load(file, weights_only=True))
    steps(other, params, 3, 6)
    # torch casts NAdam's fp32 scalar to the parameter's dtype on loading, and goes on in that.
    precision = torch.float32 if any(rule.scalars for rule in cls(name).rules) else torch.float64
    assert error(params, exact) <= 6 * torch.finfo(precision).eps * 4


def steps(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], begin: int, end: int) -> None:
    from optim_cases import gradients

    for step in range(begin, end):
        for p, g in zip(params, gradients(params, step), strict=True):
            p.grad = g
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("name", VARIANTS)
def test_save_load_go_on_is_bit_for_bit(name: str, how: str, dtype: torch.dtype) -> None:
    options = VARIANTS[name][-1]
    params, whole = make_params(dtype), make_params(dtype)
    optimizer = ours(name, params, **options)
    steps(optimizer, params, 0, 3)
    if how == "state_dict":
        params = like(params)
        fresh = ours(name, params)
        fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        optimizer = fresh
    else:
        optimizer = pickle.loads(pickle.dumps(optimizer)) if how == "pickle" else copy.deepcopy(optimizer)
        params = [p for group in optimizer.param_groups for p in group["params"]]
    steps(optimizer, params, 3, 6)
    steps(ours(name, whole, **options), whole, 0, 6)
    assert same_bits(params, whole)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor(3.0).double(), torch.tensor([3.0])])
def test_step_counts_of_older_checkpoints_load(step: Any) -> None:
    params = make_params(torch.float32, [(4,)])
    optimizer = AdamW(params)
    steps(optimizer, params, 0, 3)
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = step
    fresh = AdamW(params)
    fresh.load_state_dict(saved)
    steps(fresh, params, 3, 4)
    assert fresh.state[params[0]]["step"].item() == 4.0


def test_sgd_loads_torchs_empty_momentum_buffer() -> None:
    params = make_params(torch.float32, [(4,)])
    saved = torch.optim.SGD(params, lr=0.1, momentum=0.9, dampening=0.5).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    optimizer = SGD(params, lr=0.1)
    optimizer.load_state_dict(saved)
    params[0].grad = torch.ones(4)
    optimizer.step()
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], torch.ones(4))


def test_loading_does_not_change_how_to_compute() -> None:
    params = make_params(torch.float32, [(4,)])
    saved = torch.optim.AdamW(params, fused=False, capturable=True).state_dict()
    optimizer = AdamW(params)
    optimizer.load_state_dict(saved)
    group = optimizer.param_groups[0]
    assert (group["fused"], group["capturable"]) == (None, False)


def test_a_state_of_another_shape_is_named() -> None:
    params = make_params(torch.float32, [(4,), (5,)])
    optimizer = AdamW(params)
    steps(optimizer, params, 0, 1)
    saved = optimizer.state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(6)
    optimizer.load_state_dict(saved)
    before = like(params)
    with pytest.raises(ValueError, match=r"\['params'\]\[1\]: its state 'exp_avg' has shape \(6,\).*expected \(5,\)"):
        steps(optimizer, params, 1, 2)
    assert same_bits(params, before)


def test_named_parameters_are_kept() -> None:
    model = torch.nn.Linear(2, 3)
    optimizer = AdamW(model.named_parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


SCHEDULERS: list[Any] = [
    lambda o: lr_scheduler.StepLR(o, 2),
    lambda o: lr_scheduler.LambdaLR(o, lambda n: 0.9**n),
    lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, step_size_up=3),
    lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
    ),
]


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler", range(len(SCHEDULERS)))
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_schedulers_move_ours_as_torchs(name: str, scheduler: int, tensor_lr: bool) -> None:
    options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    results = []
    for make in (cls(name), torch_class(name)):
        params = make_params(torch.float64, [(4,), (3, 2)])
        fused = fastest(name) if make is torch_class(name) and tensor_lr else {}
        optimizer = make(params, lr=torch.tensor(0.05) if tensor_lr else 0.05, **options, **fused)
        plan = SCHEDULERS[scheduler](optimizer)
        for step in range(8):
            steps(optimizer, params, step, step + 1)
            plan.step(*([1.0] if isinstance(plan, lr_scheduler.ReduceLROnPlateau) else []))
        results.append(params)
    assert error(results[0], results[1]) <= 8 * 4 * torch.finfo(torch.float64).eps


def test_closures_run_once_with_gradients_enabled() -> None:
    p = Parameter(torch.ones(2))
    optimizer = SGD([p], lr=0.5)
    calls = []

    def closure() -> torch.Tensor:
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with torch.no_grad():
        loss = optimizer.step(closure)  # type: ignore[arg-type, call-overload]
    assert calls == [True] and loss.item() == 2.0 and torch.equal(p.detach(), torch.zeros(2))


def test_step_hooks_and_add_param_group() -> None:
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = AdamW([p])
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    p.grad = q.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [q], "lr": 0.5})
    optimizer.step()
    assert seen == ["before", "after"] * 2
    assert [int(optimizer.state[x]["step"]) for x in (p, q)] == [2, 1] and q.mean() < p.mean()


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (AdamW, {"lr": -1.0}, r"lr: expected >= 0, got -1"),
    (AdamW, {"betas": (1.0, 0.9)}, r"betas\[0\]: expected in \[0, 1\), got 1"),
    (AdamW, {"betas": (0.9, float("nan"))}, r"betas\[1\]: expected in \[0, 1\), got nan"),
    (AdamW, {"eps": -1e-8}, r"eps: expected >= 0"),
    (AdamW, {"lr": torch.ones(2)}, r"lr: expected one element, got a tensor of shape \(2,\)"),
    (Lion, {"weight_decay": -0.1}, r"weight_decay: expected >= 0"),
    (SGD, {"momentum": -0.1}, r"momentum: expected >= 0"),
    (SGD, {"nesterov": True}, r"nesterov: expected momentum > 0 and dampening == 0, got momentum=0"),
]


@pytest.mark.parametrize(("make", "options", "message"), BAD)
def test_bad_arguments_are_named(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make([Parameter(torch.ones(1))], **options)
    optimizer = make([Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(1))], **options})
    assert len(optimizer.param_groups) == 1


def test_what_cannot_be_honoured_says_what_to_use() -> None:
    with pytest.raises(RuntimeError, match=r"differentiable=True: AdamW .* use torch.optim"):
        AdamW([Parameter(torch.ones(1))], differentiable=True)
    with pytest.raises(RuntimeError, match="exclude each other"):
        AdamW([Parameter(torch.ones(1))], fused=True, foreach=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile_of_the_surrounding_step_is_right(backend: str) -> None:
    models = [torch.nn.Linear(4, 2) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [AdamW(m.parameters(), lr=0.1) for m in models]

    def train(model: torch.nn.Module, optimizer: AdamW, x: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    compiled = torch.compile(train, backend=backend)
    for _ in range(4):
        x = torch.randn(3, 4)
        train(models[0], optimizers[0], x)
        compiled(models[1], optimizers[1], x)
    assert all(torch.allclose(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert optimizers[1].state[models[1].weight]["step"] == 4
    torch._dynamo.reset()


# ---- torch.amp.GradScaler ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("amp_scaling", [True, False])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_grad_scaler_steps_and_skips(name: str, bad: bool, amp_scaling: bool, unscale_first: bool) -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer, plain = ours(name, [p], amp_scaling=amp_scaling), ours(name, [q])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((p * torch.tensor([1.0, 2.0, float("inf") if bad else 3.0])).sum()).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
        if not bad:
            assert torch.equal(p.grad, torch.tensor([1.0, 2.0, 3.0]))  # type: ignore[arg-type]
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == (512.0 if bad else 1024.0)
    if bad:
        assert torch.equal(p.detach(), torch.ones(3)) and not began(optimizer)
        assert optimizer.step_was_skipped is amp_scaling  # without it the scaler does not call step at all
    else:
        q.grad = torch.tensor([1.0, 2.0, 3.0])
        plain.step()
        assert same_bits([p], [q])


def test_an_inf_that_appears_after_unscale_is_stepped_as_torch_documents() -> None:
    """GradScaler checks in unscale_; what the user writes into gradients afterwards is the user's (pytorch#97415)."""
    p = Parameter(torch.ones(2))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu")
    scaler.scale(p.sum()).backward()
    scaler.unscale_(optimizer)
    p.grad[0] = float("inf")  # type: ignore[index]
    scaler.step(optimizer)
    assert torch.equal(p.detach(), torch.tensor([-float("inf"), 0.0]))


def test_scale_is_applied_in_the_torch_path_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_BACKEND", "torch")
    p = Parameter(torch.ones(2))
    optimizer, scaler = SGD([p], lr=1.0), torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale((2 * p).sum()).backward()
    scaler.step(optimizer)
    assert torch.equal(p.detach(), torch.full((2,), -1.0))
