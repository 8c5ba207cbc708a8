"""Operations over many tensors at a time: in one pass of the kernels, or in torch's where there are none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pytrain import backend


@torch.no_grad()
def copy_(to: Sequence[Tensor], sources: Sequence[Tensor], *, scale: float = 1.0, accumulate: bool = False) -> None:
    r"""Copy each of `sources` into its place in `to`, scaled and cast; or add it to what stands there.

    .. math::
        t_i \leftarrow \mathrm{scale} \cdot s_i \qquad\text{or}\qquad t_i \leftarrow t_i + \mathrm{scale} \cdot s_i

    Computed in fp32, in fp64 where one of the two is fp64, and rounded to the nearest even number after each operation.
    With a scale of 1 the bits are copied where the dtypes agree. All is checked before anything is written. Pairs whose
    memory overlaps are taken in their order.

    Args:
        to: floating-point tensors, such as the views of a flat bucket.
        sources: as many, of the same shapes; dtypes, devices and strides may differ. A pair of one device, with the
            same strides and no gaps, takes the kernels if its dtypes are of fp32, bf16 and fp16, or both fp64; the
            torch path takes the whole call where one pair does not.
        scale: a finite number.
        accumulate: add.

    Raises:
        TypeError: an entry is no tensor.
        ValueError: the lists differ in length, a pair in shape, a tensor is no dense floating-point one, one of `to`
            has several elements in one place, or the scale is not finite; says which.
    """
    to, sources = list(to), list(sources)
    if len(to) != len(sources):
        raise ValueError(f"copy_: to has {len(to)} tensors, sources has {len(sources)}")
    if not math.isfinite(scale):
        raise ValueError(f"copy_: scale: expected a finite number, got {scale!r}")
    if not to:  # torch's operations want a tensor
        return
    native = backend.facts is not None and backend.wanted() != "torch" and _all_tensors(to) and _all_tensors(sources)
    if native and torch.ops.pytrain._copy.default(to, sources, scale, accumulate) < 0:
        torch.autograd.graph.increment_version(to)
        return
    _check(to, sources)
    if _overlap(to, sources):
        for target, source in zip(to, sources, strict=True):
            copy_by_torch([target], [source], scale, accumulate)
    else:
        copy_by_torch(to, sources, scale, accumulate)


def copy_by_torch(to: list[Tensor], sources: list[Tensor], scale: float, accumulate: bool) -> None:
    """What `copy_` does, in torch's operations: the reference, and the fallback."""
    if scale == 1.0 and not accumulate:
        torch._foreach_copy_(to, sources)
        return
    alike: dict[tuple[torch.device, torch.dtype, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(to, sources, strict=True):
        wide = torch.float64 if torch.float64 in (target.dtype, source.dtype) else torch.float32
        t, s = alike.setdefault((target.device, target.dtype, wide), ([], []))
        t += [target]
        s += [source]
    for (_, dtype, wide), (t, s) in alike.items():
        moves = [torch.empty_like(target, dtype=wide) for target in t]
        torch._foreach_copy_(moves, s)
        if scale != 1.0:
            torch._foreach_mul_(moves, scale)
        if accumulate and dtype == wide:
            torch._foreach_add_(t, moves)
            continue
        if accumulate:
            torch._foreach_add_(moves, [target.to(wide) for target in t])
        torch._foreach_copy_(t, moves)


def _all_tensors(tensors: list[Tensor]) -> bool:
    """Whether torch takes the list as one of tensors; `_check` says which entry is none."""
    return all(issubclass(kind, Tensor) for kind in set(map(type, tensors)))


def _check(to: list[Tensor], sources: list[Tensor]) -> None:
    for i, (target, source) in enumerate(zip(to, sources, strict=True)):
        for name, x in (("to", target), ("sources", source)):
            if not isinstance(x, Tensor):
                raise TypeError(f"copy_: {name}[{i}]: expected a tensor, got {type(x).__name__}")
            if not x.is_floating_point() or x.layout != torch.strided:
                raise ValueError(
                    f"copy_: {name}[{i}]: expected a dense floating-point tensor, got {x.dtype}, {x.layout}"
                )
        if target.shape != source.shape:
            raise ValueError(f"copy_: sources[{i}] has shape {tuple(source.shape)}, to[{i}] has {tuple(target.shape)}")
        if target.numel() and any(n > 1 and s == 0 for n, s in zip(target.shape, target.stride(), strict=True)):
            raise ValueError(
                f"copy_: to[{i}] has several elements in one place: shape {tuple(target.shape)}, strides"
                f" {target.stride()}"
            )


def _overlap(to: list[Tensor], sources: list[Tensor]) -> bool:
    """Whether one of `to` may share memory with another tensor of the lists, so that their order matters."""
    spans = sorted([*(_span(x, True) for x in to if x.numel()), *(_span(x, False) for x in sources if x.numel())])
    end = written = -1
    for begin, stop, is_written in spans:
        if begin < (end if is_written else written):
            return True
        end = max(end, stop)
        written = max(written, stop if is_written else -1)
    return False


def _span(x: Tensor, written: bool) -> tuple[int, int, bool]:
    reach = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) + 1
    return x.data_ptr(), x.data_ptr() + reach * x.element_size(), written
