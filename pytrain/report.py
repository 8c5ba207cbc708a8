"""The report on a run, `python -m pytrain report RUN`: every metric over the steps, as one self-contained HTML file."""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from pytrain.page import data_uri, finish_axes, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = "metrics.jsonl"
COLUMNS = 2
OWN, OTHER, SOFT = "#d9480f", "#1f6feb", "#9db4d0"
SMOOTHED = 50  # a metric of many values is drawn as the mean of a 50th of them too
FAR_APART = 100.0  # values that are all positive and lie this far apart are drawn on a log scale


class ReportError(Exception):
    """What keeps a report from being written, as one line for the user."""


@dataclass
class Series:
    """One metric: its values in the order of the file, and what was not a finite number."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    @property
    def finite(self) -> list[tuple[int, float]]:
        """(step, value) of the finite ones."""
        return [(s, v) for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)]


@dataclass
class Run:
    """The metrics of one run.

    Args:
        path: the file.
        series: the metrics, in the order of their first appearance.
        lines: how many lines were read.
        epochs: the last epoch, from 1.
        skipped: a line for each line of the file that could not be read.
    """

    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    lines: int = 0
    epochs: int = 0
    skipped: list[str] = field(default_factory=list)


def main(argv: list[str]) -> int:
    """Run the command.

    Args:
        argv: the command line after `python -m pytrain report`.

    Returns:
        0 if the report was written, else 2.
    """
    args = _parse(argv)
    try:
        run = read_run(args.run)
        out = args.out or run.path.with_name("report.html")
        write_report(out, run)
    except ReportError as error:
        print(f"pytrain report: error: {error}", file=sys.stderr)
        return 2
    for line in run.skipped:
        print(f"pytrain report: {line}", file=sys.stderr)
    print(f"report: {out} ({len(run.series)} metrics, {run.lines} lines)")
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pytrain report",
        description="Plot every metric of a run over its steps, as one HTML file that needs nothing else.",
        epilog="Exit status: 0 the report was written, 2 it was not.",
    )
    parser.add_argument(
        "run", type=Path, help=f"the trainer's default_root_dir, or a file such as its {METRICS} or metrics.1.jsonl"
    )
    parser.add_argument("--out", type=Path, help="where to write the report (report.html beside the metrics)")
    return parser.parse_args(argv)


def read_run(path: Path) -> Run:
    """Read a run's metrics; lines that cannot be read, such as a last one cut short, are skipped and noted.

    Args:
        path: a run's folder, or its file of metrics.

    Raises:
        ReportError: there is no such folder, or no metrics in it.
    """
    file = path / METRICS if path.is_dir() else path
    if not path.exists():
        raise ReportError(f"{path}: there is no such folder; expected a run's default_root_dir")
    if not file.is_file():
        inside = sorted(found.parent.relative_to(path).as_posix() for found in path.glob(f"**/{METRICS}"))
        instead = f"; there are some in {', '.join(inside[:5])}" if inside else "; has a Trainer written to it?"
        raise ReportError(f"{path}: there is no {METRICS} in it{instead}")
    run = Run(file)
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            _read_line(run, number, line)
    if not run.series:
        damaged = f"; {len(run.skipped)} lines could not be read" if run.skipped else ""
        raise ReportError(f"{file}: there are no metrics in it{damaged}")
    return run


def _read_line(run: Run, number: int, line: bytes) -> None:
    try:
        row = json.loads(line)
    except ValueError:
        run.skipped.append(f"line {number} is damaged and was skipped: it is not JSON")
        return
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        run.skipped.append(f'line {number} is damaged and was skipped: it is no object with a whole number as "step"')
        return
    run.lines += 1
    if type(row.get("epoch")) is int:
        run.epochs = max(run.epochs, row["epoch"] + 1)
    words = row.get("nonfinite")
    named = words if isinstance(words, dict) else {}
    for name, value in row.items():
        if name in ("step", "epoch", "nonfinite"):
            continue
        if value is None and named.get(name) in ("inf", "-inf", "nan"):
            value = float(named[name])
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            series = run.series.setdefault(name, Series())
            series.steps.append(row["step"])
            series.values.append(float(value))


def plots(names: list[str]) -> list[tuple[str, ...]]:
    """Which metrics share a plot: one and its "val_" fellow ("loss" or "train_loss", and "val_loss")."""
    fellows: dict[str, str] = {}
    for name in names:
        fellow = f"val_{name.removeprefix('train_')}"
        if fellow in names and fellow not in fellows.values():
            fellows[name] = fellow
    return [(name, fellows[name]) if name in fellows else (name,) for name in names if name not in fellows.values()]


def write_report(path: Path, run: Run) -> None:
    """Write the report as one HTML file that needs nothing else; a file of this name is replaced.

    Raises:
        ReportError: matplotlib is not installed, or the file cannot be written.
    """
    rows = "".join(_row(name, series) for name, series in run.series.items())
    last = max(max(series.steps) for series in run.series.values())
    facts = [("metrics", str(run.path)), ("steps", f"{last:,}"), ("epochs", f"{run.epochs:,}")]
    facts += [("skipped", line) for line in run.skipped]
    listed = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in facts)
    head = "".join(
        f"<th{'' if i == 0 else ' class=number'}>{word}</th>"
        for i, word in enumerate(("metric", "first", "last", "lowest", "at step", "highest", "at step", "points"))
    )
    text = page(
        f"pytrain: {run.path.parent.name}",
        f"""<h1><b>pytrain</b> run {escape(run.path.resolve().parent.name)}</h1>
<p class="soft">Written by <code>python -m pytrain report</code></p>
<section><table class="facts">{listed}</table>
<img alt="Every metric over the steps" src="{data_uri(figure(run))}"></section>
<section><h2>Metrics</h2><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></section>""",
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--out: cannot write {path}: {error}") from error


def _row(name: str, series: Series) -> str:
    finite = series.finite
    low, high = min(finite, key=_value, default=None), max(finite, key=_value, default=None)
    cells = [f"{series.values[0]:.5g}", f"{series.values[-1]:.5g}"]
    for end in (low, high):
        cells += ["", ""] if end is None else [f"{end[1]:.5g}", f"{end[0]:,}"]
    odd = len(series.values) - len(finite)
    cells.append(f"{len(series.values):,}" + (f", {odd} not finite" if odd else ""))
    return f"<tr><td>{escape(name)}</td>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>"


def _value(point: tuple[int, float]) -> float:
    return point[1]


def figure(run: Run) -> Figure:
    """Return one plot a metric; validation beside training."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ReportError(f"the report needs matplotlib ({error}): pip install pytrain[report]") from error
    groups = plots(list(run.series))
    height = math.ceil(len(groups) / COLUMNS)
    drawn = Figure(figsize=(10.4, 2.9 * height), layout="constrained", facecolor="white")
    for place, names in enumerate(groups, 1):
        _plot(drawn.add_subplot(height, COLUMNS, place), {name: run.series[name] for name in names})
    return drawn


def _plot(axes: Axes, metrics: dict[str, Series]) -> None:
    odd = False
    for (name, series), colour in zip(metrics.items(), (OWN, OTHER), strict=False):
        steps, values, marker = series.steps, series.values, "o" if len(series.values) <= SMOOTHED else None
        if len(values) > 4 * SMOOTHED and is_noisy(values):
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            window = len(values) // SMOOTHED
            name = f"{name}, mean of {window}"
            steps, values = smoothed(series.finite, window)
        axes.plot(steps, values, marker=marker, markersize=3.5, color=colour, label=name, linewidth=1.4)
        for step in (s for s, v in zip(series.steps, series.values, strict=True) if not math.isfinite(v)):
            odd = True
            axes.axvline(step, color=SOFT, linewidth=1, linestyle=":")
    finite = [[value for _, value in series.finite] for series in metrics.values()]
    if all(map(is_far_apart, finite)):
        axes.set_yscale("log")
    finish_axes(axes, " and ".join(metrics) + (" (dotted: inf or nan)" if odd else ""), "step", "")
    labels = axes.get_legend_handles_labels()[1]
    if labels != list(metrics) or len(labels) > 1:
        axes.legend(frameon=False, fontsize=9)


def is_noisy(values: list[float]) -> bool:
    """Whether more than a quarter of the values are turning points; a count or a schedule has few."""
    rises = [after > before for before, after in pairwise(values) if after != before]
    return sum(a != b for a, b in pairwise(rises)) > len(values) / 4


def is_far_apart(values: list[float]) -> bool:
    """Whether a log scale shows more: all positive, of very different sizes, and no count that only rises."""
    if not values or min(values) <= 0 or max(values) <= FAR_APART * min(values):
        return False
    return any(after < before for before, after in pairwise(values))


def smoothed(points: list[tuple[int, float]], window: int) -> tuple[list[int], list[float]]:
    """The means over each point and the `window` - 1 before it; fewer at the start."""
    sums = list(accumulate((value for _, value in points), initial=0.0))
    starts = [max(0, end - window) for end in range(1, len(sums))]
    means = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, 1)]
    return [step for step, _ in points], means
