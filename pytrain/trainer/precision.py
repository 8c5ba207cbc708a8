"""Precision modes: autocast around a step, torch's loss scaler, and how a skipped step is seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch

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

    def make_scaler(self, device_type: str) -> torch.amp.GradScaler | None:
        """Return a fresh loss scaler for this mode, or None where the mode needs none."""
        return torch.amp.GradScaler(device_type) if self.loss_scaling else None


PRECISIONS = {
    "32": PrecisionMode(None, False),
    "bf16-mixed": PrecisionMode(torch.bfloat16, False),
    "fp16-mixed": PrecisionMode(torch.float16, True),
}


class SkipWatch:
    """Sees whether the last `scaler.step(optimizer)` was skipped, by torch's public optimizer hook.

    GradScaler does not call `optimizer.step` when it finds an inf or nan; for optimizers that check by themselves
    (fused ones) it does call it, with the flag in `optimizer.found_inf`. The post-step hook sees both.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._called = False
        self._found_inf: Any = None
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self._called = True
        self._found_inf = getattr(optimizer, "found_inf", None)

    def skipped(self) -> bool:
        """Return whether the step since the last call was skipped. Reads the flag: one host sync on a GPU."""
        skipped = not self._called or (self._found_inf is not None and float(self._found_inf) != 0.0)
        self._called, self._found_inf = False, None
        return skipped

    def close(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()
