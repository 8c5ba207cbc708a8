"""Records what a training does, step by step, without a change to it: by torch's optimizer hooks, one file a step."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pytrain import steps as pytrain_steps
from pytrain.amp import LossScaler
from pytrain.control import CLIP_COEF, CLIP_VALUE, CONTROL_HEAD, CONTROL_ROW, FOUND_INF, INV_SCALE
from pytrain.sealed import write_checkpoint

PLAIN = (bool, int, float, str, type(None))


class Enough(BaseException):
    """Ends a training whose steps have been recorded; no `except Exception` in it catches this."""


class Recorder:
    """Writes each applied optimizer step to `folder`, and raises `Enough` after `count` of them.

    The file of a step holds the loss whose gradient the step took, the gradients as the optimizer applied them
    (unscaled, averaged and clipped, wherever that took place), the parameters after it, those before each optimizer's
    first, and the hyperparameters. Skipped steps leave no file.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.steps = 0
        self.optimizers: list[Optimizer] = []
        self.names: list[list[str]] = []
        self.losses: list[float] = []
        self.loss_scale = self.divisor = 1.0
        self.record: dict[str, Any] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Watch every optimizer, backward pass and loss scaler of this process; ends quietly with the last step."""
        with ExitStack() as stack:
            stack.callback(register_optimizer_step_pre_hook(self._before).remove)
            stack.callback(register_optimizer_step_post_hook(self._after).remove)
            for owner, name, watch in (
                (torch.autograd, "backward", self._watch_backward),
                (torch.amp.GradScaler, "scale", self._watch_scale),
                (torch.amp.GradScaler, "update", self._watch_end),
                (LossScaler, "scale", self._watch_scale),
                (LossScaler, "update", self._watch_end),
                (pytrain_steps, "take", self._watch_take),
            ):
                stack.enter_context(patch.object(owner, name, watch(getattr(owner, name))))
            with suppress(Enough):
                yield

    # ---- what is watched besides the optimizers -------------------------------------------------------------------

    def _watch_backward(self, backward: Callable[..., Any]) -> Callable[..., Any]:
        def watched(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> Any:
            roots = [tensors] if isinstance(tensors, Tensor) else list(tensors)
            given = grad_tensors if isinstance(grad_tensors, (list, tuple)) else [grad_tensors] * len(roots)
            with torch.no_grad():
                sums = [root if grad is None else (root * grad).sum() for root, grad in zip(roots, given, strict=True)]
                self.losses.append(sum(float(value.sum()) for value in sums) / self.loss_scale)
            return backward(tensors, grad_tensors, *args, **kwargs)

        return watched

    def _watch_scale(self, scale: Callable[..., Any]) -> Callable[..., Any]:
        def watched(scaler: Any, outputs: Any) -> Any:
            scaled = scale(scaler, outputs)
            self.loss_scale = float(scaler.get_scale()) or 1.0
            return scaled

        return watched

    def _watch_end(self, update: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self.losses = []  # those of a step that was skipped
            return update(*args, **kwargs)

        return watched

    def _watch_take(self, take: Callable[..., Any]) -> Callable[..., Any]:
        def watched(optimizers: Any, scaler: Any, clip: Any, divisor: float = 1.0, *args: Any, **kwargs: Any) -> Any:
            self.divisor = divisor
            try:
                return take(optimizers, scaler, clip, divisor, *args, **kwargs)
            finally:
                self.divisor, self.losses = 1.0, []

        return watched

    # ---- the step -------------------------------------------------------------------------------------------------

    def _before(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(optimizer, "_release", None) is not None:
            raise ValueError(
                "parity: step_in_backward=True steps and frees each gradient within backward, so that there is none "
                "to compare; leave it out for the comparison"
            )
        self.record = None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._note(optimizer)
            return None

        def noted() -> Any:
            loss = closure()
            self._note(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": noted}

    @torch.no_grad()
    def _note(self, optimizer: Optimizer) -> None:
        """Begin the record of a step whose gradients are there; of several by one closure the last counts."""
        params = [param for group in optimizer.param_groups for param in group["params"]]
        number = next((i for i, known in enumerate(self.optimizers) if known is optimizer), len(self.optimizers))
        skipped, gradients = applied_gradients(optimizer)
        losses, self.losses = self.losses, []
        if skipped:
            return
        before = None if self.record is None else self.record["before"]
        if number == len(self.optimizers):
            self.optimizers.append(optimizer)
            self.names.append(names_of(params, number))
            before = [copied(param) for param in params]
        self.record = {
            "optimizer": number,
            "kind": f"{type(optimizer).__module__}.{type(optimizer).__qualname__}",
            "loss": sum(losses) / self.divisor if losses else None,
            "names": self.names[number],
            "groups": [i for i, group in enumerate(optimizer.param_groups) for _ in group["params"]],
            "hypers": [plain_values(group) for group in optimizer.param_groups],
            "gradients": gradients,
            "before": before,
        }

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.record is None:
            return
        record, self.record = self.record, None
        record["parameters"] = [copied(param) for group in optimizer.param_groups for param in group["params"]]
        self.steps += 1
        write_checkpoint(step_file(self.folder, self.steps), record)
        if self.steps == self.count:
            raise Enough


def step_file(folder: Path, step: int) -> Path:
    """Where a step's record is; steps count from 1."""
    return folder / f"step-{step:06}.ckpt"


def copied(tensor: Tensor) -> Tensor:
    """A copy in the CPU's memory, dense and with no more storage than it needs."""
    tensor = tensor.detach()
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return dense.to("cpu", copy=True).contiguous()


def plain_values(group: dict[str, Any]) -> dict[str, Any]:
    """The hyperparameters of a param group that are numbers, words or short lists of them."""
    values = {key: float(v) if isinstance(v, Tensor) and v.numel() == 1 else v for key, v in group.items()}
    kept = {}
    for key, value in values.items():
        items = value if isinstance(value, (list, tuple)) else [value]
        if key not in ("params", "param_names") and all(isinstance(item, PLAIN) for item in items):
            kept[key] = list(value) if isinstance(value, tuple) else value
    return kept


def applied_gradients(optimizer: Optimizer) -> tuple[bool, list[Tensor | None]]:
    """Whether a step that is about to take place will be skipped, and the gradients that it applies, copied.

    A fused step unscales and clips while it reads the gradients, which stay as backward left them: what it will read
    them by is in its control block (`pytrain.step`), or in the attributes that a GradScaler sets.
    """
    measured, found_inf = getattr(optimizer, "_measured", None), getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    groups = optimizer.param_groups
    clip_value, coefs = 0.0, [1.0 if scale is None else 1.0 / float(scale)] * len(groups)
    skipped = found_inf is not None and float(found_inf) != 0
    if measured is not None:
        control = measured.control.tolist()
        skipped, clip_value = control[FOUND_INF] != 0, control[CLIP_VALUE]
        rows = [control[CONTROL_HEAD + CONTROL_ROW * i :] for i in range(len(groups))]
        coefs = [control[INV_SCALE] * row[CLIP_COEF] for row in rows]
    gradients: list[Tensor | None] = []
    for coef, group in zip(coefs, groups, strict=True):
        for param in group["params"]:
            gradient = None if param.grad is None or skipped else copied(param.grad)
            if gradient is not None and (coef != 1.0 or clip_value):
                low = gradient.dtype in (torch.float16, torch.bfloat16)
                gradient = (gradient.float() if low else gradient).mul_(coef)
                gradient = gradient.clamp_(-clip_value, clip_value) if clip_value else gradient
            gradients.append(gradient)
    return skipped, gradients


def names_of(params: Sequence[Tensor], optimizer: int) -> list[str]:
    """The parameters' names in the module that holds most of them; the innermost such module.

    What no module holds is called after its place in its optimizer.
    """
    wanted = {id(param) for param in params}
    best: tuple[int, int] = (0, 0)
    names: dict[int, str] = {}
    for module in gc.get_objects():
        if not issubclass(type(module), torch.nn.Module) or "_parameters" not in module.__dict__:
            continue
        own = {id(param): name for name, param in module.named_parameters(remove_duplicate=True)}
        score = (len(wanted & own.keys()), -sum(map(len, own.values())))
        if score > best and score[0]:
            best, names = score, own
    return [names.get(id(param), f"parameter {i} of optimizer {optimizer}") for i, param in enumerate(params)]
