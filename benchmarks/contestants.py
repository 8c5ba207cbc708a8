"""What is stepped: the tensors of models, optimizers over parameters of their own, and a check that results agree."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Maker = Callable[[list[Tensor]], torch.optim.Optimizer]
LR = 1e-3
STEPS = 3  # before results are compared


def has_fused(cls: type[torch.optim.Optimizer]) -> bool:
    """Whether torch has fused kernels for its class."""
    return "fused" in inspect.signature(cls).parameters


def gpt2(d: int = 768, layers: int = 12) -> list[tuple[int, ...]]:
    """GPT-2 of a width: the small one has 148 tensors, 124 M elements."""
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * layers, (d,), (d,)]


def resnet50() -> list[tuple[int, ...]]:
    """ResNet-50: 161 tensors, 25.6 M elements."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7), (64,), (64,)]
    wide_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            wide = 4 * width
            for out, into, kernel in ((width, wide_in, 1), (width, width, 3), (wide, width, 1)):
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            if block == 0:
                shapes += [(wide, wide_in, 1, 1), (wide,), (wide,)]
            wide_in = wide
    return [*shapes, (1000, 2048), (1000,)]


@dataclass(frozen=True)
class Case:
    """Tensors to step, and the ratio to torch's fused step that pytrain wants to reach with fresh gradients."""

    name: str
    shapes: list[tuple[int, ...]]
    target: float | None = None

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def sample(self) -> Case:
        """A part of it that is stepped quickly, to look at the results."""
        small = [shape for shape in self.shapes if torch.Size(shape).numel() < 100_000][:50]
        return Case(self.name, small or [(100_000,)])


class Contestant:
    """An optimizer with parameters of its own, and how its gradients come about."""

    def __init__(self, make: Maker, case: Case, dtype: torch.dtype, *, fresh: bool) -> None:
        torch.manual_seed(0)
        self.params: list[Tensor] = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in case.shapes]
        self.sources = [torch.randn(shape).to(dtype) * 1e-2 for shape in case.shapes]
        self.optimizer = make(self.params)
        self.fresh = fresh
        if not fresh:
            for p, g in zip(self.params, self.sources, strict=True):
                p.grad = g

    def prepare(self) -> None:
        """Fresh gradients come from autograd's C++, as in training: no Python object stands for them yet."""
        if self.fresh:
            self.optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(torch._foreach_mul(self.params, 1.0), self.sources)

    def run(self) -> None:
        """The step that is timed."""
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of the states that a step has made, without the step counts."""
        states = [state for p in self.params for name, state in self.optimizer.state[p].items() if name != "step"]
        return sum(state.numel() * state.itemsize for state in states if torch.is_tensor(state))

    def step_bytes(self) -> int:
        """Bytes that a step moves at least: gradients read, parameters and states read and written, each once."""
        return sum(3 * p.numel() * p.itemsize for p in self.params) + 2 * self.state_bytes()


def check_agreement(label: str, every: dict[str, Maker], case: Case, dtype: torch.dtype, exact: Maker) -> None:
    """Refuse to time results that are further from fp64 than twice the rivals' own, or than one rounding a step.

    Args:
        label: names what is compared, for the error.
        every: the contestants by name; "pytrain" is compared with the others.
        case: the tensors, all of them stepped.
        dtype: of the parameters of all contestants.
        exact: makes the optimizer that steps in fp64.

    Raises:
        AssertionError: they are.
    """
    found: dict[str, list[Tensor]] = {}
    truth = Contestant(exact, case, torch.float64, fresh=False)
    for name, make in every.items():
        contestant = Contestant(make, case, dtype, fresh=False)
        found[name] = contestant.params
        if name == "pytrain":
            for p, q, g in zip(truth.params, contestant.params, contestant.sources, strict=True):
                p.data.copy_(q.data)
                p.grad = g.double()
        for _ in range(STEPS):
            contestant.run()
    for _ in range(STEPS):
        truth.run()
    pairs = {name: list(zip(params, truth.params, strict=True)) for name, params in found.items()}
    errors = {name: max((p.double() - e).abs().max().item() for p, e in pair) for name, pair in pairs.items()}
    rounding = torch.finfo(dtype).eps / 2 * max(p.abs().max().item() for p in truth.params)
    allowed = max(2 * max(error for name, error in errors.items() if name != "pytrain"), STEPS * rounding)
    assert errors["pytrain"] <= allowed, f"{label}, {case.name}: error {errors['pytrain']:.3g}, allowed {allowed:.3g}"
