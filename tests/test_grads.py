"""GradBuckets: where gradients lie, when buckets leave, and what happens out of order; in one process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import Parameter

from pytrain.grads import ALIGN_BYTES, Bucket, BucketPlan, BucketState, GradBuckets, padding, plan_buckets


def plan(numels: Sequence[int], *, itemsize: int = 4, **options: Any) -> list[BucketPlan]:
    return plan_buckets(numels, [0] * len(numels), [itemsize] * len(numels), **options)


class Recorder:
    """Doubles each bucket, and notes which left."""

    def __init__(self) -> None:
        self.left: list[int] = []

    def __call__(self, bucket: Bucket) -> None:
        self.left.append(bucket.index)
        bucket.flat.mul_(2.0)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def loss(model: nn.Module, seed: int) -> Tensor:
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    out: Tensor = model(x).square().mean()
    return out


def own_gradients(seeds: Sequence[int]) -> list[Tensor]:
    model = net()
    for seed in seeds:
        loss(model, seed).backward()
    return [p.grad for p in model.parameters()]  # type: ignore[misc]


# ---- the layout -----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([2, 4, 8]), st.integers(0, 2)), min_size=1, max_size=40),
    st.floats(1, 1e5),
    st.sampled_from([1, 2, 3, 8, 512]),
)
def test_every_gradient_has_one_aligned_slot_and_buckets_cut_evenly(
    items: list[tuple[int, int, int]], cap: float, world: int
) -> None:
    numels, sizes = [n for n, _, _ in items], [s for _, s, _ in items]
    keys = [(s, g) for _, s, g in items]
    plans = plan_buckets(numels, keys, sizes, cap_bytes=cap, first_cap_bytes=cap / 4, world_size=world)
    seen = []
    for one in plans:
        size, _ = one.key  # type: ignore[misc]
        assert one.numel * size % (world * ALIGN_BYTES) == 0
        end = 0
        for slot in one.slots:
            assert keys[slot.param] == one.key and slot.numel == numels[slot.param]
            assert slot.offset * size % ALIGN_BYTES == 0 and slot.offset >= end
            end = slot.offset + slot.numel
            seen.append(slot.param)
        assert end <= one.numel and (end * size <= cap or len(one.slots) == 1)
    assert sorted(seen) == list(range(len(items)))
    assert [max(len(items) - 1 - s.param for s in one.slots) for one in plans] == sorted(
        max(len(items) - 1 - s.param for s in one.slots) for one in plans
    )


def test_the_last_parameter_comes_first_and_the_first_bucket_is_small() -> None:
    plans = plan([64, 64, 64, 64], cap_bytes=512, first_cap_bytes=256)
    assert [[s.param for s in one.slots] for one in plans] == [[3], [2, 1], [0]]
    assert [[s.param for s in one.slots] for one in plan([1, 2, 3], cap_bytes=float("inf"))] == [[2, 1, 0]]
    assert [[s.param for s in one.slots] for one in plan([1, 2, 3], cap_bytes=1)] == [[2], [1], [0]]
    assert [[s.param for s in one.slots] for one in plan([1, 2, 3], order=[1, 2, 0])] == [[1, 2, 0]]


def test_shards_of_a_large_model_are_balanced_on_a_thousand_ranks() -> None:
    block = [768 * 2304, 2304, 768 * 768, 768, 768 * 3072, 3072, 3072 * 768, 768, 768, 768, 768, 768]
    numels = [50257 * 768, 1024 * 768, *block * 12, 768, 768]
    for world in (1, 8, 512, 1024):
        plans = plan(numels, world_size=world)
        assert all(one.numel % world == 0 for one in plans)
        assert padding(plans) < 0.01
    assert len(plan([1] * 20_000, world_size=1024)) == 1


@pytest.mark.parametrize("order", [[0, 1], [0, 1, 1], [0, 1, 3]])
def test_an_order_names_each_gradient_once(order: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^order: expected each of 0 to 2 once"):
        plan([1, 2, 3], order=order)


# ---- backward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1e-6, 3e-4, float("inf")])
@pytest.mark.parametrize("micro", [1, 3])
def test_gradients_are_autograds_reduced_once(cap: float, micro: int) -> None:
    model, reduce = net(), Recorder()
    buckets = GradBuckets(model.parameters(), reduce, bucket_cap_mb=cap)
    for step in range(3):
        seeds = range(step, step + micro)
        for i, seed in enumerate(seeds):
            with buckets.accumulate(last=i == micro - 1):
                loss(model, seed).backward()
            assert reduce.left == ([] if i < micro - 1 else list(range(len(buckets.buckets))))
        buckets.finish()
        for p, g in zip(model.parameters(), own_gradients(seeds), strict=True):
            torch.testing.assert_close(p.grad, 2.0 * g, rtol=1e-14, atol=0)
        model.zero_grad(set_to_none=step != 1)
        reduce.left.clear()


def test_buckets_leave_while_backward_runs_and_in_order() -> None:
    model, when = net(), []
    first = next(model.parameters())
    buckets = GradBuckets(model.parameters(), lambda b: when.append((b.index, first.grad is None)), bucket_cap_mb=1e-6)
    loss(model, 0).backward()
    assert [index for index, _ in when] == [0, 1, 2, 3]
    assert when[0][1] and all(b.state is BucketState.IN_FLIGHT for b in buckets.buckets)
    buckets.finish()
    assert all(b.state is BucketState.REDUCED for b in buckets.buckets)


def test_a_gradient_is_a_view_of_its_bucket_and_keeps_its_strides() -> None:
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    buckets = GradBuckets(conv.parameters(), Recorder())
    conv(torch.randn(2, 3, 8, 8)).sum().backward()
    buckets.finish()
    flat = buckets.buckets[0].flat
    for p in conv.parameters():
        assert p.grad.stride() == p.stride()  # type: ignore[union-attr]
        inside = p.grad.data_ptr() - flat.data_ptr()  # type: ignore[union-attr]
        assert 0 <= inside < flat.numel() * 4 and inside % ALIGN_BYTES == 0


def test_a_large_gradient_is_copied_when_it_comes_and_one_that_fills_its_bucket_never() -> None:
    net = nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False))  # 2**15 elements each
    second = net[1].weight
    for cap, copied in ((float("inf"), True), (1e-6, False)):
        buckets, came = GradBuckets(net.parameters(), Recorder(), bucket_cap_mb=cap), []
        second.register_hook(lambda g, came=came: came.append(g.data_ptr()))
        net[0].weight.register_hook(lambda g, second=second, came=came: came.append(second.grad.data_ptr()))
        for micro in range(3):
            with buckets.accumulate(last=micro == 2):
                net(torch.ones(3, 128)).sum().backward()
        buckets.finish()
        bucket, k, _ = buckets._place[id(second)]
        assert came[1] == second.grad.data_ptr() == bucket.views[k].data_ptr()  # type: ignore[union-attr]
        assert (came[0] != came[1]) == copied and bucket.flat.data_ptr() <= came[1] < bucket.flat.data_ptr() + 2**18
        net.zero_grad()
        buckets.close()


def test_a_bucket_holds_one_dtype_and_group() -> None:
    params = [Parameter(torch.ones(2, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)]
    buckets = GradBuckets(params, Recorder(), groups=[0, 0, 1])
    sum(p.float().sum() for p in params).backward()  # type: ignore[union-attr]
    buckets.finish()
    assert len(buckets.buckets) == 3 and all((p.grad == 2.0).all() for p in params)  # type: ignore[union-attr]


def test_tied_parameters_have_one_slot() -> None:
    a, b = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    b.weight = a.weight
    buckets = GradBuckets([a.weight, b.weight], Recorder())
    x = torch.ones(1, 3)
    b(a(x)).sum().backward()
    buckets.finish()
    expected = torch.autograd.grad(b(a(x)).sum(), a.weight)[0]
    assert len(buckets.buckets[0].params) == 1
    torch.testing.assert_close(a.weight.grad, 2.0 * expected)


def test_the_order_that_was_observed_is_followed() -> None:
    params = [Parameter(torch.ones(2)) for _ in range(3)]
    reduce = Recorder()
    buckets = GradBuckets(params, reduce, bucket_cap_mb=1e-6)

    def backward() -> None:
        (params[0] * (params[2] * params[1].sin()).sin()).sum().backward()

    assert buckets.observed_order() is None
    backward()
    buckets.finish()
    order = buckets.observed_order()
    assert order is not None and sorted(order) == [0, 1, 2] and order[0] == 0
    buckets.follow(order)
    assert buckets.observed_order() is None and all(p.grad is None for p in params)
    assert [b.params[0] is params[i] for b, i in zip(buckets.buckets, order, strict=True)] == [True] * 3
    reduce.left.clear()
    backward()
    assert reduce.left == [0, 1, 2]
    buckets.finish()


# ---- out of the ordinary --------------------------------------------------------------------------------------------


def test_a_gradient_that_comes_after_its_bucket_left_is_named() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    buckets = GradBuckets(model.parameters(), Recorder(), names=names)
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"a gradient of 2\.bias of shape \(3,\) came after .*use_reentrant=False"):
        loss(model, 1).backward()
    buckets.abandon()
    model.zero_grad()
    loss(model, 2).backward()
    buckets.finish()
    for p, g in zip(model.parameters(), own_gradients([2]), strict=True):
        torch.testing.assert_close(p.grad, 2.0 * g)


def test_an_unused_parameter_is_an_error_zero_or_left_alone() -> None:
    for unused in ("error", "zero", "agree"):
        used, idle = Parameter(torch.ones(3)), Parameter(torch.ones(2))
        buckets = GradBuckets([used, idle], Recorder(), unused=unused, names=["used", "idle"])  # type: ignore[arg-type]
        used.sum().backward()
        if unused == "error":
            with pytest.raises(RuntimeError, match=r"no gradient came for idle of shape \(2,\); .*unused=\"zero\""):
                buckets.finish()
            continue
        buckets.finish()
        assert (used.grad == 2.0).all() and (idle.grad == 0.0).all()  # type: ignore[union-attr]
        assert buckets.used == [True, False]
        buckets.drop_unused(buckets.used)
        assert idle.grad is None and used.grad is not None


def test_a_parameter_used_in_one_micro_batch_only_counts() -> None:
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    reduce = Recorder()
    buckets = GradBuckets([a, b], reduce)
    with buckets.accumulate(last=False):
        (a.sum() + b.sum()).backward()
    with buckets.accumulate(last=True):
        a.sum().backward()
    assert reduce.left == []
    buckets.finish()
    assert (a.grad == 4.0).all() and (b.grad == 2.0).all() and reduce.left == [0]  # type: ignore[union-attr]


def test_frozen_and_unfrozen_parameters() -> None:
    a, b = Parameter(torch.ones(3)), Parameter(torch.ones(2), requires_grad=False)
    buckets = GradBuckets([a, b], Recorder(), names=["a", "b"])
    a.sum().backward()
    buckets.finish()
    a.grad = None
    b.requires_grad_(True)
    (a.sum() + b.sum()).backward()
    with pytest.raises(RuntimeError, match=r"^b was unfrozen .*call refresh\(\)"):
        buckets.finish()
    buckets.abandon()
    buckets.refresh()
    a.grad = b.grad = None
    (a.sum() + b.sum()).backward()
    buckets.finish()
    assert (a.grad == 2.0).all() and (b.grad == 2.0).all()  # type: ignore[union-attr]
    a.requires_grad_(False)
    buckets.refresh()
    b.sum().backward()
    buckets.finish()
    assert a.grad is None


def test_a_sparse_gradient_is_named() -> None:
    table = nn.Embedding(5, 2, sparse=True)
    GradBuckets(table.parameters(), Recorder(), names=["table"])
    with pytest.raises(
        RuntimeError, match=r"the gradient of table of shape \(5, 2\) is torch\.sparse_coo.*sparse=False"
    ):
        table(torch.tensor([1, 2])).sum().backward()


def test_steps_out_of_order_are_errors() -> None:
    model = net()
    buckets = GradBuckets(model.parameters(), Recorder())
    loss(model, 0).backward()
    with pytest.raises(RuntimeError, match=r"^follow: a step is under way"):
        buckets.follow([0, 1, 2, 3])
    left = r"^accumulate: bucket 0 of this step has left already; call finish\(\)"
    with pytest.raises(RuntimeError, match=left), buckets.accumulate(last=True):
        pass
    buckets.finish()
    with pytest.raises(RuntimeError, match=r"^finish: there was no backward"):
        buckets.finish()
    with buckets.accumulate(last=False), pytest.raises(RuntimeError, match=r"leave the accumulate\(\) context first"):
        buckets.finish()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_cap_mb": 0.0}, r"^bucket_cap_mb: expected a number > 0, got 0\.0"),
        ({"first_bucket_mb": -1.0}, r"^first_bucket_mb: expected"),
        ({"unused": "skip"}, r"^unused: expected one of 'error', 'zero', 'agree', got 'skip'"),
        ({"groups": [0]}, r"^groups: expected one for each of 4 params, got 1"),
        ({"names": ["a"]}, r"^names: expected one for each of 4 params, got 1"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradBuckets(net().parameters(), Recorder(), **options)
    with pytest.raises(ValueError, match=r"^params: none of them requires a gradient"):
        GradBuckets([Parameter(torch.ones(1), requires_grad=False)], Recorder())


def test_closed_buckets_let_the_gradients_go() -> None:
    model, reduce = net(), Recorder()
    GradBuckets(model.parameters(), reduce).close()
    loss(model, 0).backward()
    assert reduce.left == []
