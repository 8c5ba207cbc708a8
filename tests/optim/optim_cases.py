"""What the optimizer tests share: every optimizer's variants, tensors to step, and errors against fp64."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import randn, skip_if_elsewhere
from torch import Tensor

from pytrain import backend
from pytrain.optim import REGISTRY, FusedOptimizer


def usual_variants(name: str) -> list[dict[str, Any]]:
    """Options to try where none are listed: the defaults, maximize, and a decay with other betas."""
    known = inspect.signature(REGISTRY[name]).parameters.keys()
    usual: list[dict[str, Any]] = [{}, {"maximize": True}, {"weight_decay": 0.3, "betas": (0.8, 0.95)}]
    return [options for options in usual if options.keys() <= known]


# Options of which each makes a path of its own.
LISTED: dict[str, list[dict[str, Any]]] = {
    "adam": [{}, {"weight_decay": 0.1}, {"amsgrad": True, "weight_decay": 0.1}, {"decoupled_weight_decay": True}],
    "adamw": [{}, {"amsgrad": True}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6}, {"maximize": True}],
    "sgd": [
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
        {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    ],
    "adamax": [{}, {"weight_decay": 0.1, "betas": (0.2, 0.4)}, {"maximize": True}],
    "nadam": [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.3}],
    "radam": [{}, {"weight_decay": 0.1, "betas": (0.9, 0.8)}, {"weight_decay": 0.1, "decoupled_weight_decay": True}],
    "adagrad": [
        {},
        {"weight_decay": 0.1, "lr_decay": 0.2, "initial_accumulator_value": 0.1},
        {"maximize": True},
    ],
    "adadelta": [{}, {"weight_decay": 0.1, "rho": 0.5}],
    "rmsprop": [
        {},
        {"momentum": 0.9, "weight_decay": 0.1},
        {"centered": True},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
    ],
    "asgd": [{}, {"weight_decay": 0.1}, {"lambd": 0.3, "t0": 1.0, "alpha": 0.6}],
    "rprop": [{}, {"etas": (0.3, 1.7), "step_sizes": (1e-3, 0.05)}],
    "lion": [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95)}, {"maximize": True}],
    "lamb": [{}, {"weight_decay": 0.0}, {"betas": (0.8, 0.95), "weight_decay": 0.3, "maximize": True}],
    "lars": [{}, {"trust_coefficient": 0.1, "weight_decay": 0.1, "maximize": True}, {"momentum": 0.0}],
    "novograd": [{}, {"weight_decay": 0.1, "betas": (0.8, 0.5)}, {"maximize": True}],
    "adan": [{}, {"weight_decay": 0.3, "betas": (0.9, 0.8, 0.95)}, {"maximize": True}],
    "ademamix": [{}, {"T_alpha_beta3": 10, "weight_decay": 0.1}, {"alpha": 2.0, "T_alpha_beta3": 3, "maximize": True}],
    "stableadamw": [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-8}, {"maximize": True}],
    "schedulefreeadamw": [
        {},
        {"warmup_steps": 3, "weight_decay": 0.1},
        {"r": 0.5, "weight_lr_power": 0.0, "maximize": True},
    ],
    "cautiousadamw": [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95)}, {"maximize": True}],
    "cautiouslion": [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95)}, {"maximize": True}],
}
VARIANTS = {name: LISTED[name] if name in LISTED else usual_variants(name) for name in REGISTRY}
CASES = [pytest.param(name, options, id=f"{name}-{options}") for name in VARIANTS for options in VARIANTS[name]]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LEVELS = ["baseline", "avx2", "avx512"]
SHAPES = [(), (1,), (0,), (7, 0), (5,), (64,), (33, 7), (4, 3, 3, 5), (1000,)]
LR = 0.01
needs_kernels = pytest.mark.skipif(backend.facts is None, reason=f"needs the kernels: {backend.why_not_loaded}")


def torch_class(name: str) -> type[torch.optim.Optimizer] | None:
    """torch.optim's class of the same name, where there is one."""
    found: type[torch.optim.Optimizer] | None = getattr(torch.optim, REGISTRY[name].__name__, None)
    return found


def fastest(name: str) -> dict[str, Any]:
    """What makes torch's class take its fused step, where it has one."""
    cls: Any = torch_class(name)
    return {"fused": True} if "fused" in inspect.signature(cls).parameters else {}


def make_params(dtype: torch.dtype, shapes: list[tuple[int, ...]] | None = None, seed: int = 0) -> list[Tensor]:
    """Parameters with values of about one."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(randn(shape, generator=generator).to(dtype)) for shape in (shapes or SHAPES)]


def like(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Copies of the parameters."""
    return [torch.nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def gradients(params: list[Tensor], seed: int) -> list[Tensor]:
    """One gradient a parameter, in its dtype, the same for the same seed whatever the layout."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return [randn(p.shape, generator=generator).to(p.dtype) for p in params]


def run(optimizer: torch.optim.Optimizer, params: list[Tensor], grads_from: list[Tensor], steps: int = 4) -> None:
    """Step with the gradients that belong to `grads_from`, cast to each parameter's dtype."""
    for step in range(steps):
        for p, g in zip(params, gradients(grads_from, step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def ours(name: str, params: list[Tensor], **options: Any) -> FusedOptimizer:
    """The optimizer of REGISTRY with the tests' learning rate."""
    return REGISTRY[name](params, lr=LR, **options)  # type: ignore[call-arg, arg-type]


def reference64(name: str, params: list[Tensor], options: dict[str, Any], steps: int = 4) -> list[Tensor]:
    """The parameters after the steps in fp64: by torch.optim's plain loop, else by our reference."""
    exact = like(params, torch.float64)
    cls = torch_class(name)
    if cls is None:
        optimizer: torch.optim.Optimizer = ours(name, exact, fused=False, **options)
    else:
        optimizer = cls(exact, lr=LR, foreach=False, **options)  # type: ignore[call-arg]
    run(optimizer, exact, params, steps)
    return exact


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference of any element."""
    both = zip(found, exact, strict=True)
    return max((f.double() - e).abs().max().item() for f, e in both if f.numel())


def largest(params: list[Tensor]) -> float:
    """The largest absolute value of any element."""
    return max(p.detach().double().abs().max().item() for p in params if p.numel())


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether all elements agree to the bit (nan with nan)."""
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def began(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has made a state; Adagrad, as torch's, makes its own before the first step."""
    return any(state.get("step") is None or state["step"] > 0 for state in optimizer.state.values())


def bits(x: Tensor) -> Tensor:
    """The tensor's memory as integers."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(whole)


def processor() -> str:
    """The processor's name, for reasons."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


@contextmanager
def isa(level: str) -> Iterator[None]:
    """Run at an instruction set level; skips where this machine does not have it."""
    if level != "baseline":
        skip_if_elsewhere("instruction sets are the CPU's; one level is tested")
    if not backend.facts.isa_levels()[level]:
        pytest.skip(f"this machine ({processor()}) has no {level}")
    before = backend.isa()
    backend.isa(level)
    try:
        yield
    finally:
        backend.isa(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with a number of torch threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


Layout = Callable[[Tensor], Tensor]
LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1),
    "channels_last": lambda x: x.clone(memory_format=torch.channels_last),
    "every_second": lambda x: torch.stack([x, x], dim=-1).contiguous()[..., 0],
    "rows_apart": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "offset_by_one": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}
