"""pytrain.step: everything between loss.backward() and the next forward, in two passes. `take` is all of it.

A step that meets an inf or nan is skipped, and then nothing has happened: parameters, state, step counts, averages and
schedules are bit for bit as before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.compiler import is_dynamo_compiling
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.optim.optimizer import Optimizer

from pytrain.amp import LossScaler, Stage
from pytrain.backend import is_remote
from pytrain.clip import Clip, ClipGroup, ClipPer, read_clip
from pytrain.control import (
    CONTROL_HEAD,
    CONTROL_ROW,
    FIRST_BAD,
    FOUND_INF,
    GRAD_NORM,
    INV_SCALE,
    ONE,
    SUMSQ,
    Record,
    settle,
)
from pytrain.parts import Part, Released, Shards, agreement, part_of

if TYPE_CHECKING:
    from pytrain.ema import Average

try:  # what torch.compile has set to look at frames: None outside of compiled code
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as dynamo_callback
except ImportError:  # a torch that has it elsewhere: always take the way that is right, and a few calls longer
    dynamo_callback = object  # type: ignore[assignment]

NO_AVERAGES: dict[int, Tensor] = {}
NO_STAGES: list[Stage] = []


def _as_tensor(record: Record) -> Tensor:
    return record if isinstance(record, Tensor) else torch.frombuffer(record, dtype=torch.float64)


class StepInfo:
    """What a step did. Nothing is read from the device before it is asked for.

    Attributes are tensors: of shape () where `step` was given one optimizer, of shape (n,) where it was given a list
    of n.
    """

    def __init__(self, records: list[Record], scale: Tensor | float, several: bool) -> None:
        self._records, self._several, self._scale = records, several, scale

    @property
    def _controls(self) -> list[Tensor]:
        return [_as_tensor(record) for record in self._records]

    def _each(self, field: int) -> Tensor:
        if not self._several:
            return self._controls[0][field]
        return torch.stack([control[field] for control in self._controls])

    @property
    def applied(self) -> Tensor:
        """Bool; False where the step was skipped."""
        return self._each(FOUND_INF) == 0

    @property
    def grad_norm(self) -> Tensor:
        """fp64; the norm of the optimizer's unscaled gradients before clipping; nan where one was inf or nan."""
        return self._each(GRAD_NORM)

    @property
    def first_bad(self) -> Tensor:
        """int64; which parameter, counted through the param groups, had the first inf or nan; -1: none."""
        return self._each(FIRST_BAD).long()

    @property
    def scale(self) -> Tensor:
        """fp32, shape (); the loss scale of this step's gradients."""
        if isinstance(self._scale, Tensor):
            return self._scale
        return torch.tensor(self._scale, dtype=torch.float32, device="cpu")

    @property
    def group_norms(self) -> list[Tensor]:
        """For each optimizer the norms (fp64) of the unscaled gradients of its param groups, shape (groups,)."""
        return [c[CONTROL_HEAD:].view(-1, CONTROL_ROW)[:, SUMSQ].sqrt() * c[INV_SCALE] for c in self._controls]

    def __repr__(self) -> str:
        shown = (f"{name}={getattr(self, name).tolist()}" for name in ("applied", "grad_norm", "scale"))
        return f"StepInfo({', '.join(shown)})"


def step(
    optimizers: Optimizer | Sequence[Optimizer],
    scaler: LossScaler | None = None,
    *,
    max_norm: float | Sequence[ClipGroup] | None = None,
    clip_value: float | None = None,
    clip_per: ClipPer = "optimizer",
    grad_divisor: float = 1.0,
    schedule: LRScheduler | Sequence[LRScheduler] | None = None,
    ema: Average | None = None,
    shards: Shards | None = None,
) -> StepInfo:
    r"""Check, unscale and clip the gradients, update parameters and averages, then the loss scale and the schedule.

    .. math::
        g \leftarrow \frac{g}{\text{scale} \cdot \text{divisor}} \cdot \min\Big(1, \frac{\text{max\_norm}}{\lVert g
        \rVert + 10^{-6}}\Big)

    Gradients are read twice and, with pytrain's optimizers, never rewritten. Any other optimizer takes the same step by
    torch's operations: its gradients are unscaled and clipped in place.

    Args:
        optimizers: one or several. Each of several has its own flag, step count, norm and schedule; the scale moves
            once for all.
        scaler: what scaled the loss; None: it was not scaled. The gradients are checked either way.
        max_norm: limit of the gradients' 2-norm, > 0; or a list of `ClipGroup`; None: no limit.
        clip_value: limit of each gradient's magnitude, > 0; excludes max_norm.
        clip_per: whose norm `max_norm` limits: that of each "optimizer", each param "group", or of "all" optimizers.
        grad_divisor: what the gradients are divided by besides the scale, > 0: the sum of the micro-batches' weights.
        schedule: one or several torch schedulers of these optimizers. A schedule advances where its optimizer's step
            was applied.
        ema: an average that follows the parameters wherever the step was applied.
        shards: who holds the rest of parameters of which this optimizer has pieces; see `pytrain.parallel`.

    Raises:
        ValueError: an argument is out of its range, or a gradient or a state does not fit its parameter; nothing was
            written then.
        RuntimeError: a step under this scaler is open: an optimizer has stepped and `update` was not called.
        LossScaleError: see `LossScaler`.

    Source: Micikevicius et al. 2018 (arXiv:1710.03740); Pascanu et al. 2013, Algorithm 1 (arXiv:1211.5063), as in
    torch.nn.utils.clip_grad_norm_.
    """
    several = not isinstance(optimizers, Optimizer)
    listed: list[Optimizer] = list(optimizers) if several else [optimizers]  # type: ignore[arg-type, list-item]
    if scaler is not None:
        scaler = _check_scaler(scaler)
    clip = read_clip(listed, max_norm, clip_value, clip_per)
    schedules = () if schedule is None else _check_schedules(listed, schedule)
    scale = 1.0 if scaler is None else scaler.scale_now()
    run = _take_eagerly if is_dynamo_compiling() or dynamo_callback() is not None else take
    moves = ema is None and shards is None
    controls = run(listed, scaler, clip, grad_divisor, ema, shards, moves)
    if scaler is not None:
        scaler.move()
    for i, one in schedules:
        _advance(one, controls[i])
    return StepInfo(controls, scale, several)


def take(
    optimizers: Sequence[Optimizer],
    scaler: LossScaler | None,
    clip: Clip,
    divisor: float = 1.0,
    ema: Average | None = None,
    shards: Shards | None = None,
    moves: bool = False,
) -> list[Record]:
    """The straight line of a step, up to the loss scale's update. Returns a copy of each optimizer's control block.

    Args:
        moves: the loss scale moves next, and nothing can fail before: one part alone may do it in pass 2.
    """
    parts = _check_parts(optimizers, scaler, clip, divisor, ema)
    for part in parts:
        if part.spread is not None:
            shards = agreement(parts, optimizers, shards)
            break
    averages, weight = (NO_AVERAGES, 0.0) if ema is None else (ema.averages, ema.next_weight())
    stages = NO_STAGES if scaler is None else scaler.begin(optimizers)
    alone = parts[0] is parts[-1]
    between = None
    if alone and shards is None and not (stages and stages[0].unscaled):  # else something comes between
        between = (scaler, moves, clip.groups, clip.max_norms)
    try:
        # PASS 1   read g -> control.{sumsq, found_inf, first_bad}; a part alone may settle it in the same launch
        controls = [part.measure(1.0 / divisor, clip.value, averages, weight, between) for part in parts]
        scaled = [0] * len(parts)
        for i, stage in enumerate(stages):
            stage.control = control = controls[i]
            scaled[i] = int(not stage.unscaled)
            if stage.found_inf is not None:  # by an unscale_() before
                control[FOUND_INF] += stage.found_inf
        # AGREE    on found_inf and sumsq with all ranks
        if shards is not None:
            shards.agree_on(controls)
        # CONTROL  norms, clip coefficients, what unscales
        if not parts[0].settles:
            settle(controls, ONE if scaler is None else scaler.current, scaled, clip.groups, clip.max_norms)
        # PASS 2   read p, g, m, v -> write p, m, v, low copy, average, g = 0; nothing where found_inf
        records = [part.finish(alone=alone, scaler=scaler if moves else None) for part in parts]
    except BaseException:
        for part in parts:
            part.abandon()
        if scaler is not None:
            scaler.drop(stages)
        raise
    for stage in stages:
        stage.stepped = True
    if shards is not None:
        shards.publish()
    if ema is not None:
        _follow(ema, optimizers, parts)
    return records


_take_eagerly = _disable_dynamo(take)  # torch.compile breaks its graph here and compiles nothing of the step


def _follow(ema: Average, optimizers: Sequence[Optimizer], parts: list[Part]) -> None:
    """Let an average take what pass 2 did not move; the parameters of a skipped step stay out of it."""
    flags = [part.skipped() for part in parts]
    done = parts[0].done()
    if len(flags) == 1 and not isinstance(flags[0], bool) and ema.count_later(flags[0][FOUND_INF] == 0, done):
        return
    skipped = [flag if isinstance(flag, bool) else bool(flag[FOUND_INF] != 0) for flag in flags]
    if all(skipped):
        return
    if len(parts) > 1:
        done = frozenset().union(*(part.done() for part, skip in zip(parts, skipped, strict=True) if not skip))
        if ema.next_weight() < 1.0:  # a first average, a copy, is of all
            left_out = [o for o, skip in zip(optimizers, skipped, strict=True) if skip]
            done |= {id(p) for optimizer in left_out for group in optimizer.param_groups for p in group["params"]}
    ema.advance(done)


def _advance(schedule: LRScheduler, record: Record) -> None:
    """Let a schedule advance by the step that this control block tells of, if it was applied."""
    control = _as_tensor(record)
    advance_where = getattr(schedule, "advance_where", None)  # those of pytrain.optim.schedules have it
    if advance_where is not None and is_remote(control.device):
        advance_where(control[FOUND_INF] == 0)
    elif control[FOUND_INF] == 0:
        schedule.step()


class StepWindow:
    """One step of several optimizers, each at its own time; see `open_step`."""

    def __init__(self, optimizers: Sequence[Optimizer], scaler: LossScaler | None) -> None:
        self.optimizers, self.scaler = list(optimizers), None if scaler is None else _check_scaler(scaler)
        self.stepped: set[int] = set()
        self.open = False

    def __enter__(self) -> StepWindow:
        if self.scaler is not None:
            self.scaler.window = True
        self.open, self.stepped = True, set()
        return self

    def step(
        self,
        optimizer: Optimizer,
        *,
        max_norm: float | Sequence[ClipGroup] | None = None,
        clip_value: float | None = None,
        clip_per: ClipPer = "optimizer",
        grad_divisor: float = 1.0,
        schedule: LRScheduler | Sequence[LRScheduler] | None = None,
        ema: Average | None = None,
    ) -> StepInfo:
        """As `pytrain.step` of one optimizer; the loss scale moves at the window's end.

        Raises:
            RuntimeError: the window is closed, or the optimizer is none of its own or has stepped in it.
        """
        name = type(optimizer).__name__
        if not self.open:
            raise RuntimeError("window.step: the window is closed; open one with `with pytrain.open_step(...)`")
        if all(optimizer is not own for own in self.optimizers):
            raise RuntimeError(f"window.step: this {name} is none of the optimizers that the window was opened with")
        if id(optimizer) in self.stepped:
            raise RuntimeError(f"window.step: this {name} has already stepped in this window")
        clip = read_clip([optimizer], max_norm, clip_value, clip_per)
        schedules = () if schedule is None else _check_schedules([optimizer], schedule)
        scale = 1.0 if self.scaler is None else self.scaler.scale_now()
        controls = take([optimizer], self.scaler, clip, grad_divisor, ema)
        self.stepped.add(id(optimizer))
        for _, one in schedules:
            _advance(one, controls[0])
        return StepInfo(controls, scale, several=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.open = False
        if self.scaler is not None:
            self.scaler.window = False
        left = [type(own).__name__ for own in self.optimizers if id(own) not in self.stepped]
        if kind is not None or left:
            if self.scaler is not None:
                self.scaler.drop(None)
            if kind is None:
                raise RuntimeError(
                    f"open_step: the window ended before {', '.join(left)} stepped; the scale did not move"
                )
        elif self.scaler is not None:
            self.scaler.move()


def open_step(optimizers: Sequence[Optimizer], scaler: LossScaler | None = None) -> StepWindow:
    """A step of several optimizers with backward passes in between (a GAN's): one scale, moved once, at the end.

        with pytrain.open_step([opt_d, opt_g], scaler) as window:
            scaler.scale(loss_d()).backward()
            window.step(opt_d)
            scaler.scale(loss_g()).backward()
            window.step(opt_g, max_norm=1.0)

    Args:
        optimizers: all that will step in the window, once each.
        scaler: what scales the losses, or None.

    Raises:
        RuntimeError: an optimizer steps that was not listed, or twice; one of the list has not stepped when the window
            ends; the scaler is updated inside.
    """
    return StepWindow(optimizers, scaler)


# ---- checks of what a user passes ---------------------------------------------------------------------------------


def _check_scaler(scaler: LossScaler) -> LossScaler | None:
    if not isinstance(scaler, LossScaler):
        raise TypeError(
            f"scaler: expected a pytrain.amp.LossScaler, got {type(scaler).__name__}; a GradScaler's state carries "
            "over: LossScaler().load_state_dict(grad_scaler.state_dict())"
        )
    if not scaler.enabled:
        return None
    if scaler.window:
        raise RuntimeError("step: an open_step() is under way under this scaler; use the step() of its window")
    stepped = scaler.open_steps() if scaler.stages else None
    if stepped:
        raise RuntimeError(
            f"step: {', '.join(stepped)} has stepped under this scaler and the step was left open; call "
            "scaler.update() after the last optimizer, or use pytrain.step alone, which updates it"
        )
    return scaler


def _check_parts(
    optimizers: Sequence[Optimizer], scaler: LossScaler | None, clip: Clip, divisor: float, ema: Average | None
) -> list[Part]:
    if not optimizers:
        raise ValueError("optimizers: expected at least one, got an empty list")
    if len(optimizers) > 1 and len(set(map(id, optimizers))) < len(optimizers):
        raise ValueError("optimizers: one of them is listed twice")
    if not (isinstance(divisor, (int, float)) and 0 < divisor < math.inf):
        raise ValueError(f"grad_divisor: expected a finite number > 0, got {divisor!r}")
    if ema is not None and ema.swapped:
        raise RuntimeError("step: the parameters hold their averages; leave the swap() context first")
    parts: list[Part] = []
    for i, optimizer in enumerate(optimizers):
        part = part_of(optimizer, i)
        parts += [part]
        together = "a loss scaler" if scaler is not None else "max_norm" if clip.max_norms else ""
        if together and type(part) is Released:
            raise ValueError(
                f"optimizers[{i}]: step_in_backward=True steps and frees each gradient in backward, and {together} "
                "needs all of them together; leave one of the two out"
            )
    return parts


def _check_schedules(
    optimizers: Sequence[Optimizer], schedule: LRScheduler | Sequence[LRScheduler]
) -> list[tuple[int, LRScheduler]]:
    """Each schedule with the number of its optimizer."""
    found: list[tuple[int, LRScheduler]] = []
    for one in schedule if isinstance(schedule, Sequence) else [schedule]:
        if not isinstance(one, LRScheduler) or isinstance(one, ReduceLROnPlateau):
            raise TypeError(
                f"schedule: expected a torch LRScheduler that needs no metric, got {type(one).__name__}; "
                "step ReduceLROnPlateau yourself where the metric is known"
            )
        of = [i for i, optimizer in enumerate(optimizers) if one.optimizer is optimizer]
        if not of:
            raise ValueError(f"schedule: {type(one).__name__} was made for another optimizer than the ones that step")
        found.append((of[0], one))
    return found
