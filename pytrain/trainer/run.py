"""A run: what one call of `fit` works with, how it starts, fresh or from a checkpoint, and what of it is saved."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from pytrain.amp import LossScaler
from pytrain.backend import is_remote
from pytrain.ema import EMA
from pytrain.launch import Alone, Team
from pytrain.rng import capture_rng, order_seed, restore_ranks_rng, restore_rng, seed_all
from pytrain.trainer.checkpoint import FORMAT, CheckpointFolder, check_fits, load_checkpoint
from pytrain.trainer.config import TrainerConfig, take_of
from pytrain.trainer.data import (
    TimePart,
    in_parts,
    loader_length,
    share_out,
    skip_batches,
    start_epoch,
    with_ends,
)
from pytrain.trainer.hooks import Hooks
from pytrain.trainer.loggers import open_loggers
from pytrain.trainer.manual import Manual
from pytrain.trainer.module import Module
from pytrain.trainer.optimizers import OptimizerSetup, check_release, read_optimizers
from pytrain.trainer.precision import PRECISIONS, PrecisionMode
from pytrain.trainer.progress import Progress, make_progress

if TYPE_CHECKING:
    from pytrain.parallel import Strategy
    from pytrain.trainer.trainer import Trainer


@dataclass(slots=True, kw_only=True)
class Run:
    """What one call of `fit` works with."""

    module: Module
    compiled: Callable[..., Any] | None  # what torch.compile has made around the module, if anything
    device: torch.device
    mode: PrecisionMode
    team: Team
    strategies: list[Alone | Strategy]
    setups: list[OptimizerSetup]
    scaler: LossScaler | None
    manual: Manual | None
    train_loader: Iterable[Any]
    val_loader: Any
    length: int | None  # batches an epoch, where that is known
    checkpoints: CheckpointFolder
    hooks: Hooks
    loggers: list[Any]
    progress: Progress | None
    started: float
    skipped_in_a_row: int
    epoch_rng: dict[str, Any] | None
    resume_rng: dict[str, Any] | None
    resume_loader: dict[str, Any] | None
    data_seed: int
    hiddens: Any = None
    batches: Iterator[tuple[Any, bool]] = field(default_factory=lambda: iter(()))
    inside_window: bool = False
    validated_at: tuple[int, int] | None = None
    last_rng: list[Any] | None = None

    @property
    def strategy(self) -> Alone | Strategy:
        """That of the first optimizer, which with automatic optimization is the only one."""
        return self.strategies[0]

    @property
    def remote(self) -> bool:
        """Whether to ask the device costs a wait."""
        return is_remote(self.device)

    def wrap(self, name: str) -> Callable[..., Any]:
        """A step of the module, compiled where it is, under the precision's autocast."""
        step = getattr(self.module, name)
        return self.mode.wrap(step if self.compiled is None else self.compiled(step), self.device.type)

    def training_step(self) -> Callable[..., Any]:
        """The module's training_step; with tbptt_steps that of parts in time, with the hidden state of the one before."""
        step = self.wrap("training_step")
        if self.module.tbptt_steps is None:
            return step

        def in_time(part: TimePart, _: int) -> Any:
            output = step(part.batch, part.batch_idx, None if part.first else self.hiddens)
            if not isinstance(output, dict) or "hiddens" not in output:
                raise TypeError('training_step must return {"loss": ..., "hiddens": ...}, as tbptt_steps is set')
            self.hiddens = _detached(output["hiddens"])
            return output

        return in_time

    def open_batches(self, trainer: Trainer, accumulate: int) -> None:
        """Start the epoch's batches; in a resumed epoch, draw and drop those already trained on."""
        loader, done, state = self.train_loader, trainer.batch_idx, self.resume_loader
        if done and self.epoch_rng is not None:
            # Their order follows from the random states at the epoch's start, which the checkpoint holds.
            restore_rng(self.epoch_rng, loader)
        else:
            self.epoch_rng = capture_rng(self.device, loader)
        if done and state is not None:
            loader.load_state_dict(state)  # type: ignore[attr-defined]
            self.resume_loader = None
        batches = start_epoch(loader, trainer.current_epoch, self.device, self.mode.dtype)
        if self.module.tbptt_steps is not None:
            batches = in_parts(batches, self.module.tbptt_split, self.module.tbptt_steps)
        if done:
            if state is None:
                skip_batches(batches, done)
            if self.resume_rng is not None:  # else the saved run had not this rank
                restore_rng(self.resume_rng, loader)
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
        return self.train_loader.state_dict() if known else None  # type: ignore[attr-defined]

    def random_states(self) -> list[tuple[Any, Any, Any]]:
        """Every rank's random states now and at the epoch's start, and its loader's; after the run's end the last."""
        if self.last_rng is not None:
            return self.last_rng
        return self.team.gather((capture_rng(self.device, self.train_loader), self.epoch_rng, self.loader_state()))

    def let_go(self) -> None:
        """The run has come to its end: the optimizer is whole again, and needs no other rank."""
        self.strategy.send_buffers()
        self.last_rng = self.random_states()
        for strategy in self.strategies:
            strategy.close()
        self.strategies = [Alone(setup.optimizer) for setup in self.setups]

    def close(self, status: str) -> None:
        """Let go of the terminal, the files and the loader's workers."""
        self.batches = iter(())
        self.module._manual, self.module._logged.batch = None, None
        if self.progress is not None:
            self.progress.close()
        for logger in self.loggers:
            logger.finalize(status)
        self.checkpoints.wait()


def start_run(
    trainer: Trainer,
    team: Team,
    module: Module,
    compiled: Callable[..., Any] | None,
    loaders: tuple[Any, Any],
    device: torch.device,
    ckpt_path: str | os.PathLike[str] | None,
) -> Run:
    """Build the run that `fit` was asked for, fresh or from a checkpoint; raises as `fit` says."""
    config, mode = trainer.config, PRECISIONS[trainer.config.precision]
    checkpoints = CheckpointFolder(config.checkpoint_dir, config.keep_checkpoints, background=config.async_checkpoints)
    folders = [Path(each.dirpath) for each in config.callbacks if getattr(each, "dirpath", None)]
    wanted = checkpoints.newest(folders) if ckpt_path == "last" and team.rank == 0 else ckpt_path
    path = team.gather(wanted)[0]
    saved = None if path is None else load_checkpoint(path)
    if saved is None and config.seed is not None:
        seed_all(config.seed)
    module.to(device=device, dtype=mode.dtype)
    setups = read_optimizers(module.configure_optimizers(), automatic=module.automatic_optimization)
    for setup in setups:
        check_release(setup.optimizer, config, team.name)
        mode.check(setup.optimizer)
    scaler = mode.make_scaler()
    trainer.ema = None if config.ema_decay is None else EMA(module, config.ema_decay)
    hooks = Hooks(trainer, module, config.callbacks)
    hooks.call("setup", "fit")
    if saved is not None:
        name, average = config.precision, trainer.ema
        check_fits(path, saved, module=module, setups=setups, precision=name, scaler=scaler, ema=average)
        team.check_alike("the checkpoint", [f"{key} {saved[key]}" for key in ("epoch", "global_step", "batch_idx")])
    train_loader, val_loader, seed, length = _share(config, team, loaders, module, device, saved)
    strategies = [team.strategy(module, setup.optimizer) for setup in setups]
    manual = None
    if not module.automatic_optimization:
        manual = Manual(
            [setup.optimizer for setup in setups], strategies, scaler, trainer.ema, lambda: trainer.should_stop
        )
    module._manual = manual
    if not module.training:
        module.train()
    total, first = config.total_steps(length), team.rank == 0
    own_rng, epoch_rng, own_loader = None, None, None
    if saved is None:
        trainer.begin()
        if config.seed is not None and team.rank > 0:
            seed_all(team.seed_of(config.seed))
    else:
        _restore(trainer, saved, module, setups, scaler, strategies)
        hooks.call("on_load_checkpoint", saved)
        checkpoints.adopt(Path(path))
        own_rng, epoch_rng = restore_ranks_rng(saved, team, train_loader)
        own_loader = saved["loader"][team.rank] if team.rank < len(saved["loader"]) else None
    return Run(
        module=module,
        compiled=compiled,
        device=device,
        mode=mode,
        team=team,
        strategies=strategies,
        setups=setups,
        scaler=scaler,
        manual=manual,
        train_loader=train_loader,
        val_loader=val_loader,
        length=length,
        checkpoints=checkpoints,
        hooks=hooks,
        loggers=open_loggers(config, module.hparams, saved) if first else [],
        progress=make_progress(trainer.global_step, total) if first and config.enable_progress_bar else None,
        started=perf_counter(),
        skipped_in_a_row=0 if saved is None else saved["skipped_in_a_row"],
        epoch_rng=epoch_rng,
        resume_rng=own_rng,
        resume_loader=own_loader,
        data_seed=seed,
        hiddens=None if saved is None else saved["hiddens"],
    )


def _share(
    config: TrainerConfig, team: Team, loaders: tuple[Any, Any], module: Module, device: torch.device, saved: Any
) -> tuple[Iterable[Any], Any, int, int | None]:
    """Return this rank's loaders, the seed of their order, and the number of training batches an epoch, if known."""
    train_loader, val_loader = loaders
    seed = order_seed(train_loader, config.seed) if saved is None else saved["data_seed"]
    seed = team.gather(seed)[0]
    few = config.overfit_batches
    train_loader = share_out(team, "train_dataloaders", train_loader, None if few else seed)
    length = loader_length(train_loader)
    if few:  # the same ones in every epoch, in the same order, also to validate with
        train_loader = list(islice(train_loader, take_of("overfit_batches", few, length)))
        length, val_loader = len(train_loader), None if val_loader is None else train_loader
    elif val_loader is not None:
        val_loader = share_val(team, "val_dataloaders", val_loader)
    limit = take_of("limit_train_batches", config.limit_train_batches, length)
    if limit is not None and length is not None:
        length = min(length, limit)
    if module.tbptt_steps is not None:
        length = None  # a batch is cut into as many parts as it has
    team.check_alike("the number of batches an epoch", ["unknown" if length is None else f"{length} batches"])
    return train_loader, val_loader, seed, length


def share_val(team: Team, name: str, loader: Any) -> Any:
    """Return this rank's part of one or several loaders whose rows come once each."""
    from pytrain.trainer.data import several

    shared = [share_out(team, name, one, None) for one in several(loader)]
    return shared if len(shared) > 1 else shared[0]


def state_of(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Return everything that the rest of the run depends on."""
    if run.inside_window:
        raise RuntimeError("a checkpoint can only be taken between optimizer steps, and one is under way")
    run.strategy.send_buffers()
    states = run.random_states()
    state = {
        "format": FORMAT,
        "precision": trainer.config.precision,
        "module": run.module.state_dict(),
        "optimizers": [strategy.state_dict() for strategy in run.strategies],
        "schedulers": [None if one.scheduler is None else one.scheduler.state_dict() for one in run.setups],
        "scaler": None if run.scaler is None else run.scaler.state_dict(),
        "ema": None if trainer.ema is None else trainer.ema.state_dict(),
        "epoch": trainer.current_epoch,
        "global_step": trainer.global_step,
        "batch_idx": trainer.batch_idx,
        "skipped_steps": trainer.skipped_steps,
        "skipped_in_a_row": run.skipped_in_a_row,
        "metrics_lines": max((getattr(logger, "lines", 0) for logger in run.loggers), default=0),
        "callback_metrics": dict(trainer.callback_metrics),
        "callbacks": {_key(each): each.state_dict() for each in trainer.callbacks if hasattr(each, "state_dict")},
        "hyper_parameters": dict(run.module.hparams),
        "hiddens": run.hiddens,
        "rng": [now for now, _, _ in states],
        "epoch_rng": [start for _, start, _ in states],
        "loader": [loader for _, _, loader in states],
        "data_seed": run.data_seed,
    }
    run.hooks.call("on_save_checkpoint", state)
    return state


def _restore(
    trainer: Trainer,
    saved: dict[str, Any],
    module: Module,
    setups: list[OptimizerSetup],
    scaler: LossScaler | None,
    strategies: list[Alone | Strategy],
) -> None:
    """Put back what `state_of` returned, but for the random states."""
    module.load_state_dict(saved["module"])
    for strategy, state in zip(strategies, saved["optimizers"], strict=True):
        strategy.load_state_dict(state)
    for setup, state in zip(setups, saved["schedulers"], strict=True):
        if isinstance(setup.scheduler, LRScheduler):
            setup.scheduler.load_state_dict(state)
    if scaler is not None:
        scaler.load_state_dict(saved["scaler"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(saved["ema"])
    trainer.begin(saved)
    for each in trainer.callbacks:
        state = saved["callbacks"].get(_key(each))
        if state is not None and hasattr(each, "load_state_dict"):
            each.load_state_dict(state)


def _key(callback: Any) -> str:
    """Under which name a callback's state is saved."""
    return str(getattr(callback, "state_key", type(callback).__name__))


def _detached(hiddens: Any) -> Any:
    if isinstance(hiddens, Tensor):
        return hiddens.detach()
    if isinstance(hiddens, dict):
        return {key: _detached(value) for key, value in hiddens.items()}
    if isinstance(hiddens, (list, tuple)):
        return type(hiddens)(_detached(value) for value in hiddens)
    return hiddens
