"""What the tests of the GPU share: the device, what is stepped, and queues that a machine without a GPU stands in for.

Without a CUDA device the same code runs on the CPU under PYTRAIN_BACKEND=simt, so that a typing error is found there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pytrain import backend
from pytrain.optim import REGISTRY, FusedOptimizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "optim")]
from optim_cases import LR, VARIANTS  # noqa: E402
from step_cases import everything  # noqa: E402

HAS_CUDA = torch.cuda.is_available() and not backend.why_no_cuda
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
needs_launches = pytest.mark.skipif(
    not HAS_CUDA and not backend.simulated,
    reason=f"needs a CUDA device with kernels ({backend.why_no_cuda}) or PYTRAIN_BACKEND=simt; `make test-gpu` has one",
)
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason=f"needs a CUDA device ({backend.why_no_cuda or 'none is here'})")
STEPS = 4
SHAPES: list[tuple[int, ...]] = [(), (1,), (0,), (5,), (33, 7), (64, 64), (4099,), (3, 5000)]


@dataclass(frozen=True)
class Case:
    """An optimizer with options, over parameters of a dtype."""

    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.options}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def sums(self) -> bool:
        """Whether the rule needs sums over each tensor, which are rounded in another order than on the CPU."""
        return any(rule.sums for rule in REGISTRY[self.optimizer].rules)

    def make(self, params: list[Tensor]) -> FusedOptimizer:
        return REGISTRY[self.optimizer](params, lr=LR, **self.options)  # type: ignore[call-arg, arg-type]

    def results(self, device: torch.device | str) -> list[Tensor]:
        """Parameters and states, on the CPU, after some steps there."""
        params = parameters(device, self.dtype)
        optimizer = self.make(params)
        for step in range(STEPS):
            give_gradients(params, step)
            optimizer.step()
        return [x.cpu() for x in everything(optimizer)]


def format_cases() -> Iterator[Case]:
    """AdamW in every way of keeping parameters and states."""
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        yield Case("adamw", {}, dtype)
    for dtype in (torch.bfloat16, torch.float16):
        yield Case("adamw", {"master_weights": True}, dtype)
        yield Case("adamw", {"kahan": True}, dtype)
    yield Case("adamw", {"master_weights": "compact"}, torch.bfloat16)
    yield Case("adamw", {"rounding": "stochastic"}, torch.bfloat16)
    yield Case("adamw", {"state_dtype": "bf16"})
    yield Case("adamw", {"state_dtype": "8bit"})
    yield Case("adamw", {"state_dtype": "8bit", "rounding": "stochastic"}, torch.bfloat16)
    yield Case("adamw", {"ema_decay": 0.9, "zero_grad_in_step": True})


CASES = [Case(name, options) for name in VARIANTS for options in VARIANTS[name]] + list(format_cases())


def parameters(
    device: torch.device | str = DEVICE, dtype: torch.dtype = torch.float32, shapes: list[tuple[int, ...]] | None = None
) -> list[Tensor]:
    """Parameters with the same values on every device."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator).to(dtype) for shape in (SHAPES if shapes is None else shapes)]
    return [nn.Parameter(x.to(device)) for x in made]


def give_gradients(params: list[Tensor], seed: int, scale: float = 1.0) -> None:
    """New gradients with the same values on every device, in the memory of the old ones where there are some."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        g = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        if p.grad is None:
            p.grad = g.to(p.device)
        else:
            p.grad.copy_(g)


def run_native(script: str, *arguments: str | Path) -> None:
    """Run a script of this folder with the CPU's own kernels."""
    environment = {"PYTRAIN_BACKEND": "native", "PYTRAIN_SIMT_REMOTE": ""}
    run_script(script, *arguments, environment=environment)


def run_script(
    script: str, *arguments: str | Path, environment: dict[str, str] | None = None, under: list[str] | None = None
) -> str:
    """What a script of this folder prints; fails the test with all of it where the script does."""
    command = [*(under or []), sys.executable, str(HERE / script), *map(str, arguments)]
    done = subprocess.run(
        command, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@contextmanager
def without_waiting() -> Iterator[None]:
    """Let torch raise where the host waits for the device; nothing where there is none."""
    if not HAS_CUDA:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(body: Callable[[], object]) -> Callable[[], object]:
    """Run body once, as a warm-up, then capture it as a CUDA graph; returns what replays it, or body without a GPU."""
    if not HAS_CUDA:
        body()
        return body
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        body()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return graph.replay


@contextmanager
def another_stream() -> Iterator[None]:
    """Queue what is inside on a new stream, after what is queued already; the default stream goes on after it."""
    if not HAS_CUDA:
        yield
        return
    stream, before = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        yield
    before.wait_stream(stream)
