"""fuse: turn a live torch.optim optimizer into pytrain's class of the same name, in place."""

from __future__ import annotations

import functools
import warnings
import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.optim import lr_scheduler
from torch.optim.optimizer import Optimizer

from pytrain import backend
from pytrain.optim.base import REGISTRY, FusedOptimizer, Options
from pytrain.optim.storage import Storage

if TYPE_CHECKING:
    from typing_extensions import Unpack

SHOWN = 8  # indices of parameters that the warning lists for one group and reason


def fuse(optimizer: Optimizer, **options: Unpack[Options]) -> FusedOptimizer:
    """Make a torch.optim optimizer step by the kernels from now on.

    When to use it: where the optimizer is made by code that you do not want to change, or in the middle of a run. The
    object stays the same one, with its param groups, state, defaults, hooks and LR schedulers; only its class changes.
    Call it before a host (Lightning, Accelerate) gets the optimizer: what took `optimizer.step` away earlier, as
    `torch.compile(optimizer.step)` does, goes on with torch's step.

    A group's `fused=True` becomes None: with torch it asks for speed, with ours it would make an error of every
    parameter that no kernel takes. `fused=False` still means the torch path. `foreach=True` stays and changes nothing.

    Args:
        optimizer: of exactly a class of torch.optim that pytrain has too. One of pytrain's is returned as it is.
        options: storage and loss scaling, the same for every optimizer: see `Options`. The default of `amp_scaling`
            is that of our classes, True, whatever torch's optimizer had.

    Returns:
        The same object. A warning says once which parameters stay on the torch path, and why.

    Raises:
        TypeError: the optimizer is of another class (a subclass, a host's wrapper), or an option is unknown.
        ValueError: an option is out of its range, or a parameter's dtype excludes it.
        RuntimeError: a group has `differentiable=True`, or the optimizer's `step` was replaced by anything but an LR
            scheduler of torch.
        BackendError: PYTRAIN_BACKEND=native, and a parameter that no kernel takes.
            After an error the optimizer is as it was.

    Example:
        optimizer = fuse(torch.optim.AdamW(model.parameters(), lr=3e-4))
    """
    if isinstance(optimizer, FusedOptimizer):
        if options:
            raise TypeError(f"fuse: {_name(type(optimizer))} is pytrain's already; give {', '.join(options)} to it")
        return optimizer
    cls = _find(type(optimizer))
    storage = Storage.of(options)
    for index, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            storage.check_param(param, f"{cls.__name__}: param_groups[{index}]['params'][{i}]")
        if group.get("differentiable"):
            raise RuntimeError(
                f"fuse: param_groups[{index}] has differentiable=True, and pytrain's {cls.__name__} has no path "
                "through autograd; supported is differentiable=False"
            )
    scheduled = _is_scheduled(optimizer)
    slow = _find_slow(optimizer)
    if slow:  # before the change, as the warning may be an error
        places = "; ".join(f"{place}: {reason}" for place, reason in slow.items())
        warnings.warn(f"{cls.__name__}: these stay on the torch path: {places}", stacklevel=2)

    fused = _adopt(optimizer, cls, options)
    fused._warned.update(slow.values())  # the first step need not say it again
    for settings in (fused.defaults, *fused.param_groups):
        if settings.get("fused"):
            settings["fused"] = None
    if scheduled:
        fused.step = _tracked(fused)  # type: ignore[method-assign]
    return fused


def _adopt(optimizer: Optimizer, cls: type[FusedOptimizer], options: Options) -> FusedOptimizer:
    """Change the class, and set what FusedOptimizer.__init__ sets and torch's does not."""
    optimizer.__class__ = cls
    fused = cast(FusedOptimizer, optimizer)
    fused.storage = Storage.of(options)
    fused.counts_steps = cls.steps_in_state or fused.storage.needs_steps
    fused._step_supports_amp_scaling = options.get("amp_scaling", True)
    fused.__setstate__({})  # the rest as after unpickling: caches, hooks of parameters, the profiler's and hooks' step
    return fused


def _find(theirs: type) -> type[FusedOptimizer]:
    """Our class of the same name."""
    pairs = {getattr(torch.optim, cls.__name__, None): cls for cls in REGISTRY.values()}
    if theirs in pairs and theirs.__module__.startswith("torch.optim."):
        return pairs[theirs]
    supported = ", ".join(sorted(f"torch.optim.{kind.__name__}" for kind in pairs if kind is not None))
    bases = [f", a subclass of torch.optim.{kind.__name__}" for kind in theirs.__mro__[1:] if kind in pairs]
    raise TypeError(
        f"fuse: expected an optimizer of exactly one of the classes {supported}, got {_name(theirs)}"
        f"{bases[0] if bases else ''}; fuse an optimizer before a host wraps it"
    )


def _is_scheduled(optimizer: Optimizer) -> bool:
    """Whether an LR scheduler of torch has replaced `step`, to notice when it is called.

    Raises:
        RuntimeError: something else has: its work would be lost.
    """
    step = vars(optimizer).get("step")
    if step is None:
        return False
    made_by_torch = getattr(step, "__globals__", None) is vars(lr_scheduler)  # functools.wraps cannot fake this
    if made_by_torch and getattr(step, "__wrapped__", None) is type(optimizer).step:
        return True
    what = step if hasattr(step, "__qualname__") else type(step)
    raise RuntimeError(
        f"fuse: the step of this {type(optimizer).__name__} was replaced by {_name(what)}; supported are torch's own "
        "step and LR schedulers. Fuse the optimizer first, then replace its step"
    )


def _tracked(optimizer: FusedOptimizer) -> Any:
    """Our step, leaving the marks by which torch's LR schedulers warn of calls in the wrong order."""
    weak = weakref.ref(optimizer)  # the function is kept by the optimizer itself

    @functools.wraps(type(optimizer).step)
    def step(*args: Any, **kwargs: Any) -> Any:
        me = cast(Any, weak())
        me._opt_called = True
        return type(me).step(me, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return step


def _find_slow(optimizer: Optimizer) -> dict[str, str]:
    """Where parameters stay on the torch path without PYTRAIN_BACKEND=torch, and why."""
    slow: dict[str, str] = {}
    for index, group in enumerate(optimizer.param_groups):
        reasons: dict[str, list[int]] = {}
        for i, param in enumerate(group["params"]):
            choice = backend.select(backend.local(param), fused=False if group.get("fused") is False else None)
            if choice.backend == "torch" and backend.wanted() != "torch":
                reasons.setdefault(choice.reason, []).append(i)
        for reason, found in reasons.items():
            place = f"param_groups[{index}]"
            if len(found) < len(group["params"]):
                place += f"['params'][{', '.join(map(str, found[:SHOWN]))}]"
                place += f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
            slow[place] = reason
    return slow


def _name(what: Any) -> str:
    return f"{what.__module__}.{what.__qualname__}"
