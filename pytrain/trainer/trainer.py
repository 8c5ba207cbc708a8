"""pytrain.Trainer: the training loop. `_train_epoch` is the whole step, on one page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pytrain.amp import LossScaler, name_of
from pytrain.ema import EMA
from pytrain.steps import StepInfo
from pytrain.steps import step as pytrain_step
from pytrain.trainer.checkpoint import FORMAT, CheckpointFolder, check_fits, load_checkpoint, write_checkpoint
from pytrain.trainer.config import ClipAlgorithm, Precision, TrainerConfig
from pytrain.trainer.data import loader_length, no_batch_message, skip_batches, start_epoch
from pytrain.trainer.loggers import JsonLinesLogger
from pytrain.trainer.module import Module
from pytrain.trainer.optimizers import OptimizerSetup, check_release, read_optimizers
from pytrain.trainer.precision import PRECISIONS
from pytrain.trainer.progress import Progress, format_metrics, make_progress
from pytrain.trainer.rng import capture_rng, restore_rng, seed_all
from pytrain.trainer.validation import validate

MAX_SKIPS_IN_A_ROW = 64  # as LossScaler has it


@dataclass(slots=True, kw_only=True)
class _Run:
    """What one call of `fit` works with."""

    module: Module
    device: torch.device
    setup: OptimizerSetup
    scaler: LossScaler | None
    ema: EMA | None
    train_loader: Iterable[Any]
    val_loader: Iterable[Any] | None
    length: int | None
    checkpoints: CheckpointFolder
    logger: JsonLinesLogger
    progress: Progress | None
    started: float
    skipped_in_a_row: int
    epoch_rng: dict[str, Any] | None
    resume_rng: dict[str, Any] | None
    batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    inside_window: bool = False

    def close(self) -> None:
        """Let go of the terminal, the file and the loader's workers."""
        self.batches = iter(())
        for part in (self.progress, self.logger):
            if part is not None:
                part.close()


class Trainer:
    """Runs the training loop of a `Module`.

    Args:
        max_epochs: stop after this many epochs, >= 1; None: no limit.
        max_steps: stop after this many applied optimizer steps, >= 1; None: no limit. One of the two is needed.
        precision: "32", "bf16-mixed" (autocast) or "fp16-mixed" (autocast and a loss scale), on any device.
        accumulate_grad_batches: micro-batches a step, >= 1; the last, shorter window of an epoch divides by its own
            length.
        gradient_clip_val: limit for the unscaled gradient, > 0; None: no clipping.
        gradient_clip_algorithm: "norm" (of all gradients together) or "value" (of each element).
        seed: seeds torch, python and numpy when `fit` starts anew, 0 to 2**32 - 1; None: they are left alone.
        log_every_n_steps: applied steps between two lines of metrics, >= 1; an epoch's last step is written too.
        default_root_dir: folder of `metrics.jsonl` and `checkpoints/`.
        enable_progress_bar: show a bar (plain lines where stdout is not a terminal).
        enable_checkpointing: save after every epoch and at the end.
        checkpoint_every_n_steps: save also every so many applied steps, >= 1; None: do not.
        keep_checkpoints: how many automatic checkpoints of a run stay, >= 1; None: all.
        ema_decay: keep an exponential moving average of the parameters, with this decay in [0, 1), and validate with
            it; None: no average.

    Attributes:
        current_epoch: the epoch under way, from 0.
        global_step: optimizer steps applied.
        batch_idx: batches of this epoch done.
        skipped_steps: steps that met an inf or nan and changed nothing.
        ema: the averages (`pytrain.ema.EMA`) of the last `fit`, or None. `with trainer.ema.swap():` puts them into the
            module, `trainer.ema.copy_to(module)` for good.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        precision: Precision = "32",
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: ClipAlgorithm = "norm",
        seed: int | None = None,
        log_every_n_steps: int = 50,
        default_root_dir: str | os.PathLike[str] = "pytrain_logs",
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
        checkpoint_every_n_steps: int | None = None,
        keep_checkpoints: int | None = 2,
        ema_decay: float | None = None,
    ) -> None:
        self.config = TrainerConfig(
            max_epochs=max_epochs,
            max_steps=max_steps,
            precision=precision,
            accumulate_grad_batches=accumulate_grad_batches,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            seed=seed,
            log_every_n_steps=log_every_n_steps,
            default_root_dir=Path(default_root_dir),
            enable_progress_bar=enable_progress_bar,
            enable_checkpointing=enable_checkpointing,
            checkpoint_every_n_steps=checkpoint_every_n_steps,
            keep_checkpoints=keep_checkpoints,
            ema_decay=ema_decay,
        )
        self.current_epoch = self.global_step = self.batch_idx = self.skipped_steps = 0
        self.ema: EMA | None = None
        self._run: _Run | None = None

    def fit(
        self,
        module: Module,
        train_dataloader: Iterable[Any],
        val_dataloader: Iterable[Any] | None = None,
        *,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Train `module` until max_epochs or max_steps, from the start or from a checkpoint.

        Args:
            module: trained in place, on the device where its parameters are.
            train_dataloader: an iterable of batches that can be iterated once an epoch.
            val_dataloader: batches for `validation_step`, run after every epoch and at the end.
            ckpt_path: a checkpoint to go on from, bit for bit; "last" is the newest in `default_root_dir`, or a
                fresh start where there is none.

        Raises:
            TypeError, ValueError: module or loaders are unfit, or the module's methods return unfit values.
            NotImplementedError: the module has several optimizers, or lacks a method.
            CheckpointError: the checkpoint is damaged or does not fit.
            FloatingPointError: 64 steps in a row met an inf or nan, the last at the lowest loss scale if there is one.
        """
        run = self._run = self._start(module, train_dataloader, val_dataloader, ckpt_path)
        try:
            while not self._finished():
                epoch_complete = self._train_epoch(run)
                metrics = self._validate(run)
                if epoch_complete:
                    self._end_epoch(run, metrics)
                if self.config.enable_checkpointing:
                    run.checkpoints.save(self.global_step, self._state(run))
        finally:
            run.close()

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the state of the run, from which `fit(..., ckpt_path=path)` goes on bit for bit.

        Args:
            path: the file; replaced atomically where it exists.

        Raises:
            RuntimeError: nothing was trained yet, or a step is under way (half of it cannot be saved).
            CheckpointError: some state cannot be read back safely.
        """
        if self._run is None:
            raise RuntimeError("save_checkpoint: there is nothing to save before fit")
        write_checkpoint(path, self._state(self._run))

    def _finished(self) -> bool:
        config = self.config
        return config.max_steps == self.global_step or config.max_epochs == self.current_epoch

    def _train_epoch(self, run: _Run) -> bool:
        """Train through the rest of an epoch, or up to max_steps. Return whether the epoch came to its end."""
        config, scaler, optimizer, progress = self.config, run.scaler, run.setup.optimizer, run.progress
        accumulate, length, save_every = config.accumulate_grad_batches, run.length, config.checkpoint_every_n_steps
        training_step = PRECISIONS[config.precision].wrap(run.module.training_step, run.device.type)
        clip = _clip_arguments(config.gradient_clip_val, config.gradient_clip_algorithm)
        schedule = run.setup.scheduler if run.setup.interval == "step" else None
        self._open_batches(run)
        first, micro, loss, step = self.batch_idx, 1, torch.zeros(()), None

        while self.global_step != config.max_steps:
            # One window: the gradients of up to `accumulate` micro-batches, summed up.
            run.inside_window = True
            optimizer.zero_grad(set_to_none=True)
            micro = 0
            for batch in islice(run.batches, accumulate):
                output = training_step(batch, self.batch_idx + micro)
                part = output if type(output) is Tensor else _loss_of(output)
                (part if scaler is None else scaler.scale(part)).backward()  # type: ignore[no-untyped-call]
                loss = part.detach() if micro == 0 else loss + part.detach()
                micro += 1
            if micro == 0:
                run.inside_window = False
                break
            loss = loss / micro

            # One step: check, unscale, divide and clip the gradients; parameters, averages, loss scale, schedule. A
            # skipped step is no step: besides the loss scale nothing moves, neither the schedule nor the step count.
            step = pytrain_step(optimizer, scaler, grad_divisor=micro, schedule=schedule, ema=run.ema, **clip)
            self.batch_idx += micro
            run.inside_window = False
            if not step.applied or getattr(optimizer, "step_was_skipped", False):
                self._count_skip(run, step)
            else:
                self.global_step += 1
                run.skipped_in_a_row = 0
                if self.global_step % config.log_every_n_steps == 0:
                    self._log(run, loss, step)
                if save_every is not None and self.global_step % save_every == 0:
                    run.checkpoints.save(self.global_step, self._state(run))
            if progress is not None and perf_counter() >= progress.next_draw:
                progress.draw(epoch=self.current_epoch, step=self.global_step, loss=loss.item())

        if self.batch_idx == 0:
            raise ValueError(no_batch_message("train_dataloader", run.train_loader))
        if self.batch_idx > first:
            if self.global_step % config.log_every_n_steps != 0:
                self._log(run, loss, step)
            if progress is not None:
                progress.draw(epoch=self.current_epoch, step=self.global_step, loss=loss.item())
        return micro == 0 or self.batch_idx == length

    def _open_batches(self, run: _Run) -> None:
        """Start the epoch's batches; in a resumed epoch, draw and drop those already trained on."""
        loader = run.train_loader
        if self.batch_idx > 0 and run.epoch_rng is not None and run.resume_rng is not None:
            # Their order follows from the random states at the epoch's start, which the checkpoint holds.
            restore_rng(run.epoch_rng, loader)
            run.batches = start_epoch(loader, self.current_epoch, run.device)
            skip_batches(run.batches, self.batch_idx)
            restore_rng(run.resume_rng, loader)
        else:
            run.epoch_rng = capture_rng(run.device, loader)
            run.batches = start_epoch(loader, self.current_epoch, run.device)

    def _count_skip(self, run: _Run, step: StepInfo) -> None:
        self.skipped_steps += 1
        run.skipped_in_a_row += 1
        if run.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW and run.scaler is None:
            where = name_of(run.setup.optimizer, int(step.first_bad)) if step.first_bad >= 0 else "unknown"
            raise FloatingPointError(
                f"{run.skipped_in_a_row} steps in a row met an inf or nan: the loss or the model itself is not finite "
                f"(epoch {self.current_epoch}, batch {self.batch_idx - 1}, first bad gradient: {where})"
            )

    def _log(self, run: _Run, loss: Tensor, step: StepInfo | None) -> None:
        """Write the metrics of the window just done. Besides progress, the only place that waits for the device."""
        metrics = {"loss": loss.item(), "lr": float(run.setup.optimizer.param_groups[0]["lr"])}
        if step is not None and self.config.gradient_clip_algorithm == "norm" and self.config.gradient_clip_val:
            metrics["grad_norm"] = step.grad_norm.item()
        if run.scaler is not None:
            metrics["loss_scale"] = run.scaler.get_scale()
        metrics["skipped_steps"] = self.skipped_steps
        metrics["seconds"] = round(perf_counter() - run.started, 3)
        for name, value in run.module.take_logged().items():
            metrics[name] = value.item() if isinstance(value, Tensor) else value
        run.logger.log(epoch=self.current_epoch, step=self.global_step, metrics=metrics)

    def _validate(self, run: _Run) -> dict[str, float]:
        """Validate, where there is a validation loader; write, show and return the metrics."""
        if run.val_loader is None:
            return {}
        step = PRECISIONS[self.config.precision].wrap(run.module.validation_step, run.device.type)
        with run.ema.swap() if run.ema is not None and run.ema.n_averaged else nullcontext():
            metrics = validate(run.module, step, run.val_loader, run.device)
        run.logger.log(epoch=self.current_epoch, step=self.global_step, metrics=metrics)
        if run.progress is not None:
            run.progress.message(f"epoch {self.current_epoch + 1}  validation  {format_metrics(metrics)}")
        return metrics

    def _end_epoch(self, run: _Run, metrics: dict[str, float]) -> None:
        """Advance a schedule that counts epochs, then the epoch."""
        scheduler, monitor = run.setup.scheduler, run.setup.monitor
        if isinstance(scheduler, ReduceLROnPlateau) and monitor is not None:
            if monitor not in metrics:
                raise ValueError(
                    f"configure_optimizers: monitor {monitor!r} is not among the validation metrics {list(metrics)}"
                )
            scheduler.step(metrics[monitor])
        elif scheduler is not None and run.setup.interval == "epoch":
            scheduler.step()
        self.current_epoch += 1
        self.batch_idx = 0

    def _start(
        self,
        module: Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        ckpt_path: str | os.PathLike[str] | None,
    ) -> _Run:
        """Check what `fit` was given and build the run, fresh or from a checkpoint."""
        config = self.config
        device = _check_fit(module, train_loader, val_loader)
        checkpoints = CheckpointFolder(config.checkpoint_dir, config.keep_checkpoints)
        path = checkpoints.newest() if ckpt_path == "last" else ckpt_path
        saved = None if path is None else load_checkpoint(path)
        if saved is None and config.seed is not None:
            seed_all(config.seed)
        setup = read_optimizers(module.configure_optimizers())
        check_release(setup.optimizer, config)
        scaler = PRECISIONS[config.precision].make_scaler()
        self.ema = None if config.ema_decay is None else EMA(module, config.ema_decay)
        if not module.training:
            module.train()
        if saved is None or path is None:
            self.current_epoch = self.global_step = self.batch_idx = self.skipped_steps = 0
        else:
            check_fits(path, saved, module=module, setup=setup, precision=config.precision, scaler=scaler, ema=self.ema)
            self._restore(saved, module, setup, scaler)
            checkpoints.adopt(Path(path))
            restore_rng(saved["rng"], train_loader)
        length = loader_length(train_loader)
        total = _total_steps(config, length)
        return _Run(
            module=module,
            device=device,
            setup=setup,
            scaler=scaler,
            ema=self.ema,
            train_loader=train_loader,
            val_loader=val_loader,
            length=length,
            checkpoints=checkpoints,
            logger=JsonLinesLogger(config.metrics_path, keep_lines=None if saved is None else saved["metrics_lines"]),
            progress=make_progress(self.global_step, total) if config.enable_progress_bar else None,
            started=perf_counter(),
            skipped_in_a_row=0 if saved is None else saved["skipped_in_a_row"],
            epoch_rng=None if saved is None else saved["epoch_rng"],
            resume_rng=None if saved is None else saved["rng"],
        )

    def _state(self, run: _Run) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        if run.inside_window:
            raise RuntimeError("a checkpoint can only be taken between optimizer steps, and one is under way")
        scheduler, scaler = run.setup.scheduler, run.scaler
        return {
            "format": FORMAT,
            "precision": self.config.precision,
            "module": run.module.state_dict(),
            "optimizer": run.setup.optimizer.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if run.ema is None else run.ema.state_dict(),
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "batch_idx": self.batch_idx,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": run.skipped_in_a_row,
            "metrics_lines": run.logger.lines,
            "rng": capture_rng(run.device, run.train_loader),
            "epoch_rng": run.epoch_rng,
        }

    def _restore(self, saved: dict[str, Any], module: Module, setup: OptimizerSetup, scaler: LossScaler | None) -> None:
        """Put back what `_state` returned, but for the random states."""
        module.load_state_dict(saved["module"])
        setup.optimizer.load_state_dict(saved["optimizer"])
        if setup.scheduler is not None:
            setup.scheduler.load_state_dict(saved["scheduler"])
        if scaler is not None:
            scaler.load_state_dict(saved["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(saved["ema"])
        self.current_epoch, self.global_step = saved["epoch"], saved["global_step"]
        self.batch_idx, self.skipped_steps = saved["batch_idx"], saved["skipped_steps"]


def _check_fit(module: Module, train_loader: Iterable[Any], val_loader: Iterable[Any] | None) -> torch.device:
    """Check the arguments of `fit`; return the device of the module."""
    if not isinstance(module, Module):
        raise TypeError(f"fit: module must be a pytrain.Module, got {type(module).__name__}")
    for name, loader in (("train_dataloader", train_loader), ("val_dataloader", val_loader)):
        if not hasattr(loader, "__iter__") and not (loader is None and name == "val_dataloader"):
            raise TypeError(f"fit: {name} must be an iterable of batches, got {type(loader).__name__}")
    if val_loader is not None and type(module).validation_step is Module.validation_step:
        raise ValueError(f"fit: val_dataloader is given, but {type(module).__name__} has no validation_step")
    first = next(module.parameters(), None)
    if first is None:
        raise ValueError(f"fit: module {type(module).__name__} has no parameters to train")
    return first.device


def _loss_of(output: Any) -> Tensor:
    """Return the loss in what training_step returned, where that was not a plain tensor."""
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        what = f"a dict with keys {list(output)}" if isinstance(output, dict) else type(output).__name__
        raise TypeError(f'training_step must return the loss, a tensor, or a dict with it as "loss"; got {what}')
    return loss


def _clip_arguments(value: float | None, algorithm: ClipAlgorithm) -> dict[str, Any]:
    """Return the arguments of `pytrain.step` that clip."""
    if value is None:
        return {}
    return {"max_norm": float(value)} if algorithm == "norm" else {"clip_value": float(value)}


def _total_steps(config: TrainerConfig, length: int | None) -> int | None:
    """Return the applied step at which the run will end, as far as it is known before."""
    limits = [] if config.max_steps is None else [config.max_steps]
    if config.max_epochs is not None and length is not None:
        limits.append(config.max_epochs * -(-length // config.accumulate_grad_batches))
    return min(limits, default=None)
