"""A few steps through every kind of kernel, for compute-sanitizer, which takes a hundred times as long."""

from __future__ import annotations

import torch
from gpu_cases import CASES, DEVICE, Case, parameters

import pytrain
from pytrain.amp import LossScaler

CHOSEN = ("adamw", "lamb", "novograd", "schedulefreeadamw")
TAILS: list[tuple[int, ...]] = [(), (0,), (3,), (255,), (257,), (4096,), (4097,), (8200,)]


def step(case: Case) -> None:
    """Two checked steps, over sizes around those of vectors, warps and chunks."""
    params = parameters(DEVICE, case.dtype, TAILS)
    optimizer, scaler = case.make(params), LossScaler(init_scale=2.0)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(2):
        pytrain.step(optimizer, scaler, max_norm=1.0)


if __name__ == "__main__":
    for case in CASES:
        if case.optimizer in CHOSEN:
            step(case)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    print("done")
