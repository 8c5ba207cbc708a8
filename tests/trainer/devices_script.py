"""A user's program for two ranks: `devices_script.py FOLDER WHAT DEVICES`; WHAT says what befalls which rank."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import rank_cases as cases
from torch import Tensor
from trainer_cases import make_trainer

import pytrain.launch


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


class Module(cases.Regression):
    """Meets with what is to befall it at the second batch."""

    def __init__(self, what: str = "") -> None:
        super().__init__(seed=rank())
        self.what = what

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            if self.what == f"error {rank()}":
                raise KeyError("only here")
            if self.what == f"kill {rank()}":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.what == f"stop {rank()}":
                os.kill(os.getpid(), signal.SIGTERM)
        return super().training_step(batch, batch_idx)

    def train_dataloader(self) -> Any:
        return cases.part(cases.joined(4), rank(), 2)


def main() -> None:
    folder, what = Path(sys.argv[1]), sys.argv[2]
    devices: Any = sys.argv[3] if sys.argv[3] == "auto" else int(sys.argv[3])
    (folder / f"pid{rank()}").write_text(str(os.getpid()))
    if what == "early error 1" and rank() == 1:
        raise KeyError("before it met the other")
    if what == "early kill 0" and rank() == 0:
        pytrain.launch._start = lambda device: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    for number, strategy in enumerate(("auto", "zero2")):
        settings = {"max_epochs": 2, "seed": 1, "strategy": strategy, "devices": devices, "enable_checkpointing": True}
        trainer = make_trainer(folder / str(number), **settings)
        try:
            trainer.fit(Module(what))
        except SystemExit as left:
            (folder / f"code{rank()}").write_text(str(left.code))
            raise
        trainer.save_checkpoint(folder / f"end{number}.ckpt")
        assert trainer.world_size == 2 and trainer.global_rank == rank()
    if what == "late error 1" and rank() == 1:
        raise KeyError("after all")


if __name__ == "__main__":
    main()
