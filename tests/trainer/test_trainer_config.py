"""What Trainer, fit and configure_optimizers accept, and the words they refuse with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR
from trainer_cases import Classifier, Mean, Validated, batches, make_trainer, read_metrics

from pytrain.optim import AdamW
from pytrain.trainer import Module, Trainer


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_epochs", 0, "int >= 1"),
        ("max_epochs", 1.5, "int >= 1"),
        ("max_steps", -2, "int >= 1"),
        ("max_steps", True, "int >= 1"),
        ("precision", "8", "bf16-mixed"),
        ("precision", 64, "bf16-mixed"),
        ("accumulate_grad_batches", 0, "int >= 1"),
        ("accumulate_grad_batches", None, "int >= 1"),
        ("gradient_clip_val", 0.0, "finite number > 0"),
        ("gradient_clip_val", float("nan"), "finite number > 0"),
        ("gradient_clip_val", "1", "finite number > 0"),
        ("gradient_clip_algorithm", "l2", "value"),
        ("seed", -1, "int >= 0"),
        ("seed", 2**32, "2**32"),
        ("log_every_n_steps", 0, "int >= 1"),
        ("enable_progress_bar", 1, "True or False"),
        ("enable_checkpointing", None, "True or False"),
        ("checkpoint_every_n_steps", 0, "int >= 1"),
        ("keep_checkpoints", 0, "int >= 1"),
    ],
)
def test_a_bad_setting_is_refused_with_its_name_value_and_range(name: str, value: Any, expected: str) -> None:
    settings: dict[str, Any] = {"max_steps": 1, name: value}
    with pytest.raises(ValueError) as error:
        Trainer(**settings)
    message = str(error.value)
    assert name in message and expected in message
    assert (repr(value) if not isinstance(value, str) else value) in message


def test_a_trainer_without_any_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="max_epochs and max_steps"):
        Trainer()


def test_checkpoints_by_step_without_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="checkpoint_every_n_steps=5 needs enable_checkpointing=True"):
        Trainer(max_steps=1, checkpoint_every_n_steps=5, enable_checkpointing=False)


class Configured(Mean):
    """Returns from configure_optimizers what `build` makes of its parameters."""

    def __init__(self, build: Any) -> None:
        super().__init__()
        self.build = build

    def configure_optimizers(self) -> Any:
        return self.build(list(self.parameters()))


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=1.0)


def with_schedule(shape: Any) -> Any:
    def build(params: Any) -> Any:
        optimizer = sgd(params)
        return shape(optimizer, StepLR(optimizer, step_size=1, gamma=0.5))

    return build


@pytest.mark.parametrize(
    ("shape", "lrs"),
    [
        (lambda opt, sched: opt, [1.0, 1.0, 1.0, 1.0]),
        (lambda opt, sched: [opt], [1.0, 1.0, 1.0, 1.0]),
        (lambda opt, sched: ([opt], []), [1.0, 1.0, 1.0, 1.0]),
        (lambda opt, sched: {"optimizer": opt}, [1.0, 1.0, 1.0, 1.0]),
        (lambda opt, sched: (opt, sched), [1.0, 1.0, 0.5, 0.5]),
        (lambda opt, sched: ([opt], [sched]), [1.0, 1.0, 0.5, 0.5]),
        (lambda opt, sched: {"optimizer": opt, "lr_scheduler": sched}, [1.0, 1.0, 0.5, 0.5]),
        (lambda opt, sched: ([opt], [{"scheduler": sched, "interval": "epoch"}]), [1.0, 1.0, 0.5, 0.5]),
        (
            lambda opt, sched: {"optimizer": opt, "lr_scheduler": {"scheduler": sched, "interval": "step"}},
            [0.5, 0.25, 0.125, 0.0625],
        ),
    ],
)
def test_every_form_of_configure_optimizers_drives_the_schedule_it_says(
    shape: Any, lrs: list[float], tmp_path: Path
) -> None:
    make_trainer(tmp_path, max_epochs=2).fit(Configured(with_schedule(shape)), [torch.ones(1)] * 2)
    assert [row["lr"] for row in read_metrics(tmp_path)] == lrs


@pytest.mark.parametrize(
    ("build", "kind", "words"),
    [
        (lambda p: [sgd(p), sgd(p)], NotImplementedError, "2 optimizers.*write the training loop"),
        (lambda p: (sgd(p), sgd(p)), NotImplementedError, "2 optimizers.*write the training loop"),
        (lambda p: ([sgd(p), sgd(p)], []), NotImplementedError, "2 optimizers.*write the training loop"),
        (lambda p: None, TypeError, "must return an optimizer.*got NoneType"),
        (lambda p: (sgd(p), 3, 4), TypeError, "got tuple of .SGD, int, int."),
        (lambda p: (sgd(p), 3), TypeError, "torch LRScheduler, got int"),
        (lambda p: {"optimiser": sgd(p)}, ValueError, "unknown keys .'optimiser'."),
        (lambda p: torch.optim.LBFGS(p), ValueError, "LBFGS, whose step needs a closure"),
        (lambda p: (sgd(p), StepLR(sgd(p), 1)), ValueError, "made for another optimizer"),
        (with_schedule(lambda o, s: (o, {"scheduler": s, "interval": "batch"})), ValueError, "got 'batch'"),
        (with_schedule(lambda o, s: (o, {"scheduler": s, "freq": 1})), ValueError, "unknown lr_scheduler keys"),
        (with_schedule(lambda o, s: (o, {"scheduler": s, "frequency": 0})), ValueError, "int >= 1, got 0"),
        (with_schedule(lambda o, s: (o, {"interval": "step"})), ValueError, 'has no "scheduler"'),
        (with_schedule(lambda o, s: (o, {"scheduler": s, "monitor": "x"})), ValueError, "monitor='x'"),
        (with_schedule(lambda o, s: (o, ReduceLROnPlateau(o))), ValueError, "ReduceLROnPlateau"),
    ],
)
def test_an_unfit_return_of_configure_optimizers_is_refused(
    build: Any, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        make_trainer(tmp_path, max_steps=1).fit(Configured(build), [torch.ones(1)])


def test_plateau_schedule_follows_the_monitored_validation_metric(tmp_path: Path) -> None:
    class Plateau(Validated):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            schedule = ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9)  # never better
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": self.monitor}}

    module = Plateau()
    module.monitor = "val_loss"
    make_trainer(tmp_path, max_epochs=3).fit(module, batches(1), batches(2))
    assert [row["lr"] for row in read_metrics(tmp_path) if "lr" in row] == [1.0, 0.5, 0.25]
    module.monitor = "accuracy"
    with pytest.raises(ValueError, match=r"'accuracy' is not among the validation metrics \['val_loss'\]"):
        make_trainer(tmp_path, max_epochs=1).fit(module, batches(1), batches(2))


@pytest.mark.parametrize(
    ("module", "loader", "val_loader", "kind", "words"),
    [
        (torch.nn.Linear(1, 1), [torch.ones(1)], None, TypeError, "pytrain.Module, got Linear"),
        (Mean(), 5, None, TypeError, "train_dataloaders must be an iterable of batches, got int"),
        (Mean(), None, None, TypeError, "train_dataloaders must be an iterable of batches, got NoneType"),
        (Mean(), [torch.ones(1)], 5, TypeError, "val_dataloaders must be an iterable of batches, got int"),
        (Mean(), [torch.ones(1)], [torch.ones(1)], ValueError, "Mean has no validation_step"),
        (Module(), [torch.ones(1)], None, ValueError, "Module has no parameters"),
        (Mean(), [], None, ValueError, "train_dataloaders gave no batch.*the list is empty"),
        (Validated(), batches(1), [], ValueError, "val_dataloaders gave no batch.*the list is empty"),
    ],
)
def test_unfit_arguments_of_fit_are_refused(
    module: Any, loader: Any, val_loader: Any, kind: type[Exception], words: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words):
        make_trainer(tmp_path, max_steps=1).fit(module, loader, val_loader)


def test_a_module_without_its_methods_is_refused_by_their_names(tmp_path: Path) -> None:
    class NoStep(Mean):
        training_step = Module.training_step

    class NoOptimizer(Mean):
        configure_optimizers = Module.configure_optimizers

    for module, name in ((NoStep(), "NoStep must define training_step"), (NoOptimizer(), "configure_optimizers")):
        with pytest.raises(NotImplementedError, match=name):
            make_trainer(tmp_path, max_steps=1).fit(module, [torch.ones(1)])


@pytest.mark.parametrize(
    ("output", "words"), [(None, "got NoneType"), (3.0, "got float"), ({"los": 1}, r"a dict with keys \['los'\]")]
)
def test_a_training_step_that_returns_no_loss_is_refused(output: Any, words: str, tmp_path: Path) -> None:
    class Bad(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return output

    with pytest.raises(TypeError, match=words):
        make_trainer(tmp_path, max_steps=1).fit(Bad(), [torch.ones(1)])


def test_log_refuses_reserved_names_and_values_that_are_no_numbers() -> None:
    module = Classifier()
    with pytest.raises(ValueError, match="'epoch' is reserved"):
        module.log("epoch", 1.0)
    with pytest.raises(ValueError, match=r"'a' must have exactly 1 element, got shape \(2,\)"):
        module.log("a", torch.ones(2))
    with pytest.raises(TypeError, match="'a' must be a number or a tensor, got str"):
        module.log("a", "x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "settings",
    [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}, {"precision": "fp16-mixed"}],
    ids=str,
)
def test_what_needs_all_gradients_is_refused_beside_step_in_backward(tmp_path: Path, settings: dict[str, Any]) -> None:
    module = Classifier(lambda params: AdamW(params, step_in_backward=True))
    before = [p.clone() for p in module.parameters()]
    name, value = next(iter(settings.items()))
    with pytest.raises(ValueError, match=f"Trainer: {name}={value!r} needs all gradients.*step_in_backward"):
        make_trainer(tmp_path, max_steps=1, **settings).fit(module, batches(2))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_step_in_backward_trains_like_a_step_after_it(tmp_path: Path) -> None:
    modules = [Classifier(lambda params, r=release: AdamW(params, step_in_backward=r)) for release in (True, False)]
    for module in modules:
        torch.manual_seed(0)  # dropout's
        make_trainer(tmp_path, max_steps=6).fit(module, batches(6))
    assert all(torch.equal(p, q) for p, q in zip(*(module.parameters() for module in modules), strict=True))
