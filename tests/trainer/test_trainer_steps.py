"""What one step of the trainer means: windows, clipping, skipped steps, precision, counts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, IterableDataset
from trainer_cases import OPTIMIZERS, Classifier, Mean, Validated, batches, make_trainer, read_metrics

import pytrain.optim
from pytrain.trainer import Trainer


class Unsized:
    """A loader that does not know its length."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


class Understated(Unsized):
    """A loader that gives more batches than its length says."""

    def __len__(self) -> int:
        return 2


class Overstated(Unsized):
    """A loader that gives fewer batches than its length says."""

    def __len__(self) -> int:
        return 100


def scalars(*values: float) -> list[Tensor]:
    return [torch.tensor([value]) for value in values]


# Window sums of these values and their quotients are exact in fp32.
@pytest.mark.parametrize(
    ("loader_type", "windows"), [(list, (4, 2)), (Unsized, (4, 2)), (Overstated, (4, 2)), (Understated, (4, 2))]
)
@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_b6_the_short_last_window_is_divided_by_its_own_length(
    loader_type: Any, windows: tuple[int, int], precision: Any, tmp_path: Path
) -> None:
    values = [1.0, 2.0, 3.0, 6.0, 8.0, 16.0]
    module = Mean()
    trainer = make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=4, precision=precision)
    trainer.fit(module, loader_type(scalars(*values)))
    first, second = values[: windows[0]], values[windows[0] :]
    assert module.w.item() == -(sum(first) / len(first) + sum(second) / len(second))


def test_a_window_shorter_than_accumulation_in_every_epoch_is_one_step_an_epoch(tmp_path: Path) -> None:
    module = Mean()
    trainer = make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=8)
    trainer.fit(module, scalars(1.0, 3.0))
    assert (trainer.global_step, module.w.item()) == (3, -6.0)


def test_accumulation_logs_the_mean_loss_of_the_window(tmp_path: Path) -> None:
    class Value(Mean):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return 0 * self.w + batch.mean()

    for loader in (scalars(1.0, 2.0, 6.0), Unsized(scalars(1.0, 2.0, 6.0))):
        make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=2).fit(Value(), loader)
        assert [row["loss"] for row in read_metrics(tmp_path)] == [1.5, 6.0]


def test_gradients_are_fresh_in_every_window(tmp_path: Path) -> None:
    module = Mean()
    module.w.grad = torch.tensor(1000.0)
    make_trainer(tmp_path, max_steps=2).fit(module, scalars(1.0, 2.0))
    assert module.w.item() == -3.0


def test_a_dict_with_the_loss_trains_as_the_loss(tmp_path: Path) -> None:
    module = Mean(as_dict=True)
    make_trainer(tmp_path, max_epochs=1).fit(module, scalars(1.0, 2.0))
    assert module.w.item() == -3.0


def test_batches_may_be_tuples_or_dicts(tmp_path: Path) -> None:
    class Keyed(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().validation_step((batch["x"], batch["y"]), batch_idx)

    pairs = batches(3)
    keyed = [{"x": x, "y": y} for x, y in pairs]
    results = []
    for module, data in ((Validated(), pairs), (Keyed(), keyed)):
        make_trainer(tmp_path, max_epochs=1, seed=1).fit(module, data, data)
        results.append(read_metrics(tmp_path))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_a_plain_run_has_the_bits_of_the_hand_written_loop(kind: str, tmp_path: Path) -> None:
    data = batches(5)
    ours, plain = Classifier(OPTIMIZERS[kind]), Classifier(OPTIMIZERS[kind])
    make_trainer(tmp_path, max_epochs=2, seed=5).fit(ours, data)
    torch.manual_seed(5)
    optimizer = plain.configure_optimizers()
    for _ in range(2):
        for batch_idx, batch in enumerate(data):
            optimizer.zero_grad(set_to_none=True)
            plain.training_step(batch, batch_idx).backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_b3_b4_a_skipped_step_changes_nothing_and_is_no_step(kind: str, tmp_path: Path) -> None:
    states: list[list[Tensor]] = []

    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            states.append([param.detach().clone() for param in self.parameters()])
            return super().training_step(batch, batch_idx)

    module = Watched(
        OPTIMIZERS[kind],
        make_schedule=lambda opt: {"scheduler": StepLR(opt, 1, gamma=0.5), "interval": "step"},
        overflow_at=(0, 2),
    )
    trainer = make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when a schedule moves before the first optimizer step
        trainer.fit(module, batches(4))
    states.append([param.detach().clone() for param in module.parameters()])
    changed = [
        any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
        for before, after in zip(states, states[1:], strict=False)
    ]
    assert changed == [False, True, False, True]
    assert (trainer.global_step, trainer.skipped_steps) == (2, 2)
    optimizer = trainer.optimizers[0]  # type: ignore[union-attr]
    first_lr = OPTIMIZERS[kind]([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"]
    assert optimizer.param_groups[0]["lr"] == first_lr * 0.25
    for state in optimizer.state.values():
        assert int(state.get("step", 2)) == 2
    rows = read_metrics(tmp_path)
    assert [(row["step"], row["skipped_steps"], row["loss_scale"]) for row in rows] == [
        (1, 1, 2.0**15),
        (2, 2, 2.0**14),
    ]


def test_max_steps_counts_applied_steps_only(tmp_path: Path) -> None:
    module = Classifier(overflow_at=(0, 1))
    trainer = make_trainer(tmp_path, max_steps=3, precision="fp16-mixed")
    trainer.fit(module, batches(10))
    assert (trainer.global_step, trainer.skipped_steps, len(module.seen)) == (3, 2, 5)


def test_an_optimizer_that_reports_a_skip_by_itself_is_believed_without_a_scaler(tmp_path: Path) -> None:
    class Picky(torch.optim.SGD):
        step_was_skipped = False

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.step_was_skipped = not self.step_was_skipped

    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(Classifier(lambda params: Picky(params, lr=1.0)), batches(4))
    assert (trainer.global_step, trainer.skipped_steps) == (2, 2)


def test_endless_skipping_ends_in_an_error_that_says_so(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, precision="fp16-mixed")
    with pytest.raises(FloatingPointError, match="64 steps in a row met an inf or nan"):
        trainer.fit(Classifier(overflow_at=range(1000)), batches(10))


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_b5_clipping_works_on_the_unscaled_gradient_with_every_optimizer(
    kind: str, algorithm: Any, tmp_path: Path
) -> None:
    """The scaled gradient is 2**16 times as large: were it clipped, or unscaled twice, the update would differ."""
    data = batches(5)
    settings: dict[str, Any] = {"gradient_clip_val": 0.125, "gradient_clip_algorithm": algorithm}
    ours, plain = (Classifier(OPTIMIZERS[kind], dropout=0.0) for _ in range(2))
    make_trainer(tmp_path, max_epochs=1, precision="fp16-mixed", **settings).fit(ours, data)
    optimizer = plain.configure_optimizers()
    scale, norms = 2.0**16, []
    for batch_idx, batch in enumerate(data):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.float16):
            loss = plain.training_step(batch, batch_idx)
        (loss * scale).backward()
        for param in plain.parameters():  # unscaled by hand: exact, for the scale is a power of two
            param.grad.div_(scale)  # type: ignore[union-attr]
        if not all(param.grad.isfinite().all() for param in plain.parameters()):  # type: ignore[union-attr]
            scale /= 2
            continue
        if algorithm == "norm":
            grads = [param.grad for param in plain.parameters() if param.grad is not None]
            norms.append(math.sqrt(math.fsum(grad.double().square().sum().item() for grad in grads)))
            for grad in grads:
                grad.mul_(min(1.0, 0.125 / (norms[-1] + 1e-6)))
        else:
            torch.nn.utils.clip_grad_value_(plain.parameters(), 0.125)
        optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a, b)
    if algorithm == "norm":
        assert [row["grad_norm"] for row in read_metrics(tmp_path)] == pytest.approx(norms, rel=1e-12)
        assert max(norms) > 0.125


@pytest.mark.parametrize(
    ("precision", "dtype"), [("32", torch.float32), ("bf16-mixed", torch.bfloat16), ("fp16-mixed", torch.float16)]
)
def test_b9_each_precision_computes_in_the_dtype_it_names(precision: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    seen = []

    class Spy(Validated):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(self.net(batch[0]).dtype)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(self.net(batch[0]).dtype)
            return super().validation_step(batch, batch_idx)

    module = Spy()
    make_trainer(tmp_path, max_epochs=1, precision=precision).fit(module, batches(1), batches(1))
    assert seen == [dtype, dtype]
    assert {param.dtype for param in module.parameters()} == {torch.float32}


def test_max_steps_in_the_middle_of_an_epoch_stops_there_and_validates(tmp_path: Path) -> None:
    module = Validated(make_schedule=lambda opt: StepLR(opt, 1, gamma=0.5))
    trainer = make_trainer(tmp_path, max_steps=7)
    trainer.fit(module, batches(5), batches(2))
    assert (trainer.global_step, trainer.current_epoch, trainer.batch_idx) == (7, 1, 2)
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if "val_loss" in row] == [5, 7]
    assert rows[-2]["lr"] == 0.005  # one full epoch, one advance


def test_max_steps_at_the_end_of_an_epoch_completes_it(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=5, max_epochs=9)
    trainer.fit(Validated(), batches(5), batches(2))
    assert (trainer.global_step, trainer.current_epoch, trainer.batch_idx) == (5, 1, 0)
    assert [row["step"] for row in read_metrics(tmp_path) if "val_loss" in row] == [5]


def test_loaders_without_a_length_train_every_epoch(tmp_path: Path) -> None:
    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(scalars(1.0, 2.0))

    for loader in (Unsized(scalars(1.0, 2.0)), DataLoader(Stream(), batch_size=None)):
        module = Mean()
        make_trainer(tmp_path, max_epochs=2).fit(module, loader)
        assert module.w.item() == -6.0


def test_a_used_up_generator_is_named_as_the_cause_in_the_second_epoch(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_epochs=2)
    with pytest.raises(ValueError, match="an iterator .generator., which can be read only once"):
        trainer.fit(Mean(), (batch for batch in scalars(1.0, 2.0)))
    assert trainer.global_step == 2


def test_a_sampler_is_told_the_epoch(tmp_path: Path) -> None:
    class Sampler:
        epochs: list[int] = []

        def set_epoch(self, epoch: int) -> None:
            self.epochs.append(epoch)

    loader = Unsized(scalars(1.0))
    loader.sampler = Sampler()  # type: ignore[attr-defined]
    make_trainer(tmp_path, max_epochs=3).fit(Mean(), loader)
    assert Sampler.epochs == [0, 1, 2]


def test_validation_runs_in_eval_mode_without_gradients_and_restores_every_mode(tmp_path: Path) -> None:
    modes = []

    class Frozen(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            modes.append((self.training, self.net[2].training, torch.is_grad_enabled()))
            return super().validation_step(batch, batch_idx)

    module = Frozen()
    module.net[2].eval()  # a part that the user froze
    make_trainer(tmp_path, max_epochs=1).fit(module, batches(1), batches(1))
    assert modes == [(False, False, False)]
    assert (module.training, module.net[0].training, module.net[2].training) == (True, True, False)


def test_a_module_left_in_eval_mode_is_trained_in_train_mode(tmp_path: Path) -> None:
    module = Classifier().eval()
    make_trainer(tmp_path, max_epochs=1).fit(module, batches(1))
    assert module.training and module.net[2].training


def test_validation_metrics_are_means_weighted_by_batch_size(tmp_path: Path) -> None:
    class Logs(Mean):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("mean", batch.mean())
            self.log("count", 1)

    make_trainer(tmp_path, max_epochs=1).fit(Logs(), scalars(1.0), [torch.ones(3), torch.full((1,), 5.0)])
    assert read_metrics(tmp_path)[-1] == {"step": 1, "epoch": 0, "mean": 2.0, "count": 1.0}


def test_a_validation_step_that_returns_no_tensor_is_refused(tmp_path: Path) -> None:
    class Bad(Mean):
        def validation_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"val_loss": 1.0}

    with pytest.raises(TypeError, match="validation_step must return a scalar tensor or None, got dict"):
        make_trainer(tmp_path, max_epochs=1).fit(Bad(), scalars(1.0), scalars(1.0))


def test_validation_does_not_change_the_training(tmp_path: Path) -> None:
    results = []
    for val_loader in (None, DataLoader(batches(3), batch_size=None, shuffle=True)):
        module = Validated()
        make_trainer(tmp_path, max_epochs=2, seed=2).fit(module, batches(3), val_loader)
        results.append(module.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name])


def test_a_seed_repeats_the_run_and_another_does_not(tmp_path: Path) -> None:
    results = []
    for seed in (1, 1, 2):
        module = Classifier()
        make_trainer(tmp_path, max_epochs=1, seed=seed).fit(module, batches(3))
        results.append(module.net[0].weight.detach().clone())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False)
    for _ in range(2):
        trainer.fit(Mean(), scalars(1.0, 2.0))
        assert (trainer.global_step, trainer.current_epoch) == (2, 1)


def test_every_registered_optimizer_trains_under_every_precision(tmp_path: Path) -> None:
    for optimizer_type in pytrain.optim.REGISTRY.values():
        for precision in ("32", "bf16-mixed", "fp16-mixed"):
            module = Classifier(lambda params, cls=optimizer_type: cls(params, lr=1e-3))  # type: ignore[misc]
            before = module.net[0].weight.detach().clone()
            trainer = make_trainer(tmp_path, max_epochs=1, precision=precision)
            trainer.fit(module, batches(2))
            assert trainer.global_step == 2 and not torch.equal(module.net[0].weight, before)
