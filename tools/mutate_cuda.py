"""Shows that the tests guard the CUDA kernels: plants faults in csrc/cuda one at a time and wants each to be found.

    python tools/mutate_cuda.py [--sample N] [--only NAME ...] [--processes N] [--write]

A fault is what goes wrong in such kernels: a tail, a barrier, a fence, a stride. Each is planted in a copy of the
sources, which tests/simt/check.py compiles for the CPU, and tried in five ways: the driver with blocks and threads in
order, in other orders, under the sanitizers, under the race checker, and with the budgets of traffic. --write puts the
table into docs/simt.md. The exit status is 1 if one is not found.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "simt"))
from check import BUDGETS, DOCS, MODES, Mode, Program, compare, put_into

from build import ROOT

CUDA = ROOT / "csrc" / "cuda"
RULES = ("SGD", "AdamW", "NAdam", "Lamb")  # without states, with, with scalars, with sums
WAYS = ("plain", "orders", "sanitizers", "races", "traffic")
# Programs and arguments of the ways; the first two share one.
RUNS = {
    "plain": ("plain", ("few", "forward")),
    "orders": ("plain", ("few",)),
    "sanitizers": ("sanitize", ("few", "forward")),
    "races": ("races", ("few", "forward")),
    "traffic": ("races", ("traffic",)),
}


@dataclass(frozen=True)
class Fault:
    """A change of one place in a file, the kernels that it is tried in, and what they are tested for."""

    name: str
    file: str
    before: str
    after: str
    kernel: str
    areas: tuple[str, ...]


def direct(name: str, file: str, before: str, after: str) -> Fault:
    return Fault(name, file, before, after, "step_fp32", ("fp32",))


def mixed(name: str, file: str, before: str, after: str) -> Fault:
    return Fault(name, file, before, after, "step_mixed", ("mixed",))


def stats(name: str, file: str, before: str, after: str) -> Fault:
    return Fault(name, file, before, after, "stats", ("stats",))


def control(name: str, file: str, before: str, after: str) -> Fault:
    return Fault(name, file, before, after, "control", ("control",))


DRAW = "  if (threadIdx.x == 0) *drawn = atomicAdd(ticket, 1u);\n"
LINES = "  if (threadIdx.x % lanes == 0) lines[threadIdx.x / lanes] = value;\n"
BARRIER = "  __syncthreads();\n"
FAULTS = (
    # ---- tails, strides, lanes -------------------------------------------------------------------------------------
    direct("elements after the last vector are forgotten", "direct.h", "k < n - beyond;", "k < vectors;"),
    direct("the last vector reaches past the end", "direct.h", "? n / width : 0", "? (n + width - 1) / width : 0"),
    direct("a block strides by half its threads", "direct.h", "k += threads) {", "k += threads / 2) {"),
    direct(
        "only the parameter's alignment is looked at",
        "direct.h",
        "s < count; ++s) is_aligned",
        "s < 1; ++s) is_aligned",
    ),
    direct(
        "no access is a vector", "direct.h", "x.is_aligned ? n / width : 0", "x.is_aligned && n < 0 ? n / width : 0"
    ),
    direct(
        "a warp takes every other vector",
        "direct.h",
        "{}, k * width);",
        "{}, vectors % 2 ? k * width : (k % (vectors / 2) * 2 + k / (vectors / 2)) * width);",
    ),
    mixed("loads of a tail read past the end", "mixed.h", "if (i < at.count) with(from[i], i);", "with(from[i], i);"),
    mixed("stores of a tail write past the end", "mixed.h", "if (i < at.count) to[i] = with(i);", "to[i] = with(i);"),
    mixed("a lane stores where its neighbour does", "mixed.h", "(to + i) = v;", "(to + (i ^ width)) = v;"),
    mixed("elements that are not there are not cleared", "mixed.h", "if (at.count < unit) {", "if (at.count < 0) {"),
    mixed(
        "vectors are taken for aligned",
        "mixed.h",
        "if (at.count == unit && aligned<H, width>(to)) {",
        "if (at.count == unit) {",
    ),
    mixed("warps take each other's units", "mixed.h", "start += n_warps * unit)", "start += unit)"),
    mixed("every lane writes the scale", "mixed.h", "if (at.lane == 0) global(", "global("),
    mixed(
        "a scale is of half a warp",
        "mixed.h",
        "for (int apart = lanes / 2; apart > 0;",
        "for (int apart = lanes / 4; apart > 0;",
    ),
    stats(
        "the vector loop misses the last vector",
        "stats.cu",
        "i < whole; i += threads * width) {\n    const Vec",
        "i < whole - width; i += threads * width) {\n    const Vec",
    ),
    stats("all gradients are read twice", "stats.cu", "if (squares.holds()) return squares.value();", ""),
    control("an upload has a word too many", "control.cu", "i < piece.n;", "i <= piece.n;"),
    control("an upload strides by too much", "control.cu", "i += copying)", "i += copying + 1)"),
    # ---- chunks, items, groups -------------------------------------------------------------------------------------
    direct(
        "chunks overlap by an element",
        "block.h",
        "at.first, left < chunk ? left : chunk,",
        "at.first, left <= chunk ? left : chunk + 1,",
    ),
    direct(
        "every parameter has the first group's numbers",
        "block.h",
        "job.settings.rows[group].hypers",
        "job.settings.rows[0].hypers",
    ),
    direct(
        "groups beyond the given rows are read there",
        "block.h",
        "return job.settings.n_rows ? job.settings.rows[group].hypers",
        "return job.n_rows ? job.settings.rows[group].hypers",
    ),
    direct(
        "a rule is kept for the next group",
        "step.h",
        "if (wanted == key && t == key_t) return;",
        "if (key >= 0 && t == key_t) return;",
    ),
    direct(
        "a rule is kept for the next count",
        "step.h",
        "if (wanted == key && t == key_t) return;",
        "if (wanted == key) return;",
    ),
    direct("a bad step is not skipped", "step.h", "return forget_gradients(job);", "forget_gradients(job);"),
    stats(
        "a block's partial sums share a place",
        "stats.cu",
        "job.partials[c * core::max_sums] = sum;",
        "job.partials[blockIdx.x * core::max_sums] = sum;",
    ),
    stats("the last of the large items is forgotten", "block.h", "l < job.n_large;", "l + 1 < job.n_large;"),
    stats(
        "large begins a chunk too early",
        "block.h",
        "item.n_chunks > few_chunks) continue;",
        "item.n_chunks >= few_chunks) continue;",
    ),
    # ---- meetings of a block or a warp -----------------------------------------------------------------------------
    stats("no barrier before a sum's lines are read", "block.h", LINES + BARRIER, LINES),
    stats(
        "no barrier before they are written again",
        "block.h",
        "  __syncthreads();  // the lines of a sum before this one were read\n",
        "",
    ),
    stats(
        "one warp's line is never written",
        "block.h",
        "if (threadIdx.x % lanes == 0) lines",
        "if (threadIdx.x % lanes == 0 && threadIdx.x > 0) lines",
    ),
    stats(
        "a lane stays away from a shuffle",
        "block.h",
        "apart /= 2) value +=",
        "apart /= 2) if (threadIdx.x != 7) value +=",
    ),
    stats(
        "bad gradients are noted without an atomic",
        "stats.cu",
        "atomicMin(first_bad, static_cast<unsigned long long>(job.items[i].extra.index));",
        "*first_bad = static_cast<unsigned long long>(job.items[i].extra.index);",
    ),
    mixed(
        "the next chunk is set while the last is worked on",
        "step.h",
        "    __syncthreads();  // all threads are done with the chunk before\n",
        "",
    ),
    direct(
        "a chunk is worked on before it is set",
        "step.h",
        "turn.next(job, settled);\n    __syncthreads();\n",
        "turn.next(job, settled);\n",
    ),
    direct(
        "a thread leaves before the others meet",
        "step.h",
        "  each_turn(job, true, *turn, [&]",
        "  if (threadIdx.x == 255) return;\n  each_turn(job, true, *turn, [&]",
    ),
    Fault(
        "another thread settles than has written",
        "stats.cu",
        "if (threadIdx.x != 0 || !then.n_controls) return;",
        "if (threadIdx.x != 64 || !then.n_controls) return;",
        "stats",
        ("fp32",),
    ),
    # ---- the last block --------------------------------------------------------------------------------------------
    stats("no fence before the ticket", "block.h", "  __threadfence();\n" + BARRIER + DRAW, BARRIER + DRAW),
    stats(
        "no fence after the ticket",
        "block.h",
        "  __threadfence();\n  if (threadIdx.x == 0) *ticket = 0;",
        "  if (threadIdx.x == 0) *ticket = 0;",
    ),
    stats("the ticket is not atomic", "block.h", "*drawn = atomicAdd(ticket, 1u);", "*drawn = (*ticket)++;"),
    stats(
        "the last block but one finishes",
        "block.h",
        "if (*drawn != gridDim.x - 1)",
        "if (*drawn + 1 != (gridDim.x > 1 ? gridDim.x - 1 : 1))",
    ),
    stats("the ticket is not set back", "block.h", "  if (threadIdx.x == 0) *ticket = 0;\n", ""),
    stats("every thread draws a ticket", "block.h", DRAW, DRAW.replace("if (threadIdx.x == 0) ", "")),
    direct(
        "the first block advances the counts",
        "step.h",
        "if (is_last_block(job.ticket, drawn)) advance",
        "if (is_last_block(job.ticket, drawn) | true && blockIdx.x == 0) advance",
    ),
    direct("every block moves the scale", "step.h", "if (blockIdx.x != 0 || threadIdx.x >= n", "if (threadIdx.x >= n"),
    direct(
        "a skipped step leaves the scale",
        "step.h",
        "  move_scale(job);\n  if (is_skipped(job)) return forget_gradients(job);\n",
        "  if (is_skipped(job)) return forget_gradients(job);\n  move_scale(job);\n",
    ),
    direct(
        "every block advances the counts",
        "step.h",
        "if (is_last_block(job.ticket, drawn)) advance",
        "is_last_block(job.ticket, drawn); advance",
    ),
)


def plant(fault: Fault, text: str) -> str:
    """The file with the fault in its first place; an error where the kernels have changed since."""
    if fault.before not in text:
        raise SystemExit(f"{fault.name}: csrc/cuda/{fault.file} no longer has {fault.before!r}")
    return text.replace(fault.before, fault.after, 1)


def link(mode: Mode, objects: list[Path], made: Path) -> Path:
    subprocess.run([mode.compiler, *mode.link, *map(str, objects), "-o", str(made)], check=True)
    return made


def shared(folder: Path) -> dict[str, tuple[list[Path], list[Path]]]:
    """What no mutant changes, once for each program: all but the kernels, and the kernels as they are."""
    program = Program(folder, RULES)
    objects = {}
    for name in ("plain", "sanitize", "races"):
        place = folder / name
        objects[name] = (program.others(MODES[name], place), program.kernels(MODES[name], place))
    return objects


def limit_processor_time() -> None:
    """A program that hangs ends; one on a busy machine does not."""
    resource.setrlimit(resource.RLIMIT_CPU, (120, 120))


def finds(way: str, program: Path, arguments: tuple[str, ...], areas: tuple[str, ...]) -> bool:
    """Whether a run shows that something is wrong."""
    command = [str(program), *arguments, *areas]
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", check=False, preexec_fn=limit_processor_time
    )
    if done.returncode != 0:
        return way != "traffic"  # wrong numbers are not the meter's business
    if way != "traffic":
        return False
    budgets = json.loads(BUDGETS.read_text())
    measured = json.loads(done.stdout)
    return bool(compare(measured, {key: budgets[key] for key in measured if key in budgets}))


def judge(fault: Fault | None, kernel: str, areas: tuple[str, ...], folder: Path, base: Path) -> list[str] | None:
    """The ways that find a fault, or what is wrong without one; None where it does not compile."""
    folder.mkdir()
    changed = folder / "csrc"
    shutil.copytree(CUDA, changed / "cuda")
    if fault is not None:
        path = changed / "cuda" / fault.file
        path.write_text(plant(fault, path.read_text()))
    program = Program(folder, RULES, changed)
    built: dict[str, Path] = {}
    found = []
    for way, (name, arguments) in RUNS.items():
        if name not in built:
            # The changed kernel first: of what several files have inline, the linker takes the first.
            others = sorted((base / name / "others").glob("*.o"))
            rest = [path for path in sorted((base / name / "kernels").glob("*.o")) if path.stem != kernel]
            try:
                own = program.kernels(MODES[name], folder / name, (kernel,))
            except subprocess.CalledProcessError:
                return None
            objects = [*others, *own, *rest]
            built[name] = link(MODES[name], objects, folder / name / "driver")
        if finds(way, built[name], arguments, areas):
            found.append(way)
    shutil.rmtree(folder)
    return found


def table(rows: list[tuple[Fault, list[str]]]) -> str:
    """The faults and what finds them, in Markdown; what a plain run finds, other orders find too."""
    lines = [f"| fault | {' | '.join(WAYS)} |", f"|---|{':-:|' * len(WAYS)}"]
    lines += [f"| {fault.name} | {' | '.join('x' if way in found else '' for way in WAYS)} |" for fault, found in rows]
    counts = " | ".join(str(sum(way in found for _, found in rows)) for way in WAYS)
    return "\n".join([*lines, f"| **of {len(rows)}** | {counts} |"]) + "\n"


def main(argv: list[str]) -> int:
    """Judge all faults, or a sample."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sample", type=int, help="only so many faults, evenly spread")
    options.add_argument("--only", nargs="*", help="only faults with one of these words in their names")
    options.add_argument("--processes", type=int, default=2, help="how many work at once (default: 2)")
    options.add_argument("--write", action="store_true", help="put the table into docs/simt.md")
    args = options.parse_args(argv)
    faults = [fault for fault in FAULTS if not args.only or any(word in fault.name for word in args.only)]
    if args.sample is not None:
        faults = faults[:: max(1, len(faults) // args.sample)][: args.sample]
    for each in FAULTS:
        plant(each, (CUDA / each.file).read_text())
    rows: list[tuple[Fault, list[str]]] = []
    wrong = False
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(args.processes) as pool:
        folder = Path(name)
        base = folder / "base"
        shared(base)
        jobs: list[tuple[Fault | None, str, tuple[str, ...]]]
        jobs = [(None, kernel, areas) for kernel, areas in sorted({(fault.kernel, fault.areas) for fault in faults})]
        jobs += [(fault, fault.kernel, fault.areas) for fault in faults]
        waiting = [pool.submit(judge, *job, folder / f"place{i}", base) for i, job in enumerate(jobs)]
        try:
            for (fault, kernel, _), answer in zip(jobs, waiting, strict=True):
                found = answer.result()
                if fault is None:
                    if found != []:
                        raise SystemExit(f"{kernel} as it is: {found}")
                    continue
                text = "does not compile" if found is None else ", ".join(found) or "NOT FOUND"
                print(f"{text:44} {fault.file}: {fault.name}", flush=True)
                rows.append((fault, found or []))
                wrong = wrong or not found
        finally:
            pool.shutdown(cancel_futures=True)
    if args.write:
        put_into(DOCS, "mutations", table(rows))
    print(f"{sum(bool(found) for _, found in rows)} of {len(rows)} faults found")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
