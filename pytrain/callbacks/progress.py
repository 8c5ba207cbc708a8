"""Progress on the terminal: a rich bar where there is one, plain lines elsewhere. Never drawn at every step."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from time import perf_counter
from typing import Protocol, TextIO


class Progress(Protocol):
    """Shows where a run stands. The trainer calls `draw` when the clock has passed `next_draw`."""

    next_draw: float

    def draw(self, *, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        """Show the position, the rate, the loss and other metrics, and the time left."""

    def message(self, text: str) -> None:
        """Print one line."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class _Meter:
    """Rate and time left, from the steps done since the start."""

    def __init__(self, first_step: int, total_steps: int | None) -> None:
        self._first = first_step
        self._total = total_steps
        self._start = perf_counter()

    def read(self, step: int) -> tuple[str, str]:
        """Return (rate, time left) as words."""
        seconds = perf_counter() - self._start
        rate = (step - self._first) / seconds if seconds > 0 else 0.0
        if self._total is None or rate <= 0:
            return f"{rate:.4g} steps/s", "unknown"
        left = max(0, round((self._total - step) / rate))
        return f"{rate:.4g} steps/s", f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


class PlainProgress:
    """Plain lines, at most one in ten seconds but for the ends of epochs."""

    interval = 10.0

    def __init__(self, stream: TextIO, first_step: int, total_steps: int | None) -> None:
        self._stream = stream
        self._total = total_steps
        self._meter = _Meter(first_step, total_steps)
        self.next_draw = perf_counter() + self.interval

    def draw(self, *, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        rate, left = self._meter.read(step)
        total = "" if self._total is None else f"/{self._total}"
        self.message(f"epoch {epoch + 1}  step {step}{total}  {format_metrics(metrics)}  {rate}  left {left}")
        self.next_draw = perf_counter() + self.interval

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        self._stream.flush()


class RichProgress:
    """A bar drawn by rich, at most five times a second.

    Raises:
        ImportError: rich is not installed.
    """

    interval = 0.2

    def __init__(self, stream: TextIO, first_step: int, total_steps: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._meter = _Meter(first_step, total_steps)
        columns = "epoch {task.fields[epoch]}", "{task.completed}/{task.total}", "{task.fields[metrics]}"
        self._bar = Bar(
            TextColumn(columns[0]),
            BarColumn(),
            TextColumn(columns[1]),
            TextColumn(columns[2]),
            TextColumn("{task.fields[rate]}"),
            TextColumn("left {task.fields[left]}"),
            console=Console(file=stream),
            auto_refresh=False,
        )
        self._task = self._bar.add_task(
            "train", total=total_steps, completed=first_step, epoch="-", metrics="", rate="-", left="-"
        )
        self._bar.start()
        self.next_draw = perf_counter() + self.interval

    def draw(self, *, epoch: int, step: int, metrics: Mapping[str, float]) -> None:
        rate, left = self._meter.read(step)
        words = format_metrics(metrics)
        self._bar.update(self._task, completed=step, epoch=str(epoch + 1), metrics=words, rate=rate, left=left)
        self._bar.refresh()
        self.next_draw = perf_counter() + self.interval

    def message(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def make_progress(first_step: int, total_steps: int | None, stream: TextIO | None = None) -> Progress:
    """Return a bar on a terminal, and plain lines elsewhere or where rich is missing (which is said once).

    Args:
        first_step: the applied step that the run starts from.
        total_steps: the applied step that it ends at; None where it is unknown.
        stream: where to write; None is sys.stdout as it is now.
    """
    stream = sys.stdout if stream is None else stream
    if not stream.isatty():
        return PlainProgress(stream, first_step, total_steps)
    try:
        return RichProgress(stream, first_step, total_steps)
    except ImportError:
        plain = PlainProgress(stream, first_step, total_steps)
        plain.message("rich is not installed, so progress is shown as plain lines (pip install 'pytrain[trainer]')")
        return plain


def format_metrics(metrics: Mapping[str, float]) -> str:
    """Return metrics as 'name value  name value'."""
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
