"""Metrics as JSON lines: one object a line, valid JSON whatever the values, flushed line by line."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytrain.loggers.base import Logger, Status, move_aside


class JsonLinesLogger(Logger):
    """Appends metrics to a file.

    A new run moves an older file aside (metrics.1.jsonl, metrics.2.jsonl, ...); a resumed run keeps the lines that
    its checkpoint counts and drops later ones, which it will write again.

    Args:
        path: the file.
        keep_lines: None for a new run; else the number of lines to keep.
    """

    def __init__(self, path: Path, *, keep_lines: int | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines = 0
        if path.exists():
            if keep_lines is None:
                move_aside(path)
            else:
                self.lines = _keep_first(path, keep_lines)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run

    def log_metrics(self, metrics: Mapping[str, float], step: int, epoch: int | None = None) -> None:
        """Write one line. JSON has no inf and nan: they become null, and "nonfinite" says which was what."""
        row: dict[str, object] = {"step": step} if epoch is None else {"step": step, "epoch": epoch}
        nonfinite = {}
        for name, value in metrics.items():
            row[name] = value if math.isfinite(value) else None
            if row[name] is None:
                nonfinite[name] = str(float(value))
        if nonfinite:
            row["nonfinite"] = nonfinite
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        self.lines += 1

    def finalize(self, status: Status) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _keep_first(path: Path, count: int) -> int:
    """Cut the file after its first `count` complete lines; return how many there are."""
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")][:count]
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(b"".join(lines))
    os.replace(temporary, path)
    return len(lines)


def open_loggers(given: Any, folder: Path, hparams: Mapping[str, Any], resumed: Mapping[str, Any] | None) -> list[Any]:
    """Return the loggers of a run, told of the hyperparameters, and where it is resumed of the step it goes on from.

    Args:
        given: as `Trainer` has it: one or several, False for none, True for JSON lines.
        folder: of the run.
        hparams: the module's.
        resumed: the checkpoint; None: the run starts anew.

    Raises:
        TypeError: one of those given cannot log.
    """
    if given is None or isinstance(given, bool):
        lines = None if resumed is None else resumed["metrics_lines"]
        return [] if given is False else [JsonLinesLogger(folder / "metrics.jsonl", keep_lines=lines)]
    loggers = list(given) if isinstance(given, (list, tuple)) else [given]
    for i, logger in enumerate(loggers):
        if not callable(getattr(logger, "log_metrics", None)):
            raise TypeError(f"Trainer: logger[{i}] has no log_metrics(metrics, step), got {logger!r}")
        if resumed is not None and hasattr(logger, "resume"):
            logger.resume(resumed["global_step"])
        if hparams and hasattr(logger, "log_hyperparams"):
            logger.log_hyperparams(dict(hparams))
    return loggers
