"""The incumbents' wrong steps, each run here with pytrain: the right number. docs/defects.md has theirs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import StepLR

import pytrain
from pytrain.amp import LossScaler
from pytrain.optim import SGD, AdamW

INF = float("inf")


def two_steps_of_a_gan(first_bad: bool) -> list[float]:
    """How far two parameters with true gradients of 2.0 move in a step in which the scale moves."""
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    optimizers = [SGD([a], lr=1.0), SGD([b], lr=1.0)]
    scaler = LossScaler(init_scale=8.0, growth_interval=1)
    with pytrain.open_step(optimizers, scaler) as window:
        scaler.scale(a * (INF if first_bad else 2.0)).backward()
        scaler.scale(b * 2.0).backward()  # both backward passes under one scale, as Lightning's loop has them
        for optimizer in optimizers:
            window.step(optimizer)
    assert scaler.get_scale() == (4.0 if first_bad else 16.0)
    return [-a.item(), -b.item()]


def test_b1_two_optimizers_use_the_scale_of_their_backward() -> None:
    """stable-pretraining#333: Lightning updates the scale after each optimizer, and the second uses 1.0 or 4.0."""
    assert two_steps_of_a_gan(first_bad=False) == [2.0, 2.0]
    assert two_steps_of_a_gan(first_bad=True) == [0.0, 2.0]


def test_b1_an_update_after_each_optimizer_would_show() -> None:
    """The wrong composition does give the wrong numbers, so the test above can fail."""
    for bad, wrong in ((False, 1.0), (True, 4.0)):
        a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
        scaler = LossScaler(init_scale=8.0, growth_interval=1)
        scaler.scale(a * (INF if bad else 2.0)).backward()
        scaler.scale(b * 2.0).backward()
        for p in (a, b):
            scaler.step(SGD([p], lr=1.0))
            scaler.update()
        assert b.item() == -wrong


def test_b2_a_growth_step_unscales_by_the_scale_before_the_growth() -> None:
    """DeepSpeed#8588: the scale grows before the gradients are unscaled, and a true 1.0 is used as 0.5."""
    p = Parameter(torch.zeros(1))
    optimizer, scaler = SGD([p], lr=1.0), LossScaler(init_scale=4.0, growth_interval=2)
    moved = []
    for _ in range(4):
        before = p.item()
        optimizer.zero_grad()
        scaler.scale(p * 1.0).backward()
        info = pytrain.step(optimizer, scaler)
        moved.append((before - p.item(), info.scale.item()))
    assert moved == [(1.0, 4.0), (1.0, 4.0), (1.0, 8.0), (1.0, 8.0)] and scaler.get_scale() == 16.0


def test_b3_an_overflow_is_seen_and_the_schedule_waits() -> None:
    """accelerate#4242: with a fused AdamW `step_was_skipped` stays False and the schedule advances."""
    p = Parameter(torch.ones(1))
    optimizer, scaler = AdamW([p], lr=1.0), LossScaler()
    schedule = StepLR(optimizer, 1, 0.1)
    scaler.scale(p * INF).backward()
    info = pytrain.step(optimizer, scaler, schedule=schedule)
    assert (bool(info.applied), optimizer.step_was_skipped, schedule.get_last_lr()) == (False, True, [1.0])


class Toy(pytrain.Module):
    """One weight whose gradient is the batch; an inf at some batches."""

    def __init__(self, kind: Any = SGD) -> None:
        super().__init__()
        self.w, self.kind, self.dtypes = Parameter(torch.zeros(())), kind, []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        self.dtypes.append(product.dtype)
        return self.w * batch.squeeze()

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.kind(self.parameters(), lr=1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": StepLR(optimizer, 1, 0.5), "interval": "step"}}


def fit(tmp_path: Path, module: Toy, values: list[float], **settings: Any) -> pytrain.Trainer:
    trainer = pytrain.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_progress_bar=False, **settings)
    trainer.fit(module, [torch.tensor([value]) for value in values])
    return trainer


def test_b4_skipped_steps_count_for_nothing(tmp_path: Path) -> None:
    """Lightning#5558: skipped steps advance the schedule and global_step."""
    module = Toy()
    trainer = fit(tmp_path, module, [1.0, INF, INF, 1.0], precision="fp16-mixed")
    assert (trainer.global_step, trainer.skipped_steps, module.w.item()) == (2, 2, -1.5)


@pytest.mark.parametrize("kind", [AdamW, torch.optim.AdamW], ids=["pytrain", "torch"])
def test_b5_fp16_a_fused_optimizer_and_clipping_go_together(kind: Any, tmp_path: Path) -> None:
    """Lightning#15501: refused. The gradient that is clipped is the true one."""

    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = kind(params, lr=lr, fused=True)
        return optimizer

    trainer = fit(tmp_path, Toy(make), [3.0], precision="fp16-mixed", gradient_clip_val=1.5, log_every_n_steps=1)
    assert trainer.global_step == 1
    assert '"grad_norm": 3.0' in (tmp_path / "metrics.jsonl").read_text()


def test_b6_a_short_last_window_divides_by_its_own_length(tmp_path: Path) -> None:
    """Lightning#19987: the last window of one batch is divided by 4, and a true 8.0 is used as 2.0."""
    module = Toy()
    fit(tmp_path, module, [1.0, 2.0, 3.0, 6.0, 8.0], accumulate_grad_batches=4)
    assert module.w.item() == -(3.0 + 0.5 * 8.0)


def test_b8_clipping_one_model_leaves_the_other_alone() -> None:
    """Accelerate, by reading: clipping one model unscales all optimizers, and the second is unscaled twice."""
    a, b = Parameter(torch.zeros(1)), Parameter(torch.zeros(1))
    optimizers = [SGD([a], lr=1.0), SGD([b], lr=1.0)]
    scaler = LossScaler(init_scale=8.0)
    scaler.scale(a * 4.0 + b * 4.0).backward()
    with pytrain.open_step(optimizers, scaler) as window:
        assert window.step(optimizers[0], max_norm=2.0).grad_norm == 4.0
        assert window.step(optimizers[1]).grad_norm == 4.0
    assert -a.item() == pytest.approx(2.0, rel=1e-6) and b.item() == -4.0


def test_b9_fp16_on_the_cpu_is_fp16(tmp_path: Path) -> None:
    """Lightning: fp16 on the CPU silently becomes bf16."""
    module = Toy()
    fit(tmp_path, module, [1.0], precision="fp16-mixed")
    assert module.dtypes == [torch.float16]


def test_b10_to_b13_layouts_and_flags_of_torchs_fused_cpu_steps() -> None:
    """Strides unlike the parameter's, an expanded gradient, a strided parameter, found_inf = 2: see tests/optim too."""
    for flag in (1.0, 2.0):
        p = Parameter(torch.ones(2))
        optimizer: Any = AdamW([p])
        p.grad = torch.full((2,), INF)
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step()
        assert p.tolist() == [1.0, 1.0]
    base = torch.zeros(6)
    every_second = Parameter(base[::2])
    every_second.grad = torch.ones(1).expand(3)
    pytrain.step(SGD([every_second], lr=1.0), max_norm=math.sqrt(3))
    assert base.tolist() == pytest.approx([-1.0, 0.0, -1.0, 0.0, -1.0, 0.0], rel=1e-6)
