"""Trains a task once in fp16 with everything on that a step can do: loss scale, clipping, average and schedule."""

from __future__ import annotations

from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

import pytrain
from pytrain.demo.compare import MAX_NORM, Verdict, warm_cosine
from pytrain.demo.tasks import Task, loss_of
from pytrain.launch import StrategyName, Team

STEPS = 150  # products in fp16 are slow on a CPU
DECAY = 0.95


class _Mixed(pytrain.Module):
    """A task for the trainer."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.model = task, task.build()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return pytrain's AdamW and the task's schedule."""
        hyper = self.task.settings
        optimizer = pytrain.optim.AdamW(
            self.model.parameters(), lr=hyper.lr, betas=hyper.betas, weight_decay=hyper.weight_decay
        )
        schedule = warm_cosine(optimizer, hyper)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_mixed(task: Task, *, goal: float, seed: int, team: Team, strategy: StrategyName = "single") -> list[Verdict]:
    """Train a task of images in fp16, and check the model and its average.

    Args:
        task: what to train; at most STEPS steps of it are taken.
        goal: the held-out accuracy that both must reach, in percent.
        seed: of the initial weights.
        team: the ranks that train, each with its part of every batch.
        strategy: how they do.
    """
    torch.manual_seed(seed)
    module = _Mixed(task)
    with TemporaryDirectory() as folder:
        trainer = pytrain.Trainer(
            max_epochs=1,
            strategy=strategy,
            precision="fp16-mixed",
            gradient_clip_val=MAX_NORM,
            ema_decay=DECAY,
            seed=seed,
            enable_progress_bar=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(module, list(islice(task.batches.part(team.rank, team.size), STEPS)))
    assert trainer.ema is not None
    model = module.model.eval()
    scores = {"the weights": task.score(model)}
    with trainer.ema.swap():
        scores["their average"] = task.score(model)
    did = f"{trainer.global_step} steps in fp16 with a loss scale and clipping, {trainer.skipped_steps} skipped"
    return [
        Verdict(score >= goal, f"{did}: held-out accuracy of {what} {score:.2f} % (expected at least {goal:g})")
        for what, score in scores.items()
    ]
