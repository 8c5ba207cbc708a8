"""What fuse() is asked for and refuses: flags, the torch path, classes it does not know, foreign steps."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from optim_cases import (
    DTYPES,
    LR,
    VARIANTS,
    needs_kernels,
    torch_class,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import lr_scheduler

from pytrain import backend
from pytrain.optim import REGISTRY
from pytrain.optim.fuse import fuse

NAMES = [name for name in VARIANTS if torch_class(name) is not None]
CASES = [pytest.param(name, options, id=f"{name}-{options}") for name in NAMES for options in VARIANTS[name]]
# torch 2.13's own fused SGD and Adagrad go wrong on the CPU in half precision (pytorch#191763).
HALVES = [*((dtype, {}) for dtype in DTYPES), (torch.float32, {"fused": True}), (torch.float32, {"foreach": True})]
HALF_CASES = [
    pytest.param(*case.values, dtype, how, id=f"{case.id}-{dtype}-{how}")
    for case in CASES
    for dtype, how in HALVES
    if how.keys() <= inspect.signature(torch_class(case.values[0])).parameters.keys()  # type: ignore[arg-type]
]
STEPS = 4


def theirs(name: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """torch's optimizer with the tests' learning rate."""
    cls: Any = torch_class(name)
    return cls(params, **{"lr": LR, **options})  # type: ignore[no-any-return]


@pytest.fixture
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if backend.facts is None:
            warnings.filterwarnings("ignore", message=".*the kernels (are|do) not")
        yield


@pytest.mark.parametrize("flag", ["fused", "foreach", "capturable"])
@pytest.mark.parametrize("name", NAMES)
def test_torchs_flags_make_no_error_of_what_no_kernel_takes(name: str, flag: str) -> None:
    good, bad = Parameter(torch.ones(2)), Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = theirs(name, [{"params": [good]}, {"params": [bad]}])
    for settings in (optimizer.defaults, *optimizer.param_groups):
        settings[flag] = True
    with pytest.warns(UserWarning, match="complex64" if backend.facts else "stay on the torch path"):
        fuse(optimizer)
    assert all(group[flag] is (None if flag == "fused" else True) for group in optimizer.param_groups)
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    optimizer.add_param_group({"params": [Parameter(torch.ones(2, dtype=torch.complex64))]})
    assert all(p.real.max().item() != 1.0 for p in (good.detach(), bad.detach()))


@needs_kernels
def test_one_warning_says_what_stays_on_the_torch_path_and_why() -> None:
    wide = [Parameter(torch.ones(2)), *(Parameter(torch.ones(2, dtype=torch.complex64)) for _ in range(10))]
    groups: Any = [
        {"params": wide},
        {"params": [Parameter(torch.ones(1))], "fused": False},
        {"params": [Parameter(torch.ones(3))]},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fused = fuse(optimizer)
        for p in wide:
            p.grad = torch.ones_like(p)
        fused.step()
        fuse(fused)
    assert [str(w.message) for w in seen] == [
        "SGD: these stay on the torch path: param_groups[0]['params'][1, 2, 3, 4, 5, 6, 7, 8] and 2 more: "
        "there are no kernels for torch.complex64; param_groups[1]: fused=False"
    ]
    assert seen[0].filename == __file__ and fused.param_groups[1]["fused"] is False


@pytest.mark.usefixtures("no_warnings")
def test_the_torch_path_that_was_asked_for_is_no_surprise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_BACKEND", "torch")
    p = Parameter(torch.ones(2))
    fused = fuse(torch.optim.AdamW([p], lr=0.5, fused=True))
    p.grad = torch.ones(2)
    fused.step()
    assert fused.backend == "torch" and p.detach().max() < 0.6


class Subclass(torch.optim.AdamW):
    """A user's class, whose own step must not be lost."""

    def step(self, closure: Any = None) -> Any:
        return None


def param() -> list[Tensor]:
    return [Parameter(torch.ones(2))]


def replaced(make: Callable[[Any], Any], scheduled: bool = False) -> torch.optim.Optimizer:
    """An optimizer whose step something replaced, before or after a scheduler did."""
    optimizer = torch.optim.AdamW(param())
    optimizer.step = make(optimizer)  # type: ignore[method-assign]
    if scheduled:
        lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    return optimizer


def over_a_scheduler() -> torch.optim.Optimizer:
    """As accelerate does, but with functools.wraps, which copies the scheduler's mark."""
    optimizer = torch.optim.AdamW(param())
    lr_scheduler.LambdaLR(optimizer, lambda n: 1.0)
    optimizer.step = functools.wraps(optimizer.step)(lambda *_: None)  # type: ignore[method-assign, assignment]
    return optimizer


def marked_as_a_schedulers() -> torch.optim.Optimizer:
    """As code does that replaces the scheduler's wrapper and wants no warning of it."""
    optimizer = torch.optim.AdamW(param())
    step = functools.wraps(torch.optim.AdamW.step)(lambda *_: None)
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    optimizer.step = step  # type: ignore[method-assign, assignment]
    return optimizer


def bound_function(optimizer: torch.optim.Optimizer) -> Any:
    return (lambda self, closure=None: None).__get__(optimizer)


SUPPORTED = ", ".join(sorted(f"torch.optim.{REGISTRY[name].__name__}" for name in NAMES))
NO_STEP = "step of this AdamW was replaced by .*; supported are torch's own step and LR schedulers"
ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], type[Exception], str]] = {
    "a subclass": (lambda: Subclass(param()), {}, TypeError, r"got \w+.Subclass, a subclass of torch.optim.AdamW"),
    "not ours": (lambda: torch.optim.LBFGS(param()), {}, TypeError, f"{SUPPORTED}, got torch.optim.lbfgs.LBFGS"),
    "no optimizer": (lambda: torch.nn.Linear(1, 1), {}, TypeError, "got torch.nn.modules.linear.Linear"),
    "differentiable": (
        lambda: torch.optim.AdamW([{"params": param()}, {"params": param(), "differentiable": True}]),
        {},
        RuntimeError,
        r"param_groups\[1\] has differentiable=True.* AdamW .*supported is differentiable=False",
    ),
    "a replaced step": (lambda: replaced(lambda o: lambda *_: None), {}, RuntimeError, NO_STEP),
    "a bound method": (lambda: replaced(lambda o: o.step), {}, RuntimeError, NO_STEP),
    "a scheduler over it": (lambda: replaced(bound_function, scheduled=True), {}, RuntimeError, NO_STEP),
    "a wrapper over a scheduler": (over_a_scheduler, {}, RuntimeError, NO_STEP),
    "a wrapper with its marks": (marked_as_a_schedulers, {}, RuntimeError, NO_STEP),
    "an object": (lambda: replaced(lambda o: torch.nn.Identity()), {}, RuntimeError, "replaced by .*Identity"),
    "an unknown option": (
        lambda: torch.optim.AdamW(param()),
        {"amp_scalling": True},
        TypeError,
        "unexpected argument 'amp_scalling'; the options of every optimizer are amp_scaling, ",
    ),
    "an option's value": (
        lambda: torch.optim.AdamW(param()),
        {"master_weights": True, "kahan": True},
        ValueError,
        "leave kahan or master_weights unset",
    ),
    "an option that a dtype excludes": (
        lambda: torch.optim.AdamW([*param(), Parameter(torch.ones(2, dtype=torch.float64))]),
        {"state_dtype": "8bit"},
        ValueError,
        r"AdamW: param_groups\[0\]\['params'\]\[1\]: state_dtype='8bit', but the parameter is float64",
    ),
    "an option for ours": (lambda: REGISTRY["adamw"](param()), {"amp_scaling": False}, TypeError, "pytrain's already"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_an_error_says_what_came_and_changes_nothing(what: str) -> None:
    make, options, kind, message = ERRORS[what]
    optimizer = make()
    cls, before = type(optimizer), vars(optimizer).copy()
    groups = copy.deepcopy(getattr(optimizer, "param_groups", []))
    with pytest.raises(kind, match=message):
        fuse(optimizer, **options)
    assert type(optimizer) is cls and vars(optimizer).keys() == before.keys()
    assert all(vars(optimizer)[key] is value for key, value in before.items())
    assert str(getattr(optimizer, "param_groups", [])) == str(groups)


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    optimizer = torch.optim.AdamW([Parameter(torch.ones(2, dtype=torch.complex64))], fused=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="stay on the torch path"):
            fuse(optimizer)
    assert type(optimizer) is torch.optim.AdamW


def test_a_demand_for_kernels_that_cannot_serve_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTRAIN_BACKEND", "native")
    optimizer = torch.optim.AdamW([Parameter(torch.ones(2, dtype=torch.complex64))], fused=None)
    before = vars(optimizer).copy()
    with pytest.raises(backend.BackendError, match="PYTRAIN_BACKEND=native"):
        fuse(optimizer)
    assert type(optimizer) is torch.optim.AdamW and vars(optimizer) == before


def test_every_class_that_torch_has_is_tried() -> None:
    assert {name for name in REGISTRY if torch_class(name)} == set(NAMES)
    assert all(re.fullmatch(r"torch\.optim\.\w+", name) for name in SUPPORTED.split(", "))
