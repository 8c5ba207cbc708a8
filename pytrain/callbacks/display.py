"""RichProgressBar: the trainer's own progress bar, with settings."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING

from pytrain.callbacks.base import Callback
from pytrain.callbacks.progress import PlainProgress, RichProgress, make_progress

if TYPE_CHECKING:
    from pytrain.trainer import Module, Trainer


class RichProgressBar(Callback):
    """Shows epoch, step, loss, metrics with `prog_bar=True`, rate and time left: a bar on a terminal, else plain lines.

    It is the trainer's own progress on rank 0, shown also with `enable_progress_bar=False`. To draw waits for the loss,
    so that is done by the clock and never at every step.

    Args:
        refresh_seconds: how often it is drawn, > 0; None: five times a second, or where there are plain lines every ten
            seconds. The end of an epoch is always drawn.

    Raises:
        ImportError: rich is not installed.
        ValueError: refresh_seconds is out of its range.
    """

    def __init__(self, refresh_seconds: float | None = None) -> None:
        if refresh_seconds is not None and not refresh_seconds > 0:
            raise ValueError(f"RichProgressBar: refresh_seconds must be > 0 or None, got {refresh_seconds!r}")
        try:
            import rich.progress  # noqa: F401 - is it there?
        except ImportError as error:
            raise ImportError(f"RichProgressBar needs the package rich ({error}): pip install rich") from error
        self.refresh_seconds = refresh_seconds

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        run = trainer.run
        if run is None or not trainer.is_global_zero:
            return
        if run.progress is None:
            run.progress = make_progress(trainer.global_step, trainer.config.total_steps(trainer.num_training_batches))
        if self.refresh_seconds is not None and isinstance(run.progress, (PlainProgress, RichProgress)):
            run.progress.interval = self.refresh_seconds
            run.progress.next_draw = perf_counter() + self.refresh_seconds
