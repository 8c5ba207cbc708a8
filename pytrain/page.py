"""What the reports share: one self-contained HTML page, and plots that look alike."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

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


def page(title: str, body: str) -> str:
    """Return an HTML page that fetches nothing.

    Args:
        title: plain text.
        body: HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{STYLE}</style></head>
<body><main>
{body}
</main></body></html>
"""


def finish_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Put title, labels and a quiet grid to a plot."""
    axes.set_title(title, fontsize=10.5, loc="left", color="#1f2328")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e6e9ec", linewidth=0.7)
    axes.set_axisbelow(True)


def data_uri(figure: Figure) -> str:
    """Return a figure as a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=170)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
