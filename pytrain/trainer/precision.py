"""Precision modes: autocast around a step, low-precision parameters, and the loss scaler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch.optim import Optimizer

from pytrain.amp import LossScaler

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class PrecisionMode:
    """What a precision name means.

    Attributes:
        autocast_dtype: None: no autocast.
        loss_scaling: whether the loss is scaled.
        dtype: of the module's floating parameters and buffers and of the batches' floats; None: they stay as they are.
    """

    autocast_dtype: torch.dtype | None = None
    loss_scaling: bool = False
    dtype: torch.dtype | None = None

    def wrap(self, step: Callable[P, R], device_type: str) -> Callable[P, R]:
        """Return `step` run under this mode's autocast; without autocast, `step` itself."""
        if self.autocast_dtype is None:
            return step
        wrapped: Callable[P, R] = torch.autocast(device_type, dtype=self.autocast_dtype)(step)
        return wrapped

    def make_scaler(self) -> LossScaler | None:
        """Return a fresh loss scaler for this mode, or None where the mode needs none."""
        return LossScaler() if self.loss_scaling else None

    def check(self, optimizer: Optimizer) -> None:
        """Raise ValueError where low-precision parameters would lose the small updates."""
        storage = getattr(optimizer, "storage", None)
        if self.dtype is not None and not (storage is not None and (storage.keep or storage.stochastic)):
            raise ValueError(
                f"configure_optimizers: parameters in {self.dtype} lose updates below their rounding, and this "
                f"{type(optimizer).__name__} keeps nothing beside them; use an optimizer of pytrain.optim with "
                'master_weights=True, kahan=True or rounding="stochastic"'
            )


PRECISIONS = {
    "32": PrecisionMode(),
    "bf16-mixed": PrecisionMode(autocast_dtype=torch.bfloat16),
    "fp16-mixed": PrecisionMode(autocast_dtype=torch.float16, loss_scaling=True),
    "bf16-true": PrecisionMode(dtype=torch.bfloat16),
    "fp16-true": PrecisionMode(dtype=torch.float16, loss_scaling=True),
}
ALIASES = {32: "32", "32-true": "32", "16-true": "fp16-true", "bf16": "bf16-mixed"}
ALIASES |= dict.fromkeys((16, "16", "16-mixed"), "fp16-mixed")
