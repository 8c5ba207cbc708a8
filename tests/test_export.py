"""Exported files give the module's outputs in a process that cannot import pytrain, and exporting changes no module."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pytrain
from pytrain.export import ExportError

BLOCKED = """
import sys
sys.modules["pytrain"] = None  # an import of it fails
import torch
inputs = torch.load(sys.argv[2], weights_only=True)
"""
ONNX = """
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
run = lambda values: torch.from_numpy(session.run(None, {k: v.numpy() for k, v in values.items()})[0])
"""
EXPORTED = """
run = torch.export.load(sys.argv[1]).module()
run = (lambda module: lambda values: module(**values).detach())(run)
"""
SAVE = "torch.save([run(values) for values in inputs], sys.argv[3])\n"


class Encoder(pytrain.Module):
    """Everything that differs between train and eval, a frozen part in eval mode, and two arguments."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, 3))
        self.body[1].eval()
        self.to(dtype)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        return self.body(x) * gain

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("any", 1.0)
        return self(batch, torch.ones(len(batch), 1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return pytrain.optim.AdamW(self.parameters(), lr=1e-2)


def inputs(*sizes: int, dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    draw = lambda n, k: torch.randn(n, k, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return [{"x": draw(size, 6), "gain": draw(size, 1)} for size in sizes]


def outputs_elsewhere(program: str, file: Path, values: list[dict[str, Tensor]]) -> list[Tensor]:
    """What the file gives in a process without pytrain."""
    given, result = file.with_suffix(".in"), file.with_suffix(".out")
    torch.save(values, given)
    command = [sys.executable, "-c", BLOCKED + program + SAVE, str(file), str(given), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return torch.load(result, weights_only=True)


def outputs_here(module: Encoder, values: list[dict[str, Tensor]]) -> list[Tensor]:
    with pytrain.export.evaluating(module):
        return [module(**one) for one in values]


def needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason="the extra [export] is not installed")


def test_a_trained_modules_onnx_file_gives_its_outputs_without_pytrain(tmp_path: Path) -> None:
    """Sums of 6 and 16 products: fewer than 64 roundings of the largest output lie between two orders of adding."""
    needs_onnx()
    module, file = Encoder(), tmp_path / "encoder.onnx"
    quiet = {"enable_progress_bar": False, "enable_checkpointing": False}
    pytrain.Trainer(max_steps=3, default_root_dir=tmp_path, **quiet).fit(module, [torch.randn(4, 6)])
    module.to_onnx(file, inputs(4)[0], dynamic_batch=True)
    values = inputs(4, 1, 9)
    for ours, theirs in zip(outputs_here(module, values), outputs_elsewhere(ONNX, file, values), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 64 * torch.finfo(torch.float32).eps * ours.abs().max()
    assert [path.name for path in tmp_path.glob("encoder.onnx*")] == ["encoder.onnx"]  # the weights are in it


def test_a_torch_export_file_gives_equal_bits_without_pytrain(tmp_path: Path) -> None:
    module, file = Encoder(), tmp_path / "encoder.pt2"
    module.to_torch_export(file, inputs(4)[0], dynamic_batch=True)
    values = inputs(4, 2, 9)
    for ours, theirs in zip(outputs_here(module, values), outputs_elsewhere(EXPORTED, file, values), strict=True):
        assert torch.equal(ours, theirs)


def test_without_dynamic_batch_the_shapes_are_the_examples(tmp_path: Path) -> None:
    module, file = Encoder(), str(tmp_path / "fixed.pt2")
    module.to_torch_export(file, tuple(inputs(4)[0].values()))  # by place
    loaded = torch.export.load(file).module()
    same, other = (tuple(values.values()) for values in inputs(4, 5))
    assert torch.equal(loaded(*same), outputs_here(module, inputs(4))[0])
    with pytest.raises((AssertionError, RuntimeError)):  # by torch, in the words of its version
        loaded(*other)


def test_a_tensor_is_an_example_too(tmp_path: Path) -> None:
    class One(pytrain.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(1)

    One().to_torch_export(tmp_path / "one.pt2", torch.ones(2, 3), dynamic_batch=True)
    assert torch.export.load(tmp_path / "one.pt2").module()(torch.ones(5, 3)).tolist() == [3.0] * 5


def test_exporting_leaves_modes_weights_and_random_states(tmp_path: Path) -> None:
    module = Encoder()
    modes, weights = (
        [part.training for part in module.modules()],
        {k: v.clone() for k, v in module.state_dict().items()},
    )
    assert len(set(modes)) == 2
    random = torch.get_rng_state()
    module.to_torch_export(tmp_path / "encoder.pt2", inputs(4)[0])
    with pytest.raises(RuntimeError):
        module.to_torch_export(tmp_path / "encoder.pt2", {"x": torch.ones(2, 5), "gain": torch.ones(2, 1)})
    assert [part.training for part in module.modules()] == modes
    assert all(torch.equal(value, weights[key]) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    torch.export.load(tmp_path / "encoder.pt2")  # that failed before the file was touched


def test_unfit_examples_are_named(tmp_path: Path) -> None:
    module, file = Encoder(), tmp_path / "encoder.pt2"
    with pytest.raises(TypeError, match="to_torch_export: example must be a tensor, a tuple .* got list"):
        module.to_torch_export(file, [torch.ones(2, 6)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"first dimensions are equal and at least 2 .*got \[1\]"):
        module.to_torch_export(file, inputs(1)[0], dynamic_batch=True)
    with pytest.raises(ValueError, match=r"got \[2, 4\]"):
        module.to_torch_export(file, (torch.ones(2, 6), torch.ones(4, 1)), dynamic_batch=True)

    class NoForward(pytrain.Module):
        pass

    with pytest.raises(ExportError, match="NoForward has no forward"):
        NoForward().to_torch_export(file, torch.ones(2, 6))
    assert not file.exists()


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ExportError, match=r"to_onnx needs onnx .*pip install pytrain\[export\]"):
        Encoder().to_onnx(tmp_path / "encoder.onnx", inputs(2)[0])


def test_torchscript_names_its_successor() -> None:
    with pytest.raises(NotImplementedError, match="torch.export; use to_torch_export"):
        Encoder().to_torchscript("file.pt", example_inputs=torch.ones(2, 6))
