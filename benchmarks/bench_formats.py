"""What does each storage format of AdamW cost against torch's fused AdamW in fp32, in time and in memory?

Gradients are fresh, as in training, and in the parameters' dtype. Results are checked first: each format on the kernels
against the same format on the torch path, both against fp64.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from common import Triad, free_memory, interleaved, machine, markdown, nothing, parser, write_json
from contestants import LR, Case, Contestant, Maker, check_agreement, gpt2
from torch import Tensor

from pytrain.optim import AdamW

GPT2 = Case("GPT-2 small", gpt2())
QUICK = Case("quick", [(768,), (5000,), (64, 300)])
SAMPLE = Case("sample", [(768,), (5000,), (64, 300), (100_000,)])  # with states that are kept in 8 bits


@dataclass(frozen=True)
class Format:
    """How parameters and states are kept, and what the project wants of it."""

    name: str
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    target: float | None = None  # torch's fused fp32 step / ours
    state_target: float | None = None  # bytes of state a parameter

    def make(self, params: list[Tensor], fused: bool | None = None) -> torch.optim.Optimizer:
        return AdamW(params, lr=LR, fused=fused, **self.options)

    def check(self) -> None:
        """Raise AssertionError where the kernels and the torch path do not agree."""
        every: dict[str, Maker] = {"pytrain": self.make, "torch path": partial(self.make, fused=False)}
        check_agreement(self.name, every, SAMPLE, self.dtype, partial(AdamW, lr=LR, fused=False))


BF16 = torch.bfloat16
FORMATS = [
    Format("fp32"),
    Format("fp32, 8-bit state", options={"state_dtype": "8bit"}, target=1.2, state_target=2.1),
    Format(
        "fp32, 8-bit state, stochastic",
        options={"state_dtype": "8bit", "rounding": "stochastic"},
        state_target=2.1,
    ),
    Format("fp32, bf16 state", options={"state_dtype": "bf16"}),
    Format("fp32, average (ema)", options={"ema_decay": 0.999}),
    Format("bf16, nearest", BF16, target=1.7),
    Format("bf16, stochastic", BF16, {"rounding": "stochastic"}, target=1.7),
    Format("bf16, Kahan", BF16, {"kahan": True}, target=1.7),
    Format("bf16, stochastic, 8-bit state", BF16, {"rounding": "stochastic", "state_dtype": "8bit"}, state_target=2.1),
    Format("bf16, master", BF16, {"master_weights": True}),
    Format("bf16, compact master", BF16, {"master_weights": "compact"}),
]


def theirs(params: list[Tensor]) -> torch.optim.Optimizer:
    """torch's fused AdamW."""
    return torch.optim.AdamW(params, lr=LR, fused=True)


def measure(form: Format, case: Case, *, repeat: int, budget: float) -> dict[str, Any]:
    """One row: a format in turns with torch's fused step over the same tensors in fp32, and with a triad."""
    ours = Contestant(form.make, case, form.dtype, fresh=True)
    rival = Contestant(theirs, case, torch.float32, fresh=True)
    triad = Triad(min(max(case.elements, 1_000), 40_000_000))
    found = interleaved(
        {"ours": (ours.prepare, ours.run), "theirs": (rival.prepare, rival.run), "triad": (nothing, triad.run)},
        repeat=repeat,
        budget=budget,
    )
    ratio = found["theirs"].median / found["ours"].median
    kept = ours.state_bytes() / case.elements
    moved = ours.step_bytes()
    share = moved / found["ours"].median / (triad.bytes / found["triad"].median)
    del ours, rival
    free_memory()
    return {
        "format": form.name,
        "case": case.name,
        "ms": {"pytrain": 1e3 * found["ours"].median, "torch fused fp32": 1e3 * found["theirs"].median},
        "pytrain": found["ours"].text(),
        "rival": found["theirs"].text(),
        "ratio": ratio,
        "state_bytes": kept,
        "step_bytes": moved / case.elements,
        "share_of_triad": share,
        "target": form.target,
        "met": None if form.target is None else ratio >= form.target,
        "state_target": form.state_target,
        "state_met": None if form.state_target is None else kept <= form.state_target,
    }


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    wanted = []
    if row["target"] is not None:
        wanted.append(f"ratio >= {row['target']:g}: {'yes' if row['met'] else 'NO'}")
    if row["state_target"] is not None:
        wanted.append(f"state <= {row['state_target']:g}: {'yes' if row['state_met'] else 'NO'}")
    return [
        row["format"],
        row["pytrain"],
        row["rival"],
        f"{row['ratio']:.2f}",
        f"{row['state_bytes']:.2f}",
        f"{row['step_bytes']:.1f}",
        f"{100 * row['share_of_triad']:.0f} %",
        ", ".join(wanted),
    ]


HEADER = [
    "format",
    "pytrain, ms",
    "torch fused fp32, ms",
    "fused / ours",
    "state, bytes a parameter",
    "moved, bytes a parameter",
    "of triad",
    "target",
]


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or 1 with a traceback where results do not agree."""
    options = parser(__doc__ or "")
    options.add_argument("--formats", help="semicolon-separated names of formats; all of them where not given")
    options.add_argument("--budget", type=float, default=20.0, help="seconds a row at most (%(default)s)")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    wanted = [name.strip() for name in args.formats.split(";")] if args.formats else [form.name for form in FORMATS]
    unknown = set(wanted) - {form.name for form in FORMATS}
    if unknown:
        options.error(f"--formats: expected some of {[form.name for form in FORMATS]}, got {sorted(unknown)}")
    chosen = [form for form in FORMATS if form.name in wanted]
    for form in chosen:
        form.check()
    print(f"AdamW: results agree; {machine()}", flush=True)
    rows = []
    for form in chosen:
        budget, repeat = (1.0, 3) if args.quick else (args.budget, args.repeat)
        rows.append(measure(form, QUICK if args.quick else GPT2, repeat=repeat, budget=budget))
        print(f"  {form.name}: {rows[-1]['ratio']:.2f}", flush=True)
    print(f"\n{markdown(HEADER, [cells(row) for row in rows])}")
    write_json(args.json, [{"machine": machine(), **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
