"""What every benchmark shares: interleaved timing, the triad it is measured against, tables and JSON lines."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant: the median, and the quartiles around it."""

    median: float
    low: float
    high: float

    def text(self) -> str:
        """The median in milliseconds with half the distance of the quartiles."""
        return f"{1e3 * self.median:.3f} ±{5e2 * (self.high - self.low):.3f}"


def interleaved(
    contestants: dict[str, tuple[Callable[[], None], Callable[[], None]]], *, repeat: int, budget: float
) -> dict[str, Timing]:
    """Time contestants in turns, A B C A B C, so that noise hits all of them alike.

    Args:
        contestants: name -> (prepare, run); only run is timed.
        repeat: rounds, >= 3; fewer when `budget` seconds are over, but at least 3.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for prepare, run in contestants.values():  # warm up
        prepare()
        run()
    end = perf_counter() + budget
    while len(next(iter(seconds.values()))) < repeat and (
        perf_counter() < end or len(next(iter(seconds.values()))) < 3
    ):
        for name, (prepare, run) in contestants.items():
            prepare()
            start = perf_counter()
            run()
            seconds[name].append(perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


def summary(seconds: Sequence[float]) -> Timing:
    """Median and quartiles."""
    cuts = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return Timing(statistics.median(seconds), cuts[0], cuts[-1])


class Triad:
    """The yardstick for memory: `a += s * b` in place, 12 bytes an element of fp32, on torch's threads."""

    def __init__(self, elements: int) -> None:
        self.a, self.b = torch.zeros(elements), torch.ones(elements)
        self.bytes = 12 * elements

    def run(self) -> None:
        """One triad."""
        self.a.add_(self.b, alpha=1e-3)


def free_memory() -> None:
    """Give memory that nothing holds back to the system; glibc's heap would grow with every row to 20 GiB and more."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None  # glibc's own
    if trim is not None:
        trim(0)


def nothing() -> None:
    """What a contestant without preparation prepares."""


def machine() -> dict[str, Any]:
    """The facts that figures depend on."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
    }


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with aligned columns."""
    table = [list(header), *[list(row) for row in rows]]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in table
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def write_json(path: Path | None, rows: Iterable[dict[str, Any]]) -> None:
    """One JSON object a line, where a path was given."""
    if path is not None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def parser(about: str) -> argparse.ArgumentParser:
    """The options that all benchmarks have."""
    options = argparse.ArgumentParser(description=about)
    options.add_argument("--quick", action="store_true", help="agreement checks and a few rounds of the small cases")
    options.add_argument("--repeat", type=int, default=25, help="rounds, at least 3 (%(default)s)")
    options.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (%(default)s)")
    options.add_argument("--json", type=Path, help="file for one JSON object a row")
    return options
