"""`assert_same_training`: a loop and its module are the same training, and each planted bug is named where it lies."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity_cases import NAMES, Adversaries, batches, loop, module, network, quiet_trainer
from torch import Tensor, nn

import pytrain
from pytrain.parity import check
from pytrain.testing import Parity, assert_same_training

# ---- the same training --------------------------------------------------------------------------------------------


def test_a_loop_and_its_module_are_equal_bit_for_bit(tmp_path: Path) -> None:
    outcome = assert_same_training(loop(), module(tmp_path))
    assert outcome.steps == 10 and outcome.largest == dict.fromkeys(
        ("initial parameter", "loss", "gradient", "parameter"), 0.0
    )


def test_accumulation_of_a_power_of_two_is_equal_bit_for_bit(tmp_path: Path) -> None:
    ours = module(tmp_path, count=8, accumulate_grad_batches=4)
    assert max(assert_same_training(loop(count=8, accumulate=4), ours).largest.values()) == 0.0


def test_a_loss_scale_and_a_skipped_step_do_not_show() -> None:
    """A scale is a power of two, also after the skip: the applied gradients are the same bits as without one."""
    outcome = assert_same_training(loop(dropout=False), loop(dropout=False, scale=2.0**16, overflow_at=2))
    assert outcome.steps == 10 and max(outcome.largest.values()) == 0.0


@pytest.mark.parametrize("adamw", [torch.optim.AdamW, pytrain.optim.AdamW])
def test_clipping_in_the_step_is_clipping_in_place(tmp_path: Path, adamw: Any) -> None:
    """Both clip to a tenth of the gradient's norm; ours as one factor in the step, torch's by rewriting gradients."""
    ours = module(tmp_path, adamw=adamw, gradient_clip_val=0.1)
    outcome = assert_same_training(loop(max_norm=0.1), ours, steps=1, tolerance=4 * torch.finfo(torch.float32).eps)
    assert outcome.largest["loss"] == 0.0


@pytest.mark.parametrize("adamw", [torch.optim.AdamW, pytrain.optim.AdamW], ids=["torch", "pytrain"])
def test_what_a_scaler_leaves_to_a_fused_optimizer_is_unscaled_too(adamw: Any) -> None:
    """GradScaler gives fused optimizers its scale and flag, and calls them in skipped steps as well."""

    def training(scale: float | None) -> Callable[[], None]:
        def run() -> None:
            model, (x, y) = network().eval(), batches()[0]
            optimizer = adamw(model.parameters(), lr=1e-2, fused=True)
            scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
            for step in range(5):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                if step == 1 and scale is not None:
                    loss = loss * torch.inf
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        return run

    outcome = assert_same_training(training(None), training(2.0**12), steps=4)
    assert outcome.steps == 4 and max(outcome.largest.values()) == 0.0


def test_random_numbers_start_from_the_seed() -> None:
    drawn = []

    def training() -> None:
        drawn.append((float(torch.rand(())), random.random(), float(np.random.rand())))
        weight = nn.Parameter(torch.rand(3))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        (weight * torch.rand(3)).sum().backward()
        optimizer.step()

    for seed in (3, 3, 4):
        assert assert_same_training(training, training, seed=seed).steps == 1
        torch.rand(()), random.random(), np.random.rand()
    assert len(set(drawn[:4])) == 1 and drawn[4] == drawn[5] and not set(drawn[0]) & set(drawn[4])


def test_mixed_precision_and_its_skipped_steps_are_those_of_torchs_recipe(tmp_path: Path) -> None:
    """The first steps overflow fp16 at the initial scale of 2^16, torch's and ours; then both train on alike."""
    x, y = (1e2 * part for part in batches()[0])

    def recipe() -> None:
        model, scaler = network(), torch.amp.GradScaler("cpu")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(99):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = nn.functional.mse_loss(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

    def ours() -> tuple[Any, ...]:
        made, _, trainer = module(tmp_path, precision="fp16-mixed")()
        trainers.append(trainer)
        return made, [(x, y)], trainer

    trainers: list[pytrain.Trainer] = []
    outcome = assert_same_training(recipe, ours, steps=3)
    assert max(outcome.largest.values()) == 0.0 and trainers[0].skipped_steps > 0


@pytest.mark.parametrize("overflow", [False, True], ids=["clean", "skipped"])
@pytest.mark.parametrize("sgd", [pytrain.optim.SGD, torch.optim.SGD], ids=["pytrain", "torch"])
@pytest.mark.parametrize("clip", [{}, {"max_norm": 0.01}, {"clip_value": 0.001}], ids=["free", "norm", "value"])
def test_our_step_is_recorded_unscaled_averaged_and_clipped(sgd: Any, overflow: bool, clip: dict[str, float]) -> None:
    """Two summed micro-batches under a loss scale, in `pytrain.step`, against one joined and unscaled batch in fp64."""
    joined = [torch.cat(parts).double() for parts in zip(*batches(2), strict=True)]

    def plain() -> None:
        model = network().double().eval()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for _ in range(4):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(joined[0]), joined[1]).backward()
            if "max_norm" in clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip["max_norm"])
            elif clip:
                nn.utils.clip_grad_value_(model.parameters(), clip["clip_value"])
            optimizer.step()

    def fused() -> None:
        model = network().double().eval()
        optimizer = sgd(model.parameters(), lr=0.5)
        scaler = pytrain.amp.LossScaler(init_scale=2.0**10)
        for step in range(5):
            optimizer.zero_grad()
            for x, y in batches(2):
                loss = nn.functional.mse_loss(model(x.double()), y.double())
                scaler.scale(loss * torch.inf if overflow and step == 1 else loss).backward()
            pytrain.step(optimizer, scaler, grad_divisor=2.0, **clip)

    outcome = assert_same_training(plain, fused, steps=4, tolerance=1e-12)
    assert outcome.steps == 4 and max(outcome.largest.values()) > 0.0


def test_a_closure_is_the_same_as_a_loop() -> None:
    def closure_training() -> None:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        x, y = batches()[0]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        for _ in range(10):
            optimizer.step(closure)

    outcome = assert_same_training(loop(), closure_training)
    assert outcome.steps == 10 and max(outcome.largest.values()) == 0.0 and "loss" in outcome.largest


@pytest.mark.parametrize("precision", ["32", "fp16-mixed"])
def test_manual_optimization_is_a_loop_of_two_optimizers(tmp_path: Path, precision: Any) -> None:
    low = precision != "32"

    def by_hand() -> None:
        nets, scaler = (network(0), network(1)), torch.amp.GradScaler("cpu", enabled=low)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in nets]
        x, y = batches()[0]
        for _ in range(5):
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16, enabled=low):
                    loss = nn.functional.mse_loss(net(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
            scaler.update()

    def module_by_hand() -> tuple[Any, ...]:
        return Adversaries(), batches(), quiet_trainer(tmp_path, precision=precision)

    outcome = assert_same_training(by_hand, module_by_hand)
    assert outcome.steps == 10 and max(outcome.largest.values()) == 0.0


def test_two_optimizers_are_told_apart() -> None:
    def gan() -> None:
        one, two = network(0), network(1)
        optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (one, two)]
        for _ in range(3):
            for net, optimizer in zip((one, two), optimizers, strict=True):
                optimizer.zero_grad()
                net(batches()[0][0]).square().mean().backward()
                optimizer.step()

    def turned() -> None:
        net, _ = network(0), network(1)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(6):
            optimizer.zero_grad()
            net(batches()[0][0]).square().mean().backward()
            optimizer.step()

    assert assert_same_training(gan, gan, steps=6).steps == 6
    with pytest.raises(AssertionError, match="step 2: gan steps its optimizer 1, turned its optimizer 0"):
        assert_same_training(gan, turned, steps=6)


# ---- planted bugs -------------------------------------------------------------------------------------------------


def found(a: Any, b: Any, step: int, kind: str, name: str) -> Parity:
    """The outcome of a check that must find this first difference."""
    outcome = check(a, b, steps=10, seed=0, tolerance=0.0)
    first = outcome.first
    assert first is not None and (first.step, first.kind, first.name) == (step, kind, name)
    assert outcome.steps == step
    return outcome


def test_a_missing_unscale_is_found(tmp_path: Path) -> None:
    ours, theirs = module(tmp_path), loop(scale=1024.0, unscale=False)
    outcome = found(ours, theirs, 1, "gradient", "0.weight")
    assert [difference.name for difference in outcome.differences] == NAMES
    with pytest.raises(AssertionError, match="1024 times") as failure:
        assert_same_training(ours, theirs)
    assert str(failure.value) == str(outcome)


def test_a_missing_zero_grad_is_found(tmp_path: Path) -> None:
    outcome = found(module(tmp_path), loop(zero_grad=False), 2, "gradient", "0.weight")
    assert "of loop_training are those of this step plus those of the last: zero_grad is missing" in str(outcome)


def test_another_weight_decay_is_found(tmp_path: Path) -> None:
    outcome = found(module(tmp_path), loop(weight_decay=0.01), 1, "parameter", "0.weight")
    assert "weight_decay of its param group is 0.1 in module_training and 0.01 in loop_training" in str(outcome)
    x = outcome.first
    assert x is not None and 0 < x.relative < 1e-2 * 0.1  # lr * weight_decay of each element


def test_another_dropout_mask_is_found(tmp_path: Path) -> None:
    outcome = found(module(tmp_path), loop(dropout_seed=5), 1, "loss", "loss")
    assert "dropout" in outcome.hints[0]


def test_other_initial_weights_are_found(tmp_path: Path) -> None:
    outcome = found(module(tmp_path), loop(seed=1), 1, "initial parameter", "0.weight")
    assert "different weights" in outcome.hints[0]


def test_a_missing_average_over_micro_batches_is_found(tmp_path: Path) -> None:
    summed = found(module(tmp_path, count=2, accumulate_grad_batches=2), _summing(), 1, "loss", "loss")
    assert summed.first is not None and summed.first.relative == pytest.approx(1.0)


def _summing() -> Callable[[], None]:
    def summing() -> None:
        model = network()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(99):
            optimizer.zero_grad()
            for x, y in batches(2):
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    return summing


def test_a_parameter_that_one_optimizer_lacks_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"only module_training has, in its optimizer 0, 3.bias of shape \(3,\)"):
        assert_same_training(module(tmp_path), loop(frozen=["3.bias"]))


def test_a_gradient_that_only_one_has_is_named(tmp_path: Path) -> None:
    def frozen() -> tuple[Any, ...]:
        made, data, trainer = module(tmp_path)()
        made.net[3].bias.requires_grad_(False)
        return made, data, trainer

    outcome = found(loop(), frozen, 1, "gradient", "3.bias")
    assert outcome.first is not None and outcome.first.text == "only loop_training has one"


def test_another_schedule_is_found_at_the_step_where_it_sets_in() -> None:
    def scheduled(every: int) -> Callable[[], None]:
        def training() -> None:
            model = network()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, every, 0.5)
            for _ in range(9):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(batches()[0][0]), batches()[0][1]).backward()
                optimizer.step()
                schedule.step()

        return training

    outcome = found(scheduled(4), scheduled(3), 4, "parameter", "0.weight")
    assert "lr of its param group is 0.5 in training (first) and 0.25 in training (second)" in str(outcome)


def test_one_element_in_a_thousand_is_found_and_a_nan_too() -> None:
    def training(change: Callable[[Tensor], None]) -> Callable[[], None]:
        def run() -> None:
            weight = nn.Parameter(torch.arange(1000.0).reshape(20, 50))
            optimizer = torch.optim.SGD([weight], lr=0.5)
            weight.sum().backward()
            change(weight.grad)
            optimizer.step()

        return run

    def add(grad: Tensor) -> None:
        grad[7, 3] += 0.25

    def spoil(grad: Tensor) -> None:
        grad[0, 1] = torch.nan

    plain = training(lambda grad: None)
    first = check(plain, training(add), steps=1, seed=0, tolerance=0.2).first
    assert first is not None and first.kind == "gradient" and first.relative == 0.25
    assert "1 of 1000 elements differ, most at [7, 3]: 1 and 1.25, apart by 0.25" in first.text
    assert first.name == "parameter 0 of optimizer 0"
    assert check(plain, training(add), steps=1, seed=0, tolerance=0.25).same
    bad = check(plain, training(spoil), steps=1, seed=0, tolerance=1.0).first
    assert bad is not None and bad.relative == float("inf")
    turned = check(training(spoil), plain, steps=1, seed=0, tolerance=1.0).first
    assert turned is not None and turned.relative == float("inf")
    assert check(training(spoil), training(spoil), steps=1, seed=0, tolerance=0.0).same
