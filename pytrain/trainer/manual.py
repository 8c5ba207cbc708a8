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


class BatchInfo(StepInfo):
    """What the steps of one batch did together: one number each, where StepInfo has one an optimizer."""

    def __init__(self, infos: Sequence[StepInfo]) -> None:
        super().__init__([control for info in infos for control in info._controls], infos[-1]._scale, several=True)

    @property
    def applied(self) -> Tensor:
        """Bool; whether any of the steps was."""
        return super().applied.any()

    @property
    def grad_norm(self) -> Tensor:
        """fp64; over all gradients of all steps."""
        return super().grad_norm.square().sum().sqrt()

    @property
    def first_bad(self) -> Tensor:
        """int64; -1: it is not known of which optimizer it would be."""
        return torch.tensor(-1)


class Manual:
    """The optimizers of a module with `automatic_optimization = False`.

    Several steps of different optimizers in one batch share one loss scale, which moves once, at the batch's end.

    Args:
        setups: the module's optimizers.
        strategies: of each.
        scaler: the loss scale, or None.
        trainer: has the averages, which move once, at the end of a batch with an applied step, and says whether this
            rank is asked to stop.
        show: lets on_before_optimizer_step see an optimizer's gradients; None: nobody looks.

    Raises:
        NotImplementedError: a loss scale on several ranks.
        ValueError: a setting of the trainer's that only automatic optimization follows.
    """

    def __init__(
        self,
        setups: Sequence[OptimizerSetup],
        strategies: Sequence[Alone | Strategy],
        scaler: LossScaler | None,
        trainer: Trainer,
        show: Callable[[Optimizer, float], float] | None,
    ) -> None:
        clip, every = trainer.config.gradient_clip_val, trainer.config.accumulate_grad_batches
        if clip is not None or every != 1:
            raise ValueError(
                f"Trainer: gradient_clip_val={clip} and accumulate_grad_batches={every} are of automatic optimization; "
                "in manual optimization, step(max_norm=...), and step in every so-manieth batch"
            )
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
        self._infos: list[StepInfo] = []
        self._show = show

    def open(self) -> None:
        """A batch begins, or its second half."""
        if self._scaler is not None:
            self._window = open_step(self._optimizers, self._scaler).__enter__()

    def close(self) -> StepInfo | None:
        """A batch has ended: loss scale and averages move. Return what its steps did; None: there was none."""
        self._close_window()
        infos, self._infos = self._infos, []
        if not infos:
            return None
        info = infos[0] if len(infos) == len(self._optimizers) == 1 else BatchInfo(infos)
        if self._trainer.ema is not None and info.applied:
            self._trainer.ema.update()
        return info

    def _close_window(self) -> None:
        """The loss scale moves by those optimizers that have stepped."""
        window, self._window = self._window, None
        if window is not None:
            window.optimizers = [own for own in window.optimizers if id(own) in window.stepped]
            if window.optimizers:
                window.__exit__(None, None, None)
            elif self._scaler is not None:
                window.open = self._scaler.window = False

    def backward(self, loss: Tensor, options: dict[str, Any]) -> None:
        """Backward of the scaled loss."""
        scaled = loss if self._scaler is None else self._scaler.scale(loss)
        scaled.backward(**options)  # type: ignore[no-untyped-call]

    def step(self, number: int, options: dict[str, Any]) -> StepInfo:
        """One optimizer's step."""
        optimizer, strategy = self._optimizers[number], self._strategies[number]
        if self._window is None:
            if not isinstance(strategy, Alone):
                options["stop"] = self._trainer.should_stop
            info: StepInfo = strategy.step(None, **options)
        else:
            if id(optimizer) in self._window.stepped:  # again in the same batch: a step of its own
                self._close_window()
                self.open()
            if self._show is not None:
                self._show(optimizer, 1.0)
            info = self._window.step(optimizer, **options)
        torch.clear_autocast_cache()  # it has copies of the weights before the step
        self._infos.append(info)
        return info

    def toggle(self, optimizer: ManualOptimizer | Optimizer) -> None:
        """Have only this optimizer's parameters take gradients, of those that did before any toggle."""
        self.untoggle()
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = (p for one in self._optimizers for group in one.param_groups for p in group["params"])
        self._hidden = [p for p in others if id(p) not in own and p.requires_grad]
        for p in self._hidden:
            p.requires_grad_(False)

    def untoggle(self) -> None:
        """Let all parameters take gradients that did before."""
        for p in self._hidden:
            p.requires_grad_(True)
        self._hidden = []
