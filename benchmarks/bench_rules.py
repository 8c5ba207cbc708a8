"""How fast is every rule? torch's foreach class and our own AdamW step the same tensors; results checked first.

Gradients are fresh, as in training. A rule that torch has is measured against torch's foreach class, and its fused one
where there is one; every rule is measured against our AdamW, whose step moves 28 bytes an element.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import Timing, Triad, free_memory, interleaved, machine, markdown, nothing, parser, write_json
from contestants import LR, Case, Contestant, Maker, check_agreement, gpt2, has_fused
from torch import Tensor

import pytrain.optim
from pytrain.optim import FusedOptimizer

GPT2 = Case("GPT-2 small", gpt2())
SMALL = Case("1,000 x 1,000", [(1000,)] * 1000)
QUICK = [Case("50 x 100", [(100,)] * 50)]
FOREACH_TARGETS = {GPT2.name: 5.0, SMALL.name: 20.0}  # foreach / ours, where torch has no fused class
NORM_TARGET = 1.5  # ours / our AdamW on GPT-2 small, for rules that sum over the tensor before they update it
MORE: dict[str, list[dict[str, Any]]] = {  # options that change what memory a step moves
    "adamw": [{"amsgrad": True}],
    "sgd": [{"momentum": 0.9}],
    "rmsprop": [{"centered": True, "momentum": 0.9}],
}


@dataclass(frozen=True)
class Subject:
    """An optimizer with options, beside torch's class where there is one."""

    ours: type[FusedOptimizer]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return ", ".join([self.ours.__name__, *(f"{key}={value}" for key, value in self.options.items())])

    @property
    def theirs(self) -> type[torch.optim.Optimizer] | None:
        """torch's class of the same name."""
        found: type[torch.optim.Optimizer] | None = getattr(torch.optim, self.ours.__name__, None)
        return found

    def make(self, params: list[Tensor], cls: Any, **implementation: bool) -> torch.optim.Optimizer:
        made: torch.optim.Optimizer = cls(params, lr=LR, **self.options, **implementation)
        return made

    def makers(self) -> dict[str, Maker]:
        """Ours, then torch's implementations of the same."""
        found: dict[str, Maker] = {"pytrain": partial(self.make, cls=self.ours)}
        if self.theirs is not None:
            found["foreach"] = partial(self.make, cls=self.theirs, foreach=True)
            if has_fused(self.theirs):
                found["fused"] = partial(self.make, cls=self.theirs, fused=True)
        return found

    def check(self, case: Case) -> None:
        """Raise AssertionError where ours and torch's class, or else our torch path, do not agree."""
        every = self.makers()
        plain = partial(self.make, cls=self.theirs or self.ours, foreach=False)
        if self.theirs is None:
            plain = partial(self.make, cls=self.ours, fused=False)
            every["torch path"] = plain
        check_agreement(self.name, every, case.sample(), torch.float32, plain)

    @property
    def takes_sums(self) -> bool:
        """Whether the rule needs a sum over the whole tensor before it can update it."""
        return any(rule.sums for rule in self.ours.rules)


def subjects(names: str | None) -> list[Subject]:
    """Every optimizer of REGISTRY with its defaults, and with the options of MORE; or those whose names are given."""
    wanted = [name.strip() for name in names.split(",")] if names else sorted(pytrain.optim.REGISTRY)
    return [Subject(pytrain.optim.REGISTRY[name], options) for name in wanted for options in ({}, *MORE.get(name, ()))]


def measure(subject: Subject, case: Case, *, repeat: int, budget: float) -> dict[str, Any]:
    """One row: ours against each rival, two at a time, with a triad in the same turns."""
    every = subject.makers()
    adamw = Subject(pytrain.optim.AdamW, {})
    rivals = {name: make for name, make in every.items() if name != "pytrain"}
    if subject != adamw:
        rivals["our AdamW"] = partial(adamw.make, cls=adamw.ours)
    triad = Triad(min(max(case.elements, 1_000), 40_000_000))
    times: dict[str, Timing] = {}
    ratios: dict[str, float] = {}
    share = 0.0
    for rival, make in rivals.items():
        ours = Contestant(every["pytrain"], case, torch.float32, fresh=True)
        theirs = Contestant(make, case, torch.float32, fresh=True)
        found = interleaved(
            {"ours": (ours.prepare, ours.run), "theirs": (theirs.prepare, theirs.run), "triad": (nothing, triad.run)},
            repeat=repeat,
            budget=budget / len(rivals),
        )
        ratios[rival] = found["theirs"].median / found["ours"].median
        times = {"pytrain": found["ours"], **times, rival: found["theirs"]}
        share = ours.step_bytes() / found["ours"].median / (triad.bytes / found["triad"].median)
        del ours, theirs
        free_memory()
    return {
        "optimizer": subject.name,
        "case": case.name,
        "elements": case.elements,
        "ms": {name: 1e3 * time.median for name, time in times.items()},
        "spread": {name: time.text() for name, time in times.items()},
        "ratios": ratios,
        "share_of_triad": share,
        **target(subject, case, ratios),
    }


def target(subject: Subject, case: Case, ratios: dict[str, float]) -> dict[str, Any]:
    """What the project wants of this row, and whether it is met."""
    if "foreach" in ratios and "fused" not in ratios and case.name in FOREACH_TARGETS:
        least = FOREACH_TARGETS[case.name]
        return {"target": f"foreach / ours >= {least:g}", "met": ratios["foreach"] >= least}
    if subject.takes_sums and case.name == GPT2.name:
        return {"target": f"ours / AdamW <= {NORM_TARGET:g}", "met": 1 / ratios["our AdamW"] <= NORM_TARGET}
    return {"target": None, "met": None}


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text."""
    ratios = row["ratios"]
    against = [f"{ratios[name]:.2f}" if name in ratios else "" for name in ("foreach", "fused")]
    adamw = f"{1 / ratios['our AdamW']:.2f}" if "our AdamW" in ratios else "1"
    met = "" if row["met"] is None else f"{row['target']}: {'yes' if row['met'] else 'NO'}"
    share = f"{100 * row['share_of_triad']:.0f} %"
    return [row["optimizer"], row["spread"]["pytrain"], row["spread"].get("foreach", ""), *against, adamw, share, met]


HEADER = [
    "optimizer",
    "pytrain, ms",
    "foreach, ms",
    "foreach / ours",
    "fused / ours",
    "ours / our AdamW",
    "of triad",
    "target",
]


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or 1 with a traceback where results do not agree."""
    options = parser(__doc__ or "")
    options.add_argument("--optimizers", help="comma-separated names in REGISTRY; all of them where not given")
    options.add_argument("--cases", help="comma-separated parts of case names")
    options.add_argument("--budget", type=float, default=20.0, help="seconds a row at most (%(default)s)")
    args = options.parse_args(argv)
    torch.set_num_threads(args.threads)
    cases = QUICK if args.quick else [GPT2, SMALL]
    if args.cases:
        cases = [case for case in cases if any(part.strip() in case.name for part in args.cases.split(","))]
    every = subjects(args.optimizers)
    for subject in every:
        for case in cases:
            subject.check(case)
    print(f"fp32, fresh gradients: results agree; {machine()}", flush=True)
    rows = []
    for case in cases:
        found = []
        for subject in every:
            budget, repeat = (1.0, 3) if args.quick else (args.budget, args.repeat)
            found.append(measure(subject, case, repeat=repeat, budget=budget))
            print(f"  {case.name}, {subject.name}: {found[-1]['ratios']}", flush=True)
        print(f"\n{case.name}\n\n{markdown(HEADER, [cells(row) for row in found])}\n", flush=True)
        rows += found
    write_json(args.json, [{"machine": machine(), **row} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
