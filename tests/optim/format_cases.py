"""What the tests of storage formats share: the formats, which to try with which optimizer, and how to compare."""

from __future__ import annotations

from typing import Any

import torch
from optim_cases import VARIANTS
from torch import Tensor

from pytrain.optim import FusedOptimizer

BF16, FP16 = torch.bfloat16, torch.float16
NAMES = list(VARIANTS)
SHAPES = [(), (0,), (7,), (33, 7), (5000,), (4, 3, 3, 5), (2, 65, 70)]
FORMATS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "master": (BF16, {"master_weights": True}),
    "master fp16": (FP16, {"master_weights": True}),
    "compact master": (BF16, {"master_weights": "compact"}),
    "kahan": (BF16, {"kahan": True}),
    "kahan fp16": (FP16, {"kahan": True}),
    "stochastic": (BF16, {"rounding": "stochastic", "seed": 5}),
    "stochastic fp16": (FP16, {"rounding": "stochastic", "seed": 6}),
    "bf16 state": (torch.float32, {"state_dtype": "bf16"}),
    "bf16 state by chance": (torch.float32, {"state_dtype": "bf16", "rounding": "stochastic"}),
    "8-bit state": (torch.float32, {"state_dtype": "8bit"}),
    "8-bit state by chance": (torch.float32, {"state_dtype": "8bit", "rounding": "stochastic", "seed": 7}),
    "8-bit state, master": (BF16, {"state_dtype": "8bit", "master_weights": True}),
    "fp32 state, kahan": (BF16, {"state_dtype": "fp32", "kahan": True}),
    "average": (torch.float32, {"ema_decay": 0.9}),
    "average fp64": (torch.float64, {"ema_decay": 0.9}),
    "average, stochastic": (BF16, {"ema_decay": 0.9, "rounding": "stochastic"}),
    "average, kahan": (BF16, {"ema_decay": 0.9, "kahan": True}),
    "zero": (torch.float32, {"zero_grad_in_step": True}),
    "zero, 8-bit state": (BF16, {"zero_grad_in_step": True, "state_dtype": "8bit"}),
}
# Rules and formats are independent: one rule in every format, and every rule in formats that touch all codecs.
ALL_FORMATS_OF_ADAMW = [("adamw", form) for form in FORMATS]
SOME_FORMATS_OF_ALL = [
    (name, form)
    for name in NAMES
    if name != "adamw"
    for form in ("kahan", "8-bit state by chance", "8-bit state, master", "average, stochastic")
]


def state_of(optimizer: FusedOptimizer) -> list[Tensor]:
    """All tensors of an optimizer: parameters, then states by name."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(value for p in params for _, value in sorted(optimizer.state[p].items()))]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Equal values and dtypes, nan where there is nan."""
    return all(x.dtype == y.dtype and torch.allclose(x, y, 0, 0, equal_nan=True) for x, y in zip(a, b, strict=True))
