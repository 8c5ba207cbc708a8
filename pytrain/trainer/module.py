"""pytrain.Module: a torch module that also says how it is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

RESERVED_METRICS = ("step", "epoch", "nonfinite")


class Module(torch.nn.Module):
    """A torch.nn.Module with a training step and an optimizer.

    Override `training_step` and `configure_optimizers`; `validation_step` is optional; `forward` is torch's own.
    """

    def __init__(self) -> None:
        super().__init__()
        self._logged: dict[str, Tensor | float] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Any]:
        """Return the loss of one micro-batch.

        Args:
            batch: what the training loader gave, on the module's device.
            batch_idx: its number in the epoch, from 0.

        Shape: the loss is one scalar tensor with a graph, or a dict that holds it as "loss".
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_step(batch, batch_idx)")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Log validation metrics of one batch with `self.log`; a returned scalar is logged as "val_loss".

        Runs in eval mode, without gradients. The trainer averages over batches, weighted by batch size.
        """
        raise NotImplementedError(f"{type(self).__name__} must define validation_step(batch, batch_idx)")

    def configure_optimizers(self) -> Any:
        """Return the optimizer, alone or with a learning rate schedule.

        Forms: `optimizer`; `(optimizer, scheduler)`; `([optimizer], [scheduler])`; `{"optimizer": ...,
        "lr_scheduler": scheduler}`. Wherever a scheduler stands, `{"scheduler": ..., "interval": "step" | "epoch",
        "monitor": name}` may stand too; the interval is "epoch" unless given.
        """
        raise NotImplementedError(f"{type(self).__name__} must define configure_optimizers()")

    def log(self, name: str, value: Tensor | float) -> None:
        """Record a metric of this step.

        In training the value at every `log_every_n_steps`-th step is written; in validation the mean.

        Args:
            name: any name but "step", "epoch" and "nonfinite".
            value: a number, or a tensor of one element (kept detached, read only when it is written).

        Raises:
            ValueError: the name is reserved, or the tensor has not exactly one element.
            TypeError: the value is not a number.
        """
        if name in RESERVED_METRICS:
            raise ValueError(f"log: name {name!r} is reserved; choose another than {list(RESERVED_METRICS)}")
        if isinstance(value, (int, float)):
            self._logged[name] = value
            return
        if not isinstance(value, Tensor):
            raise TypeError(f"log: value of {name!r} must be a number or a tensor, got {type(value).__name__}")
        if value.numel() != 1:
            raise ValueError(f"log: value of {name!r} must have exactly 1 element, got shape {tuple(value.shape)}")
        self._logged[name] = value.detach()

    def take_logged(self) -> dict[str, Tensor | float]:
        """Return what was logged since the last call, and forget it. Called by the trainer."""
        logged, self._logged = self._logged, {}
        return logged
