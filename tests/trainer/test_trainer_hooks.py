"""Hooks of modules and callbacks: their order and arguments, what they may do, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from trainer_cases import Classifier, Mean, Validated, assert_same_bits, batches, make_trainer, read_metrics

import pytrain
from pytrain.callbacks import Callback
from pytrain.lightning import HOOKS_NOT_OFFERED
from pytrain.trainer import DataModule, load_checkpoint


class Hooked(Validated):
    """Notes every hook that is called, with a word on its arguments."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.calls: list[str] = []

    def on_fit_start(self) -> None:
        self.calls.append("fit start")

    def on_fit_end(self) -> None:
        self.calls.append("fit end")

    def on_exception(self, exception: BaseException) -> None:
        self.calls.append(f"exception {exception}")

    def on_train_epoch_start(self) -> None:
        self.calls.append(f"epoch {self.current_epoch}")

    def on_train_epoch_end(self) -> None:
        self.calls.append(f"epoch {self.current_epoch} end")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"batch {batch_idx} of {len(batch[0])}")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"batch {batch_idx} of {len(batch[0])} end {outputs.requires_grad}")

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls.append(f"before step {type(optimizer).__name__}")

    def on_train_step_end(self, info: pytrain.StepInfo) -> None:
        self.calls.append(f"step {self.global_step} {bool(info.applied)}")

    def on_validation_epoch_start(self) -> None:
        self.calls.append(f"validation {self.training}")

    def on_validation_epoch_end(self) -> None:
        self.calls.append(f"validation end {self.training}")

    def on_validation_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"val batch {batch_idx} of {len(batch[0])}")

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"val batch {batch_idx} end {outputs.requires_grad}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = list(self.calls)
        self.calls.append(f"save {checkpoint['global_step']}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.calls.append(f"load {len(checkpoint['mine']) > 0}")


VALIDATION = ["validation False", "val batch 0 of 4", "val batch 0 end False", "validation end False"]


def trained(batch: int, step: int, applied: bool = True) -> list[str]:
    before = [f"batch {batch} of 4", f"batch {batch} of 4 end True", "before step AdamW"]
    return [*before, f"step {step} {applied}"]


def test_a_modules_hooks_come_in_order_with_their_arguments(tmp_path: Path) -> None:
    module = Hooked()
    make_trainer(tmp_path, max_epochs=2, enable_checkpointing=True).fit(module, batches(2), batches(1))
    expected = ["fit start"]
    for epoch in (0, 1):
        expected += [f"epoch {epoch}", *trained(0, 2 * epoch + 1), *trained(1, 2 * epoch + 2), *VALIDATION]
        expected += [f"epoch {epoch} end", f"save {2 * epoch + 2}"]
    assert module.calls == [*expected, "fit end"]


def test_a_resumed_run_loads_first_and_begins_its_epoch_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"enable_checkpointing": True, "keep_checkpoints": None, "checkpoint_every_n_steps": 1}
    make_trainer(tmp_path, max_epochs=1, **settings).fit(Hooked(), batches(3), batches(1))
    module, path = Hooked(), tmp_path / "checkpoints" / "step-00000002.ckpt"
    make_trainer(tmp_path / "again", max_epochs=1, **settings).fit(module, batches(3), batches(1), ckpt_path=path)
    expected = ["load True", "fit start", "epoch 0", *trained(2, 3), "save 3", *VALIDATION, "epoch 0 end", "save 3"]
    assert module.calls == [*expected, "fit end"]


def test_with_accumulation_batches_have_their_numbers_and_steps_come_once_a_window(tmp_path: Path) -> None:
    module = Hooked()
    make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(module, batches(3))
    starts = [call for call in module.calls if call.startswith(("batch", "step", "before")) and "end" not in call]
    step = "before step AdamW"
    assert starts == ["batch 0 of 4", "batch 1 of 4", step, "step 1 True", "batch 2 of 4", step, "step 2 True"]


def test_an_exception_is_told_and_nothing_comes_after_it(tmp_path: Path) -> None:
    class Fails(Hooked):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise ValueError("broken")

    module, seen = Fails(), []

    class Watch(Callback):
        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            seen.append((trainer.global_step, exception))

    with pytest.raises(ValueError, match="broken") as raised:
        make_trainer(tmp_path, max_epochs=1, callbacks=Watch()).fit(module, batches(1))
    assert module.calls == ["fit start", "epoch 0", "batch 0 of 4", "exception broken"]
    assert seen == [(0, raised.value)]


def test_a_skipped_step_ends_as_one_that_was_not_applied(tmp_path: Path) -> None:
    module = Hooked(overflow_at=(0,))
    make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed").fit(module, batches(2))
    assert [call for call in module.calls if call.startswith("step")] == ["step 0 False", "step 1 True"]


class Order(Callback):
    """Notes its hooks in a list that it shares."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name, self.calls = name, calls

    state_key = property(lambda self: self.name)  # type: ignore[assignment]

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.calls.append(f"{self.name} epoch end {sorted(trainer.callback_metrics)}")

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.calls.append(f"{self.name} validation end {trainer.callback_metrics['val_mine']}")

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"{self.name} batch {batch_idx}")


class Logs(Validated):
    """Logs at epochs' ends, as modules with sums of their own do."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__()
        self.calls = calls

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.calls.append(f"module batch {batch_idx}")

    def on_train_epoch_end(self) -> None:
        self.log("train_mine", 2.0, on_epoch=True)
        self.log_dict({"a": torch.tensor(3.0)}, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val_mine", 4.0)


def test_what_a_module_logs_at_an_epochs_end_is_in_its_line_before_callbacks_look(tmp_path: Path) -> None:
    calls: list[str] = []
    callbacks = [Order("one", calls), Order("two", calls)]
    trainer = make_trainer(tmp_path, max_epochs=1, callbacks=callbacks, log_every_n_steps=2)
    trainer.fit(Logs(calls), batches(1), batches(2))
    metrics = sorted(set(trainer.callback_metrics))
    assert calls == [
        "one batch 0", "two batch 0", "module batch 0", "one validation end 4.0", "two validation end 4.0",
        f"one epoch end {metrics}", f"two epoch end {metrics}",
    ]  # fmt: skip
    train, val, means = read_metrics(tmp_path)
    assert "train_mine" not in train and val["val_mine"] == 4.0 and "val_loss" in val
    assert means == {"step": 1, "epoch": 0, "train_mine": 2.0, "a": 3.0}


def test_validate_alone_calls_the_modules_validation_hooks_and_gives_what_they_log(tmp_path: Path) -> None:
    module = Hooked()
    make_trainer(tmp_path, max_epochs=1).validate(module, batches(1))
    assert module.calls == VALIDATION
    (found,) = make_trainer(tmp_path, max_epochs=1).validate(Logs([]), batches(1))
    assert set(found) == {"val_loss", "val_mine"} and found["val_mine"] == 4.0


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_gradients_that_are_looked_at_are_unscaled_and_averaged_and_step_as_those_that_are_not(
    precision: Any, accumulate: int, tmp_path: Path
) -> None:
    """Two epochs, a clip that bites; all divisors are powers of two, so that nothing is rounded twice."""
    seen: list[list[Tensor]] = []

    class Looks(Classifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            seen.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

    plain, looks = Classifier(dropout=0.0), Looks(dropout=0.0)
    settings = {"max_epochs": 2, "precision": precision, "accumulate_grad_batches": accumulate}
    for module in (plain, looks):
        make_trainer(tmp_path, gradient_clip_val=0.05, **settings).fit(module, batches(4))
    assert len(seen) == 8 // accumulate
    assert_same_bits(looks.state_dict(), plain.state_dict())
    norms = [torch.stack([g.double().square().sum() for g in grads]).sum().sqrt() for grads in seen]
    applied = [norm.item() for norm in norms if norm.isfinite()]  # the first scale is too high for some
    assert applied and [row["grad_norm"] for row in read_metrics(tmp_path)] == pytest.approx(applied, rel=1e-12)


class SeesRanks(Mean):
    """Halves the gradients that it sees, and notes them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.w.grad is not None
        self.seen.append(self.w.grad.item())
        self.w.grad.mul_(0.5)


def sees_ranks(group: Any, folder: Path, precision: Any) -> Any:
    rank = dist.get_rank(group)
    module = SeesRanks()
    data = [torch.full((1,), value + rank) for value in (1.0, 2.0, 3.0, 4.0)]
    settings = {"max_epochs": 2, "accumulate_grad_batches": 2, "precision": precision}
    make_trainer(folder, strategy="ddp", **settings).fit(module, data)
    return module.seen, module.w.item()


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_on_two_ranks_the_hook_sees_the_mean_of_all(two: Any, precision: Any, tmp_path: Path) -> None:
    for seen, w in two.run(2, sees_ranks, tmp_path, precision):
        assert seen == [2.0, 4.0] * 2 and w == -6.0


def test_a_hook_may_change_the_gradients(tmp_path: Path) -> None:
    class Halves(Mean):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            assert self.w.grad is not None
            assert self.w.grad.item() == 3.0  # of scaled sums over two batches
            self.w.grad.mul_(0.5)

    module = Halves()
    data = [torch.full((1,), value) for value in (2.0, 4.0)]
    make_trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2, precision="fp16-mixed").fit(module, data)
    assert module.w.item() == -3.0


def test_an_overflow_stays_one_though_a_hook_hides_it(tmp_path: Path) -> None:
    class Hides(Classifier):
        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            for p in self.parameters():
                p.grad = torch.zeros_like(p)

    trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed")
    trainer.fit(Hides(overflow_at=(0,)), batches(2))
    assert (trainer.global_step, trainer.skipped_steps) == (1, 1)


def test_hooks_that_are_not_overridden_are_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("an empty hook was called")

    for name in ("on_train_batch_start", "on_train_batch_end", "on_train_step_end", "on_before_optimizer_step"):
        monkeypatch.setattr(Callback, name, refuse)
    make_trainer(tmp_path, max_epochs=1, callbacks=[Callback()]).fit(Validated(), batches(1), batches(1))


@pytest.mark.parametrize("owner", ["module", "callback"])
def test_every_hook_of_lightnings_that_there_is_not_is_an_error_with_an_alternative(owner: str, tmp_path: Path) -> None:
    for name, instead in HOOKS_NOT_OFFERED.items():
        base: Any = Classifier if owner == "module" else Callback
        other: Any = type("Other", (base,), {name: lambda self, *args: None})()
        module = other if owner == "module" else Classifier()
        trainer = make_trainer(tmp_path, max_epochs=1, callbacks=other if owner == "callback" else None)
        with pytest.raises(TypeError, match=f"Other.{name} would never be called; use") as error:
            trainer.fit(module, batches(1))
        assert str(error.value).endswith(instead)


def test_lightning_has_no_hook_that_is_neither_offered_nor_refused() -> None:
    hooks = pytest.importorskip("pytorch_lightning.core.hooks", reason="pytorch-lightning is not installed")
    lightning = pytest.importorskip("pytorch_lightning")
    owners = (hooks.ModelHooks, hooks.DataHooks, hooks.CheckpointHooks, lightning.Callback)
    theirs = {name for owner in owners for name in vars(owner) if not name.startswith("_")}
    ours = {name for owner in (Callback, DataModule, Classifier) for name in dir(owner)}
    assert theirs - ours - set(HOOKS_NOT_OFFERED) == set()


def test_a_module_may_have_a_log_metrics_of_its_own(tmp_path: Path) -> None:
    class Own(Classifier):
        def log_metrics(self, a: int, b: int, c: int) -> None:
            raise AssertionError("it is no hook")

    make_trainer(tmp_path, max_epochs=1).fit(Own(), batches(1))
    assert len(read_metrics(tmp_path)) == 1


def test_a_hook_of_an_epochs_start_that_draws_leaves_a_resumed_run_as_it_was(tmp_path: Path) -> None:
    class Draws(Validated):
        def on_train_epoch_start(self) -> None:
            torch.rand(3)

    settings: dict[str, Any] = {"enable_checkpointing": True, "checkpoint_every_n_steps": 1, "keep_checkpoints": None}
    for folder, path in (("whole", None), ("again", tmp_path / "whole" / "checkpoints" / "step-00000002.ckpt")):
        trainer = make_trainer(tmp_path / folder, max_epochs=2, seed=1, **settings)
        trainer.fit(Draws(), batches(3), ckpt_path=path)
    whole, again = (load_checkpoint(tmp_path / name / "checkpoints/step-00000006.ckpt") for name in ("whole", "again"))
    for key in ("module", "optimizers", "rng", "epoch_rng"):
        assert_same_bits(again[key], whole[key])


def test_what_load_checkpoint_changes_is_what_is_loaded(tmp_path: Path) -> None:
    class Renames(Mean):
        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["module"]["w"] = torch.tensor(7.0)

    data = [torch.ones(1)]
    make_trainer(tmp_path, max_epochs=1, enable_checkpointing=True).fit(Mean(), data)
    path = tmp_path / "checkpoints" / "step-00000001.ckpt"
    module = Renames()
    make_trainer(tmp_path / "again", max_epochs=2).fit(module, data, ckpt_path=path)
    assert module.w.item() == 6.0 and Renames.load_from_checkpoint(path).w.item() == 7.0
