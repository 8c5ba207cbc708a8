"""A run: what one call of `fit` works with, how it starts, fresh or from a checkpoint, and what of it is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from pytrain.backend import is_remote
from pytrain.callbacks.hooks import Hooks, key_of
from pytrain.callbacks.progress import Progress, make_progress
from pytrain.ema import EMA
from pytrain.launch import Alone, Team
from pytrain.loggers.jsonlines import JsonLinesLogger
from pytrain.rng import capture_rng, order_seed, restore_ranks_rng, restore_rng, seed_all
from pytrain.tbptt import InTime, in_parts
from pytrain.trainer.checkpoint import FORMAT, CheckpointFolder, check_fits, load_checkpoint
from pytrain.trainer.config import TrainerConfig, take_of
from pytrain.trainer.data import (
    loader_length,
    several,
    share_out,
    skip_batches,
    start_epoch,
    with_ends,
)
from pytrain.trainer.manual import Manual
from pytrain.trainer.module import Module
from pytrain.trainer.optimizers import check_release, read_optimizers
from pytrain.trainer.precision import PRECISIONS

if TYPE_CHECKING:
    from pytrain.parallel import Strategy
    from pytrain.steps import StepInfo
    from pytrain.trainer.trainer import Trainer


class Run:
    """What one call of `fit` works with.

    Args:
        trainer: whose run it is.
        team: the ranks.
        module: what is trained.
        compiled: what torch.compile has made around it; None: nothing.
        loaders: for training and for validation, or None.
        device: where.
        ckpt_path: the checkpoint to go on from; None: start anew.

    Attributes:
        length: batches an epoch; None: unknown.
        seldom: a schedule that advances at every so-manieth step only, which the trainer counts.
        loss, total, step: of the window just done: the sum of the weighted losses, and of the weights.
        validated_at: epoch and batch of the last validation.

    Raises:
        What `Trainer.fit` says.
    """

    def __init__(
        self,
        trainer: Trainer,
        team: Team,
        module: Module,
        compiled: Callable[..., Any] | None,
        loaders: Sequence[Any],
        device: torch.device,
        ckpt_path: str | os.PathLike[str] | None,
    ) -> None:
        config, self.mode = trainer.config, PRECISIONS[trainer.config.precision]
        self.trainer, self.team, self.module, self.compiled, self.device = trainer, team, module, compiled, device
        self.remote = is_remote(device)  # to ask it costs a wait
        keep, background = config.keep_checkpoints, config.async_checkpoints
        self.checkpoints = CheckpointFolder(config.default_root_dir / "checkpoints", keep, background=background)
        folders = [Path(each.dirpath) for each in config.callbacks if getattr(each, "dirpath", None)]
        wanted = self.checkpoints.newest(folders) if ckpt_path == "last" and team.rank == 0 else ckpt_path
        path = team.gather(wanted)[0]
        saved = None if path is None else load_checkpoint(path)
        if saved is None and config.seed is not None:
            seed_all(config.seed)
        module.to(device=device, dtype=self.mode.dtype)
        self.setups = read_optimizers(module.configure_optimizers(), automatic=module.automatic_optimization)
        for setup in self.setups:
            check_release(setup.optimizer, config, team.name)
            self.mode.check(setup.optimizer)
        self.scaler = self.mode.make_scaler()
        trainer.ema = None if config.ema_decay is None else EMA(module, config.ema_decay)
        self.train_loader, self.val_loader, self.length = self._share(loaders, saved)
        self.hooks = Hooks(trainer, module, config.callbacks)
        trainer.run = self
        self.hooks.call("setup", "fit")
        if saved is not None:
            check_fits(
                path, saved, module=module, setups=self.setups, precision=config.precision, scaler=self.scaler,
                ema=trainer.ema,
            )  # fmt: skip
            team.check_alike("the checkpoint", [f"{key} {saved[key]}" for key in ("epoch", "global_step", "batch_idx")])
        self.strategies = [team.strategy(module, setup.optimizer) for setup in self.setups]
        self.manual: Manual | None = None
        if not module.automatic_optimization:
            self.manual = Manual(self.setups, self.strategies, self.scaler, trainer)
        module._manual = self.manual
        if not module.training:
            module.train()
        self.skipped_in_a_row = 0
        self.validated_at: tuple[int, int] | None = None
        self.epoch_rng: dict[str, Any] | None = None
        self._resume_rng: dict[str, Any] | None = None
        self._resume_loader: dict[str, Any] | None = None
        self._time: InTime | None = None
        trainer.begin(saved)
        if saved is not None:
            self._restore(saved)
            self.checkpoints.adopt(Path(path))
        elif config.seed is not None and team.rank > 0:
            seed_all(team.seed_of(config.seed))
        first, total = team.rank == 0, config.total_steps(self.length)
        self.loggers = open_loggers(config, module.hparams, saved) if first else []
        bar = first and config.enable_progress_bar
        self.progress: Progress | None = make_progress(trainer.global_step, total) if bar else None
        self.started = perf_counter()
        self.batches: Iterator[tuple[Any, bool]] = iter(())
        self.inside_window = False
        self.log, self.loss, self.total = module._logged, torch.zeros(()), 1.0
        self.step: StepInfo | None = None
        self.seldom: LRScheduler | None = None
        self._last_rng: list[Any] | None = None

    @property
    def strategy(self) -> Alone | Strategy:
        """That of the first optimizer, which with automatic optimization is the only one."""
        return self.strategies[0]

    @property
    def validate_every(self) -> int | None:
        """After how many batches to validate inside the epoch; None: not."""
        interval = self.trainer.config.val_check_interval
        if interval is None or self.val_loader is None:
            return None
        return max(1, take_of("val_check_interval", interval, self.length) or 1)

    def mean_loss(self) -> float:
        """Of the window just done; waits for the device."""
        return self.loss.item() / self.total

    def step_options(self) -> dict[str, Any]:
        """The options of every `pytrain.step`; where somebody looks at the gradients, also see to that."""
        config, setup, strategy = self.trainer.config, self.setups[0], self.strategy
        schedule = setup.scheduler if setup.interval == "step" and self.manual is None else None
        self.seldom, schedule = (None, schedule) if setup.frequency == 1 else (schedule, None)
        options: dict[str, Any] = {"schedule": schedule, "ema": self.trainer.ema}
        if config.gradient_clip_val is not None:
            name = "max_norm" if config.gradient_clip_algorithm == "norm" else "clip_value"
            options[name] = float(config.gradient_clip_val)
        if self.hooks["on_before_optimizer_step"] and self.manual is None:
            strategy.show_gradients(self._show)
        return options

    def _show(self, divisor: float) -> float:
        """For on_before_optimizer_step: unscale and divide the gradients in place, and call it."""
        optimizer = self.setups[0].optimizer
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if divisor != 1 and grads:
            torch._foreach_div_(grads, divisor)
        self.hooks.call("on_before_optimizer_step", optimizer)
        return 1.0

    def wrap(self, name: str) -> Callable[..., Any]:
        """A step of the module, compiled where it is, under the precision's autocast."""
        step = getattr(self.module, name)
        return self.mode.wrap(step if self.compiled is None else self.compiled(step), self.device.type)

    def training_step(self) -> Callable[..., Any]:
        """The module's training_step; with tbptt_steps that of parts in time, which hand on their hidden state."""
        step = self.wrap("training_step")
        if self.module.tbptt_steps is None:
            return step
        self._time = self._time or InTime()
        return self._time.over(step)

    def open_batches(self, accumulate: int) -> None:
        """Start the epoch's batches; in a resumed epoch, draw and drop those already trained on."""
        trainer, loader, state = self.trainer, self.train_loader, self._resume_loader
        done = trainer.batch_idx
        self.log.training = True
        if done and self.epoch_rng is not None:
            # Their order follows from the random states at the epoch's start, which the checkpoint holds.
            restore_rng(self.epoch_rng, loader)
        else:
            self.epoch_rng = capture_rng(self.device, loader)
        if done and state is not None:
            loader.load_state_dict(state)
            self._resume_loader = None
        batches = start_epoch(loader, trainer.current_epoch, self.device, self.mode.dtype)
        if self.module.tbptt_steps is not None:
            batches = in_parts(batches, self.module.tbptt_split, self.module.tbptt_steps)
        if done:
            if state is None:
                skip_batches(batches, done)
            if self._resume_rng is not None:  # else the saved run had not this rank
                restore_rng(self._resume_rng, loader)
        if self.length is None and self.team.size > 1:
            batches = self.team.while_all_have(batches)
        limit = trainer.config.limit_train_batches
        if limit is not None:
            batches = islice(batches, self.length if self.length is not None else max(0, int(limit) - done))
        ahead = accumulate if self.team.ranks is not None else 1
        self.batches = zip(batches, repeat(True)) if ahead == 1 else with_ends(batches, ahead)

    def loader_state(self) -> dict[str, Any] | None:
        """The position of a loader that knows it, such as torchdata's StatefulDataLoader."""
        known = hasattr(self.train_loader, "load_state_dict") and hasattr(self.train_loader, "state_dict")
        return self.train_loader.state_dict() if known else None

    def random_states(self) -> list[tuple[Any, Any, Any]]:
        """Every rank's random states now and at the epoch's start, and its loader's; after the run's end the last."""
        if self._last_rng is not None:
            return self._last_rng
        return self.team.gather((capture_rng(self.device, self.train_loader), self.epoch_rng, self.loader_state()))

    def let_go(self) -> None:
        """The run has come to its end: the optimizer is whole again, and needs no other rank."""
        self.strategy.send_buffers()
        self._last_rng = self.random_states()
        for strategy in self.strategies:
            strategy.close()
        self.strategies = [Alone(setup.optimizer) for setup in self.setups]

    def close(self, status: str) -> None:
        """Let go of the terminal, the files and the loader's workers."""
        self.batches = iter(())
        self.module._manual, self.log.batch = None, None
        if self.progress is not None:
            self.progress.close()
        for logger in self.loggers:
            logger.finalize(status)
        self.checkpoints.wait()

    def _share(self, loaders: Sequence[Any], saved: Mapping[str, Any] | None) -> tuple[Any, Any, int | None]:
        """Return this rank's loaders, and the number of training batches an epoch; settle the seed of their order."""
        config, team, (train_loader, val_loader) = self.trainer.config, self.team, loaders
        seed = order_seed(train_loader, config.seed) if saved is None else saved["data_seed"]
        self.data_seed = team.gather(seed)[0]
        few = config.overfit_batches
        train_loader = share_out(team, "train_dataloaders", train_loader, None if few else self.data_seed)
        length = loader_length(train_loader)
        if few:  # the same ones in every epoch, in the same order, also to validate with
            train_loader = list(islice(train_loader, take_of("overfit_batches", few, length)))
            length, val_loader = len(train_loader), None if val_loader is None else train_loader
        elif val_loader is not None:
            val_loader = share_val(team, "val_dataloaders", val_loader)
        limit = take_of("limit_train_batches", config.limit_train_batches, length)
        if limit is not None and length is not None:
            length = min(length, limit)
        if self.module.tbptt_steps is not None:
            length = None  # a batch is cut into as many parts as it has
        team.check_alike("the number of batches an epoch", ["unknown" if length is None else f"{length} batches"])
        return train_loader, val_loader, length

    def _restore(self, saved: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        trainer, count = self.trainer, len(saved["loader"])
        self.module.load_state_dict(saved["module"])
        for strategy, state in zip(self.strategies, saved["optimizers"], strict=True):
            strategy.load_state_dict(state)
        for setup, state in zip(self.setups, saved["schedulers"], strict=True):
            if setup.scheduler is not None:
                setup.scheduler.load_state_dict(state)
        if self.scaler is not None:
            self.scaler.load_state_dict(saved["scaler"])
        if trainer.ema is not None:
            trainer.ema.load_state_dict(saved["ema"])
        for each in trainer.callbacks:
            state = saved["callbacks"].get(key_of(each))
            if state is not None and hasattr(each, "load_state_dict"):
                each.load_state_dict(state)
        self.hooks.call("on_load_checkpoint", saved)
        self.skipped_in_a_row, self.validated_at = saved["skipped_in_a_row"], saved["validated_at"]
        if saved["hiddens"] is not None:
            self._time = InTime()
            self._time.hiddens = saved["hiddens"]
        self._resume_rng, self.epoch_rng = restore_ranks_rng(saved, self.team, self.train_loader)
        self._resume_loader = saved["loader"][self.team.rank] if self.team.rank < count else None

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        if self.inside_window:
            raise RuntimeError("a checkpoint can only be taken between optimizer steps, and one is under way")
        trainer = self.trainer
        for logger in self.loggers:
            if hasattr(logger, "save"):
                logger.save()
        self.strategy.send_buffers()
        states = self.random_states()
        state = {
            "format": FORMAT,
            "precision": trainer.config.precision,
            "module": self.module.state_dict(),
            "optimizers": [strategy.state_dict() for strategy in self.strategies],
            "schedulers": [None if one.scheduler is None else one.scheduler.state_dict() for one in self.setups],
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "ema": None if trainer.ema is None else trainer.ema.state_dict(),
            "epoch": trainer.current_epoch,
            "global_step": trainer.global_step,
            "batch_idx": trainer.batch_idx,
            "skipped_steps": trainer.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "metrics_lines": max((getattr(logger, "lines", 0) for logger in self.loggers), default=0),
            "callback_metrics": dict(trainer.callback_metrics),
            "callbacks": {key_of(each): each.state_dict() for each in trainer.callbacks if hasattr(each, "state_dict")},
            "hyper_parameters": dict(self.module.hparams),
            "hiddens": None if self._time is None else self._time.hiddens,
            "rng": [now for now, _, _ in states],
            "epoch_rng": [start for _, start, _ in states],
            "loader": [loader for _, _, loader in states],
            "data_seed": self.data_seed,
            "validated_at": self.validated_at,
        }
        self.hooks.call("on_save_checkpoint", state)
        return state


def share_val(team: Team, name: str, loader: Any) -> Any:
    """Return this rank's part of one or several loaders whose rows come once each."""
    shared = [share_out(team, name, one, None) for one in several(loader)]
    return shared if len(shared) > 1 else shared[0]


def open_loggers(config: TrainerConfig, hparams: Mapping[str, Any], resumed: Mapping[str, Any] | None) -> list[Any]:
    """Return the loggers of a run, told of the hyperparameters, and where it is resumed of the step it goes on from.

    Raises:
        TypeError: one of those given cannot log.
    """
    given = config.logger
    if given is None or isinstance(given, bool):
        lines = None if resumed is None else resumed["metrics_lines"]
        return [] if given is False else [JsonLinesLogger(config.default_root_dir / "metrics.jsonl", keep_lines=lines)]
    loggers = list(given) if isinstance(given, (list, tuple)) else [given]
    for i, logger in enumerate(loggers):
        if not callable(getattr(logger, "log_metrics", None)):
            raise TypeError(f"Trainer: logger[{i}] has no log_metrics(metrics, step), got {logger!r}")
        if resumed is not None and hasattr(logger, "resume"):
            logger.resume(resumed["global_step"])
        if hparams and hasattr(logger, "log_hyperparams"):
            logger.log_hyperparams(dict(hparams))
    return loggers
