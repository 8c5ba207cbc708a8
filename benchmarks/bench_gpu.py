"""What does a step cost on a GPU? pytrain against every fused optimizer at hand; the page of results is written anew.

Contestants take turns, every ratio is of one run, and a share is of the bandwidth of a copy in it. Two times are taken:
the device's, by CUDA events with the queue kept full, as in training, and the wall's, from idle device to idle device.
Results are checked first. Without a CUDA device the same code runs small sizes on the CPU, where the kernels are
simulated (PYTRAIN_BACKEND=simt): that shows that it runs, and no time means anything.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import bench_step
import torch
from bench_formats import FORMATS, Format
from common import Timing, free_memory, markdown, nothing, parser, summary, write_json
from common import machine as host
from contestants import LR, Case, Contestant, Maker, check_agreement, gpt2

import pytrain.optim
from pytrain import backend

Step = Callable[[], None]
ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "gpu-results.md"
HAS_CUDA = torch.cuda.is_available() and not backend.why_no_cuda
DEVICE = "cuda" if HAS_CUDA else "cpu"
SMALL = Case("GPT-2 small", gpt2())
TINY = Case("1,000 x 1,000", [(1000,)] * 1000)
CASES = [
    SMALL,
    Case("GPT-2 medium", gpt2(1024, 24)),
    Case("GPT-2 large", gpt2(1280, 36)),
    Case("GPT-2 XL", gpt2(1600, 48)),
    TINY,
    Case("1,000 x 64", [(64,)] * 1000),
]
QUICK = [Case("3 x 5000", [(5000,)] * 3), Case("20 x 16", [(16,)] * 20)]
COPY = 2**28 if HAS_CUDA else 10_000  # elements
SHARE_TARGET, FUSED_TARGET, TINY_TARGET = 0.92, 1.0, 3.0  # of the copy; torch fused / ours
ADAMW: dict[str, Maker] = {
    "pytrain": partial(pytrain.optim.AdamW, lr=LR),
    "torch fused": partial(torch.optim.AdamW, lr=LR, fused=True),
    "torch foreach": partial(torch.optim.AdamW, lr=LR, foreach=True),
}
# module -> where its fused AdamW is, the class, and its options
OTHERS = {
    "apex": ("apex.optimizers", "FusedAdam", {"adam_w_mode": True, "weight_decay": 0.01}),
    "DeepSpeed": ("deepspeed.ops.adam", "FusedAdam", {"adam_w_mode": True, "weight_decay": 0.01}),
    "TransformerEngine": (
        "transformer_engine.pytorch.optimizers",
        "FusedAdam",
        {"adam_w_mode": True, "weight_decay": 0.01},
    ),
    "bitsandbytes": ("bitsandbytes.optim", "AdamW", {}),
    "bitsandbytes 8-bit": ("bitsandbytes.optim", "AdamW8bit", {}),
}


def rivals() -> tuple[dict[str, Maker], list[str]]:
    """torch's, and of the others what works here; and why the rest does not."""
    found, missing = {name: make for name, make in ADAMW.items() if name != "pytrain"}, []
    for name, (module, cls, options) in OTHERS.items():
        if not HAS_CUDA or importlib.util.find_spec(module.partition(".")[0]) is None:
            missing.append(f"{name}: {'is not installed' if HAS_CUDA else 'needs a CUDA device'}")
            continue
        try:
            make = partial(getattr(importlib.import_module(module), cls), lr=LR, **options)
            make([torch.nn.Parameter(torch.zeros(8, device=DEVICE))])
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            missing.append(f"{name}: {' '.join(str(error).split())[:200]}")
        else:
            found[name] = make
    return found, missing


class Copy:
    """The yardstick: 8 bytes an element of fp32."""

    def __init__(self, elements: int) -> None:
        self.source, self.target = torch.ones(elements, device=DEVICE), torch.zeros(elements, device=DEVICE)
        self.bytes = 8 * elements

    def run(self) -> None:
        """One copy."""
        self.target.copy_(self.source)


def begin(run: Callable[[], None]) -> Callable[[], float]:
    """Run, and return what tells the seconds it took once the device is done."""
    if not HAS_CUDA:
        start = perf_counter()
        run()
        seconds = perf_counter() - start
        return lambda: seconds
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    run()
    last.record()
    return lambda: first.elapsed_time(last) / 1e3


def wait() -> None:
    """Until the device has done all that was queued."""
    if HAS_CUDA:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Times:
    """Of one contestant."""

    device: Timing
    wall: Timing


def in_turns(contestants: dict[str, tuple[Step, Step]], copy: Copy, *, repeat: int, budget: float) -> dict[str, Times]:
    """As common.interleaved: name -> (prepare, run), rounds, seconds at most. The copy runs with them."""
    everyone = {**contestants, "copy": (nothing, copy.run)}
    for prepare, run in everyone.values():
        for _ in range(2):
            prepare()
            run()
    wait()
    device: dict[str, list[float]] = {name: [] for name in everyone}
    wall: dict[str, list[float]] = {name: [] for name in everyone}
    end, rounds = perf_counter() + budget, 0
    while rounds < 3 or (rounds < repeat and perf_counter() < end):
        for name, (prepare, run) in everyone.items():
            prepare()
            for _ in range(4 if HAS_CUDA else 0):  # the host gets ahead of the device meanwhile
                copy.run()
            ended = begin(run)
            wait()
            device[name].append(ended())
            prepare()
            wait()
            start = perf_counter()
            run()
            wait()
            wall[name].append(perf_counter() - start)
        rounds += 1
    return {name: Times(summary(device[name]), summary(wall[name])) for name in everyone}


def fits(case: Case, bytes_an_element: int) -> bool:
    """Whether there is memory for two contestants and the copy."""
    if not HAS_CUDA:
        return True
    free_memory()
    torch.cuda.empty_cache()
    return 2 * bytes_an_element * case.elements + 8 * COPY < 0.95 * torch.cuda.mem_get_info()[0]


def contestant(make: Maker, case: Case, dtype: torch.dtype) -> Contestant:
    """On the device, with gradients that stay."""
    with torch.device(DEVICE):
        return Contestant(make, case, dtype, fresh=False)


def against(
    what: str, ours: tuple[Maker, torch.dtype], rival: str, make: Maker, case: Case, *, repeat: int, budget: float
) -> dict[str, Any]:
    """One row: ours in turns with a rival over the same tensors in fp32, and with a copy."""
    mine, theirs = contestant(*ours[:1], case, ours[1]), contestant(make, case, torch.float32)
    copy = Copy(COPY)
    turns: dict[str, tuple[Step, Step]] = {"ours": (nothing, mine.run), "theirs": (nothing, theirs.run)}
    found = in_turns(turns, copy, repeat=repeat, budget=budget)
    return row(what, case, rival, found, mine.step_bytes(), copy.bytes)


def whole_step(what: str, case: Case, *, repeat: int, budget: float) -> dict[str, Any]:
    """One row: pytrain.step in turns with torch's parts for the same."""
    ours, theirs = (of(case, what == bench_step.WHOLE, DEVICE) for of in (bench_step.Ours, bench_step.Torch))
    copy = Copy(COPY)
    turns: dict[str, tuple[Step, Step]] = {"ours": (ours.prepare, ours.run), "theirs": (theirs.prepare, theirs.run)}
    found = in_turns(turns, copy, repeat=repeat, budget=budget)
    return row(what, case, "torch's parts", found, bench_step.BYTES[what] * case.elements, copy.bytes)


def row(what: str, case: Case, rival: str, found: dict[str, Times], moved: int, copied: int) -> dict[str, Any]:
    """What a row holds."""
    ours, theirs, copy = (found[name] for name in ("ours", "theirs", "copy"))
    ratios = (theirs.device.median / ours.device.median, theirs.wall.median / ours.wall.median)
    share = moved / ours.device.median / (copied / copy.device.median)
    return {
        "what": what,
        "case": case.name,
        "rival": rival,
        "ms": {name: 1e3 * times.device.median for name, times in found.items()},
        "wall_ms": {name: 1e3 * times.wall.median for name, times in found.items()},
        "text": {name: times.device.text() for name, times in found.items()},
        "ratio": ratios[0],
        "wall_ratio": ratios[1],
        "bytes_a_parameter": moved / case.elements,
        "copy_gb_per_s": copied / copy.device.median / 1e9,
        "share_of_copy": share,
        **target(what, case, rival, ratios, share),
    }


def target(what: str, case: Case, rival: str, ratios: tuple[float, float], share: float) -> dict[str, Any]:
    """What the project wants of this row, and whether it is met. Nothing of a simulation."""
    if what != "AdamW" or rival != "torch fused" or not HAS_CUDA:
        return {"target": None, "met": None}
    if case.name.startswith("1,000"):
        return {"target": f"wall ratio >= {TINY_TARGET:g}", "met": ratios[1] >= TINY_TARGET}
    wanted = f"ratio >= {FUSED_TARGET:g}, share >= {100 * SHARE_TARGET:.0f} %"
    return {"target": wanted, "met": ratios[0] >= FUSED_TARGET and share >= SHARE_TARGET}


HEADER = [
    "what",
    "tensors",
    "against",
    "pytrain, ms",
    "theirs, ms",
    "theirs / pytrain",
    "by the wall",
    "bytes",
    "of copy",
    "target",
]


def cells(found: dict[str, Any]) -> list[str]:
    """A row as text."""
    met = "" if found["met"] is None else f"{found['target']}: {'yes' if found['met'] else 'NO'}"
    return [
        found["what"],
        found["case"],
        found["rival"],
        found["text"]["ours"],
        found["text"]["theirs"],
        f"{found['ratio']:.2f}",
        f"{found['wall_ratio']:.2f}",
        f"{found['bytes_a_parameter']:.1f}",
        f"{100 * found['share_of_copy']:.0f} %",
        met,
    ]


def machine() -> dict[str, Any]:
    """The facts that figures depend on."""
    if not HAS_CUDA:
        return {"device": "none: the kernels are simulated on the CPU", **host()}
    of = torch.cuda.get_device_properties(0)
    facts = {"device": of.name, "multiprocessors": of.multi_processor_count, "cuda": torch.version.cuda}
    return {**facts, "memory_gib": round(of.total_memory / 2**30, 1), **host()}


def page(rows: list[dict[str, Any]], skipped: list[str]) -> str:
    """docs/gpu-results.md."""
    facts = machine()
    times = "" if HAS_CUDA else "\n**No GPU: all times are of a simulation on the CPU and mean nothing.**\n"
    lines = [f"- {name}: {value}" for name, value in facts.items()]
    left_out = [f"- {reason}" for reason in skipped] or ["- nothing"]
    return "\n".join(
        [
            "# Results on GPUs",
            "",
            "Written by `make bench-gpu`. Medians of the device's time, with half the distance of the quartiles;",
            "contestants take turns, and a ratio is of one run; *by the wall* it includes what the host does.",
            "*Bytes* are those that a step must move a parameter; *of copy* is their rate as a share of a copy's in",
            "the same run.",
            times,
            *lines,
            "",
            markdown(HEADER, [cells(found) for found in rows]),
            "",
            "Left out:",
            "",
            *left_out,
            "",
        ]
    )


def measure(
    cases: list[Case], formats: list[Format], *, repeat: int, budget: float
) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and why some are missing."""
    rows: list[dict[str, Any]] = []
    others, skipped = rivals()

    def take(found: dict[str, Any]) -> None:
        rows.append(found)
        free_memory()
        print(f"  {found['what']}, {found['case']}, {found['rival']}: {found['ratio']:.2f}", flush=True)

    for case in cases:
        if not fits(case, 16):
            skipped.append(f"{case.name}: needs more memory than the device has free")
            continue
        for name, make in others.items():
            mine = (ADAMW["pytrain"], torch.float32)
            take(against("AdamW", mine, name, make, case, repeat=repeat, budget=budget))
    for form in formats:
        if form.name != "fp32":
            make = ADAMW["torch fused"]
            mine = (form.make, form.dtype)
            take(against(f"AdamW {form.name}", mine, "torch fused fp32", make, cases[0], repeat=repeat, budget=budget))
    for what in (bench_step.WHOLE, bench_step.CLIP):
        for case in {case.name: case for case in (cases[0], TINY if HAS_CUDA else cases[-1])}.values():
            take(whole_step(what, case, repeat=repeat, budget=budget))
    return rows, skipped


def check(cases: list[Case], formats: list[Format]) -> None:
    """Raise AssertionError where results do not agree."""
    exact: Maker = partial(torch.optim.AdamW, lr=LR, foreach=False)
    with torch.device(DEVICE):
        for case in cases:
            check_agreement("AdamW", ADAMW, case.sample(), torch.float32, exact)
        for form in formats:
            form.check()
    for what in (bench_step.WHOLE, bench_step.CLIP):
        bench_step.check(cases[-1], what == bench_step.WHOLE, DEVICE)


def simulated(argv: list[str]) -> int:
    """The same command on the CPU, where the kernels are simulated; they are built first."""
    print("no CUDA device: small sizes on the CPU, where the kernels are simulated; times mean nothing", flush=True)
    subprocess.run([sys.executable, str(ROOT / "tests" / "simt" / "build.py")], check=True)
    environment = {**os.environ, "PYTRAIN_BACKEND": "simt"}
    return subprocess.run([sys.executable, __file__, *argv], env=environment, check=False).returncode


def main(argv: list[str]) -> int:
    """Run the benchmark; 0, or 1 with a traceback where results do not agree."""
    options = parser(__doc__ or "")
    options.add_argument("--cases", help="comma-separated parts of case names")
    options.add_argument("--budget", type=float, default=10.0, help="seconds a row at most (%(default)s)")
    options.add_argument("--page", type=Path, help=f"file of results; {PAGE.name} in docs/ where there is a GPU")
    args = options.parse_args(argv)
    if torch.cuda.is_available() and backend.why_no_cuda:
        print(f"there is a CUDA device, but {backend.why_no_cuda}: `make cuda` builds the kernels")
        return 1
    if not HAS_CUDA and not backend.simulated:
        return simulated(argv)
    quick = args.quick or not HAS_CUDA
    torch.set_num_threads(args.threads if HAS_CUDA else 1)
    cases = QUICK if quick else CASES
    if args.cases:
        cases = [case for case in cases if any(part.strip() in case.name for part in args.cases.split(","))]
    check(cases, FORMATS)
    print(f"results agree; {machine()}", flush=True)
    rows, skipped = measure(cases, FORMATS, repeat=3 if quick else args.repeat, budget=1.0 if quick else args.budget)
    text = page(rows, skipped)
    print(text)
    if args.page or HAS_CUDA:
        (args.page or PAGE).write_text(text)
    write_json(args.json, [{"machine": machine(), **found} for found in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
