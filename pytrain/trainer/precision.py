"""Precision modes: autocast around a step, and the loss scaler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from pytrain.amp import LossScaler

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class PrecisionMode:
    """What a precision name means: the autocast dtype (None: no autocast) and whether the loss is scaled."""

    autocast_dtype: torch.dtype | None
    loss_scaling: bool

    def wrap(self, step: Callable[P, R], device_type: str) -> Callable[P, R]:
        """Return `step` run under this mode's autocast; without autocast, `step` itself."""
        if self.autocast_dtype is None:
            return step
        wrapped: Callable[P, R] = torch.autocast(device_type, dtype=self.autocast_dtype)(step)
        return wrapped

    def make_scaler(self) -> LossScaler | None:
        """Return a fresh loss scaler for this mode, or None where the mode needs none."""
        return LossScaler() if self.loss_scaling else None


PRECISIONS = {
    "32": PrecisionMode(None, False),
    "bf16-mixed": PrecisionMode(torch.bfloat16, False),
    "fp16-mixed": PrecisionMode(torch.float16, True),
}
