"""The parity check's names, files, command and errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from parity_cases import batches, loop, network, renamed
from torch import Tensor, nn

import pytrain
from pytrain.parity import check
from pytrain.parity import main as parity
from pytrain.testing import ParityError, assert_same_training

# ---- names --------------------------------------------------------------------------------------------------------


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
