"""pytrain.Trainer: the training loop. `_train_epoch` is the whole step, on one page."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from pytrain.amp import LossScaler, name_of
from pytrain.ema import EMA
from pytrain.steps import StepInfo
from pytrain.trainer.checkpoint import FORMAT, CheckpointFolder, check_fits, load_checkpoint, write_checkpoint
from pytrain.trainer.config import ClipAlgorithm, Precision, TrainerConfig
from pytrain.trainer.data import loader_length, no_batch_message, share_out, skip_batches, start_epoch, with_ends
from pytrain.trainer.loggers import JsonLinesLogger
from pytrain.trainer.module import Module
from pytrain.trainer.optimizers import OptimizerSetup, check_release, read_optimizers
from pytrain.trainer.precision import PRECISIONS
from pytrain.trainer.progress import Progress, format_metrics, make_progress
from pytrain.trainer.ranks import Alone, Maker, StrategyName, Team, open_team
from pytrain.trainer.rng import capture_rng, order_seed, restore_ranks_rng, restore_rng, seed_all
from pytrain.trainer.validation import validate

if TYPE_CHECKING:
    from pytrain.parallel import Strategy

MAX_SKIPS_IN_A_ROW = 64  # as LossScaler has it


@dataclass(slots=True, kw_only=True)
class _Run:
    """What one call of `fit` works with."""

    module: Module
    device: torch.device
    team: Team
    strategy: Alone | Strategy
    setup: OptimizerSetup
    scaler: LossScaler | None
    ema: EMA | None
    train_loader: Iterable[Any]
    val_loader: Iterable[Any] | None
    length: int | None
    checkpoints: CheckpointFolder
    logger: JsonLinesLogger | None
    progress: Progress | None
    started: float
    skipped_in_a_row: int
    epoch_rng: dict[str, Any] | None
    resume_rng: dict[str, Any] | None
    data_seed: int
    batches: Iterator[tuple[Any, bool]] = field(default_factory=lambda: iter(()))
    inside_window: bool = False
    last_rng: list[Any] | None = None

    def random_states(self) -> list[tuple[Any, Any]]:
        """Every rank's random states now and at the epoch's start; after the run's end those that it had then."""
        if self.last_rng is not None:
            return self.last_rng
        return self.team.gather((capture_rng(self.device, self.train_loader), self.epoch_rng))

    def let_go(self) -> None:
        """The run has come to its end: the optimizer is whole again, and needs no other rank."""
        self.strategy.send_buffers()
        self.last_rng = self.random_states()
        self.strategy.close()
        self.strategy = Alone(self.setup.optimizer)

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
        strategy: "auto" is "ddp" where there is more than one rank (torchrun has started several, or
            torch.distributed is initialized), else "single": this process alone. "ddp", "zero1" and "zero2" are those
            of `pytrain.parallel`, also on one rank; others, or with options, by a callable (module, optimizer) ->
            Strategy.
        precision: "32", "bf16-mixed" (autocast) or "fp16-mixed" (autocast and a loss scale), on any device.
        accumulate_grad_batches: micro-batches a step, >= 1; the last, shorter window of an epoch divides by its own
            length.
        gradient_clip_val: limit for the unscaled gradient, > 0; None: no clipping.
        gradient_clip_algorithm: "norm" (of all gradients together) or "value" (of each element).
        seed: seeds torch, python and numpy when `fit` starts anew, 0 to 2**32 - 1, the same on all ranks until there
            is an optimizer and differently from there on; None: they are left alone.
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
        strategy: StrategyName | Maker = "auto",
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
            strategy=strategy,
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
            train_dataloader: an iterable of batches that can be iterated once an epoch. On several ranks a DataLoader
                with torch's own samplers is shared out; what any other gives is this rank's part.
            val_dataloader: batches for `validation_step`, run after every epoch and at the end.
            ckpt_path: a checkpoint to go on from, bit for bit; "last" is the newest in `default_root_dir`, or a
                fresh start where there is none.

        Raises:
            TypeError, ValueError: module or loaders are unfit, or the module's methods return unfit values.
            NotImplementedError: the module has several optimizers, or lacks a method.
            CheckpointError: the checkpoint is damaged or does not fit.
            RuntimeError: the ranks' models, settings, checkpoints or numbers of batches differ; see `pytrain.parallel`.
            FloatingPointError: 64 steps in a row met an inf or nan, the last at the lowest loss scale if there is one.
        """
        device = _check_fit(module, train_dataloader, val_dataloader)
        with open_team(self.config.strategy, device) as team:
            run = self._run = self._start(team, device, module, train_dataloader, val_dataloader, ckpt_path)
            try:
                while not self._finished():
                    epoch_complete = self._train_epoch(run)
                    metrics = self._validate(run)
                    if epoch_complete:
                        self._end_epoch(run, metrics)
                    if self.config.enable_checkpointing:
                        self._save(run)
                run.let_go()
            finally:
                run.close()

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write the state of the run, from which `fit(..., ckpt_path=path)` goes on bit for bit.

        Rank 0 writes; all ranks must call this.

        Args:
            path: the file; replaced atomically where it exists.

        Raises:
            RuntimeError: nothing was trained yet, or a step is under way (half of it cannot be saved).
            CheckpointError: some state cannot be read back safely.
        """
        if self._run is None:
            raise RuntimeError("save_checkpoint: there is nothing to save before fit")
        state = self._state(self._run)
        if self._run.team.rank == 0:
            write_checkpoint(path, state)

    def _save(self, run: _Run) -> None:
        state = self._state(run)
        if run.team.rank == 0:
            run.checkpoints.save(self.global_step, state)

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
        strategy, options = run.strategy, {"schedule": schedule, "ema": run.ema, **clip}
        weight = strategy.weight if isinstance(strategy, Alone) else "weight"
        self._open_batches(run)
        first, micro, loss, step = self.batch_idx, 1, torch.zeros(()), None

        while self.global_step != config.max_steps:
            # One window: the gradients of up to `accumulate` micro-batches, summed up, with the last also over ranks.
            run.inside_window = True
            optimizer.zero_grad(set_to_none=True)
            micro = 0
            for batch, last in islice(run.batches, accumulate):
                output = training_step(batch, self.batch_idx + micro)
                part = output if type(output) is Tensor else _loss_of(output)
                scaled = part if scaler is None else scaler.scale(part)
                if last:
                    scaled.backward()  # type: ignore[no-untyped-call]
                else:
                    with strategy.accumulate(last=False):
                        scaled.backward()  # type: ignore[no-untyped-call]
                loss = part.detach() if micro == 0 else loss + part.detach()
                micro += 1
            if micro == 0:
                run.inside_window = False
                break
            loss = loss / micro

            # One step: check, unscale, divide and clip the gradients; parameters, averages, loss scale, schedule. A
            # skipped step is no step: besides the loss scale nothing moves, neither the schedule nor the step count.
            options[weight] = micro
            step = strategy.step(scaler, **options)
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
                    self._save(run)
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
        loader, resumed = run.train_loader, self.batch_idx > 0
        if resumed and run.epoch_rng is not None:
            # Their order follows from the random states at the epoch's start, which the checkpoint holds.
            restore_rng(run.epoch_rng, loader)
        else:
            run.epoch_rng = capture_rng(run.device, loader)
        batches = start_epoch(loader, self.current_epoch, run.device)
        if resumed:
            skip_batches(batches, self.batch_idx)
            if run.resume_rng is not None:  # else the saved run had not this rank
                restore_rng(run.resume_rng, loader)
        if run.length is None and run.team.size > 1:
            batches = run.team.while_all_have(batches)
        ahead = self.config.accumulate_grad_batches if run.team.ranks is not None else 1
        run.batches = zip(batches, repeat(True)) if ahead == 1 else with_ends(batches, ahead)

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
        """Write the metrics of the window just done. Besides progress, the only place that waits for the device.

        The loss is the mean over the ranks, all else rank 0's.
        """
        logged, mean = run.module.take_logged(), run.team.mean(loss.item())
        if run.logger is None:
            return
        metrics = {"loss": mean, "lr": float(run.setup.optimizer.param_groups[0]["lr"])}
        if step is not None and self.config.gradient_clip_algorithm == "norm" and self.config.gradient_clip_val:
            metrics["grad_norm"] = step.grad_norm.item()
        if run.scaler is not None:
            metrics["loss_scale"] = run.scaler.get_scale()
        metrics["skipped_steps"] = self.skipped_steps
        metrics["seconds"] = round(perf_counter() - run.started, 3)
        for name, value in logged.items():
            metrics[name] = value.item() if isinstance(value, Tensor) else value
        run.logger.log(epoch=self.current_epoch, step=self.global_step, metrics=metrics)

    def _validate(self, run: _Run) -> dict[str, float]:
        """Validate, where there is a validation loader; write, show and return the metrics."""
        if run.val_loader is None:
            return {}
        step = PRECISIONS[self.config.precision].wrap(run.module.validation_step, run.device.type)
        run.strategy.send_buffers()
        with run.ema.swap() if run.ema is not None and run.ema.n_averaged else nullcontext():
            metrics = validate(run.module, step, run.val_loader, run.device, run.team)
        if run.logger is not None:
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
        team: Team,
        device: torch.device,
        module: Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None,
        ckpt_path: str | os.PathLike[str] | None,
    ) -> _Run:
        """Check what `fit` was given and build the run, fresh or from a checkpoint."""
        config = self.config
        team.check_alike("the Trainer's configuration", config.alike())
        checkpoints = CheckpointFolder(config.checkpoint_dir, config.keep_checkpoints)
        path = team.gather(checkpoints.newest() if ckpt_path == "last" else ckpt_path)[0]
        saved = None if path is None else load_checkpoint(path)
        if saved is None and config.seed is not None:
            seed_all(config.seed)
        setup = read_optimizers(module.configure_optimizers())
        check_release(setup.optimizer, config, team.name)
        scaler = PRECISIONS[config.precision].make_scaler()
        if saved is not None:
            average, precision = config.ema_decay, config.precision
            check_fits(path, saved, module=module, setup=setup, precision=precision, scaler=scaler, ema=average)
            team.check_alike("the checkpoint", [f"{key} {saved[key]}" for key in ("epoch", "global_step", "batch_idx")])
        seed = order_seed(train_loader, config.seed) if saved is None else saved["data_seed"]
        seed = team.gather(seed)[0]
        train_loader = share_out(team, "train_dataloader", train_loader, seed)
        val_loader = None if val_loader is None else share_out(team, "val_dataloader", val_loader, None)
        length = loader_length(train_loader)
        team.check_alike("the number of batches an epoch", ["unknown" if length is None else f"{length} batches"])
        strategy = team.strategy(module, setup.optimizer)
        self.ema = None if config.ema_decay is None else EMA(module, config.ema_decay)
        if not module.training:
            module.train()
        own_rng, epoch_rng = None, None
        if saved is None:
            self.current_epoch = self.global_step = self.batch_idx = self.skipped_steps = 0
            if config.seed is not None and team.rank > 0:
                seed_all(team.seed_of(config.seed))
        else:
            self._restore(saved, module, setup, scaler, strategy)
            checkpoints.adopt(Path(path))
            own_rng, epoch_rng = restore_ranks_rng(saved, team, train_loader)
        total, lines = config.total_steps(length), None if saved is None else saved["metrics_lines"]
        first = team.rank == 0
        return _Run(
            module=module,
            device=device,
            team=team,
            strategy=strategy,
            setup=setup,
            scaler=scaler,
            ema=self.ema,
            train_loader=train_loader,
            val_loader=val_loader,
            length=length,
            checkpoints=checkpoints,
            logger=JsonLinesLogger(config.metrics_path, keep_lines=lines) if first else None,
            progress=make_progress(self.global_step, total) if first and config.enable_progress_bar else None,
            started=perf_counter(),
            skipped_in_a_row=0 if saved is None else saved["skipped_in_a_row"],
            epoch_rng=epoch_rng,
            resume_rng=own_rng,
            data_seed=seed,
        )

    def _state(self, run: _Run) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        if run.inside_window:
            raise RuntimeError("a checkpoint can only be taken between optimizer steps, and one is under way")
        scheduler, scaler = run.setup.scheduler, run.scaler
        run.strategy.send_buffers()
        states = run.random_states()
        return {
            "format": FORMAT,
            "precision": self.config.precision,
            "module": run.module.state_dict(),
            "optimizer": run.strategy.state_dict(),
            "scheduler": None if scheduler is None else scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "ema": None if run.ema is None else run.ema.state_dict(),
            "epoch": self.current_epoch,
            "global_step": self.global_step,
            "batch_idx": self.batch_idx,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": run.skipped_in_a_row,
            "metrics_lines": 0 if run.logger is None else run.logger.lines,
            "rng": [now for now, _ in states],
            "epoch_rng": [start for _, start in states],
            "data_seed": run.data_seed,
        }

    def _restore(
        self,
        saved: dict[str, Any],
        module: Module,
        setup: OptimizerSetup,
        scaler: LossScaler | None,
        strategy: Alone | Strategy,
    ) -> None:
        """Put back what `_state` returned, but for the random states."""
        module.load_state_dict(saved["module"])
        strategy.load_state_dict(saved["optimizer"])
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
