"""pytrain.Trainer: the training loop. `_train_epoch` is the whole step, on one page."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pytrain.amp import name_of
from pytrain.callbacks.hooks import Hooks
from pytrain.callbacks.progress import format_metrics
from pytrain.ema import EMA
from pytrain.launch import Maker, Stops, StrategyName, Team, open_team, start_ranks, watch
from pytrain.lightning import refuse_arguments
from pytrain.shares import share_val
from pytrain.steps import StepInfo
from pytrain.trainer.checkpoint import load_checkpoint, write_checkpoint
from pytrain.trainer.config import Accelerator, ClipAlgorithm, Limit, Precision, TrainerConfig
from pytrain.trainer.data import DataModule, check_loader, no_batch_message, open_data
from pytrain.trainer.module import Module, loss_of
from pytrain.trainer.precision import PRECISIONS
from pytrain.trainer.run import Run
from pytrain.trainer.validation import evaluate, predict

MAX_SKIPS_IN_A_ROW = 64  # as LossScaler has it
MOST_PENDING = 1024  # steps that were queued on a device and of which the host does not know yet: each holds some bytes


class Trainer:
    """Runs the training loop of a `Module`.

    Args:
        max_epochs: stop after this many epochs, >= 1; None or -1: no limit.
        max_steps: stop after this many applied optimizer steps, >= 1; None or -1: no limit.
        max_time: stop after this time of one `fit`: "days:hours:minutes:seconds", a timedelta, its arguments as a dict,
            or seconds > 0. One of the three limits is needed.
        accelerator: "cpu"; "cuda" or "gpu"; "auto": CUDA where there is some, else where the module is.
        devices: ranks on this node; N > 1 outside of torchrun starts them itself, by running the program again. "auto":
            as many as torchrun has started, else one.
        num_nodes: nodes; several need torchrun on each.
        strategy: "auto" is "ddp" where there is more than one rank (torchrun or `devices` have started several, or
            torch.distributed is initialized), else "single": this process alone. "ddp", "zero1" and "zero2" are those
            of `pytrain.parallel`, also on one rank; others, or with options, by a callable (module, optimizer) ->
            Strategy.
        precision: "32"; "bf16-mixed" (autocast) or "fp16-mixed" (autocast and a loss scale); "bf16-true" or "fp16-true"
            (parameters and batches in it; the optimizer keeps masters or rounds stochastically). On any device.
        accumulate_grad_batches: micro-batches a step, >= 1, or {first epoch: micro-batches}; the last, shorter window
            of an epoch divides by its own length.
        gradient_clip_val: limit for the unscaled gradient, > 0; None: no clipping.
        gradient_clip_algorithm: "norm" (of all gradients together) or "value" (of each element).
        limit_train_batches, limit_val_batches, limit_test_batches, limit_predict_batches: batches to take of a loader:
            an int, or a float in [0, 1], the share; None: all.
        overfit_batches: train on so many first batches (or that share), again and again, and validate on them; 0: off.
        fast_dev_run: try so many batches of every loop (True: one); nothing is saved or logged.
        val_check_interval: validate also every so many batches (int), or at this share of the epoch (float); None: at
            epochs' ends only.
        check_val_every_n_epoch: validate in every n-th epoch only.
        log_every_n_steps: applied steps between two lines of metrics, >= 1; an epoch's last step is written too.
        callbacks: objects with hooks; see `pytrain.callbacks`.
        logger: True: JSON lines in `default_root_dir`; False: nothing is written; or one or several loggers, see
            `pytrain.loggers`.
        deterministic: True: torch uses deterministic algorithms only; "warn": where it has them; None: as it is set.
        seed: seeds torch, python and numpy when `fit` starts anew, 0 to 2**32 - 1, the same on all ranks until there
            is an optimizer and differently from there on; None: they are left alone.
        default_root_dir: folder of `metrics.jsonl` and `checkpoints/`; it is an attribute too.
        enable_progress_bar: show a bar (plain lines where stdout is not a terminal).
        enable_checkpointing: save after every epoch and at the end, and stop at SIGTERM and SIGUSR1 with a checkpoint
            and the exit code 143.
        checkpoint_every_n_steps: save also every so many applied steps, >= 1; None: do not.
        keep_checkpoints: how many automatic checkpoints of a run stay, >= 1; None: all.
        async_checkpoints: write automatic checkpoints in the background, of a copy in the CPU's memory.
        ema_decay: keep an exponential moving average of the parameters, with this decay in [0, 1), and validate with
            it; None: no average.

    Attributes:
        current_epoch: the epoch under way, from 0.
        global_step: optimizer steps applied.
        batch_idx: batches of this epoch done.
        skipped_steps: steps that met an inf or nan and changed nothing.
        callback_metrics: the last written training metrics and validation metrics.
        max_epochs, max_steps: the limits; None: there is none.
        should_stop: set it to True to have the run end after the step under way.
        ema: the averages (`pytrain.ema.EMA`) of the last `fit`, or None. `with trainer.ema.swap():` puts them into the
            module, `trainer.ema.copy_to(module)` for good.

    Raises:
        ValueError: an argument is out of its range.
        TypeError: there is no such argument; the message names the alternative to those of Lightning's.
    """

    def __init__(
        self,
        *,
        max_epochs: int | None = None,
        max_steps: int | None = None,
        max_time: Any = None,
        accelerator: Accelerator = "auto",
        devices: int | Literal["auto"] = "auto",
        num_nodes: int = 1,
        strategy: StrategyName | Maker = "auto",
        precision: Precision = "32",
        accumulate_grad_batches: int | Mapping[int, int] = 1,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: ClipAlgorithm = "norm",
        limit_train_batches: Limit = None,
        limit_val_batches: Limit = None,
        limit_test_batches: Limit = None,
        limit_predict_batches: Limit = None,
        overfit_batches: int | float = 0,
        fast_dev_run: int | bool = False,
        val_check_interval: int | float | None = None,
        check_val_every_n_epoch: int = 1,
        log_every_n_steps: int = 50,
        callbacks: Any = None,
        logger: Any = True,
        deterministic: bool | Literal["warn"] | None = None,
        seed: int | None = None,
        default_root_dir: str | os.PathLike[str] = "pytrain_logs",
        enable_progress_bar: bool = True,
        enable_checkpointing: bool = True,
        checkpoint_every_n_steps: int | None = None,
        keep_checkpoints: int | None = 2,
        async_checkpoints: bool = False,
        ema_decay: float | None = None,
        **not_offered: Any,
    ) -> None:
        refuse_arguments(not_offered)
        self.config = TrainerConfig.of({name: value for name, value in locals().items() if name != "self"})
        self.callbacks: Sequence[Any] = self.config.callbacks
        self.max_epochs, self.max_steps, self.should_stop = self.config.max_epochs, self.config.max_steps, False
        self.default_root_dir: Path = self.config.default_root_dir
        self.ema: EMA | None = None
        self.callback_metrics: dict[str, float] = {}
        self.run: Run | None = None
        self.begin()

    # ---- what a user calls --------------------------------------------------------------------------------------

    def fit(
        self,
        module: Module,
        train_dataloaders: Iterable[Any] | DataModule | None = None,
        val_dataloaders: Any = None,
        datamodule: DataModule | None = None,
        *,
        ckpt_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Train `module` until max_epochs, max_steps or max_time, from the start or from a checkpoint.

        Args:
            module: trained in place, on `accelerator`; also one that torch.compile has wrapped.
            train_dataloaders: an iterable of batches that can be iterated once an epoch. On several ranks a DataLoader
                with torch's own samplers is shared out; what any other gives is this rank's part. None: what the data
                module's, else the module's `train_dataloader()` returns.
            val_dataloaders: batches for `validation_step`, or a list of several DataLoaders; None: as above.
            datamodule: makes the loaders.
            ckpt_path: a checkpoint to go on from, bit for bit; "last" is the newest whole one in `default_root_dir` and
                the folders of ModelCheckpoints, or a fresh start where there is none.

        Raises:
            TypeError, ValueError: module or loaders are unfit, or the module's methods return unfit values.
            NotImplementedError: the module has several optimizers and does not step them itself, or lacks a method.
            CheckpointError: the checkpoint (of the last ones: each) is damaged, or it does not fit; or one could not be
                written in the background.
            RuntimeError: the ranks' models, settings, checkpoints or numbers of batches differ; see `pytrain.parallel`.
            FloatingPointError: 64 steps in a row met an inf or nan, the last at the lowest loss scale if there is one.
            SystemExit: a signal has stopped the run, and a checkpoint is written.
        """
        config, self.should_stop = self.config, False
        module, compiled, device = self._open("fit", module)
        given = {"train_dataloader": train_dataloaders, "val_dataloader": val_dataloaders}
        with (
            open_team(config.strategy, device) as team,
            watch(self, max_time=config.max_time, signals=config.enable_checkpointing) as stops,
        ):
            team.check_alike("the Trainer's configuration", config.alike())
            loaders = self._loaders("fit", team, module, given, datamodule)
            check_loader("fit: train_dataloaders", loaders[0])
            if loaders[1] is not None:
                check_loader("fit: val_dataloaders", loaders[1])
                kind = type(module)
                if kind.validation_step is Module.validation_step:
                    raise ValueError(f"fit: val_dataloaders is given, but {kind.__name__} has no validation_step")
            run, status = Run(self, team, module, compiled, loaders, device, ckpt_path), "failed"
            try:
                run.hooks.call("on_fit_start")
                while not (stops.leave or self._finished(run)):
                    epoch_complete = self._train_epoch(run, stops)
                    if not stops.leave:
                        metrics = self._validate(run)
                        if epoch_complete:
                            self._end_epoch(run, metrics)
                    if config.enable_checkpointing:
                        self._save(run)
                stops.obey(team, run.checkpoints.wait, self.global_step)
                run.hooks.call("on_fit_end")
                run.let_go()
                status = "success"
            except BaseException as error:
                run.hooks.call("on_exception", error)
                raise
            finally:
                run.close(status)

    def validate(
        self, module: Module, dataloaders: Any = None, datamodule: DataModule | None = None, *, ckpt_path: Any = None
    ) -> list[dict[str, float]]:
        """Run `validation_step` over loaders; return, in a list, the metrics' means, and show them.

        Args:
            module: evaluated with its own weights, or those of `ckpt_path`.
            dataloaders: one loader, or a list of DataLoaders; None: the data module's or module's `val_dataloader()`.
            datamodule: makes the loader.
            ckpt_path: a checkpoint whose weights to take.
        """
        return self._evaluate("val", "validation_step", module, dataloaders, datamodule, ckpt_path)

    def test(
        self, module: Module, dataloaders: Any = None, datamodule: DataModule | None = None, *, ckpt_path: Any = None
    ) -> list[dict[str, float]]:
        """As `validate`, with `test_step` and `test_dataloader()`."""
        return self._evaluate("test", "test_step", module, dataloaders, datamodule, ckpt_path)

    def predict(
        self, module: Module, dataloaders: Any = None, datamodule: DataModule | None = None, *, ckpt_path: Any = None
    ) -> list[Any]:
        """Return what `predict_step` gives for every batch; on several ranks those of this rank's part."""
        found: list[Any] = self._evaluate("predict", "predict_step", module, dataloaders, datamodule, ckpt_path)
        return found

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the state of the run, from which `fit(..., ckpt_path=path)` goes on bit for bit.

        Rank 0 writes; all ranks must call this.

        Args:
            path: the file; replaced atomically where it exists.

        Raises:
            RuntimeError: nothing was trained yet, or a step is under way (half of it cannot be saved).
            CheckpointError: some state cannot be read back safely.
        """
        if self.run is None:
            raise RuntimeError("save_checkpoint: there is nothing to save before fit")
        state = self.run.state()
        if self.run.team.rank == 0:
            write_checkpoint(path, state)

    # ---- where the run stands -----------------------------------------------------------------------------------

    @property
    def global_step(self) -> int:
        """Optimizer steps applied. On a device this waits for what was queued there."""
        if self._pending and self.run is not None:
            self._settle(self.run)
        return self._steps

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those of the last `fit`."""
        return [] if self.run is None else [setup.optimizer for setup in self.run.setups]

    @property
    def schedulers(self) -> list[LRScheduler]:
        """Those of the last `fit`."""
        return [] if self.run is None else [one.scheduler for one in self.run.setups if one.scheduler is not None]

    @property
    def loggers(self) -> list[Any]:
        """Those of the last `fit`; none but on rank 0."""
        return [] if self.run is None else self.run.loggers

    @property
    def global_rank(self) -> int:
        """This process's rank."""
        return 0 if self.run is None else self.run.team.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return 1 if self.run is None else self.run.team.size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is the rank that writes."""
        return self.global_rank == 0

    @property
    def num_training_batches(self) -> int | None:
        """Batches an epoch; None: unknown."""
        return None if self.run is None else self.run.length

    @property
    def estimated_stepping_batches(self) -> int | None:
        """Optimizer steps that the run will take if none is skipped; None: unknown. For schedules."""
        return self.config.total_steps(self.num_training_batches)

    def begin(self, saved: Mapping[str, Any] | None = None) -> None:
        """Stand at the start, or where a checkpoint says."""
        self._pending: list[StepInfo] = []  # steps of which the host does not know yet whether they were applied
        self._steps: int = 0 if saved is None else saved["global_step"]
        self.current_epoch: int = 0 if saved is None else saved["epoch"]
        self.batch_idx: int = 0 if saved is None else saved["batch_idx"]
        self.skipped_steps: int = 0 if saved is None else saved["skipped_steps"]
        self.callback_metrics = {} if saved is None else dict(saved["callback_metrics"])

    # ---- the loop -----------------------------------------------------------------------------------------------

    def _finished(self, run: Run) -> bool:
        config = self.config
        if self.global_step >= (config.max_steps or math.inf) or self.current_epoch >= (config.max_epochs or math.inf):
            return True
        return config.limit_train_batches == 0 or any(run.team.gather(self.should_stop))

    def _train_epoch(self, run: Run, stops: Stops) -> bool:
        """Train through the rest of an epoch, or up to a limit. Return whether the epoch came to its end."""
        scaler, strategy, manual, log, max_steps = run.scaler, run.strategy, run.manual, run.log, self.config.max_steps
        starts, ends = run.batch_hooks("on_train_batch_start"), run.batch_hooks("on_train_batch_end")
        accumulate = 1 if manual is not None else self.config.accumulate_in(self.current_epoch)
        weighs, optimizer, several = strategy.weight, run.setups[0].optimizer, run.team.ranks is not None
        training_step, options = run.training_step(), run.step_options()
        own_zero_grad = type(optimizer).zero_grad is not Optimizer.zero_grad
        run.open_batches(accumulate)
        first, micro, loss, stopped = self.batch_idx, 1, run.loss, False

        while self._steps != max_steps and not stopped:
            # One window: the gradients of up to `accumulate` micro-batches, summed up, with the last also over ranks.
            run.inside_window = True
            micro, total = 0, 0.0
            if manual is not None:
                manual.open()
            elif own_zero_grad:
                optimizer.zero_grad(set_to_none=True)
            else:  # torch's, without what it costs
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = None
            for batch, last in islice(run.batches, accumulate):
                for hook in starts:
                    hook(batch, self.batch_idx + micro)
                log.batch = batch
                output = training_step(batch, self.batch_idx + micro)
                part, weight = (output, 1) if type(output) is Tensor else loss_of(output, manual=manual is not None)
                part = part if weight == 1 else part * weight
                if manual is None:
                    scaled = part if scaler is None else scaler.scale(part)
                    if last:
                        scaled.backward()  # type: ignore[no-untyped-call]
                    else:
                        with strategy.accumulate(last=False):
                            scaled.backward()  # type: ignore[no-untyped-call]
                for hook in ends:
                    hook(output, batch, self.batch_idx + micro)
                loss = part.detach() if micro == 0 else loss + part.detach()
                micro, total = micro + 1, total + weight
            if micro == 0:
                break

            # One step: check, unscale, divide and clip the gradients; parameters, averages, loss scale, schedule. A
            # skipped step is no step: besides the loss scale nothing moves, neither the schedule nor the step count.
            if manual is None:
                options[weighs] = total
                if several:
                    options["stop"] = self.should_stop
                step = strategy.step(scaler, **options)
            else:
                step = manual.close()
            self.batch_idx += micro
            run.inside_window = False
            self._after_step(run, step, loss, total, micro)
            stopped = strategy.stop if several else self.should_stop

        run.inside_window = False
        if manual is not None:
            manual.close()  # the window that found no more batches
        self.should_stop = stopped or self.should_stop
        stops.agree(run.team)
        if self.batch_idx == 0 and not stopped:
            raise ValueError(no_batch_message("train_dataloaders", run.train_loader))
        if self.batch_idx > first:
            self._draw(run)
            # A run that a signal stops goes on later, and is to have no line more than others.
            if self.batch_idx != run.length and not stops.leave and self.global_step % self.config.log_every_n_steps:
                self._log(run)
        return micro == 0 or self.batch_idx == run.length

    def _after_step(self, run: Run, step: StepInfo | None, loss: Tensor, total: float, micro: int) -> None:
        """Count a step of `micro` batches, and do what is due after it: metrics, validation, hooks, a checkpoint."""
        config, run.loss, run.total, run.step = self.config, loss, total, step
        applied = False
        if step is not None and run.remote:
            applied = self._ask_later(run, step)
        elif step is not None:
            skipped = run.manual is None and getattr(run.setups[0].optimizer, "step_was_skipped", False)
            applied = self._count(run, step, not skipped and (run.tells or bool(step.applied)))
        if applied and run.seldom is not None and self._steps % run.setups[0].frequency == 0:
            run.seldom.step()
        last = self.batch_idx == run.length and self.global_step % config.log_every_n_steps != 0
        if last or (applied and self._steps % config.log_every_n_steps == 0):
            self._log(run)
        if (every := run.validate_every) is not None and self.batch_idx // every > (self.batch_idx - micro) // every:
            self._validate(run)
        for hook in run.hooks["on_train_step_end"] if step is not None else ():
            hook(step)
        if applied and config.checkpoint_every_n_steps and self._steps % config.checkpoint_every_n_steps == 0:
            self._save(run)
        if run.progress is not None and perf_counter() >= run.progress.next_draw:
            self._draw(run)

    def _count(self, run: Run, step: StepInfo, applied: bool) -> bool:
        """Count a step, of which the host knows whether it was applied; return that."""
        if applied:
            self._steps += 1
            run.skipped_in_a_row = 0
            return True
        self.skipped_steps += 1
        run.skipped_in_a_row += 1
        if run.skipped_in_a_row >= MAX_SKIPS_IN_A_ROW and run.scaler is None:
            where = name_of(run.setups[0].optimizer, int(step.first_bad)) if step.first_bad >= 0 else "unknown"
            raise FloatingPointError(
                f"{run.skipped_in_a_row} steps in a row met an inf or nan: the loss or the model itself is not finite "
                f"(epoch {self.current_epoch}, batch {self.batch_idx - 1}, first bad gradient: {where})"
            )
        return False

    def _ask_later(self, run: Run, step: StepInfo) -> bool:
        """Count on a step, and ask the device only where something hangs on the count; return whether it was applied.

        The count is never too low, and exact whenever it reaches what something hangs on: it asks then.
        """
        config = self.config
        self._pending.append(step)
        self._steps += 1
        marks = (config.log_every_n_steps, config.checkpoint_every_n_steps, run.seldom and run.setups[0].frequency)
        due = self._steps == config.max_steps or len(self._pending) == MOST_PENDING
        if not due and not any(mark and self._steps % mark == 0 for mark in marks):
            return False
        return self._settle(run)

    def _settle(self, run: Run) -> bool:
        """Ask the device which of the steps it was given were applied; return whether the last was."""
        pending, self._pending = self._pending, []
        self._steps -= len(pending)
        flags = torch.stack([step.applied for step in pending]).tolist()
        return [self._count(run, step, applied) for step, applied in zip(pending, flags, strict=True)][-1]

    def _draw(self, run: Run) -> None:
        if run.progress is not None:
            metrics = ({"loss": run.mean_loss()} if run.total else {}) | run.log.shown()
            run.progress.draw(epoch=self.current_epoch, step=self.global_step, metrics=metrics)

    def _log(self, run: Run) -> None:
        """Write the metrics of the window just done. Besides progress, the only place that waits for the device.

        The loss and what asks for it are means over the ranks, all else rank 0's.
        """
        step, logged = run.step, run.log.read(run.team, run.mean_loss(), run.total)
        metrics = {"loss": logged.pop("loss")} if "loss" in logged else {}  # manual optimization may return none
        metrics["lr"] = float(run.setups[0].optimizer.param_groups[0]["lr"])
        if step is not None and self.config.gradient_clip_algorithm == "norm" and self.config.gradient_clip_val:
            metrics["grad_norm"] = step.grad_norm.item()
        if run.scaler is not None:
            metrics["loss_scale"] = run.scaler.get_scale()
        metrics["skipped_steps"] = self.skipped_steps
        metrics["seconds"] = round(perf_counter() - run.started, 3)
        self._write(run, metrics | logged)

    def _write(self, run: Run, metrics: dict[str, float]) -> None:
        """Give a line of metrics to callbacks and loggers."""
        run.hooks.call("log_metrics", metrics)
        known = metrics | run.log.by_plain_name(metrics)
        self.callback_metrics.update({name: value for name, value in known.items() if name != "seconds"})
        if run.loggers:
            shown = run.log.for_loggers(metrics)
            for logger in run.loggers:
                logger.log_metrics(shown, self.global_step, self.current_epoch)

    def _validate(self, run: Run) -> dict[str, float]:
        """Validate, where there is a validation loader; write, show and return the metrics."""
        config, place = self.config, (self.current_epoch, self.batch_idx)
        off = (self.current_epoch + 1) % config.check_val_every_n_epoch != 0 or config.limit_val_batches == 0
        if run.val_loader is None or off or run.validated_at == place:
            return {}
        run.strategy.send_buffers()
        with self.ema.swap() if self.ema is not None and self.ema.n_averaged else nullcontext():
            metrics = evaluate(
                run.module, run.wrap("validation_step"), run.val_loader, run.device, run.team,
                dtype=run.mode.dtype, limit=config.limit_val_batches, hooks=run.hooks,
            )  # fmt: skip
        self._write(run, metrics)
        if run.progress is not None:
            run.progress.message(f"epoch {self.current_epoch + 1}  validation  {format_metrics(metrics)}")
        run.validated_at = place  # a checkpoint that a callback takes now has it all
        run.hooks.call("on_validation_epoch_end")
        return metrics

    def _end_epoch(self, run: Run, metrics: dict[str, float]) -> None:
        """Write the epoch's means, advance schedules that count epochs, then the epoch."""
        if not run.epoch_ended:
            run.log.take()
            run.hooks.call_own("on_train_epoch_end")
            means = run.log.close_epoch(run.team)
            if means:
                self._write(run, means)
            run.epoch_ended = True  # a checkpoint that a callback takes now has it all
            run.hooks.call("on_train_epoch_end")
        for setup in run.setups:
            scheduler = setup.scheduler
            due = (self.current_epoch + 1) % setup.frequency == 0 and run.manual is None
            if isinstance(scheduler, ReduceLROnPlateau) and setup.monitor is not None and due:
                found = metrics or self.callback_metrics
                if setup.monitor not in found:
                    raise ValueError(f"monitor {setup.monitor!r} is not among the validation metrics {list(metrics)}")
                scheduler.step(found[setup.monitor])
            elif scheduler is not None and setup.interval == "epoch" and due:
                scheduler.step()
        self.current_epoch += 1
        self.batch_idx, run.epoch_ended = 0, False

    def _save(self, run: Run) -> Path | None:
        state = run.state()
        return run.checkpoints.save(self.global_step, state) if run.team.rank == 0 else None

    # ---- what all loops begin with ------------------------------------------------------------------------------

    def _open(self, method: str, module: Any) -> tuple[Module, Callable[..., Any] | None, torch.device]:
        """Check the module, start the ranks; return it, what torch.compile has made around it, and its device."""
        compiled, module = getattr(module, "dynamo_ctx", None), getattr(module, "_orig_mod", module)
        if not isinstance(module, Module):
            raise TypeError(f"{method}: module must be a pytrain.Module, got {type(module).__name__}")
        first = next(module.parameters(), None)
        if first is None:
            raise ValueError(f"{method}: module {type(module).__name__} has no parameters")
        if self.config.devices != "auto":
            start_ranks(self.config.devices, self.config.strategy)
        self.config.apply()
        module._trainer = self
        return module, compiled, self.config.device_for(first.device)

    def _loaders(
        self, stage: str, team: Team, module: Module, given: dict[str, Any], datamodule: DataModule | None
    ) -> list[Any]:
        """The loaders of a stage; a data module may stand in the place of the first."""
        first, loader = next(iter(given.items()))
        if isinstance(loader, DataModule) or (loader is not None and hasattr(loader, first)):
            given, datamodule = {**given, first: None}, loader
        owners = [owner for owner in (datamodule, module) if owner is not None]
        return open_data(team, stage, owners, given)

    def _evaluate(self, kind: str, method: str, module: Any, loader: Any, datamodule: Any, ckpt_path: Any) -> list[Any]:
        config, mode, stage = self.config, PRECISIONS[self.config.precision], "validate" if kind == "val" else kind
        module, compiled, device = self._open(stage, module)
        limit = getattr(config, f"limit_{kind}_batches")
        if kind != "predict" and getattr(type(module), method) is getattr(Module, method):
            raise ValueError(f"Trainer: {type(module).__name__} has no {method}")
        with open_team(config.strategy, device) as team:
            (loader,) = self._loaders(stage, team, module, {f"{kind}_dataloader": loader}, datamodule)
            check_loader(f"{stage}: dataloaders", loader)
            if ckpt_path is not None:
                module.load_state_dict(load_checkpoint(ckpt_path)["module"])
            module.to(device=device, dtype=mode.dtype)
            step = mode.wrap((compiled or (lambda own: own))(getattr(module, method)), device.type)
            shared = share_val(team, f"{kind}_dataloaders", loader)
            if kind == "predict":
                return predict(module, step, shared, device, mode.dtype, limit)
            hooks = Hooks(self, module, ()) if kind == "val" else None
            metrics = evaluate(
                module, step, shared, device, team, kind=kind, dtype=mode.dtype, limit=limit, hooks=hooks
            )
            if config.enable_progress_bar:
                team.say(f"{stage}  {format_metrics(metrics)}")
        return [metrics]
