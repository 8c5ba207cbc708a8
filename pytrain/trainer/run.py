"""A run: what one call of `fit` works with, how it starts, fresh or from a checkpoint, and what of it is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pytrain.backend import is_remote
from pytrain.callbacks.hooks import Hooks, key_of
from pytrain.callbacks.progress import Progress, make_progress
from pytrain.ema import EMA
from pytrain.launch import Alone, Team
from pytrain.loggers.jsonlines import open_loggers
from pytrain.rng import capture_rng, order_seed, preserved_rng, restore_ranks_rng, restore_rng, seed_all
from pytrain.shares import share_out, share_val
from pytrain.tbptt import InTime, for_parts, in_parts
from pytrain.trainer.checkpoint import FORMAT, CheckpointFolder, check_fits, load_checkpoint
from pytrain.trainer.config import take_of
from pytrain.trainer.data import loader_length, skip_batches, start_epoch, to_device, with_ends
from pytrain.trainer.manual import Manual
from pytrain.trainer.module import Module
from pytrain.trainer.optimizers import OptimizerSetup, check_release, read_optimizers
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
        limit: batches to take of the training loader; None: all.
        validate_every: after how many batches to validate inside the epoch; None: not.
        tells: the optimizer's `step_was_skipped` says all about a step, at less cost than the step's own flag.
        seldom: a schedule that advances at every so-manieth step only, which the trainer counts.
        loss, total, step: of the window just done: the sum of the weighted losses, and of the weights.
        validated_at: epoch and batch of the last validation.
        epoch_ended: all know of the epoch's end, and only its count is still to rise.

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
        self.setups: list[OptimizerSetup] = []
        self.loggers: list[Any] = []
        self._share(loaders, saved)
        trainer.run = self  # for configure_optimizers
        module.to(device=device, dtype=self.mode.dtype)
        self.setups = read_optimizers(module.configure_optimizers(), automatic=module.automatic_optimization)
        for setup in self.setups:
            check_release(setup.optimizer, config, team.name)
            self.mode.check(setup.optimizer)
        self.scaler = self.mode.make_scaler()
        trainer.ema = None if config.ema_decay is None else EMA(module, config.ema_decay)
        self.hooks = Hooks(trainer, module, config.callbacks)
        self.hooks.call("setup", "fit")
        if saved is not None:
            self.hooks.call("on_load_checkpoint", saved)
            check_fits(
                path, saved, module=module, setups=self.setups, precision=config.precision, scaler=self.scaler,
                ema=trainer.ema,
            )  # fmt: skip
            team.check_alike("the checkpoint", [f"{key} {saved[key]}" for key in ("epoch", "global_step", "batch_idx")])
        self.strategies = [team.strategy(module, setup.optimizer) for setup in self.setups]
        show = self._show if self.hooks["on_before_optimizer_step"] else None
        for setup, strategy in zip(self.setups, self.strategies, strict=True):
            if show is not None:
                strategy.show_gradients(partial(show, setup.optimizer))
        parts = self.setups, self.strategies, self.scaler, trainer, show
        self.manual = module._manual = None if module.automatic_optimization else Manual(*parts)
        if not module.training:
            module.train()
        self.skipped_in_a_row = 0
        self.tells = module.automatic_optimization and hasattr(self.setups[0].optimizer, "storage")
        self.inside_window = self.epoch_ended = False
        self.validated_at: tuple[int, int] | None = None
        self.log, self.loss, self.total = module._logged, torch.zeros(()), 1.0
        self.log.forget()
        self.epoch_rng: dict[str, Any] | None = None
        self._resume_rng: dict[str, Any] | None = None
        self._resume_loader: dict[str, Any] | None = None
        self._time: InTime | None = None
        trainer.begin(saved)
        if saved is not None:
            self._restore(saved)
            team.say(f"going on from {path}, after {trainer.current_epoch} epochs and {trainer.global_step} steps")
            self.checkpoints.adopt(Path(path), saved["checkpoints"])
        elif config.seed is not None and team.rank > 0:
            seed_all(team.seed_of(config.seed))
        first, total = team.rank == 0, config.total_steps(self.length)
        if first:
            self.loggers = open_loggers(config.logger, config.default_root_dir, module.hparams, saved)
        bar = first and config.enable_progress_bar
        self.progress: Progress | None = make_progress(trainer.global_step, total) if bar else None
        self.started = perf_counter()
        self.batches: Iterator[tuple[Any, bool]] = iter(())
        self.step: StepInfo | None = None
        self.seldom: LRScheduler | None = None
        self._last_states: list[Any] | None = None

    @property
    def strategy(self) -> Alone | Strategy:
        """That of the first optimizer, which with automatic optimization is the only one."""
        return self.strategies[0]

    def mean_loss(self) -> float:
        """Of the window just done; waits for the device."""
        return self.loss.item() / (self.total or 1)

    def step_options(self) -> dict[str, Any]:
        """The options of every `pytrain.step`."""
        config, setup = self.trainer.config, self.setups[0]
        schedule = setup.scheduler if setup.interval == "step" and self.manual is None else None
        self.seldom, schedule = (None, schedule) if setup.frequency == 1 else (schedule, None)
        options: dict[str, Any] = {"schedule": schedule, "ema": self.trainer.ema}
        if config.gradient_clip_val is not None:
            name = "max_norm" if config.gradient_clip_algorithm == "norm" else "clip_value"
            options[name] = float(config.gradient_clip_val)
        return options

    def _show(self, optimizer: Optimizer, divisor: float) -> float:
        """For on_before_optimizer_step: unscale and divide the gradients in place, and call it."""
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

    def batch_hooks(self, name: str) -> tuple[Callable[..., Any], ...]:
        """The hooks of a training batch; with tbptt_steps they are called for each part."""
        found = self.hooks[name]
        return found if self.module.tbptt_steps is None else for_parts(found)

    def open_batches(self, accumulate: int) -> None:
        """Start the epoch and its batches; in a resumed epoch, draw and drop those already trained on."""
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
        batches = start_epoch(loader, trainer.current_epoch, self.device, self.mode.dtype)
        if self.limit is not None:
            batches = islice(batches, self.limit if state is None else max(0, self.limit - done))
        if self.module.tbptt_steps is not None:
            batches = in_parts(batches, self.module.tbptt_split, self.module.tbptt_steps)
        if state is None:
            skip_batches(batches, done)
        self.hooks.call("on_train_epoch_start")
        if done and self._resume_rng is not None:  # else the saved run had not this rank
            restore_rng(self._resume_rng, loader)
        self._resume_loader = None
        if self.length is None and self.team.size > 1:
            batches = self.team.while_all_have(batches)
        ahead = accumulate if self.team.ranks is not None else 1
        self.batches = zip(batches, repeat(True)) if ahead == 1 else with_ends(batches, ahead)

    def loader_state(self) -> dict[str, Any] | None:
        """The position of a loader that knows it, such as torchdata's StatefulDataLoader; None: it has to be found."""
        loader = self.train_loader
        known = hasattr(loader, "load_state_dict") and hasattr(loader, "state_dict")
        if not known or self.module.tbptt_steps is not None:  # which may be inside a batch
            return None
        with preserved_rng(self.device, loader):  # at an epoch's end torchdata's starts the next one for it
            state: dict[str, Any] = loader.state_dict()
        return state

    def rank_states(self) -> list[dict[str, Any]]:
        """What every rank has of its own, now or at the run's end, by the names that checkpoints have for it."""
        if self._last_states is not None:
            return self._last_states
        own = {
            "rng": capture_rng(self.device, self.train_loader),
            "epoch_rng": self.epoch_rng,
            "loader": self.loader_state(),
            "hiddens": None if self._time is None else self._time.hiddens,
            "logged": self.log.state_dict(),
        }
        return self.team.gather(to_device(own, torch.device("cpu")))

    def let_go(self) -> None:
        """The run has come to its end: the optimizer is whole again, and needs no other rank."""
        self.strategy.send_buffers()
        self._last_states = self.rank_states()
        for strategy in self.strategies:
            strategy.close()
        self.strategies = [Alone(setup.optimizer) for setup in self.setups]

    def close(self, status: str) -> None:
        """Let go of the terminal, the files and the loader's workers."""
        self.batches = iter(())
        if self.manual is not None:
            self.manual.untoggle()
        self.module._manual, self.log.batch = None, None
        if self.progress is not None:
            self.progress.close()
        for logger in self.loggers:
            logger.finalize(status)
        self.checkpoints.wait()

    def _share(self, loaders: Sequence[Any], saved: Mapping[str, Any] | None) -> None:
        """Settle this rank's loaders, the seed of their order, how many batches an epoch has and where it validates."""
        config, team, (train_loader, val_loader) = self.trainer.config, self.team, loaders
        seed = order_seed(train_loader, config.seed) if saved is None else saved["data_seed"]
        self.data_seed = team.gather(seed)[0]
        few = config.overfit_batches
        train_loader = share_out(team, "train_dataloaders", train_loader, None if few else self.data_seed)
        length = loader_length(train_loader)
        if few:  # the same ones in every epoch and resumed run, in the same order, also to validate with
            with preserved_rng(self.device, train_loader):
                seed_all(self.data_seed % 2**32)
                train_loader = list(islice(train_loader, take_of("overfit_batches", few, length)))
            length, val_loader = len(train_loader), None if val_loader is None else train_loader
        elif val_loader is not None:
            val_loader = share_val(team, "val_dataloaders", val_loader)
        self.limit = limit = take_of("limit_train_batches", config.limit_train_batches, length)
        if limit is not None and length is not None:
            length = min(length, limit)
        if self.module.tbptt_steps is not None:
            length = None  # a batch is cut into as many parts as it has
        team.check_alike("the number of batches an epoch", ["unknown" if length is None else f"{length} batches"])
        self.train_loader, self.val_loader, self.length = train_loader, val_loader, length
        interval = None if val_loader is None else config.val_check_interval
        self.validate_every = take_of("val_check_interval", interval, length, least=1)

    def _restore(self, saved: dict[str, Any]) -> None:
        """Put back what `state` returned."""
        trainer, rank = self.trainer, self.team.rank
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
        for name in ("skipped_in_a_row", "validated_at", "epoch_ended"):
            setattr(self, name, saved[name])
        self._resume_rng, self.epoch_rng = restore_ranks_rng(saved, self.team, self.train_loader)
        if rank < len(saved["loader"]):
            self._resume_loader = saved["loader"][rank]
            self.log.load_state_dict(saved["logged"][rank])
            self._time = InTime(to_device(saved["hiddens"][rank], self.device))

    def state(self) -> dict[str, Any]:
        """Return everything that the rest of the run depends on."""
        trainer = self.trainer
        if self.inside_window or (trainer.ema is not None and trainer.ema.swapped):
            raise RuntimeError(
                "a checkpoint can only be taken between optimizer steps, not in one or while averages are validated"
            )
        for logger in self.loggers:
            if hasattr(logger, "save"):
                logger.save()
        self.strategy.send_buffers()
        states = self.rank_states()
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
            **{name: [own[name] for own in states] for name in states[0]},
            "data_seed": self.data_seed,
            "validated_at": self.validated_at,
            "epoch_ended": self.epoch_ended,
            "checkpoints": self.checkpoints.names,
        }
        self.hooks.call("on_save_checkpoint", state)
        return state
