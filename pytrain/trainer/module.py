"""pytrain.Module: a torch module that also says how it is trained."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from pytrain.export import Exportable
from pytrain.hparams import Hyperparameters
from pytrain.loggers.metrics import Metric, MetricLog
from pytrain.tbptt import split_time
from pytrain.trainer.checkpoint import load_checkpoint

if TYPE_CHECKING:
    from pytrain.trainer.manual import Manual, ManualOptimizer
    from pytrain.trainer.trainer import Trainer

M = TypeVar("M", bound="Module")


class Module(Exportable, Hyperparameters):
    """A torch.nn.Module with a training step and an optimizer.

    Override `training_step` and `configure_optimizers`; all else is optional: `validation_step`, `test_step`,
    `predict_step`, loaders and `setup` (those of `DataModule`) and the hooks of `pytrain.callbacks.Callback` but for
    `log_metrics`, which here have no arguments trainer and module. What `on_train_epoch_end` and
    `on_validation_epoch_end` log is among the metrics of the epoch. `forward` is torch's own.

    Attributes:
        automatic_optimization: False: `training_step` calls `manual_backward` and steps `self.optimizers()` itself.
        tbptt_steps: truncated back-propagation through time: each batch is cut along dimension 1 into parts of so many
            time steps, and each is a step of its own; `training_step(batch, batch_idx, hiddens)` returns a dict with
            "loss" and "hiddens", which come detached to the next part (None to the first). None: batches stay whole.
        hparams: what `save_hyperparameters` has kept.
    """

    automatic_optimization = True
    tbptt_steps: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self._logged = MetricLog()
        self._trainer: Trainer | None = None
        self._manual: Manual | None = None

    # ---- what a user overrides ------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | dict[str, Any]:
        """Return the loss of one micro-batch.

        Args:
            batch: what the training loader gave, on the module's device.
            batch_idx: its number in the epoch, from 0.

        Shape: the loss is one scalar tensor with a graph, or a dict that holds it as "loss". With "weight" beside it, a
            number > 0 such as the batch's tokens, the step's gradient is the mean weighted by it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define training_step(batch, batch_idx)")

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Log validation metrics of one batch with `self.log`; a returned scalar is logged as "val_loss".

        Runs in eval mode, without gradients. The trainer averages over batches, weighted by batch size.
        """
        raise NotImplementedError(f"{type(self).__name__} must define validation_step(batch, batch_idx)")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """As `validation_step`, for `Trainer.test`; a returned scalar is logged as "test_loss"."""
        raise NotImplementedError(f"{type(self).__name__} must define test_step(batch, batch_idx)")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        """Return what `Trainer.predict` gives for one batch; unless overridden that is `self(batch)`."""
        return self(batch)

    def configure_optimizers(self) -> Any:
        """Return the optimizer, alone or with a learning rate schedule.

        Forms: `optimizer`; `(optimizer, scheduler)`; `([optimizer], [scheduler])`; `{"optimizer": ...,
        "lr_scheduler": scheduler}`; with manual optimization also several, as a list of those or two lists. Wherever a
        scheduler stands, `{"scheduler": ..., "interval": "step" | "epoch", "frequency": n, "monitor": name}` may stand
        too; the interval is "epoch" unless given.
        """
        raise NotImplementedError(f"{type(self).__name__} must define configure_optimizers()")

    def tbptt_split(self, batch: Any, steps: int) -> list[Any]:
        """Cut a batch into parts of `steps` time steps: every tensor of two or more dimensions along dimension 1."""
        return split_time(batch, steps)

    # ---- what a user calls ------------------------------------------------------------------------------------------

    def log(
        self,
        name: str,
        value: Tensor | float | Metric,
        prog_bar: bool = False,
        logger: bool = True,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        sync_dist: bool = False,
        batch_size: int | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Record a metric of this step.

        In training the value at every `log_every_n_steps`-th step is written; in validation the mean.

        Args:
            name: any name but "step", "epoch" and "nonfinite".
            value: a number, a tensor of one element (kept detached, read only when it is written), or a torchmetrics
                Metric, which is computed and reset at the epoch's end.
            prog_bar: show it in the progress bar too.
            logger: give it to the loggers; False: only `trainer.callback_metrics` and the bar have it.
            on_step: write it as said above; None: in training unless on_epoch alone is asked for.
            on_epoch: write its mean over the epoch too; None: in validation and test only. With on_step and on_epoch
                both, the names are `name_step` and `name_epoch`; callbacks find the latter by `name` too.
            sync_dist: in training, write the mean over the ranks rather than rank 0's value; all ranks must log it.
            batch_size: the weight in a mean, > 0; None: the batch's first dimension.
            rank_zero_only: taken for Lightning's sake; rank 0 is what is written.

        Raises:
            ValueError: the name is reserved, the tensor has not exactly one element, or batch_size is not > 0.
            TypeError: the value is not a number.
        """
        self._logged.add(name, value, (prog_bar, logger, on_step, on_epoch, sync_dist), batch_size)

    def log_dict(self, metrics: dict[str, Any], **options: Any) -> None:
        """`log` each of several metrics; options are those of `log`."""
        for name, value in metrics.items():
            self.log(name, value, **options)

    def optimizers(self) -> ManualOptimizer | list[ManualOptimizer]:
        """The optimizers of `configure_optimizers`, to be stepped by hand: one alone, or a list of several."""
        each = self._by_hand("optimizers").each
        return each[0] if len(each) == 1 else list(each)

    def lr_schedulers(self) -> Any:
        """Their schedulers, to be stepped by hand: None, one alone, or a list of several."""
        found = [] if self._trainer is None else self._trainer.schedulers
        return found if len(found) > 1 else next(iter(found), None)

    def manual_backward(self, loss: Tensor, **options: Any) -> None:
        """Backward of the loss, scaled where there is a loss scale; options are those of `Tensor.backward`."""
        self._by_hand("manual_backward").backward(loss, options)

    def toggle_optimizer(self, optimizer: ManualOptimizer | torch.optim.Optimizer) -> None:
        """Have only this optimizer's parameters take gradients until `untoggle_optimizer`."""
        self._by_hand("toggle_optimizer").toggle(optimizer)

    def untoggle_optimizer(self, optimizer: ManualOptimizer | torch.optim.Optimizer | None = None) -> None:
        """Undo `toggle_optimizer`."""
        self._by_hand("untoggle_optimizer").untoggle()

    def _by_hand(self, method: str) -> Manual:
        if self._manual is None:
            raise RuntimeError(f"{method}: only in training_step, with automatic_optimization = False on the module")
        return self._manual

    @classmethod
    def load_from_checkpoint(cls: type[M], path: str | os.PathLike[str], **arguments: Any) -> M:
        """Make the module that a checkpoint of a `Trainer` holds: built with its hyperparameters, with its weights.

        Args:
            path: the checkpoint.
            arguments: of `__init__`, in place of those kept and beside them.

        Raises:
            CheckpointError: the checkpoint is missing or damaged.
            TypeError: an argument of `__init__` is neither kept (`save_hyperparameters`) nor given.
        """
        saved = load_checkpoint(path)
        module = cls(**{**saved["hyper_parameters"], **arguments})
        hook: Any = getattr(module, "on_load_checkpoint", None)
        if hook is not None:
            hook(saved)
        module.load_state_dict(saved["module"])
        return module

    # ---- where a run stands -----------------------------------------------------------------------------------------

    @property
    def trainer(self) -> Trainer:
        """The trainer of the run.

        Raises:
            RuntimeError: there is none yet.
        """
        if self._trainer is None:
            raise RuntimeError(f"{type(self).__name__} has no trainer before Trainer.fit")
        return self._trainer

    @property
    def device(self) -> torch.device:
        """That of the first parameter or buffer; the CPU where there is none."""
        first = next(self.parameters(), next(self.buffers(), None))
        return torch.device("cpu") if first is None else first.device

    @property
    def logger(self) -> Any:
        """The run's first logger; None where there is none, and on all ranks but 0."""
        return next(iter([] if self._trainer is None else self._trainer.loggers), None)

    @property
    def current_epoch(self) -> int:
        """The epoch under way, from 0."""
        return 0 if self._trainer is None else self._trainer.current_epoch

    @property
    def global_step(self) -> int:
        """Optimizer steps applied."""
        return 0 if self._trainer is None else self._trainer.global_step

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_trainer": None, "_manual": None, "_logged": MetricLog()}


def loss_of(output: Any, *, manual: bool) -> tuple[Tensor, float]:
    """Return the loss in what training_step returned, where that was not a plain tensor, and its weight; 0: none."""
    if output is None and manual:
        return torch.zeros(()), 0
    loss = output.get("loss") if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        what = f"a dict with keys {list(output)}" if isinstance(output, dict) else type(output).__name__
        raise TypeError(f'training_step must return the loss, a tensor, or a dict with it as "loss"; got {what}')
    weight = float(output.get("weight", 1)) if isinstance(output, dict) else 1.0
    if not 0 < weight < math.inf:
        raise ValueError(f'training_step: "weight" must be a finite number > 0, got {weight}')
    return loss, weight
