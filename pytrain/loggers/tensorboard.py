"""TensorBoardLogger: metrics as TensorBoard's event files, one point a metric and line."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from pytrain.loggers.base import FolderLogger, Status, as_json, plain, require


class TensorBoardLogger(FolderLogger):
    """Writes event files; look at them with `tensorboard --logdir SAVE_DIR`.

    In a resumed run TensorBoard drops the points after the step that it resumes from (`purge_step`), and in a new run
    whose version exists already all older points. Hyperparameters go to TensorBoard's table of them, and as text.

    Args:
        save_dir, name, version: the files lie in save_dir/name/version_n; see `FolderLogger`.
        flush_secs: how many seconds a point waits at most before it is written, > 0; `save` writes at once.

    Raises:
        ImportError: the package tensorboard is not installed.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str],
        name: str = "pytrain_logs",
        version: int | str | None = None,
        *,
        flush_secs: int = 120,
    ) -> None:
        super().__init__(save_dir, name, version)
        require("tensorboard", "TensorBoardLogger", "tensorboard")
        self._flush_secs = flush_secs
        self._writer: Any = None
        self._begun = False

    @property
    def experiment(self) -> Any:
        """torch's SummaryWriter, for images, histograms and so on."""
        if self._writer is None:
            summaries = require("torch.utils.tensorboard", "TensorBoardLogger", "tensorboard")
            purge: int | None = None
            if not self._begun and self.log_dir.exists():
                purge = 0 if self._resumed is None else self._resumed + 1
            self._begun = True
            self._writer = summaries.SummaryWriter(str(self.log_dir), purge_step=purge, flush_secs=self._flush_secs)
        return self._writer

    def log_metrics(self, metrics: Mapping[str, float], step: int, epoch: int | None = None) -> None:
        writer = self.experiment
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        if epoch is not None:
            writer.add_scalar("epoch", epoch, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(plain(params), {}):  # type: ignore[no-untyped-call]
            self.experiment.file_writer.add_summary(summary)
        self.experiment.add_text("hparams", f"```\n{as_json(params)}```")

    def save(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finalize(self, status: Status) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
