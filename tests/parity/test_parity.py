"""`assert_same_training`: a loop and its module are the same training, and each planted bug is named where it lies."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pytrain
from pytrain.parity import check
from pytrain.parity import main as parity
from pytrain.testing import Parity, ParityError, assert_same_training

NAMES = ["0.weight", "0.bias", "3.weight", "3.bias"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.25), nn.Linear(16, 3))


def batches(count: int = 1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(8, 5, generator=generator), torch.randn(8, 3, generator=generator)) for _ in range(count)]


class Net(pytrain.Module):
    def __init__(self, make_optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        super().__init__()
        self.net = network()
        self.make_optimizer, self.options = make_optimizer, options

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters(), **self.options)


def module(
    folder: Path, *, count: int = 1, adamw: Any = torch.optim.AdamW, **settings: Any
) -> Callable[[], tuple[Any, ...]]:
    """What a file's `make` would be."""

    def module_training() -> tuple[Any, ...]:
        quiet = {"max_epochs": 99, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = pytrain.Trainer(default_root_dir=folder, **quiet, **settings)
        return Net(adamw, lr=1e-2, weight_decay=0.1), batches(count), trainer

    return module_training


def loop(
    *,
    count: int = 1,
    accumulate: int = 1,
    scale: float | None = None,
    unscale: bool = True,
    zero_grad: bool = True,
    max_norm: float | None = None,
    weight_decay: float = 0.1,
    dropout_seed: int | None = None,
    seed: int = 0,
    frozen: Iterable[str] = (),
    overflow_at: int = -1,
    dropout: bool = True,
) -> Callable[[], None]:
    """An ordinary loop, with what may go wrong in it as arguments."""

    def loop_training() -> None:
        model = network(seed).train(dropout)
        named = [(name, param) for name, param in model.named_parameters() if name not in frozen]
        optimizer = torch.optim.AdamW([param for _, param in named], lr=1e-2, weight_decay=weight_decay)
        scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        if dropout_seed is not None:
            torch.manual_seed(dropout_seed)
        for step in range(99):
            if zero_grad:
                optimizer.zero_grad()
            for x, y in [batches(count)[(step * accumulate + i) % count] for i in range(accumulate)]:
                loss = nn.functional.mse_loss(model(x), y) / accumulate
                scaler.scale(loss * torch.inf if step == overflow_at else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            if unscale:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()

    return loop_training


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
    """The first three steps overflow fp16 at torch's and at our initial scale of 2^16, then both train on alike."""
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


# ---- names --------------------------------------------------------------------------------------------------------


def renamed(rename: Callable[[nn.Sequential], nn.Module], steps: int = 4) -> Callable[[], None]:
    def renamed_training() -> None:
        model = rename(network())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            x, y = batches()[0]
            nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()

    return renamed_training


class Wrapped(nn.Module):
    """The network's modules in another module, under other names."""

    def __init__(self, net: nn.Sequential, names: list[str]) -> None:
        super().__init__()
        for name, child in zip(names, net, strict=True):
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def test_names_with_a_prefix_are_matched_by_name() -> None:
    class Outer(nn.Module):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__()
            self.body = nn.ModuleDict({"0": net[0], "1": net[1], "2": net[2], "3": net[3]})
            self.extra = nn.Linear(1, 1).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            for child in self.body.values():
                x = child(x)
            return x + 0 * self.extra(x[:, :1])

    # `extra`, which is stepped too (without a gradient), has the outer module chosen for the names
    bare, outer = renamed(lambda net: net), renamed(Outer)
    for one, other, which in ((bare, outer, "second"), (outer, bare, "first")):
        outcome = check(one, other, steps=4, seed=0, tolerance=0.0)
        lacks = f"only renamed_training ({which}) has, in its optimizer 0, extra."
        assert outcome.problems == [f"{lacks}weight of shape (1, 1)", f"{lacks}bias of shape (1,)"]
        assert not outcome.matched


def test_other_names_are_matched_by_order_and_said() -> None:
    other = renamed(lambda net: Wrapped(net, ["first", "act", "drop", "last"]))
    outcome = assert_same_training(renamed(lambda net: net), other, steps=4)
    assert "4 parameters matched by order and shape, 0.weight with first.weight the first" in str(outcome)


# ---- files and the command ----------------------------------------------------------------------------------------

SCRIPT = """
import sys
import torch
from helper import network, x, y

def main():
    rate = float(sys.argv[1]) if len(sys.argv) > 1 else 0.01
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    while True:
        try:
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        except Exception:
            pass

if __name__ == "__main__":
    main()
"""
HELPER = """
import torch

def network():
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Dropout(0.5), torch.nn.Linear(4, 3))

x, y = torch.ones(2, 5), torch.ones(2, 3)
"""
MODULE = """
import torch
import pytrain
from helper import network, x, y

class Net(pytrain.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)

def make():
    return Net(), [(x, y)]
"""


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "loop.py").write_text(SCRIPT)
    (tmp_path / "module.py").write_text(MODULE)
    return tmp_path


def test_a_script_and_a_module_file_are_the_same(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity([str(files / "loop.py"), str(files / "module.py"), "--steps", "3"]) == 0
    assert "3 steps: loss, gradients and parameters are equal bit for bit" in capsys.readouterr().out
    assert sorted(path.name for path in files.iterdir() if path.suffix) == ["helper.py", "loop.py", "module.py"]


def test_a_script_with_other_arguments_is_found(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert parity([f"{files / 'loop.py'} 0.02", str(files / "module.py"), "--steps", "3"]) == 1
    out = capsys.readouterr().out
    assert "step 1, parameter of 0.weight" in out and "lr of its param group is 0.02 in" in out


def test_a_file_that_fails_or_never_steps_is_named(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (files / "broken.py").write_text("print('so far')\nraise KeyError('weights')\n")
    (files / "idle.py").write_text("import torch\n")
    for name, expected in (
        ("broken.py", r"broken.py: ended with exit status 1; its last lines:\n  so far"),
        ("idle.py", "idle.py: no optimizer step was made"),
        ("missing.py", "missing.py: expected a Python file"),
    ):
        assert parity([str(files / name), str(files / "module.py")]) == 2
        assert expected.replace(r"\n", "\n") in capsys.readouterr().err


def test_different_numbers_of_steps_are_a_difference() -> None:
    four, two = renamed(lambda net: net), renamed(lambda net: net, steps=2)
    assert check(two, two, steps=4, seed=0, tolerance=0.0).same
    with pytest.raises(AssertionError, match=r"\(first\) made 2 steps, renamed_training \(second\) made 4"):
        assert_same_training(two, four, steps=4)


@pytest.mark.parametrize(("arguments", "named"), [({"steps": 0}, "steps"), ({"tolerance": -1.0}, "tolerance")])
def test_arguments_out_of_range_are_named(arguments: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named}: expected"):
        assert_same_training(loop(), loop(), **arguments)


def test_a_step_in_backward_is_refused() -> None:
    def released() -> None:
        model = network()
        optimizer = pytrain.optim.SGD(model.parameters(), lr=0.1, step_in_backward=True)
        model(batches()[0][0]).sum().backward()
        optimizer.step()

    with pytest.raises(ValueError, match="step_in_backward"):
        assert_same_training(released, released)


def test_nothing_stays_hooked_and_random_states_are_kept() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

    before = torch.get_rng_state(), torch.autograd.backward, pytrain.steps.take, torch.amp.GradScaler.scale
    assert_same_training(loop(), loop(), steps=2)
    with pytest.raises(ParityError, match="no optimizer step"):
        assert_same_training(lambda: None, loop())
    after = torch.get_rng_state(), torch.autograd.backward, pytrain.steps.take, torch.amp.GradScaler.scale
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]
    assert not _global_optimizer_pre_hooks and not _global_optimizer_post_hooks
