"""What two ranks do in the tests of callbacks: a fit with a metric that is another on each rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from callback_cases import Net, rows
from torch import Tensor

from pytrain import Trainer
from pytrain.callbacks import EMA, EarlyStopping, ModelCheckpoint, StochasticWeightAveraging
from pytrain.loggers import CSVLogger


class Uneven(Net):
    """Logs what falls on rank 0 and rises on rank 1."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        place = self.current_epoch * 4 + batch_idx
        self.log("own", float(place if self.rank else -place))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)


def fit(group: dist.ProcessGroup, folder: Path, strategy: str) -> tuple[Any, ...]:
    """Fit; return the callbacks' states, which files there are, the epochs, and the parameters."""
    rank = dist.get_rank(group)
    best = ModelCheckpoint(folder / "best", monitor="own", save_top_k=2, every_n_train_steps=2, filename="{step}-{own}")
    last = ModelCheckpoint(folder / "last", save_last="link")
    stopping = EarlyStopping("val_loss", patience=2, min_delta=1e9)
    callbacks = [EMA(0.9), StochasticWeightAveraging(0.02, 1, 1), stopping, best, last]
    trainer = Trainer(
        max_epochs=9, strategy=strategy, callbacks=callbacks, logger=CSVLogger(folder), default_root_dir=folder,
        enable_progress_bar=False, enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    module = Uneven(rank)
    trainer.fit(module, rows()[2 * rank :] + rows()[: 2 * rank], rows(2))
    states = [best.state_dict(), last.state_dict(), stopping.state_dict()]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt"))
    return states, files, trainer.current_epoch, [p.detach() for p in module.parameters()]
