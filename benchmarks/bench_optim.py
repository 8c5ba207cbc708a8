"""How fast is a step against torch's? Every case with gradients kept and with fresh ones, results checked first."""

from __future__ import annotations

import gc
import importlib.util
import sys
from typing import Any

import torch
from common import Timing, Triad, interleaved, machine, markdown, nothing, parser, write_json
from contestants import LR, Case, Contestant, Maker, check_agreement, gpt2, has_fused, resnet50

import pytrain.optim

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


def makers(optimizer: str) -> dict[str, Maker]:
    """The contestants by name; ours first. Where torch has no class, the rival is the torch path of our own."""
    ours = pytrain.optim.REGISTRY[optimizer]
    found: dict[str, Maker] = {"pytrain": lambda params: ours(params, lr=LR)}  # type: ignore[call-arg]
    theirs = getattr(torch.optim, ours.__name__, None)
    if theirs is None:
        found["torch path"] = lambda params: ours(params, lr=LR, fused=False)  # type: ignore[call-arg]
        return found
    if has_fused(theirs):
        found["fused"] = lambda params: theirs(params, lr=LR, fused=True)
    found["foreach"] = lambda params: theirs(params, lr=LR, foreach=True)
    found["for-loop"] = lambda params: theirs(params, lr=LR, foreach=False)
    if optimizer == "adamw" and importlib.util.find_spec("deepspeed") is not None:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        found["DeepSpeed"] = lambda params: DeepSpeedCPUAdam(params, lr=LR, weight_decay=0.01, adamw_mode=True)
    return found


def check(optimizer: str, case: Case, dtype: torch.dtype) -> None:
    """Raise AssertionError where a step's results do not agree with those of the rivals."""
    every = makers(optimizer)
    check_agreement(optimizer, every, case.sample(), dtype, every[list(every)[-1]])


def measure(
    optimizer: str, case: Case, dtype: torch.dtype, *, fresh: bool, repeat: int, budget: float
) -> dict[str, Any]:
    """One row: every rival against ours, two at a time, with a triad in the same turns."""
    every = makers(optimizer)
    triad = Triad(min(max(case.elements, 1_000), 40_000_000))
    times: dict[str, Timing] = {}
    ratios: dict[str, float] = {}
    moved = 0
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
            moved = ours.step_bytes()
        del ours, theirs
        gc.collect()
    share = moved / times["pytrain"].median / (triad.bytes / times["triad"].median)
    first = next(iter(ratios))
    target = case.target if fresh and first == "fused" else None
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
        "target": target,
        "met": None if target is None else ratios[first] >= target,
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
        check(args.optimizer, case, dtype)
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
