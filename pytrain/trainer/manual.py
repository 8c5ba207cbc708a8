"""Manual optimization: a module's own backward passes and optimizer steps, with one loss scale for all of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pytrain.amp import LossScaler
from pytrain.launch import Alone
from pytrain.steps import StepInfo, StepWindow, open_step
from pytrain.trainer.optimizers import OptimizerSetup

if TYPE_CHECKING:
    from pytrain.parallel import Strategy
    from pytrain.trainer.trainer import Trainer


class ManualOptimizer:
    """What `module.optimizers()` gives: an optimizer whose `step` unscales, checks, clips and averages.

    All else is the optimizer's own.
    """

    def __init__(self, optimizer: Optimizer, manual: Manual, number: int) -> None:
        self.optimizer, self._manual, self._number = optimizer, manual, number

    def step(self, closure: Callable[[], Any] | None = None, **options: Any) -> StepInfo:
        """Step. Takes `max_norm` and the other options of `pytrain.step`; a closure is called first."""
        if closure is not None:
            with torch.enable_grad():
                closure()
        return self._manual.step(self._number, options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)


class Manual:
    """The optimizers of a module with `automatic_optimization = False`.

    Several steps of different optimizers in one batch share one loss scale, which moves once, at the batch's end.

    Args:
        setups: the module's optimizers.
        strategies: of each.
        scaler: the loss scale, or None.
        trainer: has the averages, and says whether this rank is asked to stop.

    Raises:
        NotImplementedError: a loss scale on several ranks.
    """

    def __init__(
        self,
        setups: Sequence[OptimizerSetup],
        strategies: Sequence[Alone | Strategy],
        scaler: LossScaler | None,
        trainer: Trainer,
    ) -> None:
        if scaler is not None and not isinstance(strategies[0], Alone):
            raise NotImplementedError(
                "manual optimization in fp16 on several ranks: each rank would move its own loss scale; use "
                'precision="bf16-mixed", or automatic optimization'
            )
        self._optimizers = [setup.optimizer for setup in setups]
        self.each = [ManualOptimizer(optimizer, self, i) for i, optimizer in enumerate(self._optimizers)]
        self._strategies, self._scaler, self._trainer = strategies, scaler, trainer
        self._window: StepWindow | None = None
        self._hidden: list[Tensor] = []
        self.info: StepInfo | None = None

    def open(self) -> None:
        """A batch begins."""
        self.info = None
        if self._scaler is not None:
            self._window = open_step(self._optimizers, self._scaler).__enter__()

    def close(self) -> StepInfo | None:
        """A batch has ended, or half of it: the loss scale moves by those that have stepped. Return the last step."""
        window, self._window = self._window, None
        if window is not None:
            window.optimizers = [own for own in window.optimizers if id(own) in window.stepped]
            if window.optimizers:
                window.__exit__(None, None, None)
            elif self._scaler is not None:
                window.open = self._scaler.window = False
        return self.info

    def backward(self, loss: Tensor, options: dict[str, Any]) -> None:
        """Backward of the scaled loss."""
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward(**options)  # type: ignore[no-untyped-call]

    def step(self, number: int, options: dict[str, Any]) -> StepInfo:
        """One optimizer's step."""
        optimizer = self._optimizers[number]
        if self._trainer.ema is not None:
            options.setdefault("ema", self._trainer.ema)
        if self._window is None:
            strategy = self._strategies[number]
            if not isinstance(strategy, Alone):
                options["stop"] = self._trainer.should_stop
            self.info = strategy.step(None, **options)
            return self.info
        if id(optimizer) in self._window.stepped:  # again in the same batch: a step of its own
            self.close()
            self.open()
        self.info = self._window.step(optimizer, **options)
        return self.info

    def toggle(self, optimizer: ManualOptimizer | Optimizer) -> None:
        """Have only this optimizer's parameters take gradients."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = (p for one in self._optimizers for group in one.param_groups for p in group["params"])
        self._hidden += [p for p in others if id(p) not in own and p.requires_grad]
        for p in self._hidden:
            p.requires_grad_(False)

    def untoggle(self) -> None:
        """Let all parameters take gradients that did before."""
        for p in self._hidden:
            p.requires_grad_(True)
        self._hidden = []
