"""How fast is everything after backward? pytrain.step against the best composition of torch's own parts."""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import Timing, Triad, free_memory, interleaved, machine, markdown, nothing, parser, write_json
from contestants import Case, gpt2
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

import pytrain
from pytrain.amp import LossScaler
from pytrain.ema import EMA
from pytrain.optim import AdamW

CASES = [
    Case("300 x 256", [(256,)] * 300, None),
    Case("1,000 x 1,000", [(1000,)] * 1000, None),
    Case("one of 10 M", [(10_000_000,)], None),
    Case("GPT-2 small", gpt2(), None),
]
QUICK = [Case("30 x 256", [(256,)] * 30, None), Case("5 x 3, 7", [(3, 7)] * 5, None)]
# By the number of elements an element of a tensor is read and written: what the arithmetic needs.
WHOLE, CLIP = "scaler, clip, AdamW, EMA, zero", "clip, AdamW"
BYTES = {WHOLE: 44, CLIP: 32}
TORCH_BYTES = {WHOLE: 64, CLIP: 40}
TARGETS = {
    WHOLE: {"300 x 256": 10.0, "1,000 x 1,000": 10.0, "one of 10 M": 1.4, "GPT-2 small": 1.4},
    CLIP: {"300 x 256": 8.0, "1,000 x 1,000": 8.0, "one of 10 M": 1.2, "GPT-2 small": 1.2},
}
LR, MAX_NORM, DECAY, SCALE = 1e-4, 1.0, 0.999, 1024.0


class Steps:
    """Parameters with gradients, refilled before each step as a backward would."""

    def __init__(self, case: Case, whole: bool, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.whole = whole
        self.params = [nn.Parameter(0.02 * torch.randn(s, generator=generator, device=device)) for s in case.shapes]
        scale = SCALE if whole else 1.0
        self.given = [scale * torch.randn(s, generator=generator, device=device) for s in case.shapes]
        for p, g in zip(self.params, self.given, strict=True):
            p.grad = g.clone()
        self.grads = [p.grad for p in self.params if p.grad is not None]

    def prepare(self) -> None:
        """New gradients, in the same memory."""
        torch._foreach_copy_(self.grads, self.given)

    def averages(self) -> list[Tensor]:
        """The averaged parameters; none where there is no average."""
        raise NotImplementedError

    def run(self) -> None:
        """The step."""
        raise NotImplementedError


class Ours(Steps):
    """pytrain's two passes."""

    def __init__(self, case: Case, whole: bool, device: str = "cpu") -> None:
        super().__init__(case, whole, device)
        self.optimizer = AdamW(self.params, lr=LR, zero_grad_in_step=whole)
        self.scaler = LossScaler(init_scale=SCALE) if whole else None
        self.ema = EMA(nn.ParameterList(self.params), DECAY) if whole else None

    def averages(self) -> list[Tensor]:
        return [] if self.ema is None else [self.ema.averages[id(p)] for p in self.params]

    def run(self) -> None:
        pytrain.step(self.optimizer, self.scaler, max_norm=MAX_NORM, ema=self.ema)


class Torch(Steps):
    """torch's fastest way to the same."""

    def __init__(self, case: Case, whole: bool, device: str = "cpu") -> None:
        super().__init__(case, whole, device)
        self.optimizer = torch.optim.AdamW(self.params, lr=LR, fused=True)
        self.scaler = torch.amp.GradScaler(device, init_scale=SCALE)
        self.scaler.scale(torch.zeros((), device=device))
        self.ema = [p.detach().clone() for p in self.params] if whole else []
        self.average, self.first = get_ema_multi_avg_fn(DECAY), True

    def averages(self) -> list[Tensor]:
        return self.ema

    def run(self) -> None:
        if not self.whole:
            nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
            self.optimizer.step()
            return
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            if self.first:
                torch._foreach_copy_(self.ema, self.params)
                self.first = False
            else:
                self.average(self.ema, self.params, 1)  # type: ignore[arg-type]
            torch._foreach_zero_(self.grads)


def check(case: Case, whole: bool, device: str = "cpu") -> None:
    """Raise AssertionError where three steps of both do not agree."""
    ours, theirs = Ours(case.sample(), whole, device), Torch(case.sample(), whole, device)
    for _ in range(3):
        for one in (ours, theirs):
            one.prepare()
            one.run()
    mine, others = [*ours.params, *ours.averages()], [*theirs.params, *theirs.averages()]
    for a, b in zip(mine, others, strict=True):
        apart = (a - b).abs().max().item()
        assert apart <= 1e-2 * LR, f"{case.name}: results differ by {apart:.1e}, a step is {LR:.1e}"
    assert all(not g.any() for one in (ours, theirs) for g in one.grads) == whole


def measure(case: Case, what: str, *, repeat: int, budget: float) -> dict[str, Any]:
    """One row."""
    ours, theirs = Ours(case, what == WHOLE), Torch(case, what == WHOLE)
    triad = Triad(min(max(case.elements, 1_000), 40_000_000))
    found: dict[str, Timing] = interleaved(
        {"ours": (ours.prepare, ours.run), "torch": (theirs.prepare, theirs.run), "triad": (nothing, triad.run)},
        repeat=repeat,
        budget=budget,
    )
    moved = BYTES[what] * case.elements
    target = TARGETS[what].get(case.name)
    ratio = found["torch"].median / found["ours"].median
    share = moved / found["ours"].median / (triad.bytes / found["triad"].median)
    return {
        "case": case.name,
        "what": what,
        "pytrain": found["ours"].text(),
        "torch": found["torch"].text(),
        "ms": {name: 1e3 * timing.median for name, timing in found.items()},
        "ratio": ratio,
        "bytes_a_parameter": BYTES[what],
        "torch_bytes_a_parameter": TORCH_BYTES[what],
        "gb_per_s": moved / found["ours"].median / 1e9,
        "share_of_triad": share,
        "target": target,
        "met": None if target is None else ratio >= target,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    met = {None: "", True: "yes", False: "NO"}[row["met"]]
    return [
        row["what"],
        row["case"],
        row["pytrain"],
        row["torch"],
        f"{row['ratio']:.2f}",
        f"{row['bytes_a_parameter']} / {row['torch_bytes_a_parameter']}",
        f"{row['gb_per_s']:.1f}",
        f"{100 * row['share_of_triad']:.0f} %",
        "" if row["target"] is None else f"{row['target']:g} {met}",
    ]


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or an AssertionError where results do not agree."""
    options = parser(__doc__ or "")
    options.add_argument("--cases", help="comma-separated parts of case names")
    options.add_argument("--budget", type=float, default=20.0, help="seconds a row at most (%(default)s)")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    cases = QUICK if args.quick else CASES
    if args.cases:
        cases = [case for case in cases if any(part.strip() in case.name for part in args.cases.split(","))]
    rows = []
    for what in (WHOLE, CLIP):
        for case in cases:
            check(case, what == WHOLE)
            repeat, budget = (5, 2.0) if args.quick else (args.repeat, args.budget)
            rows.append(measure(case, what, repeat=repeat, budget=budget))
            free_memory()
            print(f"  {what}, {case.name}: {rows[-1]['ratio']:.2f}", flush=True)
    print(f"results agree; {machine()}")
    header = ["step", "tensors", "pytrain, ms", "torch, ms", "torch / pytrain", "bytes", "GB/s", "of triad", "target"]
    print(markdown(header, [cells(row) for row in rows]))
    write_json(args.json, [{"machine": machine(), **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
