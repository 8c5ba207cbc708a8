"""Export of a module's forward: an ONNX file, or one of torch.export; neither needs pytrain to run."""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor, nn

Example: TypeAlias = "Tensor | tuple[Any, ...] | Mapping[str, Any]"

ONE_FILE = 2**31 - 2**24  # bytes of weights that an ONNX file, which is one protobuf, surely holds


class ExportError(RuntimeError):
    """A module cannot be exported here."""


def to_onnx(module: nn.Module, path: str | os.PathLike[str], example: Example, *, dynamic_batch: bool = False) -> None:
    """Write `module.forward` as an ONNX file, whose inputs have the names of forward's arguments.

    The module is exported in eval mode, and is then in the modes that it was in.

    Args:
        module: what to export; weights beyond 2 GB go to a second file, `path` + ".data".
        path: the file; replaced where it exists.
        example: forward's input: a tensor, a tuple of arguments, or a mapping of arguments by name.
        dynamic_batch: the first dimension of all tensors is the batch, and may have any size; the example's is at
            least 2. Else the file takes the example's shapes alone.

    Raises:
        ExportError: onnx or onnxscript are not installed, or the module has no forward.
        TypeError, ValueError: the example is unfit.
    """
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ExportError(f"to_onnx needs {name} ({error}): pip install pytrain[export]") from error
    args, kwargs, shapes = _read(module, example, dynamic_batch, "to_onnx")
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    with evaluating(module), warnings.catch_warnings():
        # Words of torch to its own developers, and of what a module without torchvision cannot miss.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
        logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
        program = torch.onnx.export(module, args, kwargs=kwargs, dynamic_shapes=shapes, dynamo=True, verbose=False)
    assert program is not None
    program.save(Path(path), external_data=size > ONE_FILE)


def to_torch_export(
    module: nn.Module, path: str | os.PathLike[str], example: Example, *, dynamic_batch: bool = False
) -> None:
    """Write `module.forward` as a file that `torch.export.load(path).module()` makes a module of; see `to_onnx`.

    Raises:
        ExportError: the module has no forward.
        TypeError, ValueError: the example is unfit.
    """
    args, kwargs, shapes = _read(module, example, dynamic_batch, "to_torch_export")
    with evaluating(module):
        program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
    torch.export.save(program, Path(path))


class Exportable(nn.Module):
    """A torch module with the functions above as methods."""

    def to_onnx(self, path: str | os.PathLike[str], example: Example, *, dynamic_batch: bool = False) -> None:
        """Write `forward` as an ONNX file; see `pytrain.export.to_onnx`."""
        to_onnx(self, path, example, dynamic_batch=dynamic_batch)

    def to_torch_export(self, path: str | os.PathLike[str], example: Example, *, dynamic_batch: bool = False) -> None:
        """Write `forward` as a file that `torch.export.load` reads; see `pytrain.export.to_torch_export`."""
        to_torch_export(self, path, example, dynamic_batch=dynamic_batch)

    def to_torchscript(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse: torch has deprecated TorchScript.

        Raises:
            NotImplementedError: always; it names the successor.
        """
        raise NotImplementedError(
            "to_torchscript: torch has deprecated TorchScript in favour of torch.export; use "
            "to_torch_export(path, example), or to_onnx(path, example)"
        )


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Have a module in eval mode without gradients, and each of its parts in its own mode again after it."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _read(
    module: nn.Module, example: Example, dynamic_batch: bool, asked: str
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Forward's arguments, and the dynamic shapes of them as torch.export has them."""
    if type(module).forward is nn.Module.forward:
        raise ExportError(f"{asked}: {type(module).__name__} has no forward, which is what is exported; define one")
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(example, Tensor):
        args = (example,)
    elif isinstance(example, tuple):
        args = example
    elif isinstance(example, Mapping) and all(isinstance(key, str) for key in example):
        kwargs = dict(example)
    else:
        raise TypeError(
            f"{asked}: example must be a tensor, a tuple of forward's arguments or a mapping of them by name, "
            f"got {type(example).__name__}"
        )
    if not dynamic_batch:
        return args, kwargs, None
    sizes = {leaf.shape[0] for leaf in torch.utils._pytree.tree_leaves((args, kwargs)) if _has_batch(leaf)}
    if len(sizes) != 1 or min(sizes) < 2:
        raise ValueError(
            f"{asked}: dynamic_batch needs tensors in the example whose first dimensions are equal and at least 2 (a "
            f"size of 1 would be taken for a constant), got {sorted(sizes)}"
        )
    batch = torch.export.Dim("batch")
    shapes = torch.utils._pytree.tree_map(lambda leaf: {0: batch} if _has_batch(leaf) else None, args or kwargs)
    return args, kwargs, shapes


def _has_batch(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
