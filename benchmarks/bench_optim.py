"""How fast is a step against torch's? Every case with gradients kept and with fresh ones, results checked first."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from common import Timing, Triad, interleaved, machine, markdown, nothing, parser, write_json
from torch import Tensor

import pytrain.optim

LR = 1e-3
BYTES = {"adamw": 28, "adam": 28, "sgd": 12, "lion": 20}  # of fp32 read and written an element


def gpt2() -> list[tuple[int, ...]]:
    """GPT-2 small: 148 tensors, 124 M elements."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *block * 12, (d,), (d,)]


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
    target: float | None

    @property
    def elements(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)


CASES = [
    Case("300 x 256", [(256,)] * 300, 8.0),
    Case("1,000 x 1,000", [(1000,)] * 1000, 8.0),
    Case("20,000 x 16", [(16,)] * 20_000, 8.0),
    Case("one of 10 M", [(10_000_000,)], 1.0),
    Case("ResNet-50", resnet50(), None),
    Case("GPT-2 small", gpt2(), 1.0),
]
QUICK = [
    Case("300 x 256", [(256,)] * 300, None),
    Case("100 x 16", [(16,)] * 100, None),
    Case("5 x 3, 7", [(3, 7)] * 5, None),
]

Maker = Callable[[list[Tensor]], torch.optim.Optimizer]


def makers(optimizer: str) -> dict[str, Maker]:
    """The contestants by name; ours first. Lion has no torch class: its rival is the torch path of our own."""
    ours = pytrain.optim.REGISTRY[optimizer]
    found: dict[str, Maker] = {"pytrain": lambda params: ours(params, lr=LR)}  # type: ignore[call-arg, arg-type]
    theirs = getattr(torch.optim, ours.__name__, None)
    if theirs is None:
        found["torch path"] = lambda params: ours(params, lr=LR, fused=False)  # type: ignore[call-arg, arg-type]
        return found
    found["fused"] = lambda params: theirs(params, lr=LR, fused=True)
    found["foreach"] = lambda params: theirs(params, lr=LR, foreach=True)
    found["for-loop"] = lambda params: theirs(params, lr=LR, foreach=False, fused=False)
    if optimizer == "adamw" and importlib.util.find_spec("deepspeed") is not None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeed"] = lambda params: DeepSpeedCPUAdam(params, lr=LR, weight_decay=0.01, adamw_mode=True)
    return found


class Contestant:
    """An optimizer with parameters of its own, and how its gradients come about."""

    def __init__(self, make: Maker, case: Case, dtype: torch.dtype, *, fresh: bool) -> None:
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in case.shapes]
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


def check_agreement(optimizer: str, case: Case, dtype: torch.dtype) -> None:
    """Refuse to time results that are further from fp64 than twice torch's own, or than one rounding.

    Raises:
        AssertionError: they are.
    """
    small = Case(
        case.name, [shape for shape in case.shapes if torch.Size(shape).numel() < 100_000][:50] or [(100_000,)], None
    )
    found: dict[str, list[Tensor]] = {}
    every = makers(optimizer)
    plain = list(every)[-1]
    exact = Contestant(every[plain], small, torch.float64, fresh=False)
    for name, make in every.items():
        contestant = Contestant(make, small, dtype, fresh=False)
        found[name] = contestant.params
        if name == "pytrain":
            for p, q, g in zip(exact.params, contestant.params, contestant.sources, strict=True):
                p.data.copy_(q.data)
                p.grad = g.double()
        for _ in range(3):
            contestant.run()
    for _ in range(3):
        exact.run()
    pairs = {name: list(zip(params, exact.params, strict=True)) for name, params in found.items()}
    errors = {name: max((p.double() - e).abs().max().item() for p, e in pair) for name, pair in pairs.items()}
    rounding = torch.finfo(dtype).eps * max(p.abs().max().item() for p in exact.params)
    allowed = max(2 * max(error for name, error in errors.items() if name != "pytrain"), rounding)
    assert errors["pytrain"] <= allowed, (
        f"{optimizer}, {case.name}: error {errors['pytrain']:.3g}, allowed {allowed:.3g}"
    )


def measure(
    optimizer: str, case: Case, dtype: torch.dtype, *, fresh: bool, repeat: int, budget: float
) -> dict[str, Any]:
    """One row: every rival against ours, two at a time, with a triad in the same turns."""
    every = makers(optimizer)
    triad = Triad(min(max(case.elements, 1_000), 40_000_000))
    times: dict[str, Timing] = {}
    ratios: dict[str, float] = {}
    for rival in [name for name in every if name != "pytrain"]:
        ours = Contestant(every["pytrain"], case, dtype, fresh=fresh)
        theirs = Contestant(every[rival], case, dtype, fresh=fresh)
        main = not ratios
        found = interleaved(
            {"ours": (ours.prepare, ours.run), "theirs": (theirs.prepare, theirs.run), "triad": (nothing, triad.run)},
            repeat=repeat if main else max(3, repeat // 4),
            budget=budget if main else budget / 3,
        )
        ratios[rival] = found["theirs"].median / found["ours"].median
        if main:
            times = {"pytrain": found["ours"], rival: found["theirs"], "triad": found["triad"]}
        del ours, theirs
        gc.collect()
    per_element = BYTES[optimizer] * dtype.itemsize / 4
    moved = case.elements * per_element
    share = moved / times["pytrain"].median / (triad.bytes / times["triad"].median)
    first = next(iter(ratios))
    return {
        "optimizer": optimizer,
        "dtype": str(dtype).removeprefix("torch."),
        "case": case.name,
        "tensors": len(case.shapes),
        "elements": case.elements,
        "gradients": "fresh" if fresh else "kept",
        "ms": {name: 1e3 * t.median for name, t in times.items()},
        "pytrain": times["pytrain"].text(),
        "rival": times[first].text(),
        "rival_name": first,
        "ratios": ratios,
        "gb_per_s": moved / times["pytrain"].median / 1e9,
        "share_of_triad": share,
        "target": case.target if fresh else None,
        "met": None if case.target is None or not fresh else ratios[first] >= case.target,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    others = [name for name in row["ratios"] if name != row["rival_name"]]
    met = {None: "", True: "yes", False: "NO"}[row["met"]]
    return [
        row["case"],
        row["gradients"],
        row["pytrain"],
        row["rival"],
        f"{row['ratios'][row['rival_name']]:.2f}",
        *[f"{row['ratios'][name]:.1f}" for name in others],
        f"{row['gb_per_s']:.1f}",
        f"{100 * row['share_of_triad']:.0f} %",
        "" if row["target"] is None else f"{row['target']:g} {met}",
    ]


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or 1 where results do not agree."""
    options = parser(__doc__ or "")
    options.add_argument("--optimizer", choices=sorted(pytrain.optim.REGISTRY), default="adamw")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options.add_argument("--cases", help="comma-separated parts of case names")
    options.add_argument("--budget", type=float, default=25.0, help="seconds a row at most (%(default)s)")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    dtype = getattr(torch, args.dtype)
    cases = QUICK if args.quick else CASES
    if args.cases:
        cases = [case for case in cases if any(part.strip() in case.name for part in args.cases.split(","))]
    for case in cases:
        check_agreement(args.optimizer, case, dtype)
    print(f"{args.optimizer}, {args.dtype}: results agree; {machine()}", flush=True)
    rows = []
    for case in cases:
        for fresh in (True, False):
            budget = 2.0 if args.quick else args.budget
            repeat = 5 if args.quick else args.repeat
            rows.append(measure(args.optimizer, case, dtype, fresh=fresh, repeat=repeat, budget=budget))
            print(f"  {case.name}, {rows[-1]['gradients']}: {rows[-1]['ratios']}", flush=True)
    rival = rows[0]["rival_name"]
    others = [f"{name} / ours" for name in rows[0]["ratios"] if name != rival]
    header = [
        "tensors",
        "gradients",
        "pytrain, ms",
        f"{rival}, ms",
        f"{rival} / ours",
        *others,
        "GB/s",
        "of triad",
        "target",
    ]
    print(markdown(header, [cells(row) for row in rows]))
    write_json(args.json, [{"machine": machine(), **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
