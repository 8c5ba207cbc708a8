"""The torch path: one parameter stepped by the rule's reference, in every storage format that the kernels have."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pytrain.optim.states import Entry, UnfitError, conform, lay_out, make, needed
from pytrain.optim.storage import LOW_PRECISION, decode_param, decode_state, encode_param, encode_state, random_bits

if TYPE_CHECKING:
    from pytrain.optim.base import FusedOptimizer


@dataclass(frozen=True)
class Slow:
    """A parameter on the torch path, and why."""

    entry: Entry
    reason: str


@dataclass(frozen=True)
class Asked:
    """What a step is asked to do with a parameter's gradient and average."""

    grad_coef: float = 1.0  # what the gradient is multiplied by
    clip_value: float = 0.0  # what it is then clamped to; 0 leaves it
    ema_weight: float = 0.0  # how far an average that was lent moves to the new parameter


def check(optimizer: FusedOptimizer, entry: Entry) -> None:
    """Raise UnfitError, before anything is written, where a gradient cannot be stepped with."""
    grad = entry.param.grad
    if grad is None:
        return
    if grad.shape != entry.param.shape:
        raise UnfitError(
            f"{entry.where}: its gradient has shape {tuple(grad.shape)}, expected {tuple(entry.param.shape)}"
        )
    if grad.layout != torch.strided and not optimizer.takes_sparse:
        raise UnfitError(
            f"{entry.where}: its gradient has layout {grad.layout}, which this optimizer does not take; "
            "use torch.optim.SparseAdam or pytrain.optim.SGD"
        )


def check_param(optimizer: FusedOptimizer, entry: Entry) -> None:
    """Raise UnfitError where this path cannot step a parameter."""
    if entry.rule.sums and optimizer.join_sums is not None:  # its reference takes them over what it is given
        raise UnfitError(f"{entry.where}: on the torch path {entry.rule.name} steps no parts of parameters; use DDP")
    check_disjoint(entry.param, entry.where)


def check_disjoint(param: Tensor, where: str) -> None:
    """As the kernels do: an element that is another one too would be stepped twice."""
    if param.layout != torch.strided or not param.numel():
        return
    reach = 0  # the largest offset that the dimensions so far can add up to
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise UnfitError(
                f"{where}: it has elements that share memory (for instance from expand()); pass a contiguous tensor"
            )
        reach += stride * (size - 1)


@torch.no_grad()
def sum_squares(grad: Tensor | None) -> float:
    """The sum of the squares of a gradient, in fp64; nan where one is inf or nan, 0 without a gradient."""
    if grad is None:
        return 0.0
    values = grad.coalesce().values() if grad.layout == torch.sparse_coo else grad
    if not values.isfinite().all():
        return math.nan
    return float(values.to(torch.complex128 if values.is_complex() else torch.float64).abs().square().sum())


@torch.no_grad()
def step(optimizer: FusedOptimizer, entry: Entry, row: tuple[float, ...], asked: Asked) -> None:
    """Step one parameter: what is kept in fewer bits in fp32, complex numbers as pairs of reals.

    Args:
        row: the gradient's sign, then the rule's hyperparameters.
        asked: what multiplies and clamps the gradient, and the weight of a lent average.
    """
    param, rule, formats, grad = entry.param, entry.rule, entry.formats, entry.param.grad
    if grad is None:
        return
    sign, *values = row
    hypers = dict(zip(rule.hypers, values, strict=True))
    state = optimizer.state.get(param, {})
    first = any(state.get(name) is None for name in rule.states)
    keys = needed(optimizer, rule, formats)
    if keys:
        state = optimizer.state[param]
        conform(optimizer, entry)
        for key in sorted(keys, key=lambda key: key != "step"):
            if state.get(key) is None:
                make(optimizer, entry, key)
        if param.layout == torch.strided and not param.is_complex():
            lay_out(optimizer, entry, set())
    if grad.layout != torch.strided:
        if not keys and not hypers["weight_decay"] and not asked.clip_value and formats.ema != "lent":
            param.add_(grad, alpha=-sign * asked.grad_coef * hypers["lr"])
            return
        grad = grad.to_dense()
    t = 1.0 if first else 2.0
    if optimizer.counts_steps:
        state["step"] += 1
        t = float(state["step"])

    def real(x: Tensor) -> Tensor:
        return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x

    low = param.dtype in LOW_PRECISION
    p = decode_param(param, state.get(formats.keep), formats.keep) if low else real(param.detach())
    g = grad.float() if low else real(grad).to(p.dtype)
    states = [real(decode_state(state, n, kind)) for n, kind in zip(rule.states, formats.states, strict=True)]
    g = g * (sign * asked.grad_coef)
    if asked.clip_value:
        g = g.clamp(-asked.clip_value, asked.clip_value)
    u = rule.reference(p, g, *states, *(state[n] for n in rule.scalars), t=t, **hypers)
    new = p - u

    def random(stream: int) -> Tensor | None:
        storage = optimizer.storage
        if not storage.stochastic:
            return None
        return random_bits(storage.seed, entry.cut.number, stream, t, param.numel(), entry.cut.begin)

    for i, (name, kind) in enumerate(zip(rule.states, formats.states, strict=True)):
        if not param.is_complex():
            encode_state(state, name, kind, states[i], None if kind in ("fp32", "fp64") else random(1 + i))
    if low:
        new = encode_param(param, state.get(formats.keep), formats.keep, new, None if formats.keep else random(0))
    else:
        p.copy_(new)
    if formats.ema == "own":
        average, decay = state["ema"], optimizer.storage.ema_decay
        assert decay is not None
        average.copy_(lerp(average, new.to(average.dtype), 1.0 if t == 1.0 else 1 - decay))
    elif formats.ema and asked.ema_weight:
        average = real(optimizer.averages[id(param)])
        weight = torch.tensor(asked.ema_weight, dtype=average.dtype, device="cpu").item()
        average.copy_(lerp(average, new.to(average.dtype), weight))
    if optimizer.storage.zero_grad and param.grad is not None:
        zero(param.grad)


def lerp(a: Tensor, b: Tensor, w: float) -> Tensor:
    """torch.lerp without fused multiply-adds, whose bits depend on the machine."""
    return a + w * (b - a) if w < 0.5 else b - (b - a) * (1 - w)


def zero(grad: Tensor) -> None:
    """Write zeros, also through an expanded tensor, which torch does not write into."""
    if grad.layout == torch.strided and 0 in grad.stride():
        sizes = [1 if stride == 0 else size for size, stride in zip(grad.shape, grad.stride(), strict=True)]
        grad = grad.as_strided(sizes, grad.stride())
    grad.zero_()
