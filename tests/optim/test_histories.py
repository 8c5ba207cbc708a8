"""Random histories: whatever happens between steps, the kernels stay with the torch path, in fp64."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
from devices import CHOSEN, randn
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from optim_cases import VARIANTS, needs_kernels
from torch import Tensor
from torch.nn import Parameter

from pytrain import backend
from pytrain.optim import REGISTRY

F64 = torch.float64
LAYOUTS: list[Any] = [
    lambda x: x.clone(memory_format=torch.contiguous_format),
    lambda x: (
        x.transpose(0, -1).clone(memory_format=torch.contiguous_format).transpose(0, -1) if x.dim() else x.clone()
    ),
    lambda x: torch.stack([x, x], -1)[..., 0],
    lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    lambda x: x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format),
]
layouts = st.sampled_from(LAYOUTS)
shapes = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4).map(tuple), min_size=1, max_size=4)
picks, flags = st.integers(0, 99), st.booleans()
HYPERS: dict[str, list[Any]] = {
    "lr": [0.01, 0.3, torch.tensor(0.02)],
    "betas": [(0.5, 0.99), (0.9, 0.95), [0.8, 0.9]],
    "weight_decay": [0, 0.1],
    "eps": [1e-6, 0.1],
    "momentum": [0, 0.5, 0.9],
    "dampening": [0, 0.3],
    "nesterov": [False, True],
    "amsgrad": [False, True],
    "maximize": [False, True],
}
CASES = [(name, options) for name in VARIANTS for options in VARIANTS[name]]


class Twins(RuleBasedStateMachine):
    """One optimizer on the kernels and one on the torch path live through the same history."""

    @initialize(case=st.sampled_from(CASES), sizes=shapes, seed=picks, data=st.data())
    def begin(self, case: tuple[str, dict[str, Any]], sizes: list[Any], seed: int, data: st.DataObject) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.options = {"lr": 0.05, **case[1]}
        values = [self.numbers(size) for size in sizes]
        mine = [Parameter(data.draw(layouts)(value)) for value in values]
        cls: Any = REGISTRY[case[0]]
        self.a = cls(mine, **self.options)
        self.b = cls([Parameter(value.clone()) for value in values], fused=False, **self.options)

    def numbers(self, shape: Any) -> Tensor:
        return randn(shape, generator=self.random, dtype=F64)

    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter and its twin."""
        groups = zip(self.a.param_groups, self.b.param_groups, strict=True)
        return [pair for g, h in groups for pair in zip(g["params"], h["params"], strict=True)]

    def pick(self, number: int) -> tuple[Tensor, Tensor]:
        pairs = self.pairs()
        return pairs[number % len(pairs)]

    def step(self, data: st.DataObject) -> None:
        for p, q in self.pairs():
            kind = data.draw(st.sampled_from(["new", "new", "new", "none", "same", "expanded"]))
            if kind == "same":
                continue
            p.grad = q.grad = None
            if kind != "none":
                g = self.numbers(()).expand(p.shape) if kind == "expanded" else self.numbers(p.shape)
                p.grad, q.grad = data.draw(layouts)(g) if kind == "new" else g, g.clone()
        self.a.step()
        self.b.step()

    # Three names for the same, so that histories are mostly steps.
    one = rule(data=st.data())(step)
    two = rule(data=st.data())(lambda self, data: self.step(data))
    three = rule(data=st.data())(lambda self, data: self.step(data))

    @rule(scale=st.sampled_from([2.0, 0.5, 1024.0]), flag=st.sampled_from([0.0, 1.0, 3.0]), data=st.data())
    def step_under_a_scaler(self, scale: float, flag: float, data: st.DataObject) -> None:
        if CHOSEN != "cpu" and len(self.a.state) < len(self.pairs()):  # there a skipped first step makes its states
            flag = 0.0
        for optimizer in (self.a, self.b):
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(flag)
        self.step(data)
        for optimizer in (self.a, self.b):
            del optimizer.grad_scale, optimizer.found_inf

    @rule(number=picks, layout=layouts, renewed=flags)
    def replace_data(self, number: int, layout: Any, renewed: bool) -> None:
        p, q = self.pick(number)
        if renewed:
            q.data = self.numbers(q.shape)
        p.data = layout(q.data if renewed else p.data)

    @rule(number=picks, layout=layouts)
    def swap(self, number: int, layout: Any) -> None:
        p, q = self.pick(number)
        p.grad = q.grad = None
        torch.utils.swap_tensors(p, Parameter(layout(p.detach())))

    @rule(number=picks, key=st.sampled_from(sorted(HYPERS)), value=picks, data=st.data())
    def change_a_hyperparameter(self, number: int, key: str, value: int, data: st.DataObject) -> None:
        self.step(data)
        index = number % len(self.a.param_groups)
        for optimizer in (self.a, self.b):
            group, new = optimizer.param_groups[index], copy.deepcopy(HYPERS[key][value % len(HYPERS[key])])
            if key in group and (key != "betas" or len(group[key]) == len(new)):  # Adan has three
                group[key] = new
        self.step(data)

    @rule(number=picks, name=picks, layout=layouts, how=st.sampled_from(["new", "edit", "data", "drop", "drop all"]))
    def change_a_state(self, number: int, name: int, layout: Any, how: str) -> None:
        p, q = self.pick(number)
        mine, twin = self.a.state.get(p, {}), self.b.state.get(q, {})
        names = sorted(key for key in mine if torch.as_tensor(mine[key]).shape == p.shape and key != "step")
        if not names:
            return
        key = names[name % len(names)]
        if how == "new":
            twin[key] = self.numbers(q.shape).abs()
            mine[key] = layout(twin[key])
        elif how == "edit":
            twin[key].mul_(0.5)
            mine[key].mul_(0.5)
        elif how == "data":
            mine[key].data = layout(mine[key].data)
        elif how == "drop":
            del mine[key], twin[key]
        else:
            del self.a.state[p], self.b.state[q]

    @rule(number=picks, value=st.sampled_from([2, 3.0, torch.tensor(2.0), torch.tensor([3.0]), torch.tensor(4)]))
    def change_a_step_count(self, number: int, value: Any) -> None:
        p, q = self.pick(number)
        if "step" in self.a.state.get(p, {}):
            self.a.state[p]["step"] = copy.deepcopy(value)
            self.b.state[q]["step"] = torch.tensor(float(value))

    @rule()
    def clear_all_state(self) -> None:
        self.a.state.clear()
        self.b.state.clear()

    @precondition(lambda self: len(self.a.param_groups) < 4)
    @rule(rows=st.sampled_from([1, 4]), layout=layouts, lr=st.sampled_from([0.01, 0.2]))
    def add_a_group(self, rows: int, layout: Any, lr: float) -> None:
        value = self.numbers((rows, 3))
        self.a.add_param_group({"params": [Parameter(layout(value))], "lr": lr})
        self.b.add_param_group({"params": [Parameter(value)], "lr": lr})

    @rule(seed=picks)
    def reorder(self, seed: int) -> None:
        for g, h in zip(self.a.param_groups, self.b.param_groups, strict=True):
            order = torch.randperm(
                len(g["params"]), generator=torch.Generator().manual_seed(seed), device="cpu"
            ).tolist()
            for group in (g, h):
                group["params"] = [group["params"][i] for i in order]

    @rule(number=picks, trained=flags)
    def freeze_or_thaw(self, number: int, trained: bool) -> None:
        for p in self.pick(number):
            p.requires_grad_(trained)

    @rule()
    def save_and_load(self) -> None:
        file = io.BytesIO()
        torch.save(self.a.state_dict(), file)
        file.seek(0)
        fresh = type(self.a)([{"params": group["params"]} for group in self.a.param_groups], **self.options)
        fresh.load_state_dict(torch.load(file, weights_only=True))
        self.a = fresh

    @rule()
    def copy_deeply(self) -> None:
        grads = [p.grad for p, _ in self.pairs()]  # which a deep copy of a parameter leaves out
        self.a = copy.deepcopy(self.a)
        for (p, _), grad in zip(self.pairs(), grads, strict=True):
            p.grad = grad

    @rule(level=st.sampled_from(["baseline", "avx2", "avx512"]))
    def change_the_instruction_set(self, level: str) -> None:
        self.level = getattr(self, "level", None) or backend.isa()
        if backend.facts is not None and backend.facts.isa_levels()[level]:
            backend.isa(level)

    @invariant()
    def twins_agree(self) -> None:
        if not hasattr(self, "a"):
            return
        assert len(self.a.state) == len(self.b.state)
        for p, q in self.pairs():
            assert torch.allclose(p, q, rtol=1e-10, atol=1e-12)
            mine, twin = self.a.state.get(p, {}), self.b.state.get(q, {})
            assert mine.keys() == twin.keys()
            for key in mine:
                shape = () if key == "step" else torch.as_tensor(twin[key]).shape
                one, other = (torch.as_tensor(state[key]).double().reshape(shape) for state in (mine, twin))
                assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)

    def teardown(self) -> None:
        if hasattr(self, "level"):
            backend.isa(self.level)


# Shrinking a failing history takes minutes: add Phase.shrink to look into one.
Twins.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
TestHistories = needs_kernels(Twins.TestCase)
