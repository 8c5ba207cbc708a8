"""The demo's report: a table for the terminal, and one self-contained HTML file with plots."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import pytrain
from pytrain.demo.compare import Comparison, largest, middle, spread
from pytrain.demo.data import missing_extra
from pytrain.page import data_uri, finish_axes, page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADINGS = ("task", "trained with", "held out", "step, ms", "whole post-backward, ms", "largest loss difference")
COLOURS = {"torch fused": "#9db4d0", "pytrain": "#d9480f", "fp64 reference": "#8a8f98"}
READING = """
Every task is trained three times, from the same initial weights, on the same batches in the same order:
with <b>torch fused</b> (<code>torch.optim.AdamW(fused=True)</code> in a plain loop), with <b>pytrain</b>
(<code>pytrain.optim.AdamW</code> in <code>pytrain.Trainer</code>), and with an <b>fp64 reference</b> (torch's AdamW
on fp64 copies of the weights), which is the yardstick: training amplifies rounding, so that two correct optimizers
drift apart, and how far torch drifts from fp64 tells how far pytrain may be from torch. The runs take turns of ten
steps, so that whatever else the machine does disturbs all of them alike.
All clip the gradients to a norm of 1. <b>Step</b> is everything from getting a batch to asking for the next one,
<b>whole post-backward</b> the part of it between backward and the schedule: clipping and the update, and with pytrain
the check for inf and nan; both are medians over the run. Differences are against torch fused.
"""


@dataclass(frozen=True)
class Sample:
    """What a language model wrote."""

    task: str
    text: str


def rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Return the table's cells, in the order of HEADINGS: three rows a task."""
    return [
        (
            one.task.name,
            run.who,
            f"{run.score:.2f} {one.task.unit}",
            "" if run is one.exact else f"{middle(run.step_seconds):.2f}",
            "" if run is one.exact else f"{middle(run.after_seconds):.3f}",
            "" if run is one.torch else f"{largest(one.differences(run)):.1e}",
        )
        for one in comparisons
        for run in one.runs
    ]


def print_table(comparisons: Sequence[Comparison]) -> None:
    """Print the table: with rich where it is installed, else as plain text."""
    cells = rows(comparisons)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(HEADINGS, *cells, strict=True)]
        for row in (HEADINGS, *cells):
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table()
    for number, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for number, row in enumerate(cells):
        table.add_row(*row, style="bold" if row[1] == "pytrain" else None, end_section=number % 3 == 2)
    Console().print(table)


def machine_facts(comparisons: Sequence[Comparison]) -> list[tuple[str, str]]:
    """Return what the figures depend on, as (name, value)."""
    backends = sorted({one.backend for one in comparisons})
    ranks = comparisons[0].ranks
    on_ranks = f"{ranks}, each with its part of every batch; torch's runs are one process' on the whole of it"
    return [
        *([("pytrain's runs", on_ranks)] if ranks else []),
        ("processor", f"{_processor()}; {os.cpu_count()} logical, torch uses {torch.get_num_threads()} threads"),
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("Python", sys.version.split()[0]),
        ("torch", torch.__version__),
        ("pytrain", f"{pytrain.__version__}, backend {', '.join(backends)}{_isa() if 'native' in backends else ''}"),
        ("time", ", ".join(f"{one.task.name} {one.seconds:.0f} s" for one in comparisons)),
    ]


def _isa() -> str:
    from pytrain import backend

    return f", {backend.isa()}"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def write_report(
    path: Path, comparisons: Sequence[Comparison], *, samples: Sequence[Sample], left_out: Sequence[str], options: str
) -> None:
    """Write the report as one HTML file that needs nothing else.

    Args:
        path: the file; replaced where it exists.
        comparisons: what to show, in this order.
        samples: texts to show below the plots of their tasks.
        left_out: a line for each task that was asked for and is not shown.
        options: the command's options, to be shown.

    Raises:
        DemoError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    verdicts = [verdict for one in comparisons for verdict in one.verdicts()]
    failed = sum(not verdict.passed for verdict in verdicts)
    badge = f"{failed} of {len(verdicts)} checks failed" if failed else f"all {len(verdicts)} checks passed"
    facts = "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in machine_facts(comparisons))
    path.write_text(
        page(
            "pytrain demo report",
            f"""<h1><b>pytrain</b> against torch, on real data</h1>
<p class="soft">Written by <code>python -m pytrain demo{escape(" " + options if options else "")}</code></p>
<p><span class="badge {"failed" if failed else "passed"}">{badge}</span></p>
<section><h2>Results</h2>{_html_table(comparisons)}
{"".join(f'<p class="soft">{escape(line)}</p>' for line in left_out)}
<h3>How to read this</h3><p>{READING}</p></section>
<section><h2>Machine</h2><table class="facts">{facts}</table></section>
{"".join(_task_section(one, samples) for one in comparisons)}""",
        ),
        encoding="utf-8",
    )


def _html_table(comparisons: Sequence[Comparison]) -> str:
    kind = ["", ""] + [' class="number"'] * 4
    head = "".join(f"<th{k}>{heading}</th>" for k, heading in zip(kind, HEADINGS, strict=True))
    lines = []
    for number, row in enumerate(rows(comparisons)):
        cells = "".join(f"<td{k}>{escape(cell)}</td>" for k, cell in zip(kind, row, strict=True))
        classes = " ".join(["first"] * (number % 3 == 0) + ["own"] * (row[1] == "pytrain"))
        lines.append(f'<tr class="{classes}">{cells}</tr>')
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _task_section(one: Comparison, samples: Sequence[Sample]) -> str:
    settings = one.task.settings
    count = sum(parameter.numel() for parameter in one.model.parameters())
    checks = "".join(
        f'<li class="{"passed" if verdict.passed else "failed"}">{escape(verdict.text)}</li>'
        for verdict in one.verdicts()
    )
    wrote = "".join(
        f"<h3>What pytrain's model wrote</h3><pre>{escape(sample.text)}</pre>"
        for sample in samples
        if sample.task == one.task.name
    )
    return f"""<section><h2>{escape(one.task.title)}</h2>
<p class="soft">{escape(one.task.about)}. {count:,} parameters, {settings.steps} steps of {settings.batch},
learning rate {settings.lr:g}, weight decay {settings.weight_decay:g}.</p>
<ul class="checks">{checks}</ul>
<img alt="Loss curves, loss differences and times of {escape(one.task.name)}" src="{data_uri(_figure(one))}">
{wrote}</section>
"""


def _figure(one: Comparison) -> Figure:
    """Return the plots of a task: losses above; differences, step times and optimizer times below."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("matplotlib", error) from error
    figure = Figure(figsize=(10.4, 6.8), layout="constrained", facecolor="white")
    grid = figure.add_gridspec(2, 4, height_ratios=(1.15, 1))
    _plot_losses(figure.add_subplot(grid[0, :]), one)
    _plot_differences(figure.add_subplot(grid[1, :2]), one)
    _plot_times(figure.add_subplot(grid[1, 2]), one, [run.step_seconds for run in one.timed], "training step")
    _plot_times(figure.add_subplot(grid[1, 3]), one, [run.after_seconds for run in one.timed], "whole post-backward")
    return figure


def _plot_losses(axes: Axes, one: Comparison) -> None:
    unit = "nats/char" if one.task.unit == "nats/char" else "nats"
    window = max(1, len(one.torch.losses) // 50)
    steps = range(1, len(one.torch.losses) + 1)
    axes.plot(steps, one.torch.losses, color=COLOURS[one.torch.who], linewidth=0.7, alpha=0.45)
    styles = ((one.torch, 5.0, "-"), (one.pytrain, 1.6, "-"))
    for run, width, line in styles:
        axes.plot(
            steps, _running_mean(run.losses, window), line, color=COLOURS[run.who], linewidth=width, label=run.who
        )
    finish_axes(axes, "training loss, both runs overlaid", "step", f"loss, {unit}")
    axes.legend(frameon=False, title=f"mean of {window} steps" if window > 1 else None)


def _plot_differences(axes: Axes, one: Comparison) -> None:
    steps = range(1, len(one.torch.losses) + 1)
    for run in (one.exact, one.pytrain):
        shown = [difference if difference > 0 else float("nan") for difference in one.differences(run)]
        axes.plot(steps, shown, ".", markersize=2.5, color=COLOURS[run.who], label=run.who)
    axes.set_yscale("log")
    finish_axes(axes, "loss difference to torch fused (equal steps not drawn)", "step", "|difference|, nats")
    axes.legend(frameon=False, markerscale=4)


def _plot_times(axes: Axes, one: Comparison, seconds: list[list[float]], title: str) -> None:
    medians = [middle(values) for values in seconds]
    ends = [spread(values) for values in seconds]
    errors = [
        [max(0.0, m - low) for m, (low, _) in zip(medians, ends, strict=True)],
        [max(0.0, high - m) for m, (_, high) in zip(medians, ends, strict=True)],
    ]
    names = [run.who.replace(" ", "\n") for run in one.timed]
    bars = axes.bar(
        names,
        medians,
        color=[COLOURS[run.who] for run in one.timed],
        yerr=errors,
        ecolor="#59636e",
        capsize=3,
        width=0.68,
    )
    axes.bar_label(bars, labels=[f"{m:.3g}" for m in medians], label_type="center", color="#1f2328", fontsize=9)
    finish_axes(axes, title, "", "ms: median, 10 % to 90 %")
    axes.tick_params(axis="x", labelsize=8, length=0)
    axes.grid(visible=False, axis="x")


def _running_mean(values: list[float], window: int) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]
