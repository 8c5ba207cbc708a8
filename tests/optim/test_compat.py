"""Where optimizers are put to work: every LR scheduler, hooks, hosts' own checks, checkpoints on disk, compile."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_cases import VARIANTS, error, fastest, gradients, like, make_params, ours, run, same_bits, torch_class
from torch.nn import Parameter
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pytrain import backend
from pytrain.optim import REGISTRY, SGD, AdamW, FusedOptimizer

NAMES = list(VARIANTS)
TORCH_NAMES = [name for name in NAMES if torch_class(name) is not None]

# ---- schedulers ---------------------------------------------------------------------------------------------------

S = lr_scheduler
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: S.LambdaLR(o, lambda n: 0.9**n),
    "MultiplicativeLR": lambda o: S.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: S.StepLR(o, 2),
    "MultiStepLR": lambda o: S.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: S.ConstantLR(o, 0.5, 3),
    "LinearLR": lambda o: S.LinearLR(o, 0.2, total_iters=4),
    "ExponentialLR": lambda o: S.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: S.PolynomialLR(o, 6, power=2.0),
    "CosineAnnealingLR": lambda o: S.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: S.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: S.CyclicLR(o, 0.001, 0.1, step_size_up=3, cycle_momentum=True),
    "OneCycleLR": lambda o: S.OneCycleLR(o, 0.1, total_steps=10, cycle_momentum=True),
    "ReduceLROnPlateau": lambda o: S.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: S.SequentialLR(o, [S.ConstantLR(o, 0.1), S.ExponentialLR(o, 0.9)], milestones=[2]),
    "ChainedScheduler": lambda o: S.ChainedScheduler([S.ConstantLR(o, 0.1), S.ExponentialLR(o, 0.9)]),
}
NOT_SCHEDULERS = {"LRScheduler", "Optimizer", "Counter"}


def test_every_scheduler_of_torch_is_tried() -> None:
    classes = {n for n, c in vars(lr_scheduler).items() if inspect.isclass(c) and c.__module__ == lr_scheduler.__name__}
    assert {n for n in classes if n in lr_scheduler.__all__} - NOT_SCHEDULERS == SCHEDULERS.keys()


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", ["adamw", "sgd"])  # one with betas, one with a momentum
def test_schedulers_move_ours_as_torchs(name: str, scheduler: str, tensor_lr: bool) -> None:
    finals, groups = [], []
    for cls in (REGISTRY[name], torch_class(name)):
        params = make_params(torch.float64, [(4,), (3, 2)])
        options: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
        if tensor_lr and cls is torch_class(name):
            options |= fastest(name)
        optimizer: Any = cls(params, lr=torch.tensor(0.05) if tensor_lr else 0.05, **options)  # type: ignore[misc]
        plan = SCHEDULERS[scheduler](optimizer)
        for step in range(8):
            for p, g in zip(params, gradients(params, step), strict=True):
                p.grad = g
            optimizer.step()
            plan.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        finals.append(params)
        groups.append({k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "fused")})
    assert {k: str(v) for k, v in groups[0].items()} == {k: str(v) for k, v in groups[1].items()}
    assert error(*finals) <= 8 * 4 * torch.finfo(torch.float64).eps


# ---- hooks and subclasses -----------------------------------------------------------------------------------------


def test_global_and_own_step_hooks_run_once_for_every_class() -> None:
    seen: list[str] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: seen.append(f"before {type(o).__name__}")),
        register_optimizer_step_post_hook(lambda o, *_: seen.append(f"after {type(o).__name__}")),
    ]
    try:
        for _ in range(2):
            for cls in REGISTRY.values():
                optimizer = cls([Parameter(torch.ones(1))])  # type: ignore[call-arg]
                optimizer.register_step_post_hook(lambda o, *_: seen.append("own"))
                optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [w for c in REGISTRY.values() for w in (f"before {c.__name__}", "own", f"after {c.__name__}")] * 2


def test_a_pre_hook_may_change_what_is_stepped() -> None:
    p = Parameter(torch.zeros(2))
    optimizer = SGD([p], lr=1.0)

    def clip(optimizer: Any, args: Any, kwargs: Any) -> None:
        for q in optimizer.param_groups[0]["params"]:
            q.grad = q.grad.clamp(max=1.0)

    optimizer.register_step_pre_hook(clip)
    for _ in range(2):
        p.grad = torch.tensor([0.5, 9.0])
        optimizer.step()
    assert p.detach().tolist() == [-1.0, -2.0]


def test_state_dict_hooks_see_and_change_what_is_saved_and_loaded() -> None:
    params = make_params(torch.float32, [(3,)])
    optimizer, other = AdamW(params), AdamW(params)
    run(optimizer, params, params, 2)
    order: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: order.append("save"))
    optimizer.register_state_dict_post_hook(lambda o, saved: {**saved, "note": "mine"})
    other.register_load_state_dict_pre_hook(lambda o, saved: {k: v for k, v in saved.items() if k != "note"})
    other.register_load_state_dict_post_hook(lambda o: order.append(f"load {o.state[params[0]]['step'].item()}"))
    saved = optimizer.state_dict()
    assert saved["note"] == "mine"
    for _ in range(2):
        other.load_state_dict(saved)
    assert order == ["save", "load 2.0", "load 2.0"]


def test_a_users_subclass_is_no_new_optimizer_and_steps_as_its_base() -> None:
    class Halved(AdamW):
        """Steps at half the rate."""

        def hyper(self, group: dict[str, Any]) -> tuple[float, ...]:
            lr, *rest = super().hyper(group)
            return (lr / 2, *rest)

    params, plain = make_params(torch.float32, [(5,)]), make_params(torch.float32, [(5,)])
    run(Halved(params, lr=0.2), params, params, 3)
    run(AdamW(plain, lr=0.1), plain, plain, 3)
    assert same_bits(params, plain) and "halved" not in REGISTRY


def test_zero_grad_keeps_or_frees_gradients_as_asked() -> None:
    p = Parameter(torch.ones(2))
    optimizer = AdamW([p])
    p.grad = torch.ones(2)
    kept = p.grad
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is kept and kept.tolist() == [0.0, 0.0]
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    optimizer.zero_grad()
    assert p.grad is None


# ---- what hosts look at ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_hosts_find_what_they_look_for(name: str) -> None:
    """The attributes that Accelerate, Lightning, transformers and torch's schedulers read or replace."""
    p = Parameter(torch.ones(2))
    optimizer = ours(name, [p])
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
    assert "closure" in inspect.signature(optimizer.step).parameters
    assert "grad_scaler" not in inspect.signature(optimizer.step).parameters
    assert optimizer._step_supports_amp_scaling is True
    assert ours(name, [p], amp_scaling=False)._step_supports_amp_scaling is False
    assert optimizer.defaults["lr"] == optimizer.param_groups[0]["lr"]
    for what in ("train", "eval"):  # schedule-free optimizers have these
        assert hasattr(optimizer, what) is name.startswith("schedulefree")
    for what in ("state", "param_groups", "defaults", "add_param_group", "load_state_dict", "state_dict"):
        assert hasattr(optimizer, what)


@pytest.mark.parametrize("name", NAMES)
def test_amp_scaling_survives_copies(name: str) -> None:
    optimizer = ours(name, [Parameter(torch.ones(2))], amp_scaling=False)
    for other in (copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other._step_supports_amp_scaling is False and not other.step_was_skipped
    optimizer.load_state_dict(ours(name, [Parameter(torch.ones(2))]).state_dict())
    assert optimizer._step_supports_amp_scaling is False


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_on_disk_goes_on_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Through torch.save and a weights-only load, with channels_last parameters and one that comes late."""
    options = VARIANTS[name][-1]
    shapes = [(2, 3, 4, 4), (70,), ()]
    whole, params = make_params(dtype, shapes), make_params(dtype, shapes)
    for side in (whole, params):
        side[0].data = side[0].data.to(memory_format=torch.channels_last)
    a, b = ours(name, whole, **options), ours(name, params, **options)

    def step(optimizer: FusedOptimizer, side: list[torch.Tensor], number: int) -> None:
        for p, g in zip(side, gradients(whole, number), strict=True):
            p.grad = g
        if number < 2:
            side[1].grad = None
        optimizer.step()

    for number in range(3):
        step(a, whole, number)
        step(b, params, number)
    torch.save({"params": params, "optimizer": b.state_dict()}, tmp_path / "file.pt")
    loaded = torch.load(tmp_path / "file.pt", weights_only=True)
    again = [Parameter(p) for p in loaded["params"]]
    other = ours(name, again)
    other.load_state_dict(loaded["optimizer"])
    for number in range(3, 6):
        step(a, whole, number)
        step(other, again, number)
    assert same_bits(whole, again)


def test_named_parameters_load_by_name_order() -> None:
    models = [torch.nn.Linear(2, 3) for _ in range(2)]
    optimizers = [AdamW(model.named_parameters()) for model in models]
    models[0](torch.ones(2)).sum().backward()
    optimizers[0].step()
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert optimizers[1].state[models[1].weight]["step"] == 1
    assert optimizers[1].param_groups[0]["param_names"] == ["weight", "bias"]


@pytest.mark.parametrize("name", TORCH_NAMES)
def test_a_checkpoint_without_newer_options_loads(name: str) -> None:
    """Checkpoints of older torches lack `fused`, `maximize`, `decoupled_weight_decay` and the like."""
    params = make_params(torch.float32, [(4,)])
    optimizer = ours(name, params)
    run(optimizer, params, params, 1)
    saved = optimizer.state_dict()
    for key in ("fused", "foreach", "maximize", "capturable", "differentiable", "decoupled_weight_decay"):
        saved["param_groups"][0].pop(key, None)
    other = ours(name, params)
    other.load_state_dict(saved)
    run(other, params, params, 1)
    assert other.param_groups[0]["maximize"] is False and other.param_groups[0].get("fused") is None
    assert type(other) is not AdamW or other.param_groups[0].get("decoupled_weight_decay", True)


def test_groups_that_do_not_match_are_refused() -> None:
    a, b = AdamW(make_params(torch.float32, [(2,)])), AdamW(make_params(torch.float32, [(2,), (3,)]))
    with pytest.raises(ValueError, match="doesn't match the size"):
        b.load_state_dict(a.state_dict())
    run(b, b.param_groups[0]["params"], b.param_groups[0]["params"], 1)


def test_distributed_checkpoints_states_by_name() -> None:
    """torch.distributed.checkpoint makes the state by a step of zeros at lr 0, and reads it by parameter names."""
    api = pytest.importorskip("torch.distributed.checkpoint.state_dict", reason="torch without distributed")
    for name in NAMES:
        models = [torch.nn.Linear(3, 2) for _ in range(2)]
        optimizers = [ours(name, list(m.parameters()), **VARIANTS[name][-1]) for m in models]
        models[0](torch.ones(3)).sum().backward()
        optimizers[0].step()
        optimizers[0].zero_grad()
        before = like(list(models[1].parameters()))
        saved = api.get_optimizer_state_dict(models[0], optimizers[0])
        api.set_optimizer_state_dict(models[1], optimizers[1], saved)
        assert same_bits(list(models[1].parameters()), before)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            a, b = optimizers[0].state.get(p, {}), optimizers[1].state.get(q, {})
            assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- torch.compile -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_compiled_step_skips_counts_and_follows_the_schedule(name: str) -> None:
    params, plain = make_params(torch.float32, [(9,), (2, 2)]), make_params(torch.float32, [(9,), (2, 2)])
    a, b = ours(name, params), ours(name, plain)
    plans = [lr_scheduler.StepLR(a, 1, gamma=0.5), lr_scheduler.StepLR(b, 1, gamma=0.5)]
    compiled = torch.compile(lambda: a.step(), backend="eager")
    try:
        for step in range(5):
            for p, q, g in zip(params, plain, gradients(plain, step), strict=True):
                p.grad, q.grad = g, g.clone()
            for optimizer in (a, b):
                optimizer.found_inf = torch.tensor(float(step == 2))  # type: ignore[attr-defined]
            compiled()
            b.step()
            assert a.step_was_skipped is (step == 2)
            for plan in plans:
                plan.step()
        assert same_bits(params, plain)
    finally:
        torch._dynamo.reset()


def test_backend_and_reason_are_shown() -> None:
    text = repr(AdamW([{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))], "fused": False}]))
    assert "group 1: torch (fused=False)" in text
    kernels = "CUDA kernels on the CPU" if backend.simulated else "CPU kernels, "
    assert (f"group 0: native ({kernels}" in text) == (backend.facts is not None)
    mixed = AdamW([{"params": [Parameter(torch.ones(1))]}, {"params": [Parameter(torch.ones(1))], "fused": False}])
    assert mixed.backend == ("mixed" if backend.facts else "torch")
    buffer = io.StringIO()
    print(SGD([Parameter(torch.ones(1))]), file=buffer)
    assert "Parameter Group 0" in buffer.getvalue()
