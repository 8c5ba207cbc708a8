"""Limits of batches, steps, epochs and time, when to validate, and truncated back-propagation; with resume."""

from __future__ import annotations

import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_cases import Classifier, Mean, Validated, assert_same_bits, batches, make_trainer, read_metrics

from pytrain.callbacks import Callback, ModelCheckpoint
from pytrain.trainer import Module, Trainer, load_checkpoint


class Unsized:
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def ones(count: int) -> list[Tensor]:
    return [torch.ones(1) for _ in range(count)]


def check_resume(tmp_path: Path, make_module: Any, make_data: Any, steps: list[int], **settings: Any) -> None:
    """A run resumed after each of these steps ends as the one that was never interrupted: state and metrics."""
    settings = {"seed": 1, "enable_checkpointing": True, "checkpoint_every_n_steps": 1, **settings}
    runs = []
    for step in (None, *steps):
        folder = tmp_path / str(step)
        path = None if step is None else tmp_path / "None" / "checkpoints" / f"step-{step:08d}.ckpt"
        torch.manual_seed(999)
        trainer, module = make_trainer(folder, keep_checkpoints=None, **settings), make_module()
        trainer.fit(module, *make_data(), ckpt_path=path)
        newest = max((folder / "checkpoints").iterdir(), key=lambda path: path.name)
        runs.append((load_checkpoint(newest), read_metrics(folder)))
        if step is not None:
            final, rows = dict(runs[-1][0]), runs[-1][1]
            whole, whole_rows = dict(runs[0][0]), runs[0][1]
            assert rows == whole_rows[-len(rows) :], step
            assert whole.pop("metrics_lines") >= final.pop("metrics_lines")
            assert_same_bits(final, whole, f"after {step}")


@pytest.mark.parametrize(("limit", "taken"), [(3, 3), (0.5, 5), (1.0, 10), (1, 1), (20, 10), (None, 10)])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_limit_of_training_batches_holds_in_every_epoch_also_a_resumed_one(
    limit: Any, taken: int, resumed: bool, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "max_epochs": 2, "limit_train_batches": limit, "enable_checkpointing": True, "checkpoint_every_n_steps": 1,
        "keep_checkpoints": None,
    }  # fmt: skip
    module = Classifier()
    trainer = make_trainer(tmp_path, **settings)
    trainer.fit(module, batches(10))
    assert (len(module.seen), trainer.global_step, trainer.num_training_batches) == (2 * taken, 2 * taken, taken)
    if resumed:
        for step in {1, taken, taken + 1}:
            again = Classifier()
            path = tmp_path / "checkpoints" / f"step-{step:08d}.ckpt"
            make_trainer(tmp_path / str(step), **settings).fit(again, batches(10), ckpt_path=path)
            assert len(again.seen) == 2 * taken - step


def test_limits_of_loaders_without_a_length(tmp_path: Path) -> None:
    for limit, taken in ((3, 3), (1.0, 5), (None, 5)):
        trainer = make_trainer(tmp_path, max_epochs=2, limit_train_batches=limit, val_check_interval=1.0)
        trainer.fit(Validated(), Unsized(batches(5)), Unsized(batches(1)))
        assert trainer.global_step == 2 * taken
    for name in ("limit_train_batches", "val_check_interval", "overfit_batches", "limit_val_batches"):
        trainer = make_trainer(tmp_path, max_epochs=1, **{name: 0.5})
        with pytest.raises(ValueError, match=f"{name}=0.5 is a share, and the loader has no length; give an int"):
            trainer.fit(Validated(), Unsized(batches(5)), Unsized(batches(5)))
    trainer = make_trainer(tmp_path, max_epochs=1, limit_train_batches=0.01)
    with pytest.raises(ValueError, match="limit_train_batches=0.01 of 5 batches is less than one; give more, or an"):
        trainer.fit(Classifier(), batches(5))


def test_no_training_batches_is_no_training(tmp_path: Path) -> None:
    module, before = Validated(), Validated().state_dict()
    trainer = make_trainer(tmp_path, max_epochs=3, limit_train_batches=0)
    trainer.fit(module, batches(2), batches(2))
    assert trainer.global_step == 0
    assert_same_bits(dict(module.state_dict()), dict(before))


@pytest.mark.parametrize(("limit", "taken"), [(2, 2), (0.5, 3), (1.0, 6), (0, 0), (None, 6)])
def test_limits_of_validation_test_and_prediction(limit: Any, taken: int, tmp_path: Path) -> None:
    seen = []

    class Counts(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(batch_idx)

        test_step = validation_step

    settings = {f"limit_{kind}_batches": limit for kind in ("val", "test", "predict")}
    trainer = make_trainer(tmp_path, max_epochs=1, **settings)
    trainer.fit(Counts(), batches(1), batches(6))
    trainer.validate(Counts(), batches(6))
    trainer.test(Counts(), batches(6))
    assert seen == 3 * list(range(taken))
    assert len(trainer.predict(Predicts(), ones(6))) == taken


class Predicts(Mean):
    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return batch


def shuffled(count: int = 12) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(count, 6, generator=draw), torch.randint(0, 3, (count,), generator=draw))
    return DataLoader(data, batch_size=2, shuffle=True)


@pytest.mark.parametrize(("few", "taken"), [(2, 2), (0.5, 3), (1.0, 6), (0, 6), (0.0, 6)])
def test_overfitting_takes_the_same_batches_in_every_epoch(few: Any, taken: int, tmp_path: Path) -> None:
    module = Validated()
    make_trainer(tmp_path, max_epochs=3, overfit_batches=few, seed=4).fit(module, shuffled(), batches(9))
    assert len(module.seen) == 3 * taken
    same = torch.equal(torch.cat(module.seen[:taken]), torch.cat(module.seen[taken : 2 * taken]))
    assert same == bool(few)


def test_overfitting_goes_on_with_its_batches_after_a_resume(tmp_path: Path) -> None:
    check_resume(tmp_path, Validated, lambda: (shuffled(), batches(1)), [1, 2, 3], max_epochs=3, overfit_batches=2)


@pytest.mark.parametrize(
    ("interval", "epoch", "places"),
    [
        (2, 1, [2, 4, 5, 7, 9, 10]),
        (0.4, 1, [2, 4, 5, 7, 9, 10]),
        (1.0, 1, [5, 10]),
        (None, 2, [10]),
        (2, 2, [7, 9, 10]),
    ],
)
def test_validation_comes_at_its_intervals_and_goes_on_bit_for_bit(
    interval: Any, epoch: int, places: list[int], tmp_path: Path
) -> None:
    settings = {"max_epochs": 2, "val_check_interval": interval, "check_val_every_n_epoch": epoch}
    make_trainer(tmp_path / "rows", **settings).fit(Validated(), batches(5), batches(2))
    assert [row["step"] for row in read_metrics(tmp_path / "rows") if "val_loss" in row] == places
    check_resume(tmp_path, Validated, lambda: (batches(5), batches(2)), [2, 3, 5, 7], **settings)


def test_validation_inside_an_epoch_waits_for_the_windows_end(tmp_path: Path) -> None:
    settings = {"max_epochs": 1, "val_check_interval": 3, "accumulate_grad_batches": 2}
    make_trainer(tmp_path, **settings).fit(Validated(), batches(9), batches(1))
    assert [row["step"] for row in read_metrics(tmp_path) if "val_loss" in row] == [2, 3, 5]  # after 4, 6, 9 batches


def test_fast_dev_run_tries_all_loops_and_leaves_nothing(tmp_path: Path) -> None:
    for value, taken in ((True, 1), (2, 2)):
        module, folder = Validated(), tmp_path / str(value)
        trainer = Trainer(fast_dev_run=value, default_root_dir=folder, enable_progress_bar=False, max_epochs=9)
        trainer.fit(module, Unsized(batches(5)), batches(5))
        assert (len(module.seen), trainer.current_epoch, trainer.global_step) == (taken, 1, taken)
        assert "val_loss" in trainer.callback_metrics and not folder.exists()


def test_a_schedule_of_accumulation_takes_its_windows_from_each_epoch_on(tmp_path: Path) -> None:
    data = [torch.full((1,), value) for value in (1.0, 3.0, 2.0, 6.0, 4.0)]
    module, trainer = Mean(), make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches={0: 1, 2: 4})
    trainer.fit(module, data)
    assert trainer.global_step == 5 + 5 + 2 and module.w.item() == -(16 + 16 + 3 + 4)
    assert trainer.estimated_stepping_batches == 12
    check_resume(
        tmp_path, Mean, lambda: (data,), [1, 5, 10, 11], max_epochs=3, accumulate_grad_batches={0: 1, 2: 4}
    )  # fmt: skip


def test_a_run_goes_on_with_more_and_ends_at_once_with_fewer_steps_or_epochs(tmp_path: Path) -> None:
    data, settings = [torch.full((1,), 1.0)] * 5, {"enable_checkpointing": True}
    for name, first, less, more in (("max_steps", 7, 3, 9), ("max_epochs", 2, 1, 3)):
        folder = tmp_path / name
        for limit, steps in ((first, 7 if name == "max_steps" else 10), (less, 0), (more, 9 if less == 3 else 15)):
            module, trainer = Mean(), make_trainer(folder, **{name: limit}, **settings)
            trainer.fit(module, data, ckpt_path="last")
            assert trainer.global_step == (steps or (7 if name == "max_steps" else 10))
            assert module.w.item() == -trainer.global_step


def test_max_time_ends_a_run_after_the_step_under_way(tmp_path: Path) -> None:
    class Slow(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            time.sleep(0.01)
            return super().training_step(batch, batch_idx)

    trainer = make_trainer(tmp_path, max_time={"seconds": 0.1})
    trainer.fit(Slow(), Unsized(ones(10**6)))
    assert 0 < trainer.global_step < 50 and trainer.current_epoch == 0


def test_should_stop_ends_the_run_after_the_step_and_it_goes_on(tmp_path: Path) -> None:
    class Stops(Callback):
        def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
            trainer.should_stop = trainer.global_step == 7

    settings: dict[str, Any] = {"max_epochs": 3, "enable_checkpointing": True, "seed": 1}
    trainer = make_trainer(tmp_path / "run", callbacks=Stops(), **settings)
    trainer.fit(Validated(), batches(5), batches(1))
    assert (trainer.global_step, trainer.batch_idx, trainer.current_epoch) == (7, 2, 1)
    again, whole = Validated(), Validated()
    make_trainer(tmp_path / "run", **settings).fit(again, batches(5), batches(1), ckpt_path="last")
    make_trainer(tmp_path / "whole", **settings).fit(whole, batches(5), batches(1))
    assert len(again.seen) == 8
    assert_same_bits(dict(again.state_dict()), dict(whole.state_dict()))


def test_should_stop_before_the_first_step_trains_nothing(tmp_path: Path) -> None:
    class Stops(Mean):
        def on_fit_start(self) -> None:
            self.trainer.should_stop = True

    trainer = make_trainer(tmp_path, max_epochs=3)
    trainer.fit(Stops(), ones(3))
    assert trainer.global_step == 0


# ---- truncated back-propagation through time --------------------------------------------------------------------

Sequence = namedtuple("Sequence", ["x", "y"])


class Recurrent(Module):
    """An LSTM whose batches are cut into parts of `tbptt_steps`."""

    tbptt_steps = 3

    def __init__(self, *, names: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 1)
        self.names, self.hooked = names, [0]
        self.register_buffer("parts", torch.zeros(()))

    def training_step(self, batch: Any, batch_idx: int, hiddens: Any = None) -> Any:  # type: ignore[override]
        assert isinstance(batch, Sequence) == self.names
        self.parts += 1
        out, hiddens = self.lstm(batch[0], hiddens)
        loss = (self.head(out) - batch[1]).square().mean()
        self.log("mean", loss, on_epoch=True)
        return {"loss": loss, "hiddens": hiddens}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        assert batch[0].shape[1] <= 3 and isinstance(batch[0], Tensor)
        self.hooked.append(batch_idx)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        assert set(outputs) == {"loss", "hiddens"} and batch_idx == self.hooked[-1] and batch[0].shape[2] == 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, foreach=False)


def sequences(*lengths: int, names: bool = False) -> list[Any]:
    draw = torch.Generator().manual_seed(3)
    made = [(torch.randn(2, n, 2, generator=draw), torch.randn(2, n, 1, generator=draw)) for n in lengths]
    return [Sequence(*pair) for pair in made] if names else made


@pytest.mark.parametrize("names", [False, True])
def test_parts_in_time_have_the_bits_of_the_loop_by_hand(names: bool, tmp_path: Path) -> None:
    """Batches of 3, 1 (shorter than a part) and 3 parts, the last of which is short."""
    module, other = Recurrent(names=names), Recurrent()
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, sequences(9, 2, 7, names=names))
    optimizer = other.configure_optimizers()
    for x, y in sequences(9, 2, 7) * 2:
        hiddens = None
        for a, b in zip(x.split(3, dim=1), y.split(3, dim=1), strict=True):
            out, hiddens = other.lstm(a, hiddens)
            hiddens = tuple(h.detach() for h in hiddens)
            optimizer.zero_grad()
            (other.head(out) - b).square().mean().backward()
            optimizer.step()
    assert_same_bits(dict(module.lstm.state_dict()), dict(other.lstm.state_dict()))
    assert trainer.global_step == 14 and module.hooked[1:] == [0, 0, 0, 1, 2, 2, 2] * 2


@pytest.mark.parametrize("limit", [None, 2])
def test_a_run_in_parts_goes_on_inside_a_batch_and_its_limits_are_of_batches(limit: int | None, tmp_path: Path) -> None:
    data = sequences(9, 2, 7)
    module = Recurrent()
    make_trainer(tmp_path / "rows", max_epochs=1, limit_train_batches=limit).fit(module, data)
    assert module.hooked[1:] == [0, 0, 0, 1, 2, 2, 2][: 4 if limit else None]
    check_resume(tmp_path, Recurrent, lambda: (data,), [1, 2, 3, 4], max_epochs=2, limit_train_batches=limit)


def ranks_in_parts(group: Any, folder: Path, path: Path | None) -> Any:
    rank, module = dist.get_rank(group), Recurrent()
    settings: dict[str, Any] = {"max_epochs": 1, "enable_checkpointing": True, "checkpoint_every_n_steps": 1}
    trainer = make_trainer(folder, strategy="ddp", keep_checkpoints=None, **settings)
    trainer.fit(module, [(x[rank::2], y[rank::2]) for x, y in sequences(9, 9)], ckpt_path=path)
    return dict(module.lstm.state_dict())


def test_each_rank_goes_on_with_its_own_hidden_state(two: Any, tmp_path: Path) -> None:
    whole = two.run(2, ranks_in_parts, tmp_path / "whole", None)
    path = tmp_path / "whole" / "checkpoints" / "step-00000002.ckpt"
    assert_same_bits(two.run(2, ranks_in_parts, tmp_path / "again", path), whole)


def test_a_checkpoint_that_a_callback_takes_goes_on_as_the_automatic_ones(tmp_path: Path) -> None:
    """Saved at the validation that lies in the middle of the epoch, and at its end."""
    runs = []
    for name in ("whole", "again"):
        callback = ModelCheckpoint(dirpath=tmp_path / name / "mine", filename="{step}", save_top_k=-1)
        module = Validated(dropout=0.0)
        path = tmp_path / "whole" / "mine" / "step=2.ckpt" if name == "again" else None
        trainer = make_trainer(tmp_path / name, max_epochs=1, val_check_interval=2, callbacks=callback)
        trainer.fit(module, batches(4), batches(1), ckpt_path=path)
        runs.append(module)
    assert_same_bits(dict(runs[0].state_dict()), dict(runs[1].state_dict()))
