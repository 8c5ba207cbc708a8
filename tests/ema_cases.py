"""What the tests of EMA and SWA share: a model with every kind of parameter, its training, and exact averages."""

from __future__ import annotations

import io
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from devices import randn
from hypothesis import HealthCheck, settings
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from pytrain.ema import EMA, SWA, Average

DECAY = 0.9
STEPS = 24
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
KINDS = [pytest.param(EMA, id="EMA"), pytest.param(SWA, id="SWA")]


class Net(nn.Module):
    """Tied weights, BatchNorm, a frozen layer and one without gradient in every third step; some strides are odd."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.last = nn.Linear(6, 5)
        self.tied = nn.Linear(5, 6, bias=False)
        self.tied.weight = self.first.weight
        self.sometimes = nn.Parameter(torch.randn(5, 3).t())

    def forward(self, x: Tensor, use: bool = True) -> Tensor:
        y = self.last(self.frozen(self.norm(self.first(x)).relu()))
        y = y + self.tied(y) @ self.last.weight.t()
        return y @ self.sometimes.t() if use else y


def made(kind: type[Average], model: nn.Module, **options: Any) -> Average:
    return EMA(model, DECAY, **options) if kind is EMA else SWA(model, **options)


def torchs(kind: type[Average], model: nn.Module) -> AveragedModel:
    function = get_ema_multi_avg_fn(DECAY) if kind is EMA else get_swa_multi_avg_fn()
    return AveragedModel(model, multi_avg_fn=function)


def batch(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(8, 5, generator=torch.Generator().manual_seed(step)).to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[int], None], steps: int = STEPS, thaw: int = 9
) -> None:
    """Train, from step `thaw` on with the frozen layer thawed; `after` each step, numbered from 1."""
    for step in range(1, steps + 1):
        if step == thaw:
            model.frozen.requires_grad_(True)
        optimizer.zero_grad()
        model(batch(step, next(model.parameters()).dtype), use=step % 3 != 0).square().mean().backward()
        optimizer.step()
        after(step)


def exact(kind: type[Average], history: list[list[Tensor]]) -> list[list[Fraction]]:
    """The average of what stands in the history, element by element, without any rounding."""
    found = [[Fraction(x) for x in p.double().flatten().tolist()] for p in history[0]]
    for n, params in enumerate(history[1:], 1):
        weight = Fraction(1.0 - DECAY) if kind is EMA else Fraction(1, n + 1)
        for average, p in zip(found, params, strict=True):
            both = zip(average, p.double().flatten().tolist(), strict=True)
            average[:] = [a + weight * (Fraction(x) - a) for a, x in both]
    return found


def error(found: list[Tensor], truth: list[list[Fraction]]) -> Fraction:
    """The largest difference of any element."""
    both = zip(found, truth, strict=True)
    return max(abs(Fraction(x) - t) for f, ts in both for x, t in zip(f.double().flatten().tolist(), ts, strict=True))


def listed(average: Average) -> list[Tensor]:
    return [average.averages[id(p)] for p in average.params]


def copies(tensors: Any) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


def bits(x: Tensor) -> Tensor:
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().contiguous().view(whole)


def same_bits(a: Any, b: Any) -> bool:
    return all(x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def saved(state: dict[str, Any]) -> Any:
    """Through a file, without arbitrary pickles."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)
