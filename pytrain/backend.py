"""The one place that loads the kernels and decides, with a reason, whether a parameter takes them or the torch path."""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHOICES = ("auto", "native", "torch")
SIMT = "simt"  # for tests: the CUDA kernels, compiled for the CPU
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ASKED_FOR = ("PYTRAIN_BACKEND=torch", "fused=False")  # reasons that need no warning
CUDA_TORCH = (2, 13)  # the oldest torch that the CUDA kernels run under
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Choice:
    """Which backend a parameter takes ("native" or "torch") and why."""

    backend: str
    reason: str


class BackendError(RuntimeError):
    """The kernels were demanded (PYTRAIN_BACKEND=native or fused=True) and cannot serve."""


def _load() -> tuple[Any, str]:
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
    facts.connect(torch.ops.pytrain._host_calls(), torch.autograd.graph.increment_version)
    for rule in facts.rules():
        torch.library.register_fake(f"pytrain::{rule}_", _fake)
    return facts, ""


def _load_launches(name: str) -> ctypes.CDLL | str:
    """Load a library of kernels that are launched ("cuda" or "simt"); return it, or why not."""
    library = _FOLDER / f"_kernels_{name}.so"
    if not library.exists():
        note = _FOLDER / f"_{name}_reason.txt"
        return f"{library.name} was not built" + (f": {note.read_text().strip()}" if note.exists() else "")
    try:
        loaded = ctypes.CDLL(str(library))
        if name == "cuda" and (misfit := _misfit(loaded)):
            return misfit
        address = loaded.pytrain_backend
        address.restype = ctypes.c_void_p
        torch.ops.pytrain._backend(address(), name == "simt")
    except (OSError, AttributeError, RuntimeError) as error:
        return f"{library.name} does not load: {error}"
    return loaded


def _misfit(library: ctypes.CDLL) -> str:
    """Why the CUDA kernels cannot run under this torch, or nothing."""
    built_for, major = library.pytrain_cuda_version() // 1000, str(torch.version.cuda).split(".")[0]
    if str(built_for) == major:
        return ""
    return (
        f"they were built for CUDA {built_for}, this torch for CUDA {torch.version.cuda};"
        f" install pytrain again with an nvcc of CUDA {major}"
    )


def _load_cuda() -> tuple[str, str]:
    """(what the kernels for CUDA devices were built for, ""), or ("", why there are none)."""
    if facts is None:
        return "", why_not_loaded
    if torch.version.cuda is None:
        return "", "this torch is built without CUDA"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < CUDA_TORCH:
        return "", f"they need torch {CUDA_TORCH[0]}.{CUDA_TORCH[1]} or later, this is {torch.__version__}"
    library = _load_launches("cuda")
    if isinstance(library, str):
        return "", library
    version, architectures = library.pytrain_cuda_version(), library.pytrain_cuda_architectures
    architectures.restype = ctypes.c_char_p
    return f"CUDA {version // 1000}.{version % 1000 // 10}, architectures {architectures().decode()}", ""


def _load_simt() -> bool:
    """Where PYTRAIN_BACKEND=simt asks for it, let the CUDA kernels' source step what is on the CPU.

    Raises:
        BackendError: their library is missing; `python tests/simt/build.py` makes it.
    """
    if facts is None or os.environ.get("PYTRAIN_BACKEND") != "simt":
        return False
    library = _load_launches("simt")
    if isinstance(library, str):
        raise BackendError(f"PYTRAIN_BACKEND=simt: {library}; python tests/simt/build.py makes it")
    return True


def _fake(*tensors: object) -> None:
    """Tell torch's tracers that the ops return nothing and change no shapes."""


def _make_reader() -> Any:
    """What reads tensors' addresses fast, where this torch offers DLPack's C exchange API as built for; else None."""
    exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if facts is None or exchange is None:
        return None
    try:
        probe = torch.zeros(1, device="cpu")
        return facts.Reader(exchange, (Tensor, torch.nn.Parameter), probe, probe._cdata, probe.untyped_storage()._cdata)
    except (ImportError, ValueError):  # another major version of DLPack, or another capsule: lists of tensors serve
        return None


facts, why_not_loaded = _load()
reader = _make_reader()
is_profiling = getattr(torch.autograd, "_profiler_enabled", bool)  # where ops are to be seen
cuda_build, why_no_cuda = _load_cuda()
simulated = _load_simt()


def launches(device: torch.device) -> bool:
    """Whether steps on this device are queued launches, so that counts and control blocks lie there."""
    return simulated if device.type == "cpu" else device.type == "cuda" and not why_no_cuda


def is_here(device: torch.device) -> bool:
    """Whether the kernels can be called on it past torch's dispatcher: what lies there is in the host's memory."""
    return device.type == "cpu" and facts is not None and not simulated


def is_remote(device: torch.device) -> bool:
    """Whether the host learns what a step has found only by waiting for this device."""
    return launches(device) and (device.type != "cpu" or os.environ.get("PYTRAIN_SIMT_REMOTE") == "1")


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued there now becomes part of a graph, and runs when that is replayed."""
    return launches(device) and torch.ops.pytrain._capture(-1 if device.type == "cpu" else device.index) != 0


def home_of_numbers(param: Tensor) -> torch.device:
    """Where a parameter's step count and scalars are kept: beside it where its kernels count, else on the CPU."""
    return param.device if launches(param.device) else torch.device("cpu")


def has_dtensors(tensors: Iterable[Tensor]) -> bool:
    """Whether one of them is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and module.DTensor in set(map(type, tensors))


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, in the same memory; any other tensor as it is."""
    if not has_dtensors([tensor]):
        return tensor
    shard: Any = tensor._local_tensor  # type: ignore[attr-defined]  # to_local() makes a new one of a parameter
    return shard.wait() if hasattr(shard, "wait") else shard  # type: ignore[no-any-return]  # still on its way


def wanted() -> str:
    """What PYTRAIN_BACKEND asks for: "auto" (the default), "native" or "torch"; "simt" in pytrain's own tests.

    Raises:
        ValueError: it is set to something else.
    """
    value = os.environ.get("PYTRAIN_BACKEND", "auto")
    if value not in (*CHOICES, SIMT):
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
        return Choice("native", _described(param.device))
    if demand:
        raise BackendError(f"{demand}, but {reason}; use PYTRAIN_BACKEND=auto and leave fused unset for the torch path")
    return Choice("torch", reason)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return "CUDA kernels"
    return "CUDA kernels on the CPU" if simulated else f"CPU kernels, {isa()}"


def _unsupported(param: Tensor) -> str:
    """Why the kernels cannot take this parameter, or nothing."""
    if type(param).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return f"{type(param).__name__} is a tensor subclass with operators of its own"
    if param.device.type == "cuda" and why_no_cuda:
        return f"there are no kernels for device {param.device}: {why_no_cuda}"
    if param.device.type not in ("cpu", "cuda"):
        return f"there are no kernels for device {param.device}"
    if param.layout != torch.strided:
        return f"there are no kernels for layout {param.layout}"
    if param.dtype not in DTYPES:
        return f"there are no kernels for {param.dtype}"
    if param.is_neg() or param.is_conj():
        return "the parameter is a lazily negated or conjugated view"
    return ""


def why_slow(param: Tensor, group: dict[str, object]) -> str | None:
    """None for the kernels; "" for the torch path because it was asked for; else the reason for the torch path."""
    fused = group.get("fused")
    choice = select(param, fused=None if fused is None else bool(fused))
    if choice.backend == "torch":
        return "" if choice.reason in ASKED_FOR else choice.reason
    grad = param.grad
    if grad is not None and grad.layout != torch.strided:
        if wanted() == "native" or fused:
            raise BackendError(f"the kernels do not take gradients of layout {grad.layout}; leave fused unset")
        return f"there are no kernels for gradients of layout {grad.layout}"
    return None
