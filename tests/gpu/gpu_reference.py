"""Writes what the CPU's own kernels make of every case to a file: what the GPU is compared with."""

from __future__ import annotations

import sys

import torch
from gpu_cases import CASES

if __name__ == "__main__":
    torch.save({case.name: case.results("cpu") for case in CASES}, sys.argv[1])
