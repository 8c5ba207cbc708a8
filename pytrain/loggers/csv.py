"""CSVLogger: metrics as a table that any program reads, one row a line of metrics."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from pytrain.loggers.base import FolderLogger, Status, as_json, move_aside, write_text

FIRST = ("step", "epoch")


class CSVLogger(FolderLogger):
    """Writes `metrics.csv`: the columns step and epoch, then one for each metric, empty where a row has none.

    Each row is on its way to the disk when `log_metrics` returns. A metric that comes later adds a column: the file is
    then written anew and replaced at once, so that a kill leaves the old file or the new one. A new run moves a file
    that is there already aside (metrics.1.csv, ...). Hyperparameters go to `hparams.json`.

    Args:
        save_dir, name, version: the file lies in save_dir/name/version_n; see `FolderLogger`.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str = "pytrain_logs", version: int | str | None = None
    ) -> None:
        super().__init__(save_dir, name, version)
        self._columns: list[str] = list(FIRST)
        self._file: TextIO | None = None
        self._begun = False
        self._known: set[frozenset[str]] = set()

    @property
    def path(self) -> Path:
        """The file; settles the version."""
        return self.log_dir / "metrics.csv"

    def log_metrics(self, metrics: Mapping[str, float], step: int, epoch: int | None = None) -> None:
        """Write one row.

        Raises:
            ValueError: a metric has the name of a column of ours, step or epoch.
        """
        for name in FIRST:
            if name in metrics:
                raise ValueError(f"CSVLogger: the metric's name {name!r} is that of a column already; choose another")
        file = self._open()
        if step == self._resumed and frozenset(metrics) in self._known:
            return  # the resumed run gives this line of the step once more
        new = [name for name in metrics if name not in self._columns]
        if new:
            file = self._write(self._columns + new, _read(self.path)[1])
        row = {"step": step, "epoch": "" if epoch is None else epoch, **metrics}
        file.write(_line(row.get(name, "") for name in self._columns))
        file.flush()

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._open()
        write_text(self.log_dir / "hparams.json", as_json(params))

    def save(self) -> None:
        if self._file is not None:
            os.fsync(self._file.fileno())

    def finalize(self, status: Status) -> None:
        if self._file is not None:
            self.save()
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        if self._file is not None:
            return self._file
        if self._begun:  # finalized, and logged to again
            self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open as long as the run
            return self._file
        self._begun = True
        if not self.path.exists():
            return self._write(list(FIRST), [])
        if self._resumed is None:
            move_aside(self.path)
            return self._write(list(FIRST), [])
        columns, rows = _read(self.path)
        rows = [row for row in rows if int(row["step"]) <= self._resumed]
        last = [row for row in rows if int(row["step"]) == self._resumed]
        self._known = {frozenset(name for name, cell in row.items() if cell and name not in FIRST) for row in last}
        return self._write(columns, rows)

    def _write(self, columns: list[str], rows: list[dict[str, str]]) -> TextIO:
        """Replace the file by one of these rows, and open it for more."""
        if self._file is not None:
            self._file.close()
        table = [_line(columns), *(_line(row.get(name, "") for name in columns) for row in rows)]
        write_text(self.path, "".join(table))
        self._columns = columns
        self._file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115 - open as long as the run
        return self._file


def _line(cells: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """The columns and the rows; a last line that a kill has cut short is left out."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1].decode("utf-8")
    lines = list(csv.reader(io.StringIO(whole, newline="")))
    if not lines:
        return list(FIRST), []
    return lines[0], [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]
