"""The trainer on the GPU: a step waits for the device only where a line of metrics is written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_cases import DEVICE, needs_launches
from gpu_cases import without_waiting as no_wait
from torch import Tensor, nn

import pytrain

pytestmark = needs_launches
EVERY, STEPS = 20, 60


class Net(pytrain.Module):
    """Two layers; the loss is inf at one batch. Between lines of metrics nothing may wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))
        self.watch, self.watched = ExitStack(), 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.net(batch).square().mean()
        self.log("train_loss", loss)
        return loss * torch.inf if batch_idx == 10 else loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx % EVERY == 3:
            self.watch.enter_context(no_wait())

    def on_train_step_end(self, info: pytrain.StepInfo) -> None:
        """At batch 10 a step is skipped, so that the 20th applied one is that of batch 20."""
        self.watched += 1
        if self.watched % EVERY == EVERY - 2:
            self.watch.close()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return pytrain.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("precision", ["32", "bf16-mixed"])
def test_a_step_of_the_trainer_waits_for_nothing(precision: Any, tmp_path: Path) -> None:
    module = Net().to(DEVICE)
    batches = list(torch.randn(STEPS + 1, 4, 8, device=DEVICE).unbind())
    trainer = pytrain.Trainer(
        max_steps=STEPS, log_every_n_steps=EVERY, precision=precision, gradient_clip_val=1.0, enable_progress_bar=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches)
    assert (trainer.global_step, trainer.skipped_steps, module.watched) == (STEPS, 1, STEPS + 1)
