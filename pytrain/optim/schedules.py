"""Learning rate schedules that are pure functions of the count of applied steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import Optimizer

Decay = Literal["linear", "cosine", "sqrt"]
DECAYS = ("linear", "cosine", "sqrt")
WINDOW = 2**16  # steps whose factors are on a device at a time


class Schedule(LRScheduler):
    """Base of the schedules: each group's lr is its initial lr times `factor(applied steps)`.

    A torch LRScheduler like any other. Passed to `pytrain.step(..., schedule=)` it advances where the step was applied,
    and never on a skipped one. Its state is the count and the settings, all plain numbers; loading takes the saved
    settings over, as torch's schedulers do.

    Where only a device knows whether a step was applied, the schedule follows there without a wait: the groups' lr
    become tensors (fp64, shape ()) on that device, and reading `last_epoch`, the count, waits for it. A captured CUDA
    graph replays up to WINDOW = 65,536 steps of it.
    """

    _there: OnDevice | None = None

    @property
    def last_epoch(self) -> int:
        """How many steps were applied."""
        return self._epoch if self._there is None else self._there.begin + int(self._there.count)

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        self._epoch = value

    def advance_where(self, applied: Tensor) -> None:
        """`step` if `applied` (bool, shape (), on a device) is true, without asking the device."""
        if self._there is None or self._there.count.device != applied.device or self._there.left == 0:
            self._come_back()
            self._there = OnDevice(self, applied.device)
        self._there.advance(applied)
        self._there.lend(self.optimizer)

    def step(self, epoch: int | None = None) -> None:
        """Advance by one, as torch's schedulers do."""
        self._come_back()
        super().step(epoch)

    def get_last_lr(self) -> list[float | Tensor]:
        """The lr of each group in the next step."""
        return super().get_last_lr() if self._there is None else [lr.clone() for lr in self._there.lrs]

    def state_dict(self) -> dict[str, Any]:
        """The count and the settings."""
        own = {key: value for key, value in super().state_dict().items() if key not in ("_there", "_epoch")}
        epoch = self.last_epoch
        lrs = [float(lr) if self._there is not None else lr for lr in self.get_last_lr()]
        count = own["_step_count"] + (epoch - self._epoch)
        return {**own, "last_epoch": epoch, "_step_count": count, "_last_lr": lrs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        self._come_back()
        self._epoch = state_dict["last_epoch"]
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "last_epoch"})

    def __getstate__(self) -> dict[str, Any]:
        self._come_back()
        return self.__dict__.copy()

    def _come_back(self) -> None:
        """Have the count and the groups' lr on the host."""
        there = self._there
        if there is None:
            return
        epoch, lrs = self.last_epoch, there.lrs.tolist()
        self._step_count += epoch - self._epoch
        self._there, self._epoch, self._last_lr = None, epoch, lrs
        for group, view, lr in zip(self.optimizer.param_groups, there.views, lrs, strict=False):
            if group["lr"] is view:
                group["lr"] = lr

    @abstractmethod
    def factor(self, step: int) -> float:
        """What the initial lr is multiplied by in the step after `step` applied ones, 0 to 1."""

    def table(self, begin: int, end: int) -> Tensor:
        """The factors of the steps from `begin` to `end - 1`, fp64, shape (end - begin,)."""
        return torch.tensor([self.factor(step) for step in range(begin, end)], dtype=torch.float64, device="cpu")

    def get_lr(self) -> list[float | Tensor]:
        """The lr of each group at the current count."""
        factor = self.factor(self.last_epoch)
        return [base * factor for base in self.base_lrs]


class WarmupCosine(Schedule):
    r"""Up in a line over `warmup_steps`, then down as half a cosine until `total_steps`, and constant from there.

    Args:
        optimizer: whose groups' lr it sets.
        warmup_steps: the n-th step takes n / warmup_steps of the lr; 0: no warm-up.
        total_steps: when `min_factor` is reached, > warmup_steps.
        min_factor: the part of the lr that is left at the end, in [0, 1].
        last_epoch: as torch's schedulers have it: -1 to begin, else the count to go on from.

    Raises:
        ValueError: an argument is out of its range.

    Source: Loshchilov & Hutter 2017, SGDR (arXiv:1608.03983), without restarts; warm-up as in Goyal et al. 2017
    (arXiv:1706.02677).
    """

    decay: Decay = "cosine"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        total_steps: int,
        min_factor: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.warmup_steps, self.total_steps = check_steps(warmup_steps, total_steps)
        self.min_factor = check_factor("min_factor", min_factor)
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        gone = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.min_factor + (1 - self.min_factor) * shape(self.decay, gone)


class WarmupLinear(WarmupCosine):
    """Up in a line over `warmup_steps`, then down in a line until `total_steps`, and constant from there.

    Args:
        optimizer, warmup_steps, total_steps, min_factor, last_epoch: as in `WarmupCosine`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Devlin et al. 2019, BERT, appendix A.2 (arXiv:1810.04805).
    """

    decay = "linear"


class WarmupStableDecay(Schedule):
    r"""Up in a line, constant, and down over the last `decay_steps` of `total_steps`; constant from there.

    Args:
        optimizer: whose groups' lr it sets.
        warmup_steps: the n-th step takes n / warmup_steps of the lr; 0: no warm-up.
        decay_steps: length of the way down, >= 1; warmup_steps + decay_steps <= total_steps.
        total_steps: when `min_factor` is reached.
        min_factor: the part of the lr that is left at the end, in [0, 1].
        decay: how it goes down, with x from 0 to 1: "linear" 1 - x, "cosine" (1 + cos(pi x)) / 2, "sqrt" 1 - sqrt(x).
        last_epoch: as in `WarmupCosine`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Hu et al. 2024, MiniCPM (arXiv:2404.06395); "sqrt" is of Hägele et al. 2024 (arXiv:2405.18392).
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        warmup_steps: int,
        decay_steps: int,
        total_steps: int,
        min_factor: float = 0.0,
        decay: Decay = "linear",
        last_epoch: int = -1,
    ) -> None:
        self.warmup_steps, self.total_steps = check_steps(warmup_steps, total_steps)
        self.decay_steps = check_count("decay_steps", decay_steps, 1)
        if warmup_steps + decay_steps > total_steps:
            raise ValueError(
                f"decay_steps: expected at most total_steps - warmup_steps = {total_steps - warmup_steps}, "
                f"got {decay_steps}"
            )
        if decay not in DECAYS:
            raise ValueError(f"decay: expected one of {', '.join(map(repr, DECAYS))}, got {decay!r}")
        self.min_factor, self.decay = check_factor("min_factor", min_factor), decay
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        gone = max(0.0, min(1.0, (step - (self.total_steps - self.decay_steps)) / self.decay_steps))
        return self.min_factor + (1 - self.min_factor) * shape(self.decay, gone)


class InverseSqrt(Schedule):
    r"""Up in a line over `warmup_steps`, then down with the t-th step after the warm-up, t from 0, as

    .. math::
        \sqrt{\mathrm{timescale} / (\mathrm{timescale} + t)}

    Args:
        optimizer: whose groups' lr it sets.
        warmup_steps: the n-th step takes n / warmup_steps of the lr; 0: no warm-up.
        timescale: how slowly it falls: after 3 timescales the lr is halved, >= 1; None: warmup_steps, or 1.
        last_epoch: as in `WarmupCosine`.

    Raises:
        ValueError: an argument is out of its range.

    Source: Vaswani et al. 2017, section 5.3 (arXiv:1706.03762): but for one step the same, with timescale =
    warmup_steps.
    """

    def __init__(
        self, optimizer: Optimizer, *, warmup_steps: int, timescale: int | None = None, last_epoch: int = -1
    ) -> None:
        self.warmup_steps = check_count("warmup_steps", warmup_steps, 0)
        self.timescale = max(1, warmup_steps) if timescale is None else check_count("timescale", timescale, 1)
        super().__init__(optimizer, last_epoch)

    def factor(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return math.sqrt(self.timescale / (self.timescale + step - self.warmup_steps))


class OnDevice:
    """A schedule's count and lr where a device has them: the count of applied steps picks a factor from a table."""

    def __init__(self, schedule: Schedule, device: torch.device) -> None:
        self.begin = schedule.last_epoch
        self.left = WINDOW  # steps until the table ends
        self.table = schedule.table(self.begin, self.begin + WINDOW + 1).to(device)
        bases = [float(lr) for lr in schedule.base_lrs]
        self.bases = torch.tensor(bases, dtype=torch.float64, device="cpu").to(device)
        self.count = torch.zeros(1, dtype=torch.int64, device=device)
        self.lrs = self.bases * self.table[0]
        self.views = list(self.lrs.unbind())

    def advance(self, applied: Tensor) -> None:
        """One step further where it was applied."""
        self.left -= 1
        self.count += applied
        torch.mul(self.bases, self.table.index_select(0, self.count), out=self.lrs)

    def lend(self, optimizer: Optimizer) -> None:
        """Let the param groups have the lr, whatever was put there meanwhile."""
        for group, lr in zip(optimizer.param_groups, self.views, strict=False):
            if group["lr"] is not lr:
                group["lr"] = lr


def shape(decay: str, gone: float) -> float:
    """What is left of 1 after the part `gone` of a decay."""
    if decay == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * gone)
    return 1 - (math.sqrt(gone) if decay == "sqrt" else gone)


def check_count(name: str, value: Any, least: int) -> int:
    """The value, if it is an int of at least so much."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")
    return value


def check_steps(warmup_steps: Any, total_steps: Any) -> tuple[int, int]:
    """Both counts, if the second is the larger one."""
    warmup = check_count("warmup_steps", warmup_steps, 0)
    total = check_count("total_steps", total_steps, 1)
    if warmup >= total:
        raise ValueError(f"total_steps: expected more than warmup_steps={warmup}, got {total}")
    return warmup, total


def check_factor(name: str, value: Any) -> float:
    """The value, if it is from 0 to 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)
