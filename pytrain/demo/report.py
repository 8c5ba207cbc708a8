"""The demo's report: a table for the terminal, and one self-contained HTML file with plots."""

from __future__ import annotations

import base64
import io
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

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HEADINGS = ("task", "trained with", "held out", "step, ms", "whole post-backward, ms", "largest loss difference")
COLOURS = {"torch fused": "#9db4d0", "pytrain": "#d9480f", "fp64 reference": "#8a8f98"}
STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --back: #f6f8fa; --own: #d9480f; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; margin: 0 0 4px; } h1 b { color: var(--own); }
h2 { font-size: 21px; margin: 0 0 2px; } h3 { font-size: 15px; margin: 20px 0 6px; }
p { margin: 6px 0 12px; } .soft { color: var(--soft); }
section { background: #fff; border: 1px solid var(--line); border-radius: 10px; padding: 22px 26px; margin-top: 22px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: 14px; }
th, td { padding: 7px 12px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; }
td.number, th.number { text-align: right; white-space: nowrap; } tr.own td { font-weight: 600; }
tr.first:not(:first-child) td { border-top: 2px solid #afb8c1; }
.facts td:first-child { color: var(--soft); width: 130px; }
img { width: 100%; height: auto; margin-top: 10px; display: block; }
ul.checks { list-style: none; padding: 0; margin: 8px 0 0; }
ul.checks li { margin: 4px 0; padding-left: 26px; position: relative; }
ul.checks li::before { position: absolute; left: 2px; font-weight: 700; }
li.passed::before { content: "\\2713"; color: #1a7f37; } li.failed::before { content: "\\2717"; color: #cf222e; }
.badge { display: inline-block; border-radius: 14px; padding: 3px 14px; color: #fff;
  font-weight: 600; font-size: 14px; }
.badge.passed { background: #1a7f37; } .badge.failed { background: #cf222e; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font: 13px/1.45 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
"""
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
        f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pytrain demo report</title><style>{STYLE}</style></head>
<body><main>
<h1><b>pytrain</b> against torch, on real data</h1>
<p class="soft">Written by <code>python -m pytrain demo{escape(" " + options if options else "")}</code></p>
<p><span class="badge {"failed" if failed else "passed"}">{badge}</span></p>
<section><h2>Results</h2>{_html_table(comparisons)}
{"".join(f'<p class="soft">{escape(line)}</p>' for line in left_out)}
<h3>How to read this</h3><p>{READING}</p></section>
<section><h2>Machine</h2><table class="facts">{facts}</table></section>
{"".join(_task_section(one, samples) for one in comparisons)}
</main></body></html>
""",
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
<img alt="Loss curves, loss differences and times of {escape(one.task.name)}" src="{_png(_figure(one))}">
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
    _finish(axes, "training loss, both runs overlaid", "step", f"loss, {unit}")
    axes.legend(frameon=False, title=f"mean of {window} steps" if window > 1 else None)


def _plot_differences(axes: Axes, one: Comparison) -> None:
    steps = range(1, len(one.torch.losses) + 1)
    for run in (one.exact, one.pytrain):
        shown = [difference if difference > 0 else float("nan") for difference in one.differences(run)]
        axes.plot(steps, shown, ".", markersize=2.5, color=COLOURS[run.who], label=run.who)
    axes.set_yscale("log")
    _finish(axes, "loss difference to torch fused (equal steps not drawn)", "step", "|difference|, nats")
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
    _finish(axes, title, "", "ms: median, 10 % to 90 %")
    axes.tick_params(axis="x", labelsize=8, length=0)
    axes.grid(visible=False, axis="x")


def _finish(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=10.5, loc="left", color="#1f2328")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.7)
    axes.set_axisbelow(True)


def _running_mean(values: list[float], window: int) -> list[float]:
    return [sum(part) / len(part) for part in (values[max(0, i - window + 1) : i + 1] for i in range(len(values)))]


def _png(figure: Figure) -> str:
    """Return a figure as a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=170)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
