"""Modules in Lightning's style run after a change of imports, as under Lightning; wrong input is named; copies work."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trainer_cases import Classifier, assert_same_bits, batches, make_trainer

import pytrain
from pytrain.trainer import Module, Trainer

# Sources as a user of Lightning has them; `pl` is the package.
AUTOENCODER = """
class LitAutoEncoder(pl.{module}):
    def __init__(self, width=4, lr=1e-2):
        super().__init__()
        self.save_hyperparameters()
        self.encoder = nn.Sequential(nn.Linear(6, self.hparams.width), nn.ReLU(), nn.Linear(self.hparams.width, 2))
        self.decoder = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, 6))

    def forward(self, x):
        return self.encoder(x)

    def training_step(self, batch, batch_idx):
        return self._step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self._step(batch, "val")

    def test_step(self, batch, batch_idx):
        self._step(batch, "test")

    def _step(self, batch, stage):
        x, _ = batch
        loss = F.mse_loss(self.decoder(self.encoder(x)), x)
        self.log(f"{{stage}}_loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.05, total_steps=self.trainer.estimated_stepping_batches
        )
        return {{"optimizer": optimizer, "lr_scheduler": {{"scheduler": scheduler, "interval": "step"}}}}
"""
CLASSIFIER = """
class LitClassifier(pl.{module}):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
        self.train_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.val_acc = torchmetrics.Accuracy(task="multiclass", num_classes=3)
        self.outputs = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)
        loss = F.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        logits = self.model(x)
        self.val_acc.update(logits, y)
        self.outputs.append(F.cross_entropy(logits, y))
        self.log("val_loss", self.outputs[-1])

    def on_validation_epoch_end(self):
        self.log("val_acc", self.val_acc.compute(), prog_bar=True)
        self.log("val_worst", torch.stack(self.outputs).max())
        self.val_acc.reset()
        self.outputs.clear()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.trainer.max_epochs)]
"""
GAN = """
class LitGan(pl.{module}):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 6))
        self.discriminator = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))

    def training_step(self, batch, batch_idx):
        x, _ = batch
        g_opt, d_opt = self.optimizers()
        z = torch.randn(len(x), 2).type_as(x)

        self.toggle_optimizer(g_opt)
        g_loss = -self.discriminator(self.generator(z)).sigmoid().log().mean()
        g_opt.zero_grad()
        self.manual_backward(g_loss)
        g_opt.step()
        self.untoggle_optimizer(g_opt)

        self.toggle_optimizer(d_opt)
        real, fake = self.discriminator(x), self.discriminator(self.generator(z).detach())
        d_loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        d_opt.zero_grad()
        self.manual_backward(d_loss)
        d_opt.step()
        self.untoggle_optimizer(d_opt)
        self.log_dict({{"g_loss": g_loss, "d_loss": d_loss}}, prog_bar=True)

    def configure_optimizers(self):
        g_opt = torch.optim.Adam(self.generator.parameters(), lr=1e-2, betas=(0.5, 0.999))
        d_opt = torch.optim.Adam(self.discriminator.parameters(), lr=1e-2, betas=(0.5, 0.999))
        return [g_opt, d_opt], []
"""
SOURCES = {"autoencoder": AUTOENCODER, "classifier": CLASSIFIER, "gan": GAN}


def loaders() -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(4)
    sets = [
        TensorDataset(torch.randn(n, 6, generator=draw), torch.randint(0, 3, (n,), generator=draw)) for n in (22, 9)
    ]
    own = torch.Generator().manual_seed(5)  # else Lightning's validation would move the order
    return DataLoader(sets[0], batch_size=4, shuffle=True, generator=own), DataLoader(sets[1], batch_size=4)


def run(name: str, package: Any, module: str, trainer: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Train a source under a package: its parameters, and what callbacks find."""
    torchmetrics = pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")
    space: dict[str, Any] = {
        "pl": package, "torch": torch, "nn": nn, "F": nn.functional, "torchmetrics": torchmetrics,
        "__name__": "lit",
    }  # fmt: skip
    exec(SOURCES[name].format(module=module), space)
    (kind,) = (value for key, value in space.items() if key.startswith("Lit"))
    package.seed_everything(7)
    own = kind()
    trainer.fit(own, *loaders()[: 1 if name == "gan" else 2])
    return dict(own.state_dict()), {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("name", SOURCES)
def test_a_module_of_lightnings_trains_as_there_after_a_change_of_imports(name: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("pytorch_lightning", reason="pytorch-lightning is not installed")
    settings = {"max_epochs": 3, "enable_progress_bar": False, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    quiet = {"enable_checkpointing": False, "logger": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = lightning.Trainer(**settings, **quiet, enable_model_summary=False)
        their_state, their_metrics = run(name, lightning, "LightningModule", theirs)
    ours = Trainer(**settings, enable_checkpointing=False)
    state, metrics = run(name, pytrain, "Module", ours)
    assert state.keys() == their_state.keys()
    for key, value in state.items():
        torch.testing.assert_close(value, their_state[key], rtol=0, atol=1e-6, msg=key)
    assert set(their_metrics) <= set(metrics)
    for key, value in their_metrics.items():
        assert metrics[key] == pytest.approx(value, abs=1e-6), key
    assert ours.global_step == 18


# ---- wrong input --------------------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"max_epochs": 0}, "max_epochs must be an int >= 1 or None, got 0"),
    ({"max_epochs": 1.5}, "max_epochs must be an int >= 1 or None, got 1.5"),
    ({"max_steps": -2}, "max_steps must be an int >= 1 or None, got -2"),
    ({"max_time": "1:2"}, 'max_time must be "days:hours:minutes:seconds"'),
    ({"accelerator": "tpu"}, "accelerator must be one of ['auto', 'cpu', 'cuda', 'gpu'], got 'tpu'"),
    ({"devices": 0}, "devices must be an int >= 1, or \"auto\", got 0"),
    ({"devices": "0,1"}, "devices must be an int >= 1, or \"auto\", got '0,1'"),
    ({"num_nodes": 0}, "num_nodes must be an int >= 1, got 0"),
    ({"strategy": "fsdp"}, "strategy must be one of ['auto', 'single', 'ddp', 'zero1', 'zero2'] or a callable"),
    ({"strategy": ["ddp"]}, "strategy must be one of"),
    ({"precision": "64"}, "precision must be one of"),
    ({"precision": [16]}, "precision must be one of"),
    ({"accumulate_grad_batches": 0}, "accumulate_grad_batches must be an int >= 1, got 0"),
    ({"accumulate_grad_batches": {0: 0}}, "accumulate_grad_batches must be an int >= 1, got 0"),
    ({"accumulate_grad_batches": {"a": 1}}, "accumulate_grad_batches: an epoch must be an int >= 0, got 'a'"),
    ({"gradient_clip_val": -1.0}, "gradient_clip_val must be None or a finite number > 0, got -1.0"),
    ({"gradient_clip_algorithm": "l1"}, "gradient_clip_algorithm must be one of ['norm', 'value'], got 'l1'"),
    ({"gradient_clip_algorithm": ["l1"]}, "gradient_clip_algorithm must be one of ['norm', 'value'], got ['l1']"),
    *(({name: bad}, f"{name} must be an int >= 0, a float in [0, 1] or None, got {bad!r}")
      for name in ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches",
                   "overfit_batches", "val_check_interval") for bad in (-1, 1.5, "2", True)),
    ({"val_check_interval": 0}, "val_check_interval must be > 0 batches or a share > 0 of an epoch, got 0"),
    ({"fast_dev_run": -1}, "fast_dev_run must be an int >= 0, got -1"),
    ({"check_val_every_n_epoch": 0}, "check_val_every_n_epoch must be an int >= 1, got 0"),
    ({"log_every_n_steps": 0}, "log_every_n_steps must be an int >= 1, got 0"),
    ({"deterministic": "yes"}, "deterministic must be one of [None, False, True, 'warn'], got 'yes'"),
    ({"seed": -1}, "seed must be an int >= 0 or None, got -1"),
    ({"seed": 2**32}, "seed must be below 2**32"),
    ({"default_root_dir": None}, "default_root_dir must be a path, got None"),
    ({"default_root_dir": 3}, "default_root_dir must be a path, got 3"),
    ({"enable_progress_bar": 1}, "enable_progress_bar must be True or False, got 1"),
    ({"checkpoint_every_n_steps": 0}, "checkpoint_every_n_steps must be an int >= 1 or None, got 0"),
    ({"keep_checkpoints": 0}, "keep_checkpoints must be an int >= 1 or None, got 0"),
    ({"ema_decay": 1.0}, "ema_decay must be None or a number in [0, 1), got 1.0"),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "words"), WRONG, ids=lambda value: str(value)[:40])
def test_a_setting_out_of_its_range_is_named_with_what_was_expected(setting: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"Trainer: {words}")):
        Trainer(**{"max_epochs": 1, **setting})


@pytest.mark.parametrize(
    ("module", "words"), [(nn.Linear(1, 1), "got Linear"), (Classifier, "got type"), (None, "got No")]
)
def test_what_is_no_module_is_named(module: Any, words: str, tmp_path: Path) -> None:
    for method in ("fit", "validate", "test", "predict"):
        with pytest.raises(TypeError, match=f"{method}: module must be a pytrain.Module, {words}"):
            getattr(make_trainer(tmp_path, max_epochs=1), method)(module, batches(1))


@pytest.mark.parametrize("output", [None, 1.0, {"los": 1}, (1, 2)])
def test_a_training_step_that_returns_no_loss_is_named(output: Any, tmp_path: Path) -> None:
    class Bad(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return output

    with pytest.raises(
        TypeError, match='training_step must return the loss, a tensor, or a dict with it as "loss"; got'
    ):
        make_trainer(tmp_path, max_epochs=1).fit(Bad(), batches(1))


# ---- copies and compiled modules ----------------------------------------------------------------------------------


def test_a_module_is_copied_and_pickled_during_and_after_fit_and_has_torchs_keys(tmp_path: Path) -> None:
    copies: list[Any] = []

    class Copies(pytrain.Callback):
        def on_train_step_end(self, trainer: Any, module: Any, info: Any) -> None:
            copies.append((copy.deepcopy(module), pickle.loads(pickle.dumps(module)), dict(module.state_dict())))

    module = Picklable()
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=Copies())
    trainer.fit(module, batches(2), batches(1))
    copies.append((copy.deepcopy(module), pickle.loads(pickle.dumps(module)), dict(module.state_dict())))
    plain = nn.ModuleDict({"net": nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))})
    assert len(copies) == 3 and module.state_dict().keys() == plain.state_dict().keys()
    for copied, loaded, _ in copies:
        for other in (copied, loaded):
            assert other._trainer is None and other.hparams == {"width": 8}
            make_trainer(tmp_path / "again", max_epochs=1).fit(other, batches(2), batches(1))
    assert module.trainer is trainer


class Picklable(Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("a", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("way", ["wrapped", "in place", "inner"])
def test_a_compiled_module_trains_as_the_plain_one(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = Picklable()
    module = copy.deepcopy(plain)
    given: Any = torch.compile(module, backend="eager") if way == "wrapped" else module
    if way == "in place":
        module.compile(backend="eager")
    elif way == "inner":
        module.net.compile(backend="eager")
    for each, folder in ((plain, "plain"), (given, way)):
        trainer = make_trainer(tmp_path / folder, max_epochs=2)
        trainer.fit(each, batches(3), batches(1))
        trainer.validate(each, batches(1))
    assert_same_bits(dict(module.state_dict()), dict(plain.state_dict()))
