"""ModelCheckpoint: writes checkpoints at chosen moments, and keeps the best of them, the newest, or both."""

from __future__ import annotations

import os
import re
import shutil
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytrain.callbacks.base import Callback, StepCount
from pytrain.callbacks.monitor import Mode, Monitor
from pytrain.sealed import sync_folder

if TYPE_CHECKING:
    from pytrain.steps import StepInfo
    from pytrain.trainer import Module, Trainer

FIELD = re.compile(r"\{([^{}:]+)(:[^{}]*)?\}")
LAST = "last.ckpt"


class ModelCheckpoint(Callback):
    """Saves the whole state of the run, at epochs' ends or every n steps, and keeps the best `save_top_k` files.

    An older file is removed only when the new one is on the disk under its name, so that a kill at any moment leaves at
    least as many whole checkpoints as were asked for. What belongs to the run goes on over interruptions: a resumed run
    writes over files of the same name. A new run never does, but for `last.ckpt`: a name that is taken gets "-v1",
    "-v2" and so on. Two in one folder need two `filename`s.

    Args:
        dirpath: the folder; None: `checkpoints` in the trainer's `default_root_dir`.
        filename: without ".ckpt"; "{epoch}-{step}" becomes "epoch=3-step=400", and "{val_loss:.2f}" names a metric.
        monitor: the metric that says which are best; None: the newest are.
        mode: "min" where less of it is better, "max" where more is. A nan is worse than all.
        save_top_k: how many to keep, >= 0; -1: all. Of equals the older stays.
        save_last: keep the newest state as `last.ckpt` too: True by a second name of the file that was just written (a
            hard link; a copy where the disk has none), "link" by a symbolic link to it. Where the newest is not among
            the best, `last.ckpt` is a file of its own.
        every_n_train_steps: save after each so many applied steps, >= 1.
        every_n_epochs: save in each so manieth epoch, >= 1; excludes every_n_train_steps (a second ModelCheckpoint may
            do the other). With neither, in every epoch.
        save_on_train_epoch_end: save at the end of the training epoch (True) or after each validation (False); None:
            after each validation where the run validates, else at the end of the epoch.

    Attributes:
        best_model_path: of the best file kept; "" where there is none.
        best_model_score: its metric; None without `monitor`.
        last_model_path: of the newest state saved.
        best_k_models: score by path, of all that are kept.
        kth_best_model_path: of the worst that is kept, which goes first.

    Raises:
        ValueError: an argument is out of its range, or, when it is to be judged, the metric is not among those there
            are.
    """

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str = "{epoch}-{step}",
        monitor: str | None = None,
        mode: Mode = "min",
        save_top_k: int = 1,
        save_last: bool | Literal["link"] = False,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
    ) -> None:
        _check_int("save_top_k", save_top_k, low=-1)
        for name, value in (("every_n_train_steps", every_n_train_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None:
                _check_int(name, value, low=1)
        if save_last not in (True, False, "link"):
            raise ValueError(f"ModelCheckpoint: save_last must be True, False or 'link', got {save_last!r}")
        if Path(filename).name != filename:
            raise ValueError(f"ModelCheckpoint: filename must be one name without folders, got {filename!r}")
        if every_n_train_steps is not None and every_n_epochs is not None:
            raise ValueError(
                f"ModelCheckpoint: every_n_train_steps={every_n_train_steps} and every_n_epochs={every_n_epochs} are "
                "both given; give one, and the other to a second ModelCheckpoint"
            )
        if every_n_train_steps is None and every_n_epochs is None:
            every_n_epochs = 1
        self._monitor = Monitor("ModelCheckpoint", monitor or "", mode, save_on_train_epoch_end)
        self._given = None if dirpath is None else Path(dirpath)
        self.dirpath, self.filename = self._given, filename
        self.monitor, self.mode, self.save_top_k, self.save_last = monitor, mode, save_top_k, save_last
        self.every_n_train_steps, self.every_n_epochs = every_n_train_steps, every_n_epochs
        self._scores: dict[str, float] = {}  # by file name, in the order of saving
        self._last = ""
        self._condemned: list[str] = []  # to be removed when the newest file is on the disk
        self._saved_at = -1
        self._folder: str | None = None  # that `_scores` speaks of
        self._strangers: frozenset[str] = frozenset()
        self._resumed = False
        self._count, self._due = StepCount(), 0

    # ---- what it knows ----------------------------------------------------------------------------------------------

    @property
    def best_k_models(self) -> dict[str, float]:
        return {self._path(name): score for name, score in self._scores.items()}

    @property
    def best_model_path(self) -> str:
        return self._path(min(self._scores, key=self._rank)) if self._scores else ""

    @property
    def best_model_score(self) -> float | None:
        return None if self.monitor is None or not self._scores else self._scores[min(self._scores, key=self._rank)]

    @property
    def kth_best_model_path(self) -> str:
        return self._path(self._worst()) if self._scores else ""

    @property
    def last_model_path(self) -> str:
        return self._path(self._last) if self._last else ""

    @property
    def state_key(self) -> str:
        when = f"every_n_train_steps={self.every_n_train_steps}, every_n_epochs={self.every_n_epochs}"
        return f"ModelCheckpoint(filename={self.filename!r}, monitor={self.monitor!r}, mode={self.mode!r}, {when})"

    def state_dict(self) -> dict[str, Any]:
        return {
            "folder": self._folder,
            "scores": dict(self._scores),
            "last": self._last,
            "condemned": list(self._condemned),
            "saved_at": self._saved_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._take(state_dict)
        self._resumed = True

    def _take(self, state: dict[str, Any]) -> None:
        self._folder, self._scores, self._last = state["folder"], dict(state["scores"]), state["last"]
        self._condemned, self._saved_at = list(state["condemned"]), state["saved_at"]

    # ---- when it saves ----------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, module: Module) -> None:
        self._monitor.start()
        self.dirpath = trainer.default_root_dir / "checkpoints" if self._given is None else self._given
        self._count.start(trainer)
        every = self.every_n_train_steps or 1
        self._due = (trainer.global_step // every + 1) * every
        self._strangers = frozenset(path.name for path in self.dirpath.glob("*.ckpt"))

    def on_train_step_end(self, trainer: Trainer, module: Module, info: StepInfo) -> None:
        if self.every_n_train_steps is None:
            return
        self._count.tick()
        if self._count.reached(trainer, self._due):
            self._due += self.every_n_train_steps
            self._save(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if self._monitor.looks_after_validation() and self._is_epoch(trainer):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, module: Module) -> None:
        if self._monitor.looks_at_epoch_end(trainer) and self._is_epoch(trainer):
            self._save(trainer)

    def on_fit_end(self, trainer: Trainer, module: Module) -> None:
        self._settle(trainer)
        self._resumed, self._saved_at = False, -1

    def on_exception(self, trainer: Trainer, module: Module, exception: BaseException) -> None:
        self._resumed, self._saved_at = False, -1

    def _is_epoch(self, trainer: Trainer) -> bool:
        return self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    # ---- how it saves -----------------------------------------------------------------------------------------------

    def _save(self, trainer: Trainer) -> None:
        """Save the state of this step, if it was not saved yet and is to be kept."""
        if trainer.global_step == self._saved_at:
            return
        self._settle(trainer)
        score = float(trainer.global_step) if self.monitor is None else self._monitor.read(trainer)
        before = self.state_dict()
        try:
            name = self._admit(trainer, score) or (LAST if self.save_last else None)
            if name is None:
                return
            self._last, self._saved_at = name, trainer.global_step  # the checkpoint holds this state
            trainer.save_checkpoint(self._path(name))
        except BaseException:
            self._take(before)
            raise
        self._settle(trainer)

    def _admit(self, trainer: Trainer, score: float | None) -> str | None:
        """The new file's name, where it is to be kept; files that have to go for it are condemned."""
        if score is None or self.save_top_k == 0:
            return None
        full = 0 < self.save_top_k <= len(self._scores)
        if full and self.monitor is not None and not self._monitor.rank(score) < self._rank(self._worst()):
            return None
        while 0 < self.save_top_k <= len(self._scores):
            worst = self._worst()
            del self._scores[worst]
            self._condemned.append(worst)
        name = self._name(trainer)
        self._scores[name] = score
        self._condemned = [one for one in self._condemned if one != name]
        return name

    def _settle(self, trainer: Trainer) -> None:
        """Where the newest file is on the disk: have `last.ckpt` lead to it and remove the condemned ones."""
        self._enter_folder(trainer)
        if trainer.is_global_zero and self._last and (self._condemned or self.save_last):
            newest = Path(self._path(self._last))
            if not newest.exists():  # its writing goes on in the background
                return
            if self.save_last and self._last != LAST:
                _lead(newest.with_name(LAST), newest, symbolic=self.save_last == "link")
            for name in self._condemned:
                newest.with_name(name).unlink(missing_ok=True)
        self._condemned = []

    def _enter_folder(self, trainer: Trainer) -> None:
        """Note the folder; forget the files that a resumed run has left in another one."""
        assert self.dirpath is not None
        folder, root = self.dirpath.absolute(), trainer.default_root_dir.absolute()
        place = folder.relative_to(root).as_posix() if folder.is_relative_to(root) else folder.as_posix()
        if self._folder not in (None, place):
            self._scores, self._condemned, self._last, self._resumed = {}, [], "", False
        self._folder = place

    def _name(self, trainer: Trainer) -> str:
        """The file's name for this moment, which no other file that is kept has, and none of another run."""
        known = {"epoch": trainer.current_epoch, "step": trainer.global_step}

        def put(match: re.Match[str]) -> str:
            key, form = match[1], match[2] or ":"
            value = known[key] if key in known else self._monitor.read(trainer, key)
            return f"{key.replace('/', '_')}={format(float('nan') if value is None else value, form[1:])}"

        stem = FIELD.sub(put, self.filename)
        taken = {LAST, *self._scores, *(() if self._resumed else self._strangers)}
        names = (f"{stem}-v{version}.ckpt" if version else f"{stem}.ckpt" for version in count())
        return next(name for name in names if name not in taken)

    def _rank(self, name: str) -> float:
        score = self._scores[name]
        return -score if self.monitor is None else self._monitor.rank(score)

    def _worst(self) -> str:
        """Of equals the newest."""
        return max(reversed(self._scores), key=self._rank)

    def _path(self, name: str) -> str:
        return str(Path() / name if self.dirpath is None else self.dirpath / name)


def _lead(alias: Path, target: Path, *, symbolic: bool) -> None:
    """Make `alias` a second name of `target`, in one moment."""
    if alias.exists() and alias.samefile(target):
        return  # to rename one name of a file to another of its names would do nothing
    temporary = alias.with_name(f".{alias.name}.tmp")
    temporary.unlink(missing_ok=True)
    if symbolic:
        temporary.symlink_to(target.name)
    else:
        try:
            os.link(target, temporary)
        except OSError:  # no hard links on this disk
            shutil.copyfile(target, temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
    os.replace(temporary, alias)
    sync_folder(alias.parent)


def _check_int(name: str, value: Any, *, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"ModelCheckpoint: {name} must be an int >= {low}, got {value!r}")
