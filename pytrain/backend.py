"""The one place that loads the kernels and decides, with a reason, whether a parameter takes them or the torch path."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "native", "torch")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ASKED_FOR = ("PYTRAIN_BACKEND=torch", "fused=False")  # reasons that need no warning
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Choice:
    """Which backend a parameter takes ("native" or "torch") and why."""

    backend: str
    reason: str


class BackendError(RuntimeError):
    """The kernels were demanded (PYTRAIN_BACKEND=native or fused=True) and cannot serve."""


def _load() -> tuple[ModuleType | None, str]:
    """Load the kernel library and the facts module; (facts, "") or (None, why not)."""
    library = _FOLDER / "_kernels.so"
    if not library.exists():
        note = _FOLDER / "_build_reason.txt"
        why = note.read_text().strip() if note.exists() else "pytrain was installed without them"
        return None, f"the kernels are not built: {why}"
    try:
        torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]
        facts = importlib.import_module("pytrain._C")
    except (OSError, ImportError) as error:
        return None, f"the kernels do not load: {error}"
    for rule in facts.rules():
        torch.library.register_fake(f"pytrain::{rule}_", _fake)
    return facts, ""


def _fake(*tensors: object) -> None:
    """Tell torch's tracers that the ops return nothing and change no shapes."""


def _make_reader() -> Any:
    """What reads tensors' addresses fast, where this torch offers DLPack's C exchange API as built for; else None."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if facts is None or exchange is None:
        return None
    try:
        return facts.Reader(exchange, (Tensor, torch.nn.Parameter))
    except (ImportError, ValueError):  # another major version of DLPack, or another capsule: lists of tensors serve
        return None


facts, why_not_loaded = _load()
reader = _make_reader()


def wanted() -> str:
    """What PYTRAIN_BACKEND asks for: "auto" (the default), "native" or "torch".

    Raises:
        ValueError: it is set to something else.
    """
    value = os.environ.get("PYTRAIN_BACKEND", "auto")
    if value not in CHOICES:
        raise ValueError(f"PYTRAIN_BACKEND: expected one of {', '.join(CHOICES)}, got {value!r}")
    return value


def isa(level: str = "") -> str:
    """The instruction set level that the kernels use, after changing it to `level` if one is given.

    Raises:
        RuntimeError: the level (or the one in PYTRAIN_ISA) is unknown or this machine does not have it.
        BackendError: the kernels are not loaded.
    """
    if facts is None:
        raise BackendError(why_not_loaded)
    return str(torch.ops.pytrain._isa(level))


def select(param: Tensor, *, fused: bool | None = None, unfit: str = "") -> Choice:
    """Decide for one parameter.

    Args:
        param: the parameter; its values are not read.
        fused: the param group's torch option. True demands the kernels, False the torch path.
        unfit: why an optimizer's own kernels cannot take it, if they cannot.

    Raises:
        BackendError: the kernels were demanded and cannot take this parameter; says why.
    """
    demand = "PYTRAIN_BACKEND=native" if wanted() == "native" else "fused=True" if fused else ""
    if wanted() == "torch":
        return Choice("torch", ASKED_FOR[0])
    if fused is False and not demand:
        return Choice("torch", ASKED_FOR[1])
    reason = why_not_loaded or _unsupported(param) or unfit
    if not reason:
        return Choice("native", f"CPU kernels, {isa()}")
    if demand:
        raise BackendError(f"{demand}, but {reason}; use PYTRAIN_BACKEND=auto and leave fused unset for the torch path")
    return Choice("torch", reason)


def _unsupported(param: Tensor) -> str:
    """Why the kernels cannot take this parameter, or nothing."""
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(param).__name__} is a tensor subclass with operators of its own"
    if param.device.type != "cpu":
        return f"there are no kernels for device {param.device}"
    if param.layout != torch.strided:
        return f"there are no kernels for layout {param.layout}"
    if param.dtype not in DTYPES:
        return f"there are no kernels for {param.dtype}"
    if param.is_neg() or param.is_conj():
        return "the parameter is a lazily negated or conjugated view"
    return ""
