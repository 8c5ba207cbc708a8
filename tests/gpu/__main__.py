"""Runs the tests of the GPU: on a CUDA device where there is one, else the same code on the CPU, under simt."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch

from pytrain import backend

HERE = Path(__file__).resolve().parent


def run(environment: dict[str, str], *arguments: str | Path) -> int:
    """The exit status of pytest with these arguments."""
    command = [sys.executable, "-m", "pytest", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


def main(argv: list[str]) -> int:
    """Run pytest with its arguments; its exit status, or 1 where a device has no kernels."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--suites", nargs="*", default=[], help="suites of the CPU, to run with tensors on the device")
    args, rest = options.parse_known_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device: the kernels run on the CPU, and what needs a device is skipped", flush=True)
        if args.suites:
            print("the suites of the CPU's kernels do not run on one either; `make test-second` stands in", flush=True)
        subprocess.run([sys.executable, str(HERE.parent / "simt" / "build.py")], check=True)
        return run({"PYTRAIN_BACKEND": "simt", "PYTRAIN_SIMT_REMOTE": "1"}, HERE, *rest)
    if backend.why_no_cuda:
        print(f"there is a CUDA device, but {backend.why_no_cuda}: `make cuda` builds the kernels")
        return 1
    print(f"on {torch.cuda.get_device_name()}", flush=True)
    status = run({}, HERE, *rest)
    if args.suites:
        suites = run({"PYTRAIN_TEST_DEVICE": "cuda"}, "-m", "not slow and not matrix", *args.suites, *rest)
        status = status or suites
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
