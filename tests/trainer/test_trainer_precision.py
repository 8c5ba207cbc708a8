"""Low-precision parameters and weighted micro-batches: as a loop by hand, also over ranks and after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from trainer_cases import Validated, assert_same_bits, batches, make_trainer, read_metrics

import pytrain
from pytrain.amp import LossScaler
from pytrain.optim import SGD, AdamW
from pytrain.trainer import Module, load_checkpoint

TRUE = {"bf16-true": torch.bfloat16, "fp16-true": torch.float16}
KEEPING: dict[str, dict[str, Any]] = {
    "masters": {"master_weights": True},
    "kahan": {"kahan": True},
    "stochastic": {"rounding": "stochastic"},
}


class Low(Validated):
    """Notes the dtypes that it sees."""

    def __init__(self, **keeping: Any) -> None:
        super().__init__(lambda params: AdamW(params, lr=0.01, **keeping), dropout=0.0)
        self.dtypes: set[Any] = set()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.dtypes |= {batch[0].dtype, batch[1].dtype, self.net(batch[0]).dtype}
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.dtypes |= {batch[0].dtype, batch[1].dtype}
        return super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize("precision", TRUE)
def test_a_true_precision_has_the_bits_of_the_loop_by_hand(precision: Any, keeping: str, tmp_path: Path) -> None:
    data, dtype = batches(4), TRUE[precision]
    ours, plain = Low(**KEEPING[keeping]), Low(**KEEPING[keeping]).to(dtype)
    trainer = make_trainer(tmp_path, max_epochs=2, precision=precision, seed=3)
    trainer.fit(ours, data, data)
    assert ours.dtypes == {dtype, torch.int64} and {p.dtype for p in ours.parameters()} == {dtype}
    torch.manual_seed(3)
    optimizer, scaler = plain.configure_optimizers(), LossScaler() if dtype == torch.float16 else None
    for i, (x, y) in enumerate(data * 2):
        optimizer.zero_grad()
        loss = plain.training_step((x.to(dtype), y), i % 4)
        (loss if scaler is None else scaler.scale(loss)).backward()
        pytrain.step(optimizer, scaler)
    assert_same_bits(dict(ours.state_dict()), dict(plain.state_dict()))
    if dtype == torch.float16:
        assert trainer.skipped_steps > 0 < trainer.global_step  # the first scale is too high for an fp16 loss


@pytest.mark.parametrize("keeping", KEEPING)
@pytest.mark.parametrize("precision", TRUE)
def test_a_true_precision_goes_on_bit_for_bit(precision: Any, keeping: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6, "precision": precision, "enable_checkpointing": True, "checkpoint_every_n_steps": 1,
        "keep_checkpoints": None, "seed": 3, "ema_decay": 0.5,
    }  # fmt: skip
    path = tmp_path / "whole" / "checkpoints" / "step-00000002.ckpt"
    for folder, start in (("whole", None), ("again", path)):
        make_trainer(tmp_path / folder, **settings).fit(Low(**KEEPING[keeping]), batches(4), ckpt_path=start)
    whole, again = (load_checkpoint(tmp_path / name / "checkpoints/step-00000006.ckpt") for name in ("whole", "again"))
    assert whole.pop("metrics_lines") > again.pop("metrics_lines")
    assert_same_bits(again, whole)


@pytest.mark.parametrize("precision", TRUE)
def test_a_true_precision_needs_an_optimizer_that_keeps_more(precision: Any, tmp_path: Path) -> None:
    for make in (AdamW, torch.optim.AdamW):
        module = Validated(lambda params, make=make: make(params, lr=0.1))
        with pytest.raises(ValueError, match="parameters in torch..*float16 lose updates.*master_weights=True"):
            make_trainer(tmp_path, max_epochs=1, precision=precision).fit(module, batches(1))


def test_evaluation_in_a_true_precision_casts_module_and_batches(tmp_path: Path) -> None:
    module = Low()
    trainer = make_trainer(tmp_path, max_epochs=1, precision="bf16-true")
    (found,) = trainer.validate(module, batches(2))
    assert module.dtypes == {torch.bfloat16, torch.int64} and set(found) == {"val_loss"}


@pytest.mark.parametrize("name", [16, "16", "16-mixed", "bf16", 32, "32-true", "16-true"])
def test_lightnings_names_of_precisions_are_taken(name: Any, tmp_path: Path) -> None:
    expected = {16: "fp16-mixed", "16": "fp16-mixed", "16-mixed": "fp16-mixed", "bf16": "bf16-mixed"}
    known = expected.get(name, "fp16-true" if name == "16-true" else "32")
    assert make_trainer(tmp_path, max_epochs=1, precision=name).config.precision == known


# ---- weighted micro-batches ---------------------------------------------------------------------------------------


class Tokens(Module):
    """The loss is w times a batch's mean, and its weight the batch's length; SGD at lr 1 shows the gradient."""

    def __init__(self, *, bare: bool = False) -> None:
        super().__init__()
        self.w, self.bare = torch.nn.Parameter(torch.ones((), dtype=torch.float64)), bare

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        weight = 1 if self.bare else torch.tensor(len(batch)) if batch_idx % 2 else len(batch)
        return {"loss": self.w * batch.mean(), "weight": weight}

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=1.0)


def tokens() -> list[Tensor]:
    draw = torch.Generator().manual_seed(8)
    return [torch.randn(n, dtype=torch.float64, generator=draw) for n in (3, 1, 7, 2, 5, 4, 6, 2)]


def expected(data: list[Tensor], window: int) -> tuple[list[float], list[float]]:
    """w after each window, and its loss: over all tokens in it."""
    w, after, losses = 1.0, [], []
    for i in range(0, len(data), window):
        mean = torch.cat(data[i : i + window]).mean().item()
        losses.append(w * mean)
        w -= mean
        after.append(w)
    return after, losses


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_window_is_the_mean_over_its_tokens(window: int, precision: Any, tmp_path: Path) -> None:
    module = Tokens()
    make_trainer(tmp_path, max_epochs=1, accumulate_grad_batches=window, precision=precision).fit(module, tokens())
    after, losses = expected(tokens(), window)
    assert module.w.item() == pytest.approx(after[-1], rel=1e-12)
    assert [row["loss"] for row in read_metrics(tmp_path)] == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_none_is_an_error_with_its_value(weight: float, tmp_path: Path) -> None:
    class Bad(Tokens):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return {"loss": self.w * 1, "weight": weight}

    with pytest.raises(ValueError, match=f'training_step: "weight" must be a finite number > 0, got {weight}'):
        make_trainer(tmp_path, max_epochs=1).fit(Bad(), tokens())


def ranks_tokens(group: Any, folder: Path, window: int, bare: bool) -> Any:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    module = Tokens(bare=bare)
    trainer = make_trainer(folder, max_epochs=1, strategy="ddp", accumulate_grad_batches=window)
    trainer.fit(module, tokens()[rank::size])
    return module.w.item(), read_metrics(folder)


def test_two_ranks_take_the_mean_over_the_tokens_of_both_and_log_it(two: Any, tmp_path: Path) -> None:
    for window in (1, 2):
        after, losses = expected(tokens(), 2 * window)
        for w, rows in two.run(2, ranks_tokens, tmp_path / str(window), window, False):
            assert w == pytest.approx(after[-1], rel=1e-12)
            assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-12)
