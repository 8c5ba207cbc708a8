"""Where batches come from: data modules, loaders of the module, streams, loaders that know their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from trainer_cases import (
    Classifier,
    NoisyData,
    Validated,
    assert_same_bits,
    batches,
    make_trainer,
    noisy_loader,
    read_metrics,
)

from pytrain import DataModule
from pytrain.trainer import load_checkpoint


class Data(DataModule):
    """Notes what is asked of it."""

    def __init__(self, size: int = 2, *, validates: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["validates"])
        self.calls: list[str] = []
        self.validates = validates

    def prepare_data(self) -> None:
        self.calls.append("prepare")

    def setup(self, stage: str) -> None:
        self.calls.append(f"setup {stage}")

    def train_dataloader(self) -> Any:
        self.calls.append("train")
        return batches(self.hparams.size)

    def val_dataloader(self) -> Any:
        self.calls.append("val")
        return batches(1) if self.validates else None

    def test_dataloader(self) -> Any:
        self.calls.append("test")
        return batches(3)

    def predict_dataloader(self) -> Any:
        self.calls.append("predict")
        return [x for x, _ in batches(4)]


class Whole(Validated):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.validation_step(batch, batch_idx)


@pytest.mark.parametrize("place", ["datamodule", "first"])
def test_a_data_module_gives_the_loaders_of_every_stage(place: str, tmp_path: Path) -> None:
    data, trainer = Data(), make_trainer(tmp_path, max_epochs=2)
    given = {"datamodule": data} if place == "datamodule" else {}
    first = () if given else (data,)
    module = Whole()
    trainer.fit(module, *first, **given)
    assert (len(module.seen), data.calls) == (4, ["prepare", "setup fit", "train", "val"])
    assert [row["step"] for row in read_metrics(tmp_path) if "val_loss" in row] == [2, 4]
    data.calls.clear()
    (validated,), (tested,) = trainer.validate(module, *first, **given), trainer.test(module, *first, **given)
    predicted = trainer.predict(module, *first, **given)
    assert (set(validated), set(tested), len(predicted)) == ({"val_loss"}, {"test_loss"}, 4)
    expected = [("validate", "val"), ("test", "test"), ("predict", "predict")]
    assert data.calls == [call for stage, name in expected for call in ("prepare", f"setup {stage}", name)]
    assert data.hparams == {"size": 2}


def test_a_data_module_without_validation_validates_nothing_and_given_loaders_come_first(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Classifier(), datamodule=Data(validates=False))
    assert trainer.global_step == 2
    data = Data()
    trainer.fit(Validated(), batches(5), batches(1), datamodule=data)
    assert trainer.global_step == 5 and data.calls == ["prepare", "setup fit"]


def test_loaders_of_the_module_itself(tmp_path: Path) -> None:
    class Own(Whole):
        def setup(self, stage: str) -> None:
            self.stage = stage

        def train_dataloader(self) -> Any:
            return batches(3)

        def val_dataloader(self) -> Any:
            return [DataLoader(batches(n), batch_size=None) for n in (1, 2)]

        predict_dataloader = train_dataloader

        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return self(batch[0])

        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("number", float(dataloader_idx))

    module, trainer = Own(), make_trainer(tmp_path, max_epochs=1)
    trainer.fit(module)
    assert (module.stage, trainer.global_step) == ("fit", 3)
    assert read_metrics(tmp_path)[-1] == {
        "step": 3, "epoch": 0, "number/dataloader_idx_0": 0.0, "number/dataloader_idx_1": 1.0,
    }  # fmt: skip
    assert len(trainer.predict(module)) == 3


def test_each_of_several_loaders_to_predict_is_told_its_number(tmp_path: Path) -> None:
    class Numbers(Classifier):
        def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return dataloader_idx, batch_idx

    loaders = [DataLoader(batches(n), batch_size=None) for n in (1, 2)]
    assert make_trainer(tmp_path, max_epochs=1).predict(Numbers(), loaders) == [[(0, 0)], [(1, 0), (1, 1)]]


@pytest.mark.parametrize("argument", ["train_dataloaders", "val_dataloaders"])
def test_no_loader_and_one_that_is_none_are_named(argument: str, tmp_path: Path) -> None:
    given = {"train_dataloaders": batches(1), argument: 3}
    with pytest.raises(TypeError, match=f"fit: {argument} must be an iterable of batches, got int"):
        make_trainer(tmp_path, max_epochs=1).fit(Validated(), **given)
    with pytest.raises(TypeError, match="fit: train_dataloaders must be an iterable of batches, got NoneType"):
        make_trainer(tmp_path, max_epochs=1).fit(Validated())
    with pytest.raises(TypeError, match="test: dataloaders must be an iterable of batches, got NoneType"):
        make_trainer(tmp_path, max_epochs=1).test(Whole())
    with pytest.raises(ValueError, match="Trainer: Validated has no test_step"):
        make_trainer(tmp_path, max_epochs=1).test(Validated(), batches(1))


class Stream(IterableDataset[Any]):
    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        data = NoisyData()
        return (data[int(torch.randint(0, 21, ()))] for _ in range(self.count))


def check_resume(make_loader: Any, steps: list[int], tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_epochs": 3, "enable_checkpointing": True, "checkpoint_every_n_steps": 1, "keep_checkpoints": None,
        "seed": 1,
    }  # fmt: skip
    runs = []
    for step in (None, *steps):
        folder = tmp_path / str(step)
        path = None if step is None else tmp_path / "None" / "checkpoints" / f"step-{step:08d}.ckpt"
        torch.manual_seed(999)
        module, loader = Validated(), make_loader()
        make_trainer(folder, **settings).fit(module, loader, batches(1), ckpt_path=path)
        newest = max((folder / "checkpoints").iterdir(), key=lambda path: path.name)
        runs.append((module.seen, load_checkpoint(newest)))
        if step is not None:
            assert_same_bits(module.seen, runs[0][0][step:], f"after {step}")
            for key in ("module", "optimizers", "rng", "epoch_rng"):
                assert_same_bits(runs[-1][1][key], runs[0][1][key], f"after {step}: {key}")


def test_a_stream_goes_on_inside_an_epoch(tmp_path: Path) -> None:
    check_resume(lambda: DataLoader(Stream(10), batch_size=4), [1, 3, 4], tmp_path)


class Stateful:
    """A loader that knows its place, and draws its order as a StatefulDataLoader does; counts its batches."""

    drawn = 0

    def __init__(self) -> None:
        self.left: list[int] = []
        self.loaded: list[int] | None = None

    def __len__(self) -> int:
        return 6

    def __iter__(self) -> Iterator[Any]:
        self.left, self.loaded = torch.randperm(6).tolist() if self.loaded is None else self.loaded, None
        data = batches(6)
        while self.left:
            Stateful.drawn += 1
            yield data[self.left.pop()]

    def state_dict(self) -> dict[str, Any]:
        torch.rand(2)  # to ask a loader for its place must not move the training
        return {"left": list(self.left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["left"]


def test_a_loader_that_knows_its_place_draws_nothing_twice(tmp_path: Path) -> None:
    check_resume(Stateful, [2, 6, 8], tmp_path)
    Stateful.drawn = 0
    path = tmp_path / "None" / "checkpoints" / "step-00000014.ckpt"
    make_trainer(tmp_path / "count", max_epochs=3).fit(Validated(), Stateful(), ckpt_path=path)
    assert Stateful.drawn == 4
    Stateful.drawn = 0
    path = tmp_path / "None" / "checkpoints" / "step-00000003.ckpt"
    trainer = make_trainer(tmp_path / "limit", max_epochs=1, limit_train_batches=4)
    trainer.fit(Validated(), Stateful(), ckpt_path=path)
    assert (Stateful.drawn, trainer.global_step) == (1, 4)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdatas_stateful_loader_goes_on_inside_an_epoch(workers: int, tmp_path: Path) -> None:
    """It keeps the order; what workers draw for their rows it does not repeat."""
    reason = "torchdata is not installed"
    kind = pytest.importorskip("torchdata.stateful_dataloader", reason=reason).StatefulDataLoader
    rows: Any = NoisyData() if workers == 0 else [(x, y) for x, y in zip(NoisyData().x, NoisyData().y, strict=True)]
    check_resume(lambda: kind(rows, batch_size=4, shuffle=True, num_workers=workers), [2, 6, 9], tmp_path)


def test_a_plain_loader_goes_on_when_its_checkpoint_is_of_another_length(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"enable_checkpointing": True, "max_steps": 5}
    make_trainer(tmp_path, **settings).fit(Validated(), noisy_loader())
    with pytest.raises(ValueError, match="the checkpoint was taken after batch 5 of its epoch, but train_dataloaders"):
        make_trainer(tmp_path, max_steps=9).fit(Validated(), batches(2), ckpt_path="last")


def test_batches_of_mappings_and_objects_weigh_by_their_rows(tmp_path: Path) -> None:
    from collections import UserDict

    class Rows(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("rows", float(len(batch["x"])))

    loader = [UserDict({"x": torch.ones(n, 2)}) for n in (1, 3)]
    (found,) = make_trainer(tmp_path, max_epochs=1).validate(Rows(), loader)
    assert found == {"rows": (1 * 1 + 3 * 3) / 4}


def test_hyperparameters_are_kept_by_name() -> None:
    class Kept(DataModule):
        def __init__(self, config: dict[str, int]) -> None:
            self.save_hyperparameters(config)  # type: ignore[arg-type]

    with pytest.raises(TypeError, match="argument 0 must be the name of an argument of __init__, a str, got dict"):
        Kept({"width": 3})
