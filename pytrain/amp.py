"""LossScaler: fp16 loss scaling with named policies; a drop-in for torch.amp.GradScaler."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pytrain import backend
from pytrain.control import (
    BAD_OPTIMIZER,
    BAD_PARAM,
    FOUND_INF,
    GROWTH_TRACKER,
    HYSTERESIS_LEFT,
    SCALE,
    SCALER_SIZE,
    SKIPPED_IN_A_ROW,
    Besides,
    Between,
    Policy,
    update_scaler,
)
from pytrain.optim.storage import cut_of
from pytrain.parts import agreement, blank_control, part_of

Outputs = TypeVar("Outputs", bound="Tensor | Iterable[Any]")

# Initial scale and policy. The same pattern of overflows gives each its own trace; see docs/step.md.
POLICIES: dict[str, tuple[float, Policy]] = {
    "torch": (2.0**16, Policy(2.0, 0.5, 2000, 1, 0.0, math.inf, refills=False, first_is_free=False)),
    "apex": (2.0**16, Policy(2.0, 0.5, 2000, 1, 0.0, 2.0**24, refills=True, first_is_free=False)),
    "megatron": (2.0**32, Policy(2.0, 0.5, 1000, 2, 1.0, math.inf, refills=False, first_is_free=False)),
    "deepspeed": (2.0**16, Policy(2.0, 0.5, 1000, 2, 1.0, math.inf, refills=False, first_is_free=True)),
    "deepspeed-consecutive": (2.0**16, Policy(2.0, 0.5, 1000, 2, 1.0, math.inf, refills=True, first_is_free=True)),
    "static": (math.nan, Policy(1.0, 1.0, 2**24 - 1, 1, 0.0, math.inf, refills=False, first_is_free=False)),
}
SCALES = "a number > 0 that fp32 has"
LOWEST = 2.0**-24  # a scale that counts as the floor where the policy has none: fp16's smallest number
READ_EVERY = 64  # steps between two looks at the state where looking would wait for the device


class LossScaleError(FloatingPointError):
    """The loss scale is at its floor, and still every step meets an inf or nan."""


@dataclass(eq=False, slots=True)
class Stage:
    """How far an optimizer has come in the step under way."""

    optimizer: Optimizer
    unscaled: bool = False
    stepped: bool = False
    control: Tensor | None = None
    found_inf: Tensor | None = None  # what `unscale_` found


class LossScaler:
    r"""Scales the loss so that small fp16 gradients do not vanish, and skips the steps in which they overflow.

    The API is that of torch.amp.GradScaler, which it replaces in a loop with any torch optimizer; `pytrain.step` does
    all of it in one call. Its state lives in one small tensor; a step is skipped as a whole, and the scale moves once
    a step, whatever the number of optimizers. Gradients are looked at again in `step`, so that an inf which came after
    `unscale_` is skipped too (pytorch#97415).

    Args:
        policy: when the scale moves: "torch"; "apex" (`hysteresis` overflows in a row); "megatron" (`hysteresis`
            overflows since the last growth); "deepspeed" (as Megatron, and growth one step later);
            "deepspeed-consecutive" (as DeepSpeed with consecutive_hysteresis); "static" (never).
        init_scale: the first scale, > 0; 2**16, for Megatron 2**32; to be given for "static".
        growth_factor: what the scale is multiplied by after `growth_interval` clean steps in a row, > 1; 2.
        backoff_factor: what it is multiplied by at an overflow, in (0, 1); 0.5.
        growth_interval: in steps, >= 1, below 2**24; 2000, for Megatron and DeepSpeed 1000.
        hysteresis: how many overflows it takes to lower the scale, >= 1; 1, for Megatron and DeepSpeed 2.
        min_scale, max_scale: the scale never leaves this range; apex has a ceiling of 2**24, Megatron and DeepSpeed a
            floor of 1, torch neither.
        max_skipped_in_a_row: so many skipped steps in a row, the last of them at the floor, are an error, >= 1.
        enabled: False makes every method pass through what it is given, as GradScaler's does.

    Raises:
        ValueError: an argument is out of its range, or does not go with "static".

    Source: Micikevicius et al. 2018, section 3.2 (arXiv:1710.03740); the policies are those of torch.amp.GradScaler,
    apex's amp_C.update_scale_hysteresis, Megatron-LM's DynamicGradScaler and DeepSpeed's DynamicLossScaler.
    """

    def __init__(
        self,
        policy: str = "torch",
        *,
        init_scale: float | None = None,
        growth_factor: float | None = None,
        backoff_factor: float | None = None,
        growth_interval: int | None = None,
        hysteresis: int | None = None,
        min_scale: float | None = None,
        max_scale: float | None = None,
        max_skipped_in_a_row: int = 64,
        enabled: bool = True,
    ) -> None:
        if policy not in POLICIES:
            raise ValueError(f"policy: expected one of {', '.join(map(repr, POLICIES))}, got {policy!r}")
        self.policy_name = policy
        first, rules = POLICIES[policy]
        given = {
            "growth_factor": growth_factor,
            "backoff_factor": backoff_factor,
            "growth_interval": growth_interval,
            "hysteresis": hysteresis,
            "min_scale": min_scale,
            "max_scale": max_scale,
        }
        changes = {name: value for name, value in given.items() if value is not None}
        if policy == "static" and changes:
            raise ValueError(f"{next(iter(changes))}: a static scale never moves; give init_scale alone")
        if policy == "static" and init_scale is None:
            raise ValueError("init_scale: policy='static' needs one, > 0")
        self.rules = rules._replace(**changes)  # type: ignore[arg-type]
        scale = first if init_scale is None else init_scale
        _check(self.rules, scale, policy)
        if not _is_count(max_skipped_in_a_row):
            raise ValueError(f"max_skipped_in_a_row: expected an int >= 1, got {max_skipped_in_a_row!r}")
        self.max_skipped_in_a_row = max_skipped_in_a_row
        self.enabled = enabled
        self._state = torch.zeros(SCALER_SIZE, dtype=torch.float32, device="cpu")
        self._state[SCALE], self._state[HYSTERESIS_LEFT] = scale, self.rules.hysteresis
        self._state[BAD_PARAM] = self._state[BAD_OPTIMIZER] = -1
        self._place(self._state)
        self.stages: list[Stage] = []
        self._updates = 0
        self._order: list[weakref.ref[Optimizer]] = []  # the last step's, where only the device knows
        self._first_bad: weakref.ref[Optimizer] | None = None  # whose optimizer's the last row of skips began with
        self.moved = False  # has pass 2 of the step under way moved the state?
        self.window = False  # is a pytrain.open_step under way, which updates at its end?

    def _place(self, state: Tensor) -> None:
        self._state, self.current = state, state[SCALE]  # current: the scale, fp32, shape (); it changes in place
        seen = state.device.type == "cpu" and not backend.is_remote(state.device)
        self._numbers = state.numpy() if seen else None
        self.place = state.data_ptr() if seen else 0  # where the host reads the scale

    def __getstate__(self) -> dict[str, Any]:
        self._check_between("copy")
        return {**self.__dict__, "current": None, "_numbers": None, "place": 0, "_first_bad": None, "_order": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._place(self._state)

    # ---- GradScaler's methods --------------------------------------------------------------------------------------

    def scale(self, outputs: Outputs) -> Outputs:
        """The loss (or losses, in any nesting of iterables) times the scale.

        Raises:
            ValueError: something in it is neither a tensor nor an iterable.
        """
        if not self.enabled:
            return outputs
        if isinstance(outputs, Tensor):
            if self._state.device != outputs.device:
                self._follow(outputs)
            return outputs * self.current.to(outputs.device)  # type: ignore[return-value]
        if isinstance(outputs, Iterable):
            scaled = map(self.scale, outputs)
            return type(outputs)(scaled) if isinstance(outputs, (list, tuple)) else scaled  # type: ignore
        raise ValueError(f"scale: expected a tensor or an iterable of tensors, got {type(outputs).__name__}")

    def _follow(self, outputs: Tensor) -> None:
        """The state moves once to the device of the loss."""
        if self._state.device.type == "cpu" and not self._updates and not self.stages:
            self._place(self._state.to(outputs.device))

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide an optimizer's gradients by the scale, in place: for those who want to look at or change them.

        Needless before clipping in `pytrain.step`, which unscales on the way.

        Raises:
            RuntimeError: they are unscaled already, or the optimizer has stepped.
        """
        if not self.enabled:
            return
        for stage in self.stages:
            if stage.optimizer is optimizer and stage.unscaled:
                raise RuntimeError("unscale_() has already been called on this optimizer since the last update().")
            if stage.optimizer is optimizer and stage.stepped:
                raise RuntimeError("unscale_() is being called after step().")
        inverse, found = self.current.double().reciprocal().float(), torch.zeros((), device="cpu")
        by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                grad = param.grad
                if grad.is_sparse:
                    if grad.dtype == torch.float16:  # whose rows may overflow only when they are summed
                        param.grad = grad = grad.coalesce()
                    grad = grad._values()
                grad = backend.local(grad)
                grad = torch.view_as_real(grad) if grad.is_complex() else grad
                by_kind.setdefault((grad.device, grad.dtype), []).append(grad)
        with torch.no_grad():
            for (device, _), grads in by_kind.items():
                flag = torch.zeros(1, device=device)
                torch._amp_foreach_non_finite_check_and_unscale_(grads, flag, inverse.to(device))
                found += flag[0].to(found.device)
        shards = agreement([part_of(optimizer)], [optimizer], None)
        if shards is not None:  # also what other ranks have found in their shards
            control = blank_control(len(optimizer.param_groups))
            control[FOUND_INF] = found
            shards.agree_on([control])
            found = control[FOUND_INF].float()
        stage = self.stage(optimizer)
        stage.unscaled, stage.found_inf = True, found

    def step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step an optimizer with unscaled gradients, or leave it as it is where one of them is inf or nan.

        Raises:
            RuntimeError: it has stepped since the last `update`, or a closure was passed.
        """
        if not self.enabled:
            return optimizer.step(*args, **kwargs)
        if self.window:
            raise RuntimeError("step: an open_step() is under way under this scaler; use the step() of its window")
        if "closure" in kwargs or args:
            raise RuntimeError("step: closures cannot be used with a loss scaler, which steps after one backward")
        if kwargs:
            raise TypeError(f"step: unexpected arguments {', '.join(kwargs)}; a step under a loss scaler takes none")
        from pytrain.clip import read_clip
        from pytrain.steps import take

        take([optimizer], self, read_clip([optimizer], None, None, "optimizer"))
        return None

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """Move the scale, once a step, after its last optimizer; or set it.

        Raises:
            RuntimeError: no optimizer was unscaled or stepped since the last update, or a `pytrain.open_step` is
                under way, which updates at its end.
            LossScaleError: the scale is at its floor and `max_skipped_in_a_row` steps were skipped.
        """
        if not self.enabled:
            return
        if self.window:
            raise RuntimeError("update: this step updates the scale at the end of its open_step(); leave that context")
        self.move(new_scale)

    def move(self, new_scale: float | Tensor | None = None) -> None:
        """`update`, whether a window is open or not."""
        if new_scale is not None:
            value = float(new_scale)
            if not _is_scale(value):
                raise ValueError(f"new_scale: expected {SCALES}, got {value!r}")
        stages, self.stages = self.stages, []
        moved, self.moved = self.moved, False
        if new_scale is not None:
            self._state[SCALE] = value
            return
        if not stages:
            raise RuntimeError(
                "update: no optimizer was stepped since the last update(); one update a step, after its last optimizer"
            )
        if moved:
            torch.autograd.graph.increment_version(self._state)
        else:
            controls: list[Tensor] = []
            for stage in stages:
                controls += [_found(stage) if stage.control is None else stage.control]
            update_scaler(self._state, controls, self.rules)
        self._updates += 1
        if self._numbers is None:
            self._order = [weakref.ref(stage.optimizer) for stage in stages]
        row = self._numbers[SKIPPED_IN_A_ROW] if self._numbers is not None else 0
        if row == 1:
            self._first_bad = weakref.ref(stages[int(self._state[BAD_OPTIMIZER])].optimizer)
        due = self._numbers is None and self._updates % READ_EVERY == 0
        if row >= self.max_skipped_in_a_row or (due and not backend.is_capturing(self._state.device)):
            self._check_floor()

    def get_scale(self) -> float:
        """The scale; waits for the device."""
        return float(self.current) if self.enabled else 1.0

    def is_enabled(self) -> bool:
        """Whether this scaler scales."""
        return self.enabled

    def get_growth_factor(self) -> float:
        """What the scale is multiplied by when it grows."""
        return self.rules.growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Change it; > 1."""
        self._change(growth_factor=new_factor)

    def get_backoff_factor(self) -> float:
        """What the scale is multiplied by when it is lowered."""
        return self.rules.backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Change it; in (0, 1)."""
        self._change(backoff_factor=new_factor)

    def get_growth_interval(self) -> int:
        """How many clean steps in a row let the scale grow."""
        return int(self.rules.growth_interval)

    def set_growth_interval(self, new_interval: int) -> None:
        """Change it; >= 1."""
        self._change(growth_interval=new_interval)

    def _change(self, **changes: float) -> None:
        if self.policy_name == "static":
            raise ValueError(f"{next(iter(changes))}: a static scale never moves")
        rules = self.rules._replace(**changes)  # type: ignore[arg-type]
        _check(rules, self.get_scale() or 1.0, self.policy_name)
        self.rules = rules

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on; torch.amp.GradScaler loads it too, and takes what it knows."""
        if not self.enabled:
            return {}
        self._check_between("state_dict")
        values = self._state.tolist()
        return {
            "scale": values[SCALE],
            "growth_factor": self.rules.growth_factor,
            "backoff_factor": self.rules.backoff_factor,
            "growth_interval": self.rules.growth_interval,
            "_growth_tracker": int(values[GROWTH_TRACKER]),
            "policy": self.policy_name,
            "hysteresis": self.rules.hysteresis,
            "hysteresis_left": int(values[HYSTERESIS_LEFT]),
            "min_scale": self.rules.min_scale,
            "max_scale": self.rules.max_scale,
            "skipped_in_a_row": int(values[SKIPPED_IN_A_ROW]),
            "first_bad": [int(values[BAD_OPTIMIZER]), int(values[BAD_PARAM])],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state, also one of torch.amp.GradScaler, which leaves this scaler's policy as it is.

        Raises:
            ValueError: a key is missing, a number is out of its range, or the state is of another policy.
            RuntimeError: the state is empty: it comes from a scaler that was not enabled.
        """
        if not self.enabled:
            return
        self._check_between("load_state_dict")
        if not state_dict:
            raise RuntimeError("load_state_dict: the state is empty; it comes from a scaler with enabled=False")
        needed = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")
        missing = [key for key in needed if key not in state_dict]
        if missing:
            raise ValueError(f"load_state_dict: missing keys {missing}")
        policy = state_dict.get("policy", self.policy_name)
        if policy != self.policy_name:
            raise ValueError(
                f"load_state_dict: the state is of policy {policy!r}, this scaler has {self.policy_name!r}"
            )
        names = ("growth_factor", "backoff_factor", "growth_interval", "hysteresis", "min_scale", "max_scale")
        static = policy == "static"
        rules = self.rules if static else self.rules._replace(**{n: state_dict[n] for n in names if n in state_dict})
        _check(rules, state_dict["scale"], policy, zero=True)
        for key in ("_growth_tracker", "hysteresis_left", "skipped_in_a_row"):
            count = state_dict.get(key, 0)
            if not (isinstance(count, int) and 0 <= count < 2**24):
                raise ValueError(f"load_state_dict: {key}: expected an int from 0 to 2**24 - 1, got {count!r}")
        self.rules = rules
        optimizer, param = state_dict.get("first_bad", (-1, -1))
        values = [0.0] * SCALER_SIZE
        values[SCALE], values[GROWTH_TRACKER] = state_dict["scale"], state_dict["_growth_tracker"]
        values[HYSTERESIS_LEFT] = state_dict.get("hysteresis_left", rules.hysteresis)
        values[SKIPPED_IN_A_ROW] = state_dict.get("skipped_in_a_row", 0)
        values[BAD_OPTIMIZER], values[BAD_PARAM] = optimizer, param
        self._state.copy_(torch.tensor(values, dtype=torch.float32))

    # ---- for pytrain.step ------------------------------------------------------------------------------------------

    def scale_now(self) -> float | Tensor:
        """The scale, which later ones do not change: a number where the host knows it."""
        return self.current.clone() if self._numbers is None else float(self._numbers[SCALE])

    def stage(self, optimizer: Optimizer) -> Stage:
        """How far an optimizer has come in the step under way."""
        for stage in self.stages:
            if stage.optimizer is optimizer:
                return stage
        self.stages += [Stage(optimizer)]
        return self.stages[-1]

    def begin(self, optimizers: Sequence[Optimizer]) -> list[Stage]:
        """The stages of optimizers that are about to step.

        Raises:
            RuntimeError: one of them has stepped since the last update.
        """
        self.moved = False
        stages: list[Stage] = []
        for optimizer in optimizers:
            stage = self.stage(optimizer)
            if stage.stepped:
                raise RuntimeError(
                    f"step() has already been called on this {type(optimizer).__name__} since the last update()"
                )
            stages += [stage]
        return stages

    def lend(self, between: Between) -> Besides:
        """For a launch: the scale; or the state and how it moves, where it moves next and by this one optimizer."""
        _, moves, groups, norms = between
        if moves and self.stages[0] is self.stages[-1]:
            return self._state, groups, norms, self.rules
        return self.current, groups, norms, ()

    def open_steps(self) -> list[str]:
        """The names of the optimizers that have stepped since the last update."""
        return [type(stage.optimizer).__name__ for stage in self.stages if stage.stepped]

    def drop(self, stages: list[Stage] | None) -> None:
        """An error has ended the step of these, or of all: only what `unscale_` did remains done."""
        ended = self.stages if stages is None else [stage for stage in stages if not stage.unscaled]
        self.stages = [stage for stage in self.stages if stage not in ended]

    def _check_between(self, what: str) -> None:
        if self.stages:
            raise RuntimeError(f"{what}: a step is under way (unscaled or stepped, not updated); call update() first")

    def _check_floor(self) -> None:
        values = self._state.tolist() if self._numbers is None else self._numbers
        row = values[SKIPPED_IN_A_ROW]
        if row < self.max_skipped_in_a_row:
            return
        if self._numbers is None and 0 <= (place := int(values[BAD_OPTIMIZER])) < len(self._order):
            self._first_bad = self._order[place]
        scale, static = float(values[SCALE]), self.policy_name == "static"
        if not static and scale > max(_fp32(self.rules.min_scale), LOWEST):
            return
        number, where = int(values[BAD_PARAM]), ""
        optimizer = None if self._first_bad is None else self._first_bad()
        if optimizer is not None and number >= 0:
            where = f"; the first bad gradient of the first of them was that of {name_of(optimizer, number)}"
        raise LossScaleError(
            f"{int(row)} steps in a row met an inf or nan, the last of them at the lowest scale, {scale:g}{where}. "
            "The loss or the model itself is not finite: look at the loss, at the inputs and at that parameter"
        )


def _found(stage: Stage) -> Tensor:
    """The control block of an optimizer that was unscaled and never stepped: what `unscale_` found."""
    control = blank_control(len(stage.optimizer.param_groups))
    if stage.found_inf is not None:
        control[FOUND_INF] = float(stage.found_inf)
    return control


def name_of(optimizer: Optimizer, number: int) -> str:
    """A parameter's place in an optimizer, its name where the optimizer knows it, and its shape."""
    first = 0  # the number of the group's first parameter; names are there for those too of which others have parts
    for index, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for k, param in enumerate(group["params"]):
            if cut_of(param, first + k).number == number:
                called = f" ({names[number - first]})" if names else ""
                place = f"{type(optimizer).__name__}: param_groups[{index}]['params'][{k}]{called}"
                return f"{place}, of shape {tuple(param.shape)}"
        first += len(names or group["params"])
    return f"{type(optimizer).__name__}: an unknown parameter"


def _fp32(value: float) -> float:
    return ctypes.c_float(value).value


def _is_scale(value: Any) -> bool:
    """Whether fp32 has this scale, or one near it."""
    return isinstance(value, (int, float)) and 0 < _fp32(value) < math.inf


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _check(rules: Policy, scale: float, policy: str, *, zero: bool = False) -> None:
    """Raise ValueError where a setting is out of its range."""

    def check(name: str, value: Any, good: bool, wanted: str) -> None:
        if not good:
            raise ValueError(f"{name}: expected {wanted}, got {value!r}")

    check("init_scale", scale, _is_scale(scale) or (zero and scale == 0), SCALES)
    if policy == "static":
        return
    check("growth_factor", rules.growth_factor, 1 < rules.growth_factor < math.inf, "a finite number > 1")
    check("backoff_factor", rules.backoff_factor, 0 < rules.backoff_factor < 1, "a number in (0, 1)")
    counts = _is_count(rules.growth_interval) and rules.growth_interval < 2**24
    check("growth_interval", rules.growth_interval, counts, "an int from 1 to 2**24 - 1")
    check("hysteresis", rules.hysteresis, _is_count(rules.hysteresis), "an int >= 1")
    check("min_scale", rules.min_scale, 0 <= rules.min_scale < math.inf, "a finite number >= 0")
    check("max_scale", rules.max_scale, rules.max_scale >= max(rules.min_scale, 2.0**-126), "at least min_scale, > 0")
    inside = _fp32(rules.min_scale) <= _fp32(scale) <= _fp32(rules.max_scale)
    if not zero:
        check("init_scale", scale, inside, f"from min_scale={rules.min_scale} to max_scale={rules.max_scale}")
