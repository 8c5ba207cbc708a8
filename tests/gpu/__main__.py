"""Runs the tests of the GPU: on a CUDA device where there is one, else the same code on the CPU, under simt."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from pytrain import backend

HERE = Path(__file__).resolve().parent


def main(argv: list[str]) -> int:
    """Run pytest with its arguments; its exit status, or 1 where a device has no kernels."""
    environment = dict(os.environ)
    if torch.cuda.is_available():
        if backend.why_no_cuda:
            print(f"there is a CUDA device, but {backend.why_no_cuda}: `make cuda` builds the kernels")
            return 1
        print(f"on {torch.cuda.get_device_name()}", flush=True)
    else:
        print("no CUDA device: the kernels run on the CPU, and what needs a device is skipped", flush=True)
        subprocess.run([sys.executable, str(HERE.parent / "simt" / "build.py")], check=True)
        environment |= {"PYTRAIN_BACKEND": "simt", "PYTRAIN_SIMT_REMOTE": "1"}
    command = [sys.executable, "-m", "pytest", str(HERE), *argv]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
