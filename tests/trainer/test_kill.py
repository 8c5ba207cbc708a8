"""A loop of one's own, killed at any moment: scaler, schedule, SWA and optimizer go on bit for bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import pytrain
from pytrain.amp import LossScaler
from pytrain.ema import SWA
from pytrain.optim import AdamW
from pytrain.trainer.checkpoint import write_checkpoint

STEPS = 60


def train(path: Path | None, *, pause: float = 0.0, resume: Path | None = None) -> list[torch.Tensor]:
    """Train, with an inf now and then; write everything after each step; return all that the end depends on."""
    torch.manual_seed(0)
    model = torch.nn.Linear(9, 5)
    optimizer = AdamW(model.parameters(), lr=0.1, state_dtype="fp32")
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
    scaler, swa = LossScaler("megatron", init_scale=256.0, growth_interval=3), SWA(model, start_step=10)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "scaler": scaler, "swa": swa}
    first = 0
    if resume is not None:
        saved = read(resume)
        first = saved.pop("step")
        for name, part in parts.items():
            part.load_state_dict(saved[name])  # type: ignore[attr-defined]
    for step in range(first, STEPS):
        x = torch.randn(4, 9, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(x).square().mean() * (float("inf") if step % 7 in (3, 4) else 1.0)
        scaler.scale(loss).backward()
        pytrain.step(optimizer, scaler, max_norm=0.5, schedule=schedule, ema=swa)
        if path is not None:
            state = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
            write_checkpoint(path, {"step": step + 1, **state})
            time.sleep(pause)
    numbers = torch.tensor([scaler.get_scale(), schedule.get_last_lr()[0], swa.n_averaged])
    averages = [swa.averages[id(p)] for p in swa.params]
    states = [x for p in model.parameters() for x in optimizer.state[p].values()]
    return [*(p.detach() for p in model.parameters()), *averages, *states, numbers]


def read(path: Path) -> dict[str, object]:
    """What was written last, by torch alone: a sealed checkpoint is a plain archive."""
    return dict(torch.load(path, weights_only=True))


@pytest.mark.parametrize("seed", range(3))
def test_a_loop_killed_at_any_moment_goes_on_bit_for_bit(seed: int, tmp_path: Path) -> None:
    path, here = tmp_path / "last.ckpt", Path(__file__)
    program = (
        f"import sys; sys.path.insert(0, {str(here.parent)!r}); from pathlib import Path; import {here.stem} as t; "
    )
    program += f"t.train(Path({str(path)!r}), pause=0.01)"
    child = subprocess.Popen([sys.executable, "-c", program])
    end = time.monotonic() + 120
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.Random(seed).uniform(0.05, 0.5))
    child.kill()
    assert child.wait() == -signal.SIGKILL
    at = read(path)["step"]
    assert isinstance(at, int) and 1 <= at < STEPS
    whole, resumed = train(None), train(None, resume=path)
    assert len(whole) == len(resumed) and all(torch.equal(x, y) for x, y in zip(whole, resumed, strict=True))
