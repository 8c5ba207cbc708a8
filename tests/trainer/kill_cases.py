"""A run of the trainer in a process of its own, which ends itself by a signal at a moment that is counted out."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import MultiStepLR
from trainer_cases import Classifier, noisy_loader

from pytrain import sealed
from pytrain.callbacks import Callback, EarlyStopping, ModelCheckpoint
from pytrain.optim import AdamW
from pytrain.trainer import Trainer

# Torch is loaded once, with what it loads at the first optimizer's state_dict; each run is a process of its own.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch._dynamo", "pytrain.trainer", "pytrain.callbacks", "pytrain.optim"])
STAGES = ("call", "write", "fsync", "rename")


class Moment(NamedTuple):
    """The `at`-th Python call (or return) of the fit, or the `at`-th time that a checkpoint's writing comes there."""

    signal: int
    stage: str
    at: int


class Counts(Counter[str]):
    """Counts what happens from `start` to `stop`, and sends the signal when it is time; None: only counts."""

    def __init__(self, moment: Moment | None) -> None:
        super().__init__()
        self.moment, self.on = moment, False
        self._write, self._fsync, self._replace = sealed._HashingFile.write, os.fsync, os.replace
        sealed._HashingFile.write = self.write  # type: ignore[method-assign,assignment]
        os.fsync = self.fsync  # type: ignore[assignment]
        os.replace = self.rename  # type: ignore[assignment]

    def start(self) -> None:
        """The fit has begun, and watches for signals."""
        self.on = True
        if self.moment is None or self.moment.stage == "call":
            threading.setprofile(self.call)
            sys.setprofile(self.call)

    def stop(self) -> None:
        """The fit is at its end."""
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        self.on = False

    def reach(self, stage: str) -> None:
        """Something happens."""
        if self.on:
            self[stage] += 1
            if self.moment is not None and self.moment[1:] == (stage, self[stage]):
                os.kill(os.getpid(), self.moment.signal)

    def call(self, frame: Any, event: str, arg: Any) -> None:
        self.reach("call")

    @property
    def write(self) -> Any:
        def half_by_half(file: Any, data: Any) -> int:
            view = memoryview(data).cast("B")
            self._write(file, view[: len(view) // 2])
            file._file.flush()
            self.reach("write")
            self._write(file, view[len(view) // 2 :])
            return len(view)

        return half_by_half

    def fsync(self, handle: int) -> None:
        self.reach("fsync")
        self._fsync(handle)

    def rename(self, source: Any, target: Any) -> None:
        self.reach("rename")
        self._replace(source, target)
        self.reach("rename")


class Victim(Classifier):
    """Shuffled and noisy rows, dropout, overflows, a schedule, means over the epoch."""

    def __init__(self, counts: Counts) -> None:
        super().__init__(
            lambda params: AdamW(params, lr=0.02),
            make_schedule=lambda optimizer: {
                "scheduler": MultiStepLR(optimizer, [2, 3, 5], 0.7),
                "interval": "step",
            },
            overflow_at=(2,),
        )
        self.counts = counts
        self.register_buffer("epochs_ended", torch.zeros(()))

    def train_dataloader(self) -> Any:
        self.counts.start()
        return noisy_loader()

    def val_dataloader(self) -> Any:
        return noisy_loader()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mean_loss", loss.nan_to_num(posinf=1.0), on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def on_train_epoch_end(self) -> None:
        self.epochs_ended += 1

    def on_fit_end(self) -> None:
        self.counts.stop()


class Validations(Callback):
    """How many validations have ended."""

    def __init__(self) -> None:
        self.count = 0

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]


def train(folder: Path, asynchronous: bool, moment: Moment | None) -> None:
    """Fit, from the last checkpoint where there is one; leave in `folder` the end's state and what was counted."""
    said = os.open(folder / "said.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    counts = Counts(moment)
    trainer = Trainer(
        max_epochs=3,
        precision="fp16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        val_check_interval=4,
        log_every_n_steps=2,
        callbacks=[
            ModelCheckpoint(monitor="val_loss", save_top_k=2, save_last=True),
            ModelCheckpoint(filename="ended-{epoch}", save_top_k=1, save_on_train_epoch_end=True),
            EarlyStopping("val_loss", patience=100),
            Validations(),
        ],
        seed=1,
        default_root_dir=folder,
        enable_progress_bar=False,
        checkpoint_every_n_steps=1,
        async_checkpoints=asynchronous,
        ema_decay=0.8,
    )
    trainer.fit(Victim(counts), ckpt_path="last")
    counts.on = False
    trainer.save_checkpoint(folder / "end.ckpt")
    (folder / "counts.json").write_text(json.dumps(counts))


def write_to_a_full_disk(folder: Path) -> None:
    """A limit of a file's size stands for the full disk; what the error says is left in `folder`."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        sealed.write_checkpoint(folder / "big.ckpt", {"x": torch.zeros(100_000)})
    except OSError as error:
        (folder / "error.txt").write_text(f"OSError: {error}")


def save_and_end(folder: Path) -> None:
    """Save in the background, where writing begins when the main thread is at its end."""
    main, real = threading.main_thread(), sealed.write_checkpoint

    def late(path: Path, payload: Any) -> None:
        main.join()
        real(path, payload)

    sealed.write_checkpoint = late  # type: ignore[assignment]
    sealed.CheckpointFolder(folder, 2, background=True).save(1, {"x": torch.zeros(1000)})
