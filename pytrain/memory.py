"""Small tensors in common blocks of memory: quicker to make, and to walk, than as many of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SMALL, BLOCK_BYTES = 16384, 2**20  # tensors of up to so many elements share blocks of up to so many bytes
LINE_BYTES = 64


def is_small(tensor: Tensor) -> bool:
    """Whether what lies beside this tensor may share a block."""
    return tensor.numel() <= SMALL and tensor.is_contiguous()


def zeros_in_blocks(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Contiguous zeros of each shape; each starts a cache line, but for those of one element (step counts)."""
    per_line = LINE_BYTES // dtype.itemsize
    numels = [math.prod(shape) for shape in shapes]
    sizes = [1 if not shape else -(-numel // per_line) * per_line for shape, numel in zip(shapes, numels, strict=True)]
    made: list[Tensor] = []
    while len(made) < len(shapes):
        begin = end = len(made)
        total = 0
        while end < len(shapes) and (end == begin or (total + sizes[end]) * dtype.itemsize <= BLOCK_BYTES):
            total += sizes[end]
            end += 1
        block, offset = torch.zeros(total, dtype=dtype, device=device), 0
        for i in range(begin, end):
            made += [block[offset : offset + numels[i]].view(tuple(shapes[i]))]
            offset += sizes[i]
    return made
