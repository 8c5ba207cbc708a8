"""copy_: the bits of casts and arithmetic that round each operation, from any memory, and nothing beside it."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import there
from torch import Tensor

from pytrain import backend
from pytrain.multi import copy_, copy_by_torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
PAIRS = [*itertools.product(FLOATS, FLOATS), (torch.float64, torch.float64)]
OTHER_PAIRS = [(torch.float64, torch.float32), (torch.bfloat16, torch.float64)]
MODES = [(1.0, False), (0.3, False), (1.0, True), (0.3, True), (0.0, True)]
SHAPES: list[tuple[int, ...]] = [(), (0,), (1,), (7, 0), (5,), (33, 7), (511,), (513,), (4096,), (4097,), (9000,)]
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65504.0, 65519.9, 65520.0, -65536.0, 3.3e38, 3.4e38]
SPECIAL += [1e-40, 1.2e-38, 6e-8, 2.98e-8, 2.99e-8, 6.1e-5, 5.9e-8, 1.0 + 2.0**-8, 1.0 + 3 * 2.0**-8, 1.0 + 2.0**-11]
needs_kernels = pytest.mark.skipif(backend.facts is None, reason=f"needs the kernels: {backend.why_not_loaded}")
pairs = pytest.mark.parametrize(("to", "source"), PAIRS, ids=lambda dtype: str(dtype).removeprefix("torch."))
modes = pytest.mark.parametrize(("scale", "accumulate"), MODES)


def numbers(n: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Values of many sizes, and of the special ones as many as there is room for."""
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64, device="cpu")
    x *= 10.0 ** torch.randint(-9, 6, (n,), generator=generator, device="cpu")
    places = torch.randperm(n, generator=generator, device="cpu")[: min(n // 2, len(SPECIAL))]
    x[places] = torch.tensor(SPECIAL, dtype=torch.float64, device="cpu")[: len(places)]
    return there(x.to(dtype))


def made(dtype: torch.dtype, seed: int, shapes: list[tuple[int, ...]] = SHAPES) -> list[Tensor]:
    return [numbers(torch.Size(s).numel(), dtype, seed + i).reshape(s) for i, s in enumerate(shapes)]


def expected(to: Tensor, source: Tensor, scale: float, accumulate: bool) -> Tensor:
    """One pair, on the CPU, an operation at a time."""
    wide = torch.float64 if to.dtype == torch.float64 else torch.float32
    x = source.cpu().to(wide)
    if scale != 1.0:
        x = x * torch.tensor(scale, dtype=wide, device="cpu")
    return (to.cpu().to(wide) + x if accumulate else x).to(to.dtype)


def bits(x: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().cpu().contiguous().view(integers)


def same(found: Tensor, wanted: Tensor) -> bool:
    """The same bits, or nan in the same places."""
    both = found.cpu().isnan() & wanted.cpu().isnan()
    return found.shape == wanted.shape and bool(((bits(found) == bits(wanted)) | both).all())


def native(to: list[Tensor], sources: list[Tensor], scale: float = 1.0, accumulate: bool = False) -> int:
    taken: int = torch.ops.pytrain._copy.default(to, sources, scale, accumulate)
    return taken


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways that copy_ has."""
    if request.param == "torch":
        monkeypatch.setenv("PYTRAIN_BACKEND", "torch")
    elif backend.facts is None:
        pytest.skip(f"needs the kernels: {backend.why_not_loaded}")
    yield request.param


# ---- results ---------------------------------------------------------------------------------------------------------


@modes
@pairs
def test_each_operation_is_rounded(
    to: torch.dtype, source: torch.dtype, scale: float, accumulate: bool, path: str
) -> None:
    targets, sources = made(to, 0), made(source, 100)
    wanted = [expected(t, s, scale, accumulate) for t, s in zip(targets, sources, strict=True)]
    kept = [s.clone() for s in sources]
    copy_(targets, sources, scale=scale, accumulate=accumulate)
    assert all(map(same, targets, wanted)) and all(map(same, sources, kept))


@pytest.mark.parametrize(("to", "source"), OTHER_PAIRS)
@modes
def test_dtypes_without_kernels_take_the_torch_path(
    to: torch.dtype, source: torch.dtype, scale: float, accumulate: bool
) -> None:
    targets, sources = made(to, 0), made(source, 100)
    wanted = []
    for t, s in zip(targets, sources, strict=True):
        x = s.cpu().double() * scale
        wanted.append((t.cpu().double() + x if accumulate else x).to(to))
    copy_(targets, sources, scale=scale, accumulate=accumulate)
    assert all(map(same, targets, wanted))


@needs_kernels
@modes
@pytest.mark.parametrize(("to", "source"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)])
def test_a_large_tensor(to: torch.dtype, source: torch.dtype, scale: float, accumulate: bool) -> None:
    n = 2**20 + 3
    target, other = numbers(n, to, 1), numbers(n, source, 2)
    wanted = expected(target, other, scale, accumulate)
    assert native([target], [other], scale, accumulate) == -1
    assert same(target, wanted)


@needs_kernels
@pairs
def test_thousands_of_tiny_tensors(to: torch.dtype, source: torch.dtype) -> None:
    shapes: list[tuple[int, ...]] = [(k % 7,) for k in range(5000)]
    flat, other = numbers(15_000, to, 3), numbers(15_000, source, 4)
    sizes = [n for (n,) in shapes]
    total = sum(sizes)
    wanted = torch.cat([expected(flat[:total], other[:total], 0.3, True), flat[total:].cpu()])
    targets, sources = list(flat[:total].split(sizes)), list(other[:total].split(sizes))
    assert native(targets, sources, 0.3, True) == -1
    assert same(flat, wanted)


@needs_kernels
def test_pairs_of_all_dtypes_in_one_call() -> None:
    targets = [x for to, _ in PAIRS for x in made(to, 5)]
    sources = [x for _, source in PAIRS for x in made(source, 6)]
    wanted = [expected(t, s, 0.3, True) for t, s in zip(targets, sources, strict=True)]
    assert native(targets, sources, 0.3, True) == -1
    assert all(map(same, targets, wanted))


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_copy_keeps_every_pattern_of_bits(dtype: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    target = torch.empty_like(every)
    assert native([target], [every]) == -1
    assert torch.equal(bits(target), bits(every))


@needs_kernels
@pytest.mark.parametrize(("dtype", "nan"), [(torch.float32, 0x7F800001), (torch.float64, 0x7FF0000000000001)])
def test_a_copy_keeps_a_signalling_nan(dtype: torch.dtype, nan: int) -> None:
    integers = torch.int32 if dtype == torch.float32 else torch.int64
    source = torch.full((37,), nan, dtype=integers)
    target = torch.zeros(37, dtype=dtype)
    assert native([target], [source.view(dtype)]) == -1
    assert torch.equal(bits(target), source.cpu())


@needs_kernels
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", FLOATS)
def test_every_half_is_cast_as_torch_casts_it(to: torch.dtype, source: torch.dtype) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)
    target = torch.empty_like(every, dtype=to)
    assert native([target], [every]) == -1
    assert same(target, every.to(to))


@needs_kernels
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_fp32_is_rounded_to_the_nearest_even_half(to: torch.dtype) -> None:
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(to).float()
    finite = halves[halves.isfinite()].sort().values.double()
    middles = ((finite[1:] + finite[:-1]) / 2).float()  # exact: one more bit
    beside = [torch.nextafter(middles, torch.full_like(middles, end)) for end in (-torch.inf, torch.inf)]
    source = torch.cat([middles, *beside])
    target = torch.empty_like(source, dtype=to)
    assert native([target], [source]) == -1
    assert same(target, source.to(to))
    assert bool((bits(target[: len(middles)]) % 2 == 0).all())  # ties go to even


@needs_kernels
@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_a_cast_nan_keeps_its_sign_and_the_upper_bits_of_its_payload(to: torch.dtype) -> None:
    fraction = 7 if to == torch.bfloat16 else 10
    payloads = torch.tensor([0x1, 0x7FFFFF, 0x400000, 0x2AAAAA, 0x155555, 0x3FFFFF], dtype=torch.int32, device="cpu")
    patterns = torch.cat([payloads | 0x7F800000, payloads | -(2**23)])
    target = torch.zeros(len(patterns), dtype=to)
    assert native([target], [patterns.view(torch.float32).to(target.device)]) == -1
    quiet = 1 << (fraction - 1)
    wanted = ((patterns & 0x7FFFFF) >> (23 - fraction)) | quiet
    assert torch.equal(bits(target).int() & ((1 << fraction) - 1), wanted)
    assert torch.equal(bits(target) < 0, patterns < 0) and bool(target.isnan().all())


# ---- memory ----------------------------------------------------------------------------------------------------------


@needs_kernels
@pytest.mark.parametrize("accumulate", [False, True])
@pairs
def test_views_at_any_offset_and_nothing_beside_them(to: torch.dtype, source: torch.dtype, accumulate: bool) -> None:
    scale = 0.3 if accumulate else 1.0
    for begin, other_begin in [(0, 1), (1, 0), (1, 1), (3, 5), (7, 2), (8, 13), (17, 17)]:
        for n in (1, 3, 31, 64, 4095, 4100):
            flat, other = numbers(n + 40, to, n), numbers(n + 40, source, n + 1)
            view, part = flat[begin : begin + n], other[other_begin : other_begin + n]
            wanted = flat.cpu().clone()
            wanted[begin : begin + n] = expected(view, part, scale, accumulate)
            assert native([view], [part], scale, accumulate) == -1
            assert same(flat, wanted)


DENSE = {
    "transposed": lambda x: x.t(),
    "channels last": lambda x: x.reshape(4, 6, 5, 3).to(memory_format=torch.channels_last),
    "permuted": lambda x: x.reshape(6, 4, 15).permute(2, 0, 1),
    "one dimension of one": lambda x: x.reshape(1, 36, 10).transpose(0, 1),
}


@needs_kernels
@pytest.mark.parametrize("layout", DENSE)
@pairs
def test_dense_tensors_of_the_same_strides_are_walked_flat(to: torch.dtype, source: torch.dtype, layout: str) -> None:
    target, other = (DENSE[layout](numbers(360, dtype, 7).reshape(18, 20)) for dtype in (to, source))
    wanted = expected(target, other, 0.3, True)
    assert native([target], [other], 0.3, True) == -1
    assert same(target, wanted)


@pytest.mark.parametrize("accumulate", [False, True])
def test_other_strides_take_the_torch_path(accumulate: bool, path: str) -> None:
    gaps, other = numbers(600, torch.float32, 8).reshape(20, 30), numbers(200, torch.bfloat16, 9).reshape(10, 20)
    targets = [gaps[:, ::3], torch.zeros(4, 5).t(), torch.zeros(3)]
    sources = [other.t(), torch.ones(5, 4), torch.ones(1).expand(3)]
    wanted = [expected(t, s, 0.3, accumulate) for t, s in zip(targets, sources, strict=True)]
    between = gaps[:, 1::3].clone()
    copy_(targets, sources, scale=0.3, accumulate=accumulate)
    assert all(map(same, targets, wanted)) and same(gaps[:, 1::3], between)


@needs_kernels
@pairs
def test_a_tensor_may_be_its_own_source(to: torch.dtype, source: torch.dtype) -> None:
    if to == source:
        for scale, accumulate in MODES:
            targets = made(to, 10)
            wanted = [expected(t, t, scale, accumulate) for t in targets]
            assert native(targets, targets, scale, accumulate) == -1
            assert all(map(same, targets, wanted))
    else:  # another dtype in the same memory: what is written would be read
        memory = numbers(64, to, 10)
        other = memory.view(source)[: memory.numel()]
        assert native([memory[: other.numel()]], [other]) == 0


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_overlapping_pairs_are_taken_in_their_order(scale: float, path: str) -> None:
    x = torch.arange(12.0)
    copy_([x[0:4], x[4:8], x[6:10]], [x[8:12], x[0:4], torch.zeros(4)], scale=scale)
    head = [scale * v for v in (8.0, 9.0, 10.0, 11.0)]
    assert x.tolist() == [*head, scale * head[0], scale * head[1], 0.0, 0.0, 0.0, 0.0, 10.0, 11.0]


# ---- what the op does not take ---------------------------------------------------------------------------------------


def misfits() -> dict[str, tuple[Tensor, Tensor]]:
    x = torch.zeros(24)
    return {
        "sizes": (torch.zeros(3), torch.ones(4)),
        "dimensions": (torch.zeros(4), torch.ones(2, 2)),
        "strides": (torch.zeros(4, 5), torch.ones(5, 4).t()),
        "gaps": (x[::2], x[::2]),
        "expanded": (torch.zeros(1).expand(3), torch.ones(3)),
        "fp64 to fp32": (torch.zeros(3), torch.ones(3, dtype=torch.float64)),
        "fp32 to fp64": (torch.zeros(3, dtype=torch.float64), torch.ones(3)),
        "integers": (torch.zeros(3, dtype=torch.int16), torch.ones(3, dtype=torch.int16)),
        "device": (torch.zeros(3), torch.ones(3, device="meta")),
        "overlap": (x[:8], x[4:12]),
        "layout": (torch.zeros(3), torch.ones(3).to_sparse()),
    }


@needs_kernels
@pytest.mark.parametrize("what", misfits())
def test_the_first_pair_that_does_not_fit_is_named_and_nothing_is_written(what: str) -> None:
    target, source = misfits()[what]
    before, after = torch.zeros(5), torch.zeros(5)
    kept = target.clone()
    assert native([before, target, after], [torch.ones(5), source, torch.ones(5)]) == 1
    assert not before.any() and not after.any() and torch.equal(target, kept)


@needs_kernels
def test_memory_that_an_earlier_pair_uses_is_named() -> None:
    x, ones = torch.zeros(40), torch.ones(8)
    assert native([x[:8], x[20:28], x[7:15]], [ones, ones, ones]) == 2  # targets
    assert native([x[20:28], x[:8]], [ones, x[27:35]]) == 1  # a target before it
    assert native([x[:8], x[20:28]], [x[27:35], ones]) == 1  # a source before it
    assert native([x[:30], x[10:12], x[25:35]], [torch.ones(30), torch.ones(2), torch.ones(10)]) == 1
    assert not x.any()
    assert native([x[:8], x[8:16], x[16:16]], [ones, ones, x[4:4]]) == -1  # neighbours, and nothing
    assert x.sum() == 16


@pytest.mark.parametrize(
    ("to", "sources", "error", "message"),
    [
        ([1], [1, 2], ValueError, r"to has 1 tensors, sources has 2"),
        ([0, "no tensor"], [1, 1], TypeError, r"to\[1\]: expected a tensor, got str"),
        ([0, 0], [1, None], TypeError, r"sources\[1\]: expected a tensor, got NoneType"),
        ([0, 0], [1, "long"], ValueError, r"sources\[1\] has shape \(4,\), to\[1\] has \(3,\)"),
        ([0, "integer"], [1, 1], ValueError, r"to\[1\]: expected a dense floating-point tensor, got torch.int64"),
        ([0, 0], [1, "sparse"], ValueError, r"sources\[1\]: expected a dense .* got torch.float32, torch.sparse_coo"),
        ([0, "expanded"], [1, 1], ValueError, r"to\[1\] has several elements in one place: shape \(3,\), strides"),
    ],
)
def test_an_error_names_argument_and_index_before_anything_is_written(
    to: list[Any], sources: list[Any], error: type[Exception], message: str, path: str
) -> None:
    named = {
        "long": torch.ones(4),
        "integer": torch.zeros(3, dtype=torch.int64),
        "sparse": torch.ones(3).to_sparse(),
        "expanded": torch.zeros(1).expand(3),
    }
    lists = [
        [torch.full((3,), float(x)) if isinstance(x, int) else named.get(x, x) for x in part] for part in (to, sources)
    ]
    with pytest.raises(error, match=rf"^copy_: {message}"):
        copy_(*lists)
    assert torch.equal(lists[0][0], torch.full((3,), float(to[0])))


@pytest.mark.parametrize("scale", [float("inf"), float("nan")])
def test_a_scale_must_be_finite(scale: float) -> None:
    with pytest.raises(ValueError, match=r"^copy_: scale: expected a finite number, got (inf|nan)"):
        copy_([torch.zeros(1)], [torch.zeros(1)], scale=scale)


def test_nothing_to_copy(path: str) -> None:
    copy_([], [])
    empty = torch.zeros(0)
    copy_([empty], [torch.zeros(0, dtype=torch.bfloat16)], scale=0.5, accumulate=True)
    assert empty.shape == (0,)


# ---- torch -----------------------------------------------------------------------------------------------------------


def test_autograd_sees_the_write(path: str) -> None:
    weight, target = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    loss = (weight * target).sum()
    version = target._version
    copy_([target], [torch.full((3,), 2.0)])
    assert target._version > version and target.tolist() == [2.0, 2.0, 2.0] and target.is_leaf
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_negated_view_is_read_as_what_it_stands_for(path: str) -> None:
    target = torch.zeros(4)
    copy_([target], [torch._neg_view(torch.ones(4))])
    assert target.tolist() == [-1.0] * 4


def test_the_reference_is_the_same_function() -> None:
    for (to, source), (scale, accumulate) in itertools.product(PAIRS, MODES):
        targets, sources = made(to, 20), made(source, 21)
        wanted = [expected(t, s, scale, accumulate) for t, s in zip(targets, sources, strict=True)]
        copy_by_torch(targets, sources, scale, accumulate)
        assert all(map(same, targets, wanted)), (to, source, scale, accumulate)


@pytest.mark.skipif(not backend.simulated, reason="needs PYTRAIN_BACKEND=simt, which counts launches")
@pytest.mark.parametrize(("n", "launches"), [(1, 1), (120, 1), (121, 2), (361, 4)])
def test_a_launch_carries_up_to_120_pairs_of_two_dtypes(n: int, launches: int) -> None:
    count = ctypes.CDLL(str(Path(backend.__file__).with_name("_kernels_simt.so"))).pytrain_simt_launches
    count.restype = ctypes.c_longlong
    targets, sources = [torch.zeros(5) for _ in range(n)], [torch.ones(5) for _ in range(n)]
    empty = torch.zeros(0)
    before = count()
    assert native([empty, *targets], [empty, *sources]) == -1
    assert count() - before == launches and all(t.sum() == 5 for t in targets)
    assert native(targets, [s.half() if i % 2 else s for i, s in enumerate(sources)]) == -1
    assert count() - before - launches == sum(-(-k // 120) for k in (n // 2, n - n // 2) if k)


@needs_kernels
@pytest.mark.skipif(backend.simulated, reason="threads and instruction sets are the CPU's own")
def test_threads_and_instruction_sets_change_no_bit() -> None:
    sizes: list[tuple[int, ...]] = [(90_001,), (3,), (70_000,), (77,)]
    kept = torch.get_num_threads(), backend.isa()
    try:
        for to, source in PAIRS:
            found = []
            start, sources = made(to, 30, sizes), made(source, 31, sizes)
            for threads, level in itertools.product((1, 2, 5), backend.facts.isa_levels()):  # type: ignore[union-attr]
                if not backend.facts.isa_levels()[level]:  # type: ignore[union-attr]
                    continue
                torch.set_num_threads(threads)
                backend.isa(level)
                targets = [t.clone() for t in start]
                assert native(targets, sources, 0.3, True) == -1
                found.append([bits(t) for t in targets])
            assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
    finally:
        torch.set_num_threads(kept[0])
        backend.isa(kept[1])
