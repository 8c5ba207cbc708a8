"""What `python -m pytrain info` prints: versions, the build, the machine, each optimizer's backend and the reason."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from pytrain import backend, optim
from pytrain._version import __version__

SETTINGS = ("PYTRAIN_BACKEND", "PYTRAIN_ISA")


def info() -> str:
    """The report as text, one fact a line."""
    facts = backend.facts
    lines = [
        f"pytrain    {__version__}",
        f"torch      {torch.__version__} (CUDA: {torch.version.cuda or 'no'})",
        f"python     {platform.python_version()} on {platform.machine()}",
        f"threads    {torch.get_num_threads()}",
    ]
    if facts is None:
        lines.append(f"kernels    none: {backend.why_not_loaded}")
    else:
        library = Path(backend.__file__).with_name("_kernels.so")
        levels = ", ".join(name for name, has in facts.isa_levels().items() if has)
        lines += [
            f"kernels    CPU, {library.stat().st_size / 1e6:.2f} MB, {len(facts.rules())} rules, by {facts.compiler}",
            f"machine    {levels}; in use: {_in_use()}",
            f"cuda       {_cuda()}",
        ]
    lines += [f"{name:<10} {value}" for name in SETTINGS if (value := os.environ.get(name))]
    lines.append("optimizers (for a float32 parameter on the CPU):")
    lines += [f"  {cls.__name__:<10} {_choice()}" for cls in optim.REGISTRY.values()]
    return "\n".join(lines)


def _cuda() -> str:
    if backend.why_no_cuda:
        return f"no kernels: {backend.why_no_cuda}"
    library = Path(backend.__file__).with_name("_kernels_cuda.so")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return (
        f"kernels for {backend.cuda_build}, {library.stat().st_size / 1e6:.2f} MB;"
        f" devices: {', '.join(devices) or 'torch finds none'}"
    )


def _in_use() -> str:
    try:
        return backend.isa()
    except RuntimeError as error:
        return f"none ({str(error).splitlines()[0]})"


def _choice() -> str:
    try:
        choice = backend.select(torch.zeros(1))
    except (RuntimeError, ValueError) as error:
        return f"error: {str(error).splitlines()[0]}"
    return f"{choice.backend}: {choice.reason}"
