"""The public ops: schemas, torch's own opcheck, the same bits as the optimizers, and errors that name what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import not_second
from optim_cases import make_params, needs_kernels, ours, run, same_bits
from torch import Tensor

from pytrain import backend
from pytrain.control import CLIP_COEF, CONTROL_HEAD, CONTROL_HYPERS, CONTROL_ROW
from pytrain.optim import REGISTRY

pytestmark = needs_kernels
RULES = {rule.name: rule for cls in REGISTRY.values() for rule in cls.rules}
VALUES = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.9, "dampening": 0.2}


def arguments(rule: Any, sizes: tuple[int, ...] = (5, 0, 33), dtype: torch.dtype = torch.float32) -> list[Any]:
    """Arguments for the op of a rule."""
    torch.manual_seed(0)
    params, grads = [torch.randn(n, dtype=dtype) for n in sizes], [torch.randn(n, dtype=dtype) for n in sizes]
    states = [[torch.rand(n, dtype=dtype) for n in sizes] for _ in rule.states]
    scalars = [[torch.tensor(0.5) for _ in sizes] for _ in rule.scalars]
    steps = [[torch.tensor(3.0) for _ in sizes]] if rule.counts else []
    control = torch.zeros(CONTROL_HEAD + CONTROL_ROW, dtype=torch.float64)
    control[0] = control[CONTROL_HEAD] = control[CONTROL_HEAD + CLIP_COEF] = 1.0
    for i, name in enumerate(rule.hypers):
        control[CONTROL_HEAD + CONTROL_HYPERS + i] = VALUES.get(name, 0.3)
    return [params, grads, *states, *scalars, *steps, control, [0] * len(sizes)]


def op(rule: Any) -> Any:
    return getattr(torch.ops.pytrain, f"{rule.name}_").default


def test_cpp_and_python_have_the_same_rules() -> None:
    keys = ("states", "scalars", "hypers", "counts", "sums")
    mine = {name: {key: getattr(rule, key) for key in keys} for name, rule in RULES.items()}
    assert mine == backend.facts.rules()  # type: ignore[union-attr]


@not_second("opcheck's tensors without memory ask for the device themselves")
@pytest.mark.parametrize("name", RULES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(op(RULES[name]), tuple(arguments(RULES[name])))


@pytest.mark.parametrize("name", RULES)
def test_op_agrees_with_the_reference(name: str) -> None:
    rule = RULES[name]
    args = arguments(rule, dtype=torch.float64)
    hypers = {n: VALUES.get(n, 0.3) for n in rule.hypers}
    expected = []
    for k, p in enumerate(args[0]):
        states = [args[2 + s][k].clone() for s in range(len(rule.states))]
        scalars = [args[2 + len(states) + s][k].clone() for s in range(len(rule.scalars))]
        expected.append((p - rule.reference(p, args[1][k], *states, *scalars, t=4.0, **hypers), *states))
    op(rule)(*args)
    for k, (p, *states) in enumerate(expected):
        found = [args[0][k], *(args[2 + s][k] for s in range(len(rule.states)))]
        for a, b in zip(found, (p, *states), strict=True):
            assert torch.allclose(a, b, rtol=1e-13, atol=1e-14, equal_nan=True)
    if rule.counts:
        assert [s.item() for s in args[-3]] == [4.0] * 3


@pytest.mark.parametrize("name", RULES)
def test_a_set_flag_skips(name: str) -> None:
    args = arguments(RULES[name])
    args[-2][1] = 2.0
    before = [[t.clone() for t in part] for part in args[:-2]]
    op(RULES[name])(*args)
    for part, kept in zip(args[:-2], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, kept, strict=True))


def broken(change: Any) -> list[Any]:
    args = arguments(RULES["adamw"])
    change(args)
    return args


BROKEN: list[tuple[Any, str]] = [
    (lambda a: a[1].pop(), r"adamw_: grads has 2 tensors, params has 3"),
    (lambda a: a[2].pop(), r"adamw_: exp_avg has 2 tensors, params has 3"),
    (lambda a: a[4].pop(), r"adamw_: step has 2 tensors, params has 3"),
    (lambda a: a[-1].pop(), r"adamw_: groups has 2 entries, params has 3"),
    (lambda a: a[-1].__setitem__(1, 7), r"adamw_: groups\[1\] is 7, control has 1 rows"),
    (lambda a: a[-1].__setitem__(1, -1), r"adamw_: groups\[1\] is -1, expected >= 0"),
    (lambda a: a[1].__setitem__(2, torch.ones(4)), r"adamw_: grads\[2\] has shape \(4\), params\[2\] has \(33\)"),
    (lambda a: a[0].__setitem__(2, torch.ones(33).double()), r"adamw_: params\[2\] has a dtype unlike the others'"),
    (lambda a: a[2].__setitem__(2, torch.ones(33).double()), r"adamw_: a state of params\[2\] has"),
    (lambda a: a[3].__setitem__(2, torch.ones(32)), r"adamw_: a state of params\[2\] has a shape, strides"),
    (lambda a: a[4].__setitem__(0, torch.ones(2)), r"adamw_: step\[0\] is not one float32"),
    (lambda a: a[0].__setitem__(2, torch.ones(1).expand(33)), r"adamw_: params\[2\] has elements that share memory"),
    (lambda a: a.__setitem__(-2, torch.zeros(17).double()), r"adamw_: control must be"),
    (lambda a: a.__setitem__(-2, torch.zeros(18)), r"adamw_: control must be"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_errors_name_the_argument_and_nothing_is_written(change: Any, message: str) -> None:
    args = broken(change)
    before = [[t.clone() for t in part] for part in args[:-2]]
    with pytest.raises(RuntimeError, match=message):
        op(RULES["adamw"])(*args)
    for part, kept in zip(args[:-2], before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(part, kept, strict=True))


def test_staged_copies_are_written_back() -> None:
    args = arguments(RULES["adamw"], (6,))
    base = torch.randn(12)
    plain: list[Tensor] = [base[::2].clone()]
    args[0] = [base[::2]]
    rest = base[1::2].clone()
    op(RULES["adamw"])(*args)
    again = arguments(RULES["adamw"], (6,))
    again[0] = plain
    op(RULES["adamw"])(*again)
    assert torch.equal(base[::2], plain[0]) and torch.equal(base[1::2], rest)


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"PYTRAIN_ISA: expected baseline, avx2 or avx512, got 'sse9'"):
        backend.isa("sse9")


@pytest.mark.parametrize("name", REGISTRY)
def test_without_the_exchange_api_the_lists_give_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older torches have no DLPack C exchange API."""
    results = []
    for reader in (backend.reader, None):
        monkeypatch.setattr(backend, "reader", reader)
        params = make_params(torch.float32)
        run(ours(name, params), params, params, 3)
        results.append(params)
    assert same_bits(*results)


@pytest.mark.skipif(backend.reader is None, reason="this torch has no DLPack C exchange API")
def test_hints_are_kept_where_a_tensor_is_laid_out_as_expected() -> None:
    """Of another layout nothing is assumed, and the step is the same."""
    exchange, types, probe = torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, torch.nn.Parameter), torch.zeros(2)
    here, storage = probe._cdata, probe.untyped_storage()._cdata
    assert backend.facts.Reader(exchange, types, probe, here, storage).leaves_trails
    for wrong in ((here + 8, storage), (here, storage + 8)):
        assert not backend.facts.Reader(exchange, types, probe, *wrong).leaves_trails
    deep = torch.zeros((1,) * 6)  # whose sizes lie elsewhere
    assert not backend.facts.Reader(exchange, types, deep, deep._cdata, deep.untyped_storage()._cdata).leaves_trails


@pytest.mark.skipif(backend.reader is None, reason="this torch has no DLPack C exchange API")
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_without_hints_the_bits_are_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = backend.facts.Reader(
        torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, torch.nn.Parameter), torch.zeros(2), 0, 0
    )
    results = []
    for reader in (backend.reader, plain):
        monkeypatch.setattr(backend, "reader", reader)
        params = make_params(torch.float32, [(1, 2, 1, 3, 1, 2), (), (0,), (7,)])
        run(ours(name, params), params, params, 3)
        results.append(params)
    assert same_bits(*results)


def test_another_exchange_api_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", object(), raising=False)
    assert backend._make_reader() is None
