"""Parameters that are DTensors (FSDP2, HSDP, tensor parallelism) on real ranks over Gloo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import fsdp_jobs
import pytest
import torch
from jobs import KINDS
from pool import Pool
from torch import Tensor

from pytrain import backend

needs_kernels = pytest.mark.skipif(backend.facts is None or backend.wanted() == "torch", reason="the kernels' bits")
CLIPPED: dict[str, Any] = {"max_norm": 0.5}


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "layout, size, kind, step",
    [
        ("fsdp", 2, "AdamW", CLIPPED),
        ("fsdp", 2, "Lion", CLIPPED),
        ("fsdp", 4, "SGD", CLIPPED),
        ("fsdp", 4, "AdamW", {"clip_value": 0.05}),
        ("fsdp", 2, "torch.AdamW", CLIPPED),
        ("hsdp", 4, "AdamW", CLIPPED),
        ("slice", 4, "AdamW", CLIPPED),
        ("tp", 4, "AdamW", CLIPPED),
        ("tp", 4, "torch.SGD", CLIPPED),
        ("mixed", 2, "Lion", CLIPPED),
        ("mixed", 4, "AdamW", CLIPPED),
    ],
)
@pytest.mark.filterwarnings("ignore:While redistributing")
def test_ranks_do_what_one_process_does_on_all_data(
    pool: Pool, layout: str, size: int, kind: str, step: dict[str, Any]
) -> None:
    found = pool.run(size, fsdp_jobs.train, layout, kind, step)
    params, averages, norms = fsdp_jobs.train_alone(fsdp_jobs.SPLIT[layout] or size, kind, step)
    for theirs, their_averages, their_norms, sizes, _ in found:
        close(theirs, params)
        close(their_averages, averages)
        assert their_norms == found[0][2] == pytest.approx(norms, rel=1e-12)
        # One small sum a step; on a mesh of two dimensions that is not all ranks, two.
        assert sizes == [2] * (2 if layout == "slice" else 1)
    if (layout, size) == ("fsdp", 4):
        assert (0, 16) in found[3][4]  # the last rank has nothing of the last layer


@pytest.mark.parametrize("layout, size", [("fsdp", 2), ("fsdp", 4), ("hsdp", 4)])
def test_the_norm_and_the_step_are_those_of_torch(pool: Pool, layout: str, size: int) -> None:
    expected = pool.run(size, fsdp_jobs.train_by_torch, layout)[0]
    for kind in ("AdamW", "torch.AdamW"):
        for params, norms in pool.run(size, fsdp_jobs.train_by_pytrain, layout, kind):
            assert norms == pytest.approx(expected[1], rel=1e-12)
            close(params, expected[0])


@needs_kernels
@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_stepped_as_whole_tensors_are_to_the_bit(pool: Pool, size: int) -> None:
    kinds = [(name, {}, torch.float32) for name in fsdp_jobs.ELEMENTWISE]
    kinds = kinds if size == 2 else []
    formats = [one for one in KINDS if one[1].get("state_dtype") != "8bit" and "rounding" not in one[1]]
    assert len(fsdp_jobs.ELEMENTWISE) > 10 and len(formats) > 6
    assert pool.run(size, fsdp_jobs.beside_whole_tensors, kinds + formats, False) == [[]] * size


@needs_kernels
def test_mixed_precision_of_fully_shard_steps_fp32_shards(pool: Pool) -> None:
    kinds = [("AdamW", {}, torch.float32), ("SGD", {"momentum": 0.9}, torch.float32)]
    assert pool.run(2, fsdp_jobs.beside_whole_tensors, kinds, True) == [[]] * 2


@pytest.mark.parametrize(
    "kind, layout, size, unscale",
    [
        ("AdamW", "fsdp", 2, False),
        ("AdamW", "hsdp", 4, False),
        ("AdamW", "fsdp", 4, True),
        ("AdamW", "mixed", 2, False),
        ("torch.AdamW", "fsdp", 2, False),
        ("torch.AdamW", "fsdp", 2, True),
    ],
)
def test_an_inf_in_one_shard_skips_the_step_on_all_ranks(
    pool: Pool, kind: str, layout: str, size: int, unscale: bool
) -> None:
    for applied, same, scale, at_last, no_norm in pool.run(size, fsdp_jobs.overflow_on_one, kind, layout, unscale):
        assert applied == [True, False, True] and same == [False, True, False] and no_norm == [False, True, False]
        assert (scale, at_last) == (4.0, 2.0 if unscale else 4.0)


def test_torchs_scaler_skips_on_all_ranks(pool: Pool) -> None:
    assert pool.run(2, fsdp_jobs.torchs_scaler) == [([[False] * 6, [True] * 6], False)] * 2


@pytest.mark.parametrize("options", [{}, {"master_weights": True}, {"state_dtype": "bf16", "kahan": True}])
def test_a_checkpoint_of_four_ranks_goes_on_with_two_to_the_bit(
    pool: Pool, tmp_path: Path, options: dict[str, Any]
) -> None:
    folder = str(tmp_path / "saved")
    state, params, sharded = pool.run(4, fsdp_jobs.save, folder, "AdamW", options)[0]
    assert sharded
    for loaded, later in pool.run(2, fsdp_jobs.load, folder, "AdamW", options):
        assert equal(later, params)
        for a, b in zip(loaded, state, strict=True):
            assert a.keys() == b.keys() and equal(list(a.values()), [b[key] for key in a])


@pytest.mark.parametrize("kinds", [("AdamW", "torch.AdamW"), ("torch.AdamW", "AdamW")])
def test_checkpoints_are_those_of_torchs_optimizer(pool: Pool, tmp_path: Path, kinds: tuple[str, str]) -> None:
    state, _, _ = pool.run(2, fsdp_jobs.save, str(tmp_path / "saved"), kinds[0], {})[0]
    for loaded, _ in pool.run(2, fsdp_jobs.load, str(tmp_path / "saved"), kinds[1], {}):
        for a, b in zip(loaded, state, strict=True):
            assert a.keys() == b.keys() and equal(list(a.values()), [b[key] for key in a])


def test_the_state_of_one_process_loads(pool: Pool) -> None:
    params, state, expected = fsdp_jobs.alone_to_load()
    for found, error, untouched in pool.run(2, fsdp_jobs.load_whole, params, state):
        assert equal(found, expected) and untouched
        assert error == ("AdamW: param_groups[0]['params'][0]: its state 'exp_avg' has shape (3, 5), expected (16, 5)")


def test_changes_between_steps_are_noticed(pool: Pool) -> None:
    for found in pool.run(2, fsdp_jobs.changes):
        assert found["moved"] == [True] + [False] * 5 and all(found["moved by a new lr"])
        assert len(found["hooks"]) == 4 and all(found["hooks"])
        assert found["by a hook's gradient"]
        assert found["new memory"] and not found["old memory"] and all(found["averages"]) and all(found["own again"])
        assert found["portable"] == {"step": "Tensor", "exp_avg": "DTensor", "exp_avg_sq": "DTensor"}
        assert found["fused"] == found["a copy's"]
        assert found["fused"] == "native" or backend.facts is None or backend.wanted() == "torch"
        # beta1 = 0.9 of zeros, and a tenth of a gradient whose norm is at most 1
        assert 0 < found["from a new state"] <= 0.1 + 1e-9


def test_what_needs_whole_tensors_is_refused_by_name(pool: Pool) -> None:
    names = [cls.__name__ for cls in fsdp_jobs.OTHERS]
    assert {"LAMB", "LARS", "Adafactor", "Muon"} <= set(names)
    for found in pool.run(2, fsdp_jobs.errors):
        for name in names:
            assert "is a DTensor, of which ranks hold shards, and" in found[name]
            assert "needs whole tensors" in found[name]
        assert "rounding='stochastic'" in found["rounding"] and "'8bit'" in found["state_dtype"]
        assert "step_in_backward=True" in found["step_in_backward"]
        assert found["a later group"].endswith("; 1") and "stochastic" in found["a later group"]
        assert "pytrain.step alone" in found["a strategy"]
        for name in ("partial", "partial, step()"):
            assert found[name].startswith(
                "UnfitError: AdamW: param_groups[0]['params'][0]: its gradient has placements"
            )
            assert "(Partial(sum),)" in found[name] and "(Shard(dim=0),)" in found[name]
        assert "(Replicate(),)" in found["replicated"] and found["redistributed"] == "no error"
        assert "Partial" in found["a partial parameter"]
        assert found["moved"] == str([True] + [False] * 5)  # by the step after the redistribution, of p alone


def test_meshes_that_cross_are_named(pool: Pool) -> None:
    for error in pool.run(4, fsdp_jobs.crossed):
        assert (
            error.startswith("ValueError: step: parameters lie on DeviceMesh(") and "lacks ranks of the first" in error
        )


def test_without_dtensors_nothing_of_them_is_loaded() -> None:
    program = (
        "import sys, torch, pytrain\n"
        "assert 'torch.distributed.tensor' not in sys.modules\n"  # later torch.optim itself loads it
        "p = torch.nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)\n"
        "pytrain.step(pytrain.optim.AdamW([p]), pytrain.amp.LossScaler(), max_norm=1.0)\n"
        "print('pytrain.optim.dtensors' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"
