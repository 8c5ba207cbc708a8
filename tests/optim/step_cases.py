"""What the tests of pytrain.step share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pytrain.amp import LossScaler

INF, NAN = float("inf"), float("nan")
PATHS = [pytest.param(None, id="kernels"), pytest.param(False, id="torch path")]


def everything(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [v for p in params for _, v in sorted(optimizer.state.get(p, {}).items()) if isinstance(v, Tensor)]
    return [p.detach() for p in params] + states


def copies(tensors: list[Tensor]) -> list[Tensor]:
    return [x.clone() for x in tensors]


def scaled_by(scale: float) -> LossScaler:
    return LossScaler("static", init_scale=scale)


def norm_of(grads: list[Tensor]) -> float:
    return math.sqrt(math.fsum(float(x) ** 2 for g in grads for x in g.double().flatten()))
