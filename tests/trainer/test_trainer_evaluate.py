"""What modules log: by step and by epoch, in training and validation, numbers and torchmetrics, on ranks."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from trainer_cases import Mean, Validated, batches, make_trainer, read_metrics

from pytrain.callbacks import Callback
from pytrain.trainer import Module

VALUES = [1.0, 2.0, 4.0, 9.0, 8.0]  # of batches; each weighs 1
FOUND = {"step", "epoch", "loss", "lr", "skipped_steps"}


class Logs(Mean):
    """Logs each batch's value with the given options."""

    def __init__(self, name: str = "x", **options: Any) -> None:
        super().__init__()
        self.name, self.options = name, options

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.log(self.name, batch.mean(), **self.options)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log(f"val_{self.name}", batch.mean(), **self.options)


def data(values: list[float] = VALUES) -> list[Tensor]:
    return [torch.full((1,), value) for value in values]


def rows_of(folder: Path) -> list[dict[str, float]]:
    """The lines, but for what every one has; only the ones that have something."""
    rows = [{key: value for key, value in row.items() if key not in FOUND} for row in read_metrics(folder)]
    return [row for row in rows if row]


@pytest.mark.parametrize(("on_step", "on_epoch"), product([None, True, False], repeat=2))
@pytest.mark.parametrize("every", [1, 2])
def test_training_values_are_written_by_step_and_by_epoch_as_asked(
    on_step: Any, on_epoch: Any, every: int, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, max_epochs=2, log_every_n_steps=every)
    trainer.fit(Logs(on_step=on_step, on_epoch=on_epoch), data())
    by_step = on_step if on_step is not None else not on_epoch
    both = bool(on_step and on_epoch)
    steps = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] if every == 1 else [2, 4, 5, 6, 8, 10]
    expected: list[dict[str, float]] = []
    for epoch in (0, 1):
        lines = [{"x" + "_step" * both: (VALUES * 2)[step - 1]} for step in steps if (step - 1) // 5 == epoch]
        expected += lines if by_step else []
        expected += [{"x" + "_epoch" * both: 4.8}] if on_epoch else []
    assert rows_of(tmp_path) == [pytest.approx(row) for row in expected]
    assert ("x" in trainer.callback_metrics) == bool(by_step or on_epoch)
    if on_epoch:
        assert trainer.callback_metrics["x"] == pytest.approx(4.8)


@pytest.mark.parametrize(("on_step", "on_epoch"), product([None, True, False], repeat=2))
def test_validation_values_are_means_however_they_are_logged(on_step: Any, on_epoch: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Logs(on_step=on_step, on_epoch=on_epoch), data([3.0]), data())
    name = "val_x_epoch" if on_step and on_epoch else "val_x"
    assert rows_of(tmp_path)[-1 if not on_epoch else -2] == {name: pytest.approx(4.8)}
    assert trainer.callback_metrics["val_x"] == pytest.approx(4.8)


def test_each_value_weighs_by_its_own_batch_size(tmp_path: Path) -> None:
    class Sizes(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("rows", batch.mean(), on_epoch=True)
            self.log("given", batch.mean(), on_epoch=True, batch_size=batch_idx + 1)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_given", batch.mean(), batch_size=batch_idx + 1)
            self.log("val_rows", batch.mean())

    loader = [torch.full((3,), 1.0), torch.full((1,), 5.0)]
    make_trainer(tmp_path, max_epochs=1).fit(Sizes(), loader, loader)
    rows = read_metrics(tmp_path)
    assert (rows[-2]["val_given"], rows[-2]["val_rows"]) == (11 / 3, 2.0)
    assert (rows[-1]["given"], rows[-1]["rows"]) == (11 / 3, 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.float64])
def test_a_mean_over_many_values_of_low_precision_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    class Low(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("x", torch.tensor(3, dtype=dtype), on_epoch=True, batch_size=4096)
            return super().training_step(batch, batch_idx)

    make_trainer(tmp_path, max_epochs=1, log_every_n_steps=1000).fit(Low(), data([0.0] * 300))
    assert read_metrics(tmp_path)[-1]["x"] == 3.0


def test_hidden_names_do_not_reach_loggers_and_hide_no_other(tmp_path: Path) -> None:
    class Hidden(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("mine", 1.0, logger=False, on_step=True, on_epoch=True)
            self.log_dict({"mine_too": 2.0, "other_step": 3}, on_step=True)
            self.log("np", np.float32(4.0))  # type: ignore[arg-type]
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Tensor, batch_idx: int, number: int = 0) -> None:
            self.log("val_mine", 5.0, logger=False)

    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Hidden(), data([1.0]), [DataLoader([1.0]), DataLoader([2.0])])
    assert [set(row) - FOUND for row in read_metrics(tmp_path)] == [{"mine_too", "other_step", "np"}, set(), set()]
    names = ("mine", "mine_step", "mine_epoch", "val_mine/dataloader_idx_0")
    assert all(name in trainer.callback_metrics for name in names)


def test_the_bar_shows_what_asks_for_it_also_right_after_a_line_was_written() -> None:
    module = Mean()
    log = module._logged
    log.training = True
    module.log("a", 1.0, prog_bar=True)
    module.log("b", 2.0)
    assert log.shown() == {"a": 1.0}
    log.take()
    assert log.shown() == {"a": 1.0}


@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (torch.ones(2), ValueError, "value of 'x' must have exactly 1 element, got shape \\(2,\\)"),
        ("a", TypeError, "value of 'x' must be a number or a tensor, got str"),
        (None, TypeError, "value of 'x' must be a number or a tensor, got NoneType"),
        ({"a": 1}, TypeError, "value of 'x' must be a number or a tensor, got dict"),
    ],
)
def test_a_value_that_is_no_number_is_named(value: Any, error: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        Mean().log("x", value)
    with pytest.raises(ValueError, match="batch_size of 'x' must be > 0, got 0"):
        Mean().log("x", 1.0, batch_size=0)
    with pytest.raises(ValueError, match="name 'epoch' is reserved"):
        Mean().log("epoch", 1.0)


def test_a_loss_that_validation_logs_and_returns_keeps_its_options(tmp_path: Path) -> None:
    class Both(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().validation_step(batch, batch_idx)
            self.log("val_loss", 2 * loss, logger=False)
            return loss

    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Both(), batches(1), batches(1))
    assert "val_loss" in trainer.callback_metrics and not any("val_loss" in row for row in read_metrics(tmp_path))


# ---- torchmetrics -------------------------------------------------------------------------------------------------


class Most:
    """A metric with torchmetrics' words: the largest value since the last reset, which no mean of parts is."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self._forward_cache: Any = None

    def __call__(self, value: Tensor) -> Tensor:
        self.values.append(value.item())
        self._forward_cache = value
        return value

    def compute(self) -> Tensor:
        return torch.tensor(max(self.values))

    def reset(self) -> None:
        self.values = []


class Measured(Mean):
    def __init__(self, make: Any, **options: Any) -> None:
        super().__init__()
        self.options, self.of_train, self.of_val = options, make(), make()

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        self.of_train(batch.mean())
        self.log("most", self.of_train, **self.options)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.of_val(batch.mean())
        self.log("val_most", self.of_val)


def kinds() -> list[Any]:
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    return [Most, torchmetrics.MaxMetric]


@pytest.mark.parametrize("kind", [0, 1])
def test_a_metric_is_of_its_epoch_also_where_validation_comes_inside_it(kind: int, tmp_path: Path) -> None:
    make = Most if kind == 0 else kinds()[1]
    trainer = make_trainer(tmp_path, max_epochs=2, val_check_interval=3)
    trainer.fit(Measured(make), data(), data([7.0, 5.0]))
    rows = rows_of(tmp_path)
    assert rows == [{"val_most": 7.0}, {"val_most": 7.0}, {"most": 9.0}] * 2


@pytest.mark.parametrize(("on_step", "on_epoch"), product([None, True, False], repeat=2))
@pytest.mark.parametrize("kind", [0, 1])
def test_a_metric_is_written_by_step_and_by_epoch_as_asked(
    kind: int, on_step: Any, on_epoch: Any, tmp_path: Path
) -> None:
    make = Most if kind == 0 else kinds()[1]
    module = Measured(make, on_step=on_step, on_epoch=on_epoch)
    make_trainer(tmp_path, max_epochs=1).fit(module, data([3.0, 1.0]))
    by_step, by_epoch = (
        on_step or (on_step is None and on_epoch is False),
        on_epoch or (on_epoch is None and not on_step),
    )
    both = bool(on_step and on_epoch)
    steps = [{"most" + "_step" * both: value} for value in (3.0, 1.0)] if by_step else []
    assert rows_of(tmp_path) == steps + ([{"most" + "_epoch" * both: 3.0}] if by_epoch else [])


def test_a_metric_that_computes_several_numbers_is_named(tmp_path: Path) -> None:
    class Two(Most):
        def compute(self) -> Any:
            return {"a": 1.0}

    with pytest.raises(
        TypeError, match="the metric 'most' must compute one number, Two gives a dict; log its values by"
    ):
        make_trainer(tmp_path, max_epochs=1).fit(Measured(Two), data())


# ---- when values are read, and of which rank ----------------------------------------------------------------------


class Watched(Tensor):
    """A number that counts how often it is read."""

    reads = 0

    def __float__(self) -> float:
        Watched.reads += 1
        return super().__float__()

    def item(self) -> Any:
        Watched.reads += 1
        return super().item()


def test_nothing_is_read_before_it_is_written(tmp_path: Path) -> None:
    reads: list[int] = []

    class Counts(Callback):
        def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
            reads.append(Watched.reads)

    class Reads(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.log("a", torch.ones(()).as_subclass(Watched))
            self.log("b", torch.ones(()).as_subclass(Watched), on_epoch=True, on_step=True, sync_dist=True)
            return super().training_step(batch, batch_idx)

    Watched.reads = 0
    make_trainer(tmp_path, max_epochs=1, log_every_n_steps=4, callbacks=Counts()).fit(Reads(), data([1.0] * 7))
    assert reads[:6] == [0, 0, 0, reads[3], reads[3], reads[3]] and reads[3] >= 2  # the seventh is the epoch's last


class OnRanks(Module):
    """Ranks log in differing order; their values are their rank plus the batch's number."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.w, self.rank = torch.nn.Parameter(torch.zeros(())), rank

    def note(self, value: float, stage: str) -> None:
        names = [("mean", True), ("first", False), ("other", True)]
        for name, shared in names if self.rank == 0 else reversed(names):
            self.log(f"{stage}{name}", value + (10 if name == "other" else 0), sync_dist=shared)
        self.log(f"{stage}total", value, on_epoch=True, on_step=False)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.note(self.rank + batch_idx, "")
        return self.w * batch.mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.note(self.rank + batch_idx, "val_")

    def on_validation_epoch_end(self) -> None:
        self.log("val_end", float(self.rank), sync_dist=True)
        self.log("val_own", float(self.rank))

    def on_train_epoch_end(self) -> None:
        self.log("end", float(self.rank), sync_dist=True)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def on_ranks(group: Any, folder: Path) -> Any:
    trainer = make_trainer(folder, max_epochs=1, strategy="ddp")
    trainer.fit(OnRanks(dist.get_rank(group)), data([1.0, 2.0]), data([1.0, 2.0]))
    return rows_of(folder) if dist.get_rank(group) == 0 else trainer.callback_metrics


def test_ranks_share_what_asks_for_it_whatever_their_order(two: Any, tmp_path: Path) -> None:
    rows, metrics = two.run(2, on_ranks, tmp_path)
    first, second, val, end = rows
    assert first == {"mean": 0.5, "first": 0.0, "other": 10.5}
    assert second == {"mean": 1.5, "first": 1.0, "other": 11.5}
    assert val == {
        "val_mean": 1.0, "val_first": 1.0, "val_other": 11.0, "val_total": 1.0, "val_end": 0.5, "val_own": 0.0,
    }  # fmt: skip
    assert end == {"end": 0.5, "total": 1.0}
    assert metrics["mean"] == 1.5 and metrics["val_end"] == 0.5
