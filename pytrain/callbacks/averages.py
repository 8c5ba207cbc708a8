"""EMA and StochasticWeightAveraging: `pytrain.ema`'s averages, taken in a run of the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from pytrain import ema
from pytrain.callbacks.base import Callback, say
from pytrain.tbptt import InTime, in_parts

if TYPE_CHECKING:
    from pytrain.steps import StepInfo
    from pytrain.trainer import Module, Trainer


class EMA(Callback):
    """Keeps an exponential moving average of the parameters, as `Trainer(ema_decay=...)` does, with more to choose.

    It is `trainer.ema`: it moves within the optimizer's own pass, validation uses it, checkpoints hold it, and skipped
    steps stay out of it.

    Args:
        decay: what the average keeps of itself each time, in [0, 1).
        start_step: how many applied steps come before any is averaged, >= 0.
        every: the distance of the averaged steps, >= 1.
        copy_at_end: give the module the averages at the end of the run; else it keeps its own parameters, and
            `trainer.ema.swap()` and `trainer.ema.copy_to(module)` give them.

    Raises:
        ValueError: at the start of the run: an argument is out of its range, or the trainer has averages already.
    """

    def __init__(self, decay: float = 0.999, *, start_step: int = 0, every: int = 1, copy_at_end: bool = False) -> None:
        self.decay, self.start_step, self.every, self.copy_at_end = decay, start_step, every, copy_at_end
        self._average: ema.EMA | None = None

    def setup(self, trainer: Trainer, module: Module, stage: str) -> None:
        if stage != "fit":
            return
        if trainer.ema is not None:
            raise ValueError("EMA: the trainer has averages already; give either this callback or ema_decay, once")
        self._average = ema.EMA(module, self.decay, start_step=self.start_step, every=self.every)
        trainer.ema = self._average

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        if self.copy_at_end and self._average is not None and self._average.n_averaged:
            self._average.copy_to(module)


class StochasticWeightAveraging(Callback):
    """Averages the parameters of the last epochs' ends uniformly, under a learning rate of their own.

    From epoch `swa_epoch_start` on the learning rate goes to `swa_lrs`, whatever a schedule says, and after each epoch
    the parameters are averaged. At the end of the run the module gets the averages, and its BatchNorm statistics are
    renewed by one pass of `training_step` over the training data without gradients (on each rank over that rank's
    part). Checkpoints of the run hold the parameters that are trained; the averages are in this callback's state.

    Args:
        swa_lrs: one for all param groups of all optimizers, or one for each, > 0; None: the schedule's stay.
        swa_epoch_start: the first epoch, from 0, whose end is averaged: an int, or a share of `max_epochs` in [0, 1].
        annealing_epochs: over how many epochs the learning rate goes from where it was to `swa_lrs`, >= 0.
        annealing_strategy: "cos" or "linear".

    Attributes:
        average: `pytrain.ema.SWA`; None before the run.

    Raises:
        ValueError: an argument is out of its range; at the start of the run: it does not fit the optimizers, or a share
            of the epochs is given and the trainer has no max_epochs; or BatchNorm meets manual optimization.

    Source: Izmailov et al. 2018, algorithm 1 (arXiv:1803.05407); the rates are those of torch.optim.swa_utils.SWALR.
    """

    def __init__(
        self,
        swa_lrs: float | Sequence[float] | None,
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
    ) -> None:
        lrs = [swa_lrs] if isinstance(swa_lrs, (int, float)) else swa_lrs
        if lrs is not None and not (lrs and all(isinstance(lr, (int, float)) and 0 < lr < math.inf for lr in lrs)):
            raise ValueError(f"StochasticWeightAveraging: swa_lrs must be finite numbers > 0 or None, got {swa_lrs!r}")
        start, is_share = swa_epoch_start, isinstance(swa_epoch_start, float)
        if isinstance(start, bool) or not (0 <= start <= 1 if is_share else isinstance(start, int) and start >= 0):
            raise ValueError(
                f"StochasticWeightAveraging: swa_epoch_start must be an int >= 0 or a share in [0, 1], got {start!r}"
            )
        if isinstance(annealing_epochs, bool) or not isinstance(annealing_epochs, int) or annealing_epochs < 0:
            raise ValueError(
                f"StochasticWeightAveraging: annealing_epochs must be an int >= 0, got {annealing_epochs!r}"
            )
        if annealing_strategy not in ("cos", "linear"):
            raise ValueError(
                f"StochasticWeightAveraging: annealing_strategy must be 'cos' or 'linear', got {annealing_strategy!r}"
            )
        self._lrs = None if lrs is None else [float(lr) for lr in lrs]
        self._start, self._annealing, self._linear = start, annealing_epochs, annealing_strategy == "linear"
        self._first = 0
        self._lrs_before: list[float] | None = None
        self._ended = -1  # the last epoch whose end was averaged; a run that resumes from there ends it once more
        self._saved: dict[str, Any] | None = None
        self.average: ema.SWA | None = None

    def state_dict(self) -> dict[str, Any]:
        average = None if self.average is None else self.average.state_dict()
        return {"lrs_before": self._lrs_before, "ended": self._ended, "average": average}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lrs_before, self._saved = state_dict["lrs_before"], state_dict["average"]
        self._ended = state_dict["ended"]

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        if isinstance(self._start, float) and trainer.config.max_epochs is None:
            raise ValueError(
                f"StochasticWeightAveraging: swa_epoch_start={self._start!r} is a share of max_epochs, which the "
                "trainer has not; give a number of epochs, an int"
            )
        self._first = (
            int(self._start * (trainer.config.max_epochs or 0)) if isinstance(self._start, float) else self._start
        )
        if not module.automatic_optimization and _has_statistics(module):
            raise ValueError(
                "StochasticWeightAveraging: the module has BatchNorm, whose statistics training_step renews at the "
                "end, and with automatic_optimization = False that would step; use the EMA callback"
            )
        groups = len(_groups(trainer))
        if self._lrs is not None and len(self._lrs) not in (1, groups):
            raise ValueError(
                f"StochasticWeightAveraging: swa_lrs has {len(self._lrs)} values, the optimizers have {groups} param "
                "groups; give one value, or one for each"
            )
        self.average = ema.SWA(module)
        if self._saved is not None:
            self.average.load_state_dict(self._saved)
            self._saved = None

    def on_train_epoch_start(self, trainer: Trainer, module: Module) -> None:
        self._set_lrs(trainer)

    def on_train_step_end(self, trainer: Trainer, module: Module, info: StepInfo) -> None:
        self._set_lrs(trainer)  # a schedule may have moved it

    def log_metrics(self, trainer: Trainer, module: Module, metrics: dict[str, float]) -> None:
        self._set_lrs(trainer)
        if "lr" in metrics:
            metrics["lr"] = float(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if trainer.current_epoch >= self._first and trainer.current_epoch > self._ended and self.average is not None:
            self.average.update()
            self._ended = trainer.current_epoch

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        average, self._lrs_before, self._ended = self.average, None, -1
        if average is None or not average.n_averaged:
            say(trainer, f"StochasticWeightAveraging: epoch {self._first} has no end, so nothing was averaged")
            return
        average.copy_to(module)
        if _has_statistics(module):
            _renew_statistics(trainer, module)

    def _set_lrs(self, trainer: Trainer) -> None:
        after = trainer.current_epoch - self._first
        if after < 0 or self._lrs is None:
            return
        groups = _groups(trainer)
        if self._lrs_before is None:
            self._lrs_before = [float(group["lr"]) for group in groups]
        share = min(1.0, after / self._annealing) if self._annealing else 1.0
        weight = share if self._linear else (1.0 - math.cos(math.pi * share)) / 2.0
        lrs = self._lrs * len(groups) if len(self._lrs) == 1 else self._lrs
        for group, before, goal in zip(groups, self._lrs_before, lrs, strict=True):
            lr = weight * goal + (1.0 - weight) * before
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr


class _Step(nn.Module):
    """A module whose forward is a training step of another."""

    def __init__(self, module: Module, step: Callable[[Any, int], Any]) -> None:
        super().__init__()
        self.module, self.step = module, step

    def forward(self, batch: Any) -> None:
        self.step(batch, 0)


def _has_statistics(module: nn.Module) -> bool:
    return any(isinstance(part, _BatchNorm) for part in module.modules())


def _renew_statistics(trainer: Trainer, module: Module) -> None:
    """Compute the BatchNorm statistics anew for the parameters as they are now, as training computes them."""
    from pytrain.trainer.data import to_device

    run = trainer.run
    assert run is not None
    step = run.wrap("training_step")
    batches: Iterator[Any] = (to_device(batch, run.device, run.mode.dtype) for batch in run.train_loader)
    if module.tbptt_steps is not None:
        step, batches = InTime().over(step), in_parts(batches, module.tbptt_split, module.tbptt_steps)
    modes = [(part, part.training) for part in module.modules()]
    logged, module._logged = module._logged, type(module._logged)()  # nobody reads what is logged here
    update_bn(((batch,) for batch in batches), _Step(module, step))
    module._logged = logged
    for part, training in modes:
        part.training = training


def _groups(trainer: Trainer) -> list[dict[str, Any]]:
    return [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
