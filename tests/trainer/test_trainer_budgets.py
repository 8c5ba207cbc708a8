"""The trainer's price: frames between `fit` and the user's code, and Python and C calls a step."""

from __future__ import annotations

import cProfile
import pstats
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trainer_cases import make_trainer

from pytrain.optim import AdamW
from pytrain.steps import take
from pytrain.trainer import Module, Trainer

STEPS = 200


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))


def data() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(4, 8), torch.randn(4, 1)) for _ in range(STEPS)]


class Regression(Module):
    """A three-layer MLP that logs its loss every step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.frames: list[str] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("train_loss", loss)
        if batch_idx == 1:
            self.frames = pytrain_frames(sys._getframe(1))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW(self.parameters(), lr=1e-3)


def pytrain_frames(frame: Any) -> list[str]:
    """The functions of pytrain on the stack, from the innermost out to `fit`."""
    names = []
    while frame is not None:
        code = frame.f_code
        if "pytrain" in Path(code.co_filename).parts:
            names.append(code.co_name)
        if code is Trainer.fit.__code__:
            break
        frame = frame.f_back
    return names


def calls(profile: cProfile.Profile) -> float:
    return pstats.Stats(profile).total_calls / STEPS  # type: ignore[attr-defined]


def plain_loop(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in batches:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def test_fit_reaches_training_step_within_four_frames(tmp_path: Path) -> None:
    module = Regression()
    make_trainer(tmp_path, max_epochs=1).fit(module, data()[:3])
    assert 1 <= len(module.frames) <= 4, module.frames


def test_fit_reaches_the_straight_line_of_the_step_within_three_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def watched(*args: Any) -> Any:
        seen.append(pytrain_frames(sys._getframe(1)))
        return take(*args)

    monkeypatch.setattr("pytrain.steps.take", watched)
    make_trainer(tmp_path, max_epochs=1).fit(Regression(), data()[:3])
    assert seen and 1 <= len(seen[-1]) <= 3, seen


def test_a_step_makes_no_more_calls_than_a_plain_loop_with_torchs_fused_adamw(tmp_path: Path) -> None:
    model, batches = net(), data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    plain_loop(model, optimizer, batches[:3])
    plain = cProfile.Profile()
    plain.runcall(plain_loop, model, optimizer, batches)

    module = Regression()
    trainer = make_trainer(tmp_path, max_epochs=1, log_every_n_steps=50)
    trainer.fit(Regression(), batches[:3])
    ours = cProfile.Profile()
    ours.runcall(trainer.fit, module, batches)
    assert trainer.global_step == STEPS
    assert calls(ours) <= calls(plain), f"{calls(ours):.0f} calls a step, a plain loop {calls(plain):.0f}"
