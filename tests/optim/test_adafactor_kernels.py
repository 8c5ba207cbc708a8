"""Adafactor's kernels: their error, the same bits everywhere, what they write, and the op's checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_cases import (
    LAYOUTS,
    LEVELS,
    bits,
    error,
    gradients,
    isa,
    like,
    make_params,
    needs_kernels,
    run,
    same_bits,
    threads,
)
from test_adafactor import LARGE, OPTIONS, SHAPES
from torch import Tensor
from torch.nn import Parameter

from pytrain.optim.adafactor import Adafactor

pytestmark = needs_kernels


def kernels(params: list[Tensor], **options: Any) -> Adafactor:
    return Adafactor(params, fused=True, **options)


@pytest.mark.parametrize("shapes", [SHAPES, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_kernels_error_is_at_most_twice_the_torch_paths(options: dict[str, Any], shapes: list[tuple[int, ...]]) -> None:
    a = make_params(torch.float32, shapes)
    b, exact = like(a), like(a, torch.float64)
    eps = (torch.finfo(torch.float32).eps, 1e-3)
    for optimizer, params in (
        (kernels(a, **options), a),
        (Adafactor(b, fused=False, **options), b),
        (Adafactor(exact, eps=eps, fused=False, **options), exact),
    ):
        run(optimizer, params, a)
    assert error(a, exact) <= 2 * error(b, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", LEVELS)
def test_bits_are_the_same_for_all_levels_and_thread_counts(level: str, dtype: torch.dtype) -> None:
    first = make_params(dtype, SHAPES + LARGE)
    with isa("baseline"), threads(1):
        one = kernels(first, weight_decay=0.1)
        run(one, first, first, 2)
    for count in (1, 2, 3):
        params = make_params(dtype, SHAPES + LARGE)
        with isa(level), threads(count):
            other = kernels(params, weight_decay=0.1)
            run(other, params, params, 2)
        assert same_bits(params, first)
        for p, q in zip(params, first, strict=True):
            assert same_bits(list(other.state[p].values()), list(one.state[q].values()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1,), (9,), (7, 5), (5, 7), (4, 3, 3, 3), (33, 1001), (33001,)])
def test_nothing_outside_the_tensors_is_written(shape: tuple[int, ...], level: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def guarded(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        memory = torch.randn(math.prod(shape) + 33, generator=generator).abs()
        return memory, memory[17 : 17 + math.prod(shape)].view(shape)

    memory, x = guarded(shape)
    p = Parameter(x)
    grad_memory, p.grad = guarded(shape)
    optimizer = kernels([p])
    names = {"variance": shape} if len(shape) < 2 else {
        "row_var": (*shape[:-1], 1), "col_var": (*shape[:-2], 1, shape[-1])
    }  # fmt: skip
    memories = [memory]
    for name, each in names.items():
        state_memory, optimizer.state[p][name] = guarded(each)
        memories.append(state_memory)
    before, grad_before = [m.clone() for m in memories], grad_memory.clone()
    with isa(level):
        optimizer.step()
    assert same_bits([grad_memory], [grad_before])
    for now, then in zip(memories, before, strict=True):
        assert same_bits([now[:17], now[-16:]], [then[:17], then[-16:]])
        assert not torch.equal(now[17:-16], then[17:-16])
    assert all(
        optimizer.state[p][name].data_ptr() == m[17:].data_ptr() for name, m in zip(names, memories[1:], strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_parameters_and_gradients_do_not_matter(layout: str) -> None:
    x, g = torch.randn(2, 6, 5, 7), torch.randn(2, 6, 5, 7)
    plain, of_param, of_grad = Parameter(x.clone()), Parameter(LAYOUTS[layout](x)), Parameter(x.clone())
    for p in (plain, of_param, of_grad):
        p.grad = g.clone()
    of_grad.grad = LAYOUTS[layout](g)
    Adafactor([plain]).step()
    Adafactor([of_grad]).step()
    Adafactor([of_param]).step()
    assert same_bits([of_grad], [plain])
    torch.testing.assert_close(of_param, plain)


def test_negated_gradients_are_read_as_what_they_are() -> None:
    p, q = Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2))
    p.grad = torch.complex(torch.zeros(3, 2), torch.ones(3, 2)).conj().imag
    q.grad = -torch.ones(3, 2)
    assert p.grad.is_neg()
    kernels([p, q]).step()
    assert same_bits([p], [q])


def test_found_inf_skips_and_grad_scale_divides() -> None:
    params, others = make_params(torch.float32, SHAPES), make_params(torch.float32, SHAPES)
    mine, other = kernels(params), kernels(others)
    for p, q, g in zip(params, others, gradients(params, 0), strict=True):
        p.grad, q.grad = g * 1024, g
    before = like(params)
    mine.found_inf, mine.grad_scale = torch.tensor(1.0), torch.tensor(1024.0)  # type: ignore[attr-defined]
    mine.step()
    assert mine.step_was_skipped and same_bits(params, before) and not mine.state
    mine.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    mine.step()
    other.step()
    assert not mine.step_was_skipped and same_bits(params, others)


def test_versions_of_what_was_written_are_counted_up() -> None:
    p = Parameter(torch.ones(3, 2))
    p.grad = torch.ones(3, 2)
    optimizer = kernels([p])
    optimizer.step()
    written = [p, *optimizer.state[p].values()]
    before = [x._version for x in written]
    optimizer.step()
    assert all(x._version > version for x, version in zip(written, before, strict=True))
    assert p.grad._version == 0


@pytest.mark.parametrize("how", ["parameters", "states"])
def test_shared_memory_is_stepped_as_on_the_torch_path(how: str) -> None:
    results = []
    for fused in (True, False):
        x = torch.arange(1.0, 13.0, dtype=torch.float64).view(4, 3)
        params = [Parameter(x), Parameter(x if how == "parameters" else x + 1)]
        for p, scale in zip(params, (1.0, 2.0), strict=True):
            p.grad = x.clone() * scale
        optimizer = Adafactor(params, fused=fused)
        if how == "states":
            shared = {"step": torch.tensor(1.0), "row_var": x.new_ones(4, 1), "col_var": x.new_ones(1, 3)}
            for p in params:
                optimizer.state[p].update(shared)
        optimizer.step()
        results.append(params)
        assert all(optimizer.state[p]["step"] == (1 if how == "parameters" else 2) for p in params)
    assert error(results[0], results[1]) <= 1e-14


def test_both_paths_make_the_same_state() -> None:
    a, b = make_params(torch.float32, SHAPES), make_params(torch.float32, SHAPES)
    run(kernels(a), a, a, 1)
    native, slow = kernels(a), Adafactor(b, fused=False)
    run(native, a, a, 1)
    run(slow, b, b, 1)
    for p, q in zip(a, b, strict=True):
        kinds = [
            {k: (v.dtype, v.shape, v.stride()) for k, v in o.state[x].items()} for o, x in ((native, p), (slow, q))
        ]
        assert kinds[0] == kinds[1] and list(kinds[0]) == list(kinds[1])


HEAD = [1.0, 0.0, 0.0, 0.0, -1.0]  # inv_scale, found_inf, clip_value, grad_norm, first_bad


def op(**changes: Any) -> int:
    """The op over a matrix and a vector."""
    lists: dict[str, list[Any]] = {
        "params": [torch.ones(3, 2), torch.ones(4)],
        "grads": [torch.ones(3, 2), torch.ones(4)],
        "row_vars": [torch.zeros(3, 1), torch.zeros(0)],
        "col_vars": [torch.zeros(1, 2), torch.zeros(4)],
        "steps": [torch.zeros(()), torch.zeros(())],
        "groups": [0, 0],
    }
    hypers = [0.01, -0.8, -1.0, 1e-3, 1.0]
    control = changes.pop("control", torch.tensor([*HEAD, 1.0, 1.0, 1.0, 0.0, *hypers, *[0.0] * 9]).double())
    for name, second in changes.items():
        lists[name] = lists[name][:1] if second is None else [lists[name][0], second]
    written = [x for name in ("params", "row_vars", "col_vars", "steps") for x in lists[name]]
    before = [bits(x.clone()) for x in written]
    try:
        code: int = torch.ops.pytrain._adafactor(*lists.values(), control)
    except RuntimeError:
        assert all(torch.equal(bits(x), y) for x, y in zip(written, before, strict=True))
        raise
    changed = [not torch.equal(bits(x), y) for x, y in zip(written, before, strict=True) if x.numel()]
    assert all(changed) if code == -1 else not any(changed)
    return code


def test_op_steps_or_skips() -> None:
    assert op() == -1
    assert op(control=torch.tensor([1.0, 1.0, *HEAD[2:], *[0.0] * 18]).double()) == -2


BAD_TENSORS: list[tuple[dict[str, Any], str]] = [
    ({"grads": None}, r"grads has 1 entries, params has 2"),
    ({"groups": None}, r"groups has 1 entries, params has 2"),
    ({"groups": 1}, r"groups\[1\] is 1, expected 0 to 0"),
    ({"params": torch.ones(4).bfloat16()}, r"params\[1\] is neither float32 nor float64"),
    ({"params": torch.ones(8)[::2]}, r"params\[1\] is not a contiguous tensor on the CPU"),
    ({"grads": torch.ones(5)}, r"grads\[1\] has shape \(5\), params\[1\] has \(4\)"),
    ({"grads": torch.ones(4, device="meta")}, r"grads\[1\] is not a strided tensor on the CPU"),
    ({"grads": torch.ones(4).to_sparse()}, r"grads\[1\] is not a strided tensor on the CPU"),
    ({"row_vars": torch.zeros(4)}, r"row_vars\[1\] has shape \(4\), expected \(0\)"),
    ({"col_vars": torch.zeros(3)}, r"col_vars\[1\] has shape \(3\), expected \(4\)"),
    ({"col_vars": torch.zeros(4).double()}, r"col_vars\[1\] is not float32 as expected"),
    ({"col_vars": torch.zeros(8)[::2]}, r"col_vars\[1\] is not a contiguous tensor on the CPU"),
    ({"steps": torch.zeros(2)}, r"steps\[1\] has shape \(2\), expected \(\)"),
    ({"control": torch.zeros(3).double()}, r"control must be a contiguous float64 tensor of 5 \+ 18 x"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_TENSORS)
def test_op_names_what_does_not_fit_and_writes_nothing(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        op(**changes)
