"""Data parallel training: every rank has the whole model, and gradients are summed over the ranks bucket by bucket."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from pytrain.amp import LossScaler
from pytrain.grads import Work
from pytrain.parallel.base import Strategy
from pytrain.steps import StepInfo
from pytrain.steps import step as pytrain_step


class DDP(Strategy):
    """Sums gradients over the ranks while backward runs, and steps on every rank alike.

        torch.distributed.init_process_group()
        ranks = pytrain.parallel.DDP(model, optimizer)
        for batch in loader:
            loss_of(model, batch).backward()
            ranks.step(max_norm=1.0)
            optimizer.zero_grad()

    Arguments and errors are those of `Strategy`; the optimizer may be pytrain's or torch's.

    Source: Li et al. 2020, PyTorch Distributed (arXiv:2006.15704).
    """

    name = "ddp"
    _shown: Callable[[float], float] | None = None

    def show_gradients(self, show: Callable[[float], float]) -> None:
        self._shown = show

    def _collect(self, flat: Tensor) -> Work | None:
        return self.collectives.all_reduce(flat)

    def _step(self, scaler: LossScaler | None, weight: float, stop: bool, options: dict[str, Any]) -> StepInfo:
        total = self.agree(weight, stop)  # the gradients, and with them flags and norms, are the same by now
        divisor = total / self.divided_before
        if self._shown is not None:
            divisor = self._shown(divisor)
        info = pytrain_step(self.optimizer, scaler, grad_divisor=divisor, **options)
        order = self.buckets.observed_order()
        if order is not None:
            self.buckets.follow(self.ranks.from_first(order))
        return info
