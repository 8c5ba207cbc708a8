"""FusedOptimizer: what all optimizers share. Param groups, state, checkpoints, loss scaling, and the step itself."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim.optimizer import Optimizer, ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pytrain import backend
from pytrain.control import (
    CONTROL_HEAD,
    CONTROL_ROW,
    FOUND_INF,
    SKIPPED,
    STATS,
    SUMSQ,
    WRITE,
    WRITE_FITTED,
    Between,
    Moving,
    Record,
)
from pytrain.optim.plan import Settled, settle
from pytrain.optim.release import Release
from pytrain.optim.slow import zero
from pytrain.optim.states import plain
from pytrain.optim.storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from pytrain.optim.dtensors import Shards, Spread

# Is told, of parameters that are parts of others, those others' places in the optimizer, and what was summed up over
# the parts, shape (parameters, sums): fp64, to be replaced by the sums over all parts.
JoinSums = Callable[[list[tuple[Tensor, Tensor]]], None]
REGISTRY: dict[str, type[FusedOptimizer]] = {}


@dataclass(frozen=True)
class Rule:
    """An update rule: what C++ and Python must agree on, and its reference in torch.

    `reference(p, g, *states, *scalars, t=..., **hypers)` updates the states (shaped as p) and the scalars (fp32, no
    dimensions) in place and returns the update u of p <- p - u. In fp64 it is the oracle of the tests; in the
    parameter's own dtype it is the fallback.
    """

    name: str
    states: tuple[str, ...]
    hypers: tuple[str, ...]
    counts: bool
    reference: Callable[..., Tensor]
    scalars: tuple[str, ...] = ()
    sums: int = 0  # how many sums over the whole tensor the C++ rule takes before it updates
    positive: tuple[str, ...] = ()  # states that are never below zero
    exact: tuple[str, ...] = ()  # states that hold weights or step sizes: never kept in fewer than 32 bits


class Options(TypedDict, total=False):
    """Keyword arguments of every optimizer, besides torch's. See docs/optimizers.md."""

    amp_scaling: bool
    master_weights: bool | str
    rounding: str
    kahan: bool
    state_dtype: str | None
    ema_decay: float | None
    zero_grad_in_step: bool
    step_in_backward: bool
    seed: int


class FusedOptimizer(Optimizer):
    """Base of all optimizers: torch.optim.Optimizer with one native step over all parameters.

    A subclass names its `rules`, and says which rule and which hyperparameters a param group takes.
    """

    rules: ClassVar[tuple[Rule, ...]] = ()
    steps_in_state: ClassVar[bool] = False  # does state hold a "step" tensor a parameter, as torch's class does?
    takes_sparse: ClassVar[bool] = False  # does torch's class take sparse gradients?
    takes_control: ClassVar[bool] = True  # does its own loop unscale, clip and average, as `pytrain.step` asks it to?
    join_sums: JoinSums | None = None  # adds to what rules sum over parts of parameters what other ranks have
    settles: bool = False  # has the last `measure` settled the control block too?
    implementation_keys: ClassVar[tuple[str, ...]] = ()  # group keys that choose how, not what, to compute
    spread: Spread | None = None  # how DTensors among the parameters lie on the ranks
    _shards: Shards | None = None  # what steps those

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "rules" in cls.__dict__:  # a user's subclass without a rule of its own is not one more optimizer
            REGISTRY[cls.__name__.lower()] = cls

    def __init__(self, params: ParamsT, defaults: dict[str, Any], **options: Unpack[Options]) -> None:
        self._settled: Settled | None = None
        self._loading: dict[str, Any] | None = None
        self._warned: set[str] = set()
        self._skipped: bool | Tensor = False  # a control block on a device, where only that knows
        self._swapped = False
        self._measured: Settled | None = None
        self.averages: dict[int, Tensor] = {}
        self.storage = Storage.of(options)
        self.counts_steps = self.steps_in_state or self.storage.needs_steps
        self._step_supports_amp_scaling = options.get("amp_scaling", True)
        self._release = Release(self) if self.storage.in_backward else None
        self.check_group(defaults)
        self._check_implementation(defaults)
        super().__init__(params, defaults)

    # ---- what a subclass says -------------------------------------------------------------------------------------

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError, naming the argument, where a hyperparameter is out of its range."""

    def rule(self, group: dict[str, Any]) -> Rule:
        """The rule that a group's options select."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
        """The rule's hyperparameters, in the order of `Rule.hypers`."""
        raise NotImplementedError

    def initial(self, name: str, param: Tensor, group: dict[str, Any]) -> float | Tensor:
        """What a state or scalar of this name begins with: a number, or values shaped as the parameter."""
        return 0.0

    # ---- what a user sees -----------------------------------------------------------------------------------------

    @property
    def step_was_skipped(self) -> bool:
        """Whether the last `step` did nothing because a gradient was inf or nan; waits for its device."""
        return bool(self._skipped[FOUND_INF] != 0) if isinstance(self._skipped, Tensor) else self._skipped

    @property
    def choices(self) -> list[backend.Choice]:
        """The backend and the reason, a param group: that of its first parameter on the torch path, if there is one."""
        if self._shards is not None:
            return self._shards.inner(self).choices
        found = {} if self._settled is None else {id(s.entry.param): s.reason for s in self._settled.slow}
        chosen = []
        for group in self.param_groups:
            each = [backend.select(p, fused=group.get("fused")) for p in group["params"]]
            each += [backend.Choice("torch", found[id(p)]) for p in group["params"] if id(p) in found]
            torch_path = [c for c in each if c.backend == "torch"]
            chosen += torch_path[:1] or each[:1] or [backend.Choice("native", "no parameters")]
        return chosen

    @property
    def backend(self) -> str:
        """What steps the parameters: "native", "torch", or "mixed" where param groups differ."""
        names = {choice.backend for choice in self.choices}
        return names.pop() if len(names) == 1 else "mixed"

    def __repr__(self) -> str:
        try:
            lines = [f"    group {i}: {c.backend} ({c.reason})" for i, c in enumerate(self.choices)]
        except (backend.BackendError, ValueError) as error:  # what the next step will raise
            lines = [f"    {error}"]
        return super().__repr__()[:-1] + "backend\n" + "\n".join(lines) + "\n)"

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Under torch.amp.GradScaler the gradients are unscaled on the fly (they themselves stay scaled), and the whole
        step is left out where the scaler found an inf or nan: see `step_was_skipped`.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.

        Raises:
            ValueError: a gradient or a state does not fit its parameter; nothing was written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._release is not None:
            self._release.check_step()
        self._apply()
        if self._release is not None:
            self._skipped = self.step_was_skipped or self._release.any_skipped()
            self._release.finish()
        return loss

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Have the parameters hold their averages (`ema_decay`) inside the context, and their own values after it.

        Raises:
            RuntimeError: the optimizer keeps no averages, or it is stepped inside the context.
        """
        if self.storage.ema_decay is None:
            raise RuntimeError("swap_ema: this optimizer keeps no averages; make it with ema_decay=")
        params = [p for group in self.param_groups for p in group["params"] if "ema" in self.state.get(p, {})]
        with torch.no_grad():
            own = [p.detach().clone() for p in params]
            for p in params:
                p.copy_(self.state[p]["ema"])
        self._swapped = True
        try:
            yield
        finally:
            self._swapped = False
            with torch.no_grad():
                for p, value in zip(params, own, strict=True):
                    p.copy_(value)

    # ---- the step -------------------------------------------------------------------------------------------------

    @_disable_dynamo  # torch.compile breaks its graph here, and compiles nothing of what is called from here
    def _apply(self) -> None:
        """Run the plans; make them anew where what they were made of has changed."""
        if self._swapped:
            raise RuntimeError("step: the parameters hold their averages; leave the swap_ema() context first")
        if self._measured is not None:
            self._write(WRITE)
            return
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        given = [x for x in (found_inf, grad_scale) if x is not None]
        if given and self.takes_control and all(torch.is_tensor(x) and backend.is_remote(x.device) for x in given):
            self._run_settled(1.0, found_inf, grad_scale)
            return
        self._skipped = found_inf is not None and bool(found_inf != 0)
        if not self._skipped:
            scale = 1.0 if grad_scale is None else float(grad_scale)
            self._run(1.0 / scale if scale else math.inf)
        else:
            self._zero_kept()

    def _zero_kept(self) -> None:
        """After a skipped step: a kept inf would poison every later one."""
        if self.storage.zero_grad:
            for group in self.param_groups:
                for param in group["params"]:
                    if param.grad is not None:
                        zero(param.grad)

    def _run(self, inv_scale: float) -> None:
        self._run_settled(inv_scale, None, None)

    def _run_settled(self, inv_scale: float, found_inf: Tensor | None, grad_scale: Tensor | None) -> None:
        """Step; the last two, of a torch GradScaler, count where only their device knows them."""
        if self._shards is not None:
            return self._shards.run(self, inv_scale, found_inf, grad_scale)
        settled, code = self._settled, 0
        if settled is not None and settled.is_current(self):
            code = settled.run(self, inv_scale, found_inf, grad_scale)
        if settled is None or code >= 0:
            self._settled = None
            settled = settle(self)
            try:
                code = settled.run(self, inv_scale, found_inf, grad_scale, last_try=True)
            except BaseException:
                settled.forget(self)
                raise
            self._settled = settled
        on_device = bool(settled.remote) and not settled.merges and (settled.coded or found_inf is not None)
        self._skipped = code == SKIPPED or (settled.control if on_device else False)
        if code == SKIPPED:
            self._zero_kept()

    def measure(
        self,
        grad_coef: float,
        clip_value: float,
        averages: dict[int, Tensor],
        ema_weight: float,
        between: Between | None = None,
    ) -> Tensor:
        """Pass 1 of `pytrain.step`: fill in and return the control block; the next `step()` is pass 2 by it.

        Args:
            between: what settles the control block, where nothing has to come before that: then pass 1 may do it, and
                `settles` says whether it did.

        Raises:
            UnfitError: a gradient or a state does not fit its parameter.
        """
        if self._swapped:
            raise RuntimeError("step: the parameters hold their averages; leave the swap() context first")
        if self._shards is not None:
            return self._shards.measure(self, grad_coef, clip_value)
        if averages and averages is not self.averages:
            self.averages, self._settled = averages, None
        settled, code = self._settled, 0
        if settled is not None and settled.is_current(self):
            settled.begin(grad_coef, clip_value, ema_weight)
            code = settled.stats(False, between) if settled.gather(self, STATS) else 0
        if settled is None or code >= 0:
            self._settled = None
            settled = settle(self)
            try:
                settled.begin(grad_coef, clip_value, ema_weight)
                settled.gather(self)
                settled.stats(True, between)
            except BaseException:
                settled.forget(self)
                raise
            self._settled = settled
        self._measured = settled
        self.settles = settled.settled
        return settled.control

    def finish(self, *, alone: bool, scaler: Moving | None = None) -> Record:
        """Pass 2 of `pytrain.step`: as `step()` after a `measure`. Returns a copy of the step's control block.

        Args:
            alone: nothing has run since `measure` that could have moved a tensor.
            scaler: what may move in the same launch; its `moved` says whether it has.
        """
        settled, patched = self._measured, self.__dict__.get("step")
        assert settled is not None
        if patched is not None and hasattr(patched, "_wrapped_by_lr_sched"):
            self._opt_called, patched = True, None  # all that a scheduler's wrapper does
        if patched is not None or self._hooked():
            self.step()
        else:
            self._write(WRITE_FITTED if alone else WRITE, scaler)
        return settled.record()

    def _hooked(self) -> bool:
        mine = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        return bool(mine or _global_optimizer_pre_hooks or _global_optimizer_post_hooks)

    def _write(self, mode: int, scaler: Moving | None = None) -> None:
        if self._shards is not None:
            return self._shards.write(self, mode)
        settled, self._measured = self._measured, None
        assert settled is not None
        if mode == WRITE and self._hooked():  # hooks may have changed the gradients
            settled.gather(self)
            sums = settled.control[CONTROL_HEAD:].view(-1, CONTROL_ROW)[:, SUMSQ]
            found = sums.clone()
            settled.stats(True)  # for inf and nan; norms stay those that were clipped by
            sums.copy_(found)
        code = settled.write(self, True, mode, scaler)
        self._skipped = settled.control if settled.remote and not settled.merges else False
        if code == SKIPPED:
            self._forget_first(settled)
            self.skip()

    def skip(self) -> None:
        """A step of `pytrain.step` was left out."""
        self._skipped = True
        self._zero_kept()

    def skipped(self) -> bool | Tensor:
        """As `step_was_skipped`, without a wait: the control block where only its device knows."""
        return self._skipped

    def done(self) -> frozenset[int]:
        """The ids of the parameters whose averages, lent by `measure`, the last step has moved if it was applied."""
        return frozenset() if self._settled is None else self._settled.averaged

    def abandon(self) -> None:
        """Take back a `measure` whose pass 2 will not come."""
        if self._measured is not None:
            if self._shards is not None:
                self._shards.abandon()
            else:
                self._forget_first(self._measured)
            self._measured = None

    def _forget_first(self, settled: Settled) -> None:
        if settled.fresh:
            settled.forget(self)
            self._settled = None

    def warn_once(self, text: str) -> None:
        """Say why parameters take the torch path; each reason once an optimizer."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(f"{type(self).__name__}: {text}", stacklevel=2)

    # ---- param groups, checkpoints, copies ------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as torch.optim.Optimizer does.

        Raises:
            ValueError: a hyperparameter of the group is out of its range.
        """
        full = {**self.defaults, **param_group}
        self.check_group(full)
        self._check_implementation(full)
        super().add_param_group(param_group)
        try:
            self._find_shards()
        except ValueError:
            del self.param_groups[-1]
            raise
        if self._release is not None:
            self._release.watch(self.param_groups[-1]["params"])

    def _find_shards(self) -> None:
        """Where a parameter is a DTensor, have its shards stepped."""
        self._shards = self.spread = None
        if backend.has_dtensors(p for group in self.param_groups for p in group["params"]):
            from pytrain.optim.dtensors import Shards

            self._shards = Shards(self)
            self.spread = self._shards.spread

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of torch.optim's class of the same name.

        Each state keeps the dtype that it was saved with. Options that choose how to compute (`fused`, `foreach`,
        `capturable`, `differentiable`) stay as this optimizer was made with.

        Raises:
            ValueError: the param groups do not match, or a state's shape is not its parameter's.
        """
        before = [{k: g[k] for k in self.implementation_keys if k in g} for g in self.param_groups]
        hook = self.register_load_state_dict_pre_hook(_remember)  # the last hook sees what is really loaded
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None
        for group, kept in zip(self.param_groups, before, strict=True):
            for key in self.implementation_keys:
                group.pop(key, None)
            group.update(kept)

    def __setstate__(self, state: dict[str, Any]) -> None:
        loading = getattr(self, "_loading", None)
        if loading is not None:
            restore_dtypes(state, loading)
        super().__setstate__(state)
        self._settled, self._loading, self._warned, self._skipped, self._swapped = None, None, set(), False, False
        self._measured, self.averages = None, {}
        if not hasattr(self, "storage"):  # an optimizer pickled by an older version
            self.storage, self.counts_steps = Storage(), self.steps_in_state
        if getattr(self, "_release", None) is None:
            self._release = Release(self) if self.storage.in_backward else None
        if self._release is not None:
            self._release.watch([p for group in self.param_groups for p in group["params"]])
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        self._find_shards()

    def __getstate__(self) -> dict[str, Any]:
        state = super().__getstate__()
        kept = {"storage": self.storage, "counts_steps": self.counts_steps}
        return {**state, **kept, "_step_supports_amp_scaling": self._step_supports_amp_scaling}

    def state_dict(self, *, portable: bool = False) -> dict[str, Any]:
        """The state and param groups, as torch.optim.Optimizer gives them.

        Args:
            portable: give states as torch.optim keeps them, in fp32, without what our storage formats add.
        """
        saved = super().state_dict()
        if portable:
            numbers = iter(number for group in saved["param_groups"] for number in group["params"])
            for group in self.param_groups:
                for param, number in zip(group["params"], numbers, strict=False):
                    if number in saved["state"]:
                        saved["state"][number] = plain(self, param, self.rule(group))
            saved["state"] = {number: state for number, state in saved["state"].items() if state}
        return saved

    def _check_implementation(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        if group.get("differentiable"):
            raise RuntimeError(
                f"differentiable=True: {name} has no path through autograd; use torch.optim's class of that name"
            )
        if group.get("fused") and group.get("foreach"):
            raise RuntimeError("fused=True and foreach=True exclude each other; leave foreach unset")


def _remember(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    assert isinstance(optimizer, FusedOptimizer)
    optimizer._loading = state_dict


def restore_dtypes(state: dict[str, Any], loaded: dict[str, Any]) -> None:
    """Undo torch's cast of every loaded state to its parameter's dtype (pytorch#43706)."""
    saved = [i for group in loaded["param_groups"] for i in group["params"]]
    params = [p for group in state["param_groups"] for p in group["params"]]
    for index, param in zip(saved, params, strict=True):
        for key, value in loaded["state"].get(index, {}).items():
            if torch.is_tensor(value) and torch.is_tensor(param) and key != "step":
                cast = state["state"][param][key]
                if cast.dtype != value.dtype:
                    state["state"][param][key] = value.to(device=cast.device, copy=True)


def decayed(p: Tensor, w: float) -> Tensor:
    """The part w p that a decay takes away; nothing of an infinite p, which stays what it is."""
    return torch.where(p.isinf(), 0.0, w * p)


def sign(x: Tensor) -> Tensor:
    """-1, 0 or 1; nan for nan, which torch.sign hides."""
    return torch.where(x.isnan(), x, torch.sign(x))


def scalar(name: str, value: float | Tensor) -> float:
    """A hyperparameter given as a number or a tensor of one element, as a number."""
    if torch.is_tensor(value) and value.numel() != 1:
        raise ValueError(f"{name}: expected one element, got a tensor of shape {tuple(value.shape)}")
    return float(value)


def scalars(name: str, values: Sequence[float | Tensor], count: int) -> tuple[float, ...]:
    """Hyperparameters given together, as numbers."""
    if len(values) != count:
        raise ValueError(f"{name}: expected {count} values, got {len(values)}")
    return tuple(scalar(f"{name}[{i}]", value) for i, value in enumerate(values))


def check_range(name: str, value: float | Tensor, low: float, below: float | None = None) -> None:
    """Raise ValueError unless low <= value (< below)."""
    number = scalar(name, value)
    if number >= low and (below is None or number < below):
        return
    wanted = f">= {low}" if below is None else f"in [{low}, {below})"
    raise ValueError(f"{name}: expected {wanted}, got {number}")
