"""Logger: what the trainer asks of a logger, and what those that write into folders share."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from pytrain.sealed import sync_folder

Status = Literal["success", "failed", "interrupted"]


class Logger:
    """Takes metrics; a subclass overrides `log_metrics`, and of the others what it needs. Called on rank 0 only.

    Nothing is written before the first call. `resume(step)`, where it is called, comes before all others.

    Attributes:
        save_dir: the folder under which it writes, or None.
    """

    save_dir: Path | None = None

    @property
    def name(self) -> str:
        """Of the experiment."""
        return type(self).__name__

    @property
    def version(self) -> int | str | None:
        """Of the run; None where that is not settled yet."""
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int, epoch: int | None = None) -> None:
        """Write one line of metrics.

        Args:
            metrics: numbers by name; they may be inf or nan.
            step: applied optimizer steps so far.
            epoch: the epoch under way, from 0.
        """
        raise NotImplementedError(f"{type(self).__name__} must define log_metrics(metrics, step, epoch)")

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Write what the run was started with."""

    def resume(self, step: int) -> None:
        """Go on with the newest run after an applied step: what was written after that step is dropped."""

    def save(self) -> None:
        """Have what was logged so far survive the end of this process."""

    def finalize(self, status: Status) -> None:
        """The run has ended: write what is left and let go of files. A second call does nothing."""


class FolderLogger(Logger):
    """Writes into `save_dir/name/version`, a new folder for each run.

    Args:
        save_dir: where the folders of all experiments lie.
        name: of the experiment; "" leaves this level out.
        version: an int n (the folder is "version_n") or the folder's name; None: one more than the highest there is,
            or in a resumed run the highest.
    """

    def __init__(
        self, save_dir: str | os.PathLike[str], name: str = "pytrain_logs", version: int | str | None = None
    ) -> None:
        if isinstance(version, bool) or not (version is None or isinstance(version, (int, str))):
            raise TypeError(
                f"{type(self).__name__}: version must be an int, a str or None, got {type(version).__name__}"
            )
        self.save_dir: Path = Path(save_dir)
        self._name, self._version = name, version
        self._resumed: int | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def version(self) -> int | str | None:
        return self._version

    @property
    def log_dir(self) -> Path:
        """The run's folder; settles the version. It may not exist yet."""
        root = self.save_dir / self._name
        if self._version is None:
            found = [int(path.name[8:]) for path in root.glob("version_*") if path.name[8:].isdecimal()]
            highest = max(found, default=-1)
            self._version = highest + 1 if self._resumed is None else max(highest, 0)
        return root / (self._version if isinstance(self._version, str) else f"version_{self._version}")

    def resume(self, step: int) -> None:
        self._resumed = step


def move_aside(path: Path) -> None:
    """Give a file of an older run the next free name: metrics.1.csv, metrics.2.csv and so on."""
    number = 1
    while (target := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    os.replace(path, target)


def write_text(path: Path, text: str) -> None:
    """Write a file so that the path holds the old text or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def plain(params: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Hyperparameters in one level, "optimizer/lr" for {"optimizer": {"lr": ...}}; what is no number becomes text."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= plain(value, f"{name}/")
        else:
            flat[name] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def as_json(params: Mapping[str, Any]) -> str:
    """Hyperparameters as a JSON text."""
    return json.dumps(plain(params), indent=2) + "\n"


def require(module: str, logger: str, package: str) -> Any:
    """Import what a logger needs.

    Raises:
        ImportError: it is not installed; the message has the command that does.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{logger} needs the package {package} ({error}): pip install {package}") from error
