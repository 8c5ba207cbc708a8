"""EMA and SWA: averages of a module's parameters over the training steps, kept beside the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import update_bn

from pytrain import backend
from pytrain.optim.states import is_small, zeros_in_blocks

FORMAT = 1  # of the state dicts


class Average(ABC):
    """What EMA and SWA share: an average beside each parameter of a module, and when and how it is taken and used.

    An average is fp32 beside a bf16, fp16 or fp8 parameter (torch's AveragedModel keeps it in the parameter's dtype,
    where a small weight moves nothing), else of the parameter's dtype; it has the strides and the device that the
    parameter had at first. Frozen parameters have averages too; tied ones have one. Buffers are not averaged: the
    module's own are used, but for the statistics that `update_bn` renews.

    The module's parameters must stay the objects that they are: assigning to their `data`, or loading the module, is
    fine; a parameter that was replaced, added or removed raises a RuntimeError in `swap`, `copy_to`, `state_dict` and
    `load_state_dict`, but goes unnoticed while averages are taken. The object cannot be copied or pickled; save its
    `state_dict`.

    Attributes:
        constant: whether all averages but the first have the same weight.
        params: the module's parameters, in its order.
        averages: the average of each, keyed by the parameter's id; a copy of the parameter until a first one is taken.
        buffers: the renewed BatchNorm statistics by name; empty where there are none, or none of these averages.
        swapped: whether the parameters hold their averages now.
    """

    constant = False

    def __init__(self, model: nn.Module, *, start_step: int, every: int) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        _check_count("start_step", start_step, least=0)
        _check_count("every", every, least=1)
        named = dict(model.named_parameters())
        if not named:
            raise ValueError("model: has no parameters to average")
        for name, param in named.items():
            _check_param(name, param)
        self.start_step, self.every = start_step, every
        self._steps = self._n_averaged = 0
        self._later: Tensor | None = None  # how many applied steps, all averaged, are not in these counts yet
        self.swapped = False
        self.params: list[Tensor] = list(named.values())
        self.averages: dict[int, Tensor] = _copies(self.params)
        self.buffers: dict[str, Tensor] = {}
        self._model, self._names = model, list(named)
        self._done: frozenset[int] | None = None
        self._rest: list[Tensor] = []

    @property
    def steps(self) -> int:
        """How many steps were applied; waits for the device where only that knows."""
        self._count()
        return self._steps

    @property
    def n_averaged(self) -> int:
        """How many averages were taken; waits for the device where only that knows."""
        self._count()
        return self._n_averaged

    # ---- taking averages --------------------------------------------------------------------------------------------

    def next_weight(self) -> float:
        """The weight that the next applied step has in the average: 1 in the first, 0 if that step takes none."""
        if self._is_steady():
            return self._weight()
        after_start = self.steps + 1 - self.start_step
        if after_start <= 0 or after_start % self.every:
            return 0.0
        return self._weight() if self.n_averaged else 1.0

    def update(self) -> None:
        """Average the parameters. For a plain loop, after each `optimizer.step()` that was applied.

        `pytrain.step(..., ema=average)` does this by itself, and only where the step was applied.

        Raises:
            RuntimeError: the parameters hold their averages, or one has another shape or dtype than before.
        """
        self.advance()

    def advance(self, done: Collection[int] = ()) -> None:
        """An applied step is over: average the parameters that are not done yet with `next_weight()`, and count.

        Args:
            done: the ids of the parameters whose averages the optimizer's own loop has moved with this weight already.

        Raises:
            RuntimeError: the parameters hold their averages, or one has another shape or dtype than before.
        """
        self._check_not_swapped("update")
        weight = self.next_weight()
        if weight:
            if done is not self._done:  # the same object again means the same parameters again
                self._done = frozenset(done)
                self._rest = [p for p in self.params if id(p) not in self._done]
            if self._rest:
                self._check_fit("update")
                average_([self.averages[id(p)] for p in self._rest], self._rest, weight)
            self._n_averaged += 1
            self.buffers = {}
        self._steps += 1

    def count_later(self, applied: Tensor, done: frozenset[int]) -> bool:
        """`advance` after a step of which only a device knows whether it was applied; False: that cannot wait.

        Args:
            applied: bool, shape (), on a device.
            done: as in `advance`.
        """
        if not self._is_steady() or self.buffers or not done.issuperset(self.averages):
            return False
        self._check_not_swapped("update")
        self._later = applied.long() if self._later is None else self._later + applied
        return True

    def _count(self) -> None:
        if self._later is not None:
            applied, self._later = int(self._later), None
            self._steps += applied
            self._n_averaged += applied

    def _is_steady(self) -> bool:
        """Whether all later steps have the same weight, so that it does not matter how many there were."""
        return self.constant and self.every == 1 and self._n_averaged > 0 and self._steps >= self.start_step

    @abstractmethod
    def _weight(self) -> float:
        """The weight of an average that is not the first."""

    # ---- using them -------------------------------------------------------------------------------------------------

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Inside this context the module's parameters, and renewed statistics, hold their averages.

        They are written into the parameters' memory, rounded to their dtype; what stood there comes back to the bit at
        the end, also after an exception. What is written to the parameters in between is lost. Needs memory for one
        copy of the parameters.

        Raises:
            RuntimeError: nothing was averaged yet, the contexts are nested, or the module has other parameters.
        """
        self._check_not_swapped("swap")
        self._check_usable("swap")
        live = list(self.params)
        values = [self.averages[id(p)] for p in live]
        if self.buffers:
            present = dict(self._model.named_buffers())
            _check_alike(
                "swap: the module's buffers", self.buffers, {n: present[n] for n in self.buffers if n in present}
            )
            live += [present[name] for name in self.buffers]
            values += self.buffers.values()
        kept = [x.detach().clone() for x in live]
        self.swapped = True
        try:
            _copy(live, values)
            yield
        finally:
            _copy(live, kept)
            self.swapped = False

    def copy_to(self, model: nn.Module) -> None:
        """Copy the averages, rounded to its parameters' dtypes, and the buffers into a module of the same structure.

        This may be the averaged module itself, to end a training with. All is checked before anything is written.

        Raises:
            RuntimeError: nothing was averaged yet, the averaged module has other parameters, or holds its averages.
            ValueError: names or shapes differ; says which.
        """
        self._check_usable("copy_to")
        if model is self._model:
            self._check_not_swapped("copy_to")
        averages, buffers = self._named_averages(), dict(self._model.named_buffers()) | self.buffers
        params, their_buffers = dict(model.named_parameters()), dict(model.named_buffers())
        _check_alike("copy_to: the model's parameters", averages, params)
        _check_alike("copy_to: the model's buffers", buffers, their_buffers)
        _copy([params[name] for name in averages], averages.values())
        _copy([their_buffers[name] for name in buffers], buffers.values())

    def update_bn(self, loader: Iterable[Any], device: torch.device | str | int | None = None) -> None:
        """Renew the BatchNorm statistics for the averaged weights, as torch.optim.swa_utils.update_bn does.

        One pass over the data in training mode. The module's own buffers, momenta and modes stay as they are: `buffers`
        keeps the new statistics, `swap` and `copy_to` use them, and the next average drops them. Does nothing where the
        module has no BatchNorm.

        Args:
            loader: batches: tensors, or lists and tuples that begin with one.
            device: where to move each batch; None leaves it where it is.

        Raises:
            RuntimeError: as `swap`.
            ValueError: the loader gave no batch.

        Source: Izmailov et al. 2018, section 3.2 (arXiv:1803.05407).
        """
        with self.swap(), _buffers_and_modes_kept(self._model):
            names = _statistics(self._model)
            if not names:
                return
            batches = 0

            def counted() -> Iterator[Any]:
                nonlocal batches
                for batch in loader:
                    batches += 1
                    yield batch

            update_bn(counted(), self._model, device)  # type: ignore[arg-type]
            if not batches:
                raise ValueError("update_bn: the loader gave no batch")
            present = dict(self._model.named_buffers())
            renewed = {name: present[name].detach().clone() for name in names}
        self.buffers = renewed

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All that later averages depend on, for `torch.save`; its tensors are the averages themselves, not copies.

        Raises:
            RuntimeError: the module has other parameters than the averages were made for.
        """
        self._check_usable("state_dict", may_be_empty=True)
        return {
            "format": FORMAT,
            "kind": type(self).__name__,
            "steps": self.steps,
            "n_averaged": self.n_averaged,
            **self._settings(),
            "averages": self._named_averages() if self.n_averaged else {},
            "buffers": dict(self.buffers),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. All is checked before anything is written.

        This object's start_step, every and decay stay as they are, so that they can be changed in the middle of a
        training; the saved ones are for the reader.

        Raises:
            RuntimeError: the parameters hold their averages, or the module has other parameters.
            ValueError: another kind or format, a missing key, or names, shapes or dtypes differ; says which.
        """
        where = "load_state_dict"
        self._check_not_swapped(where)
        self._check_usable(where, may_be_empty=True)
        needed = ("format", "kind", "steps", "n_averaged", "averages", "buffers")
        missing = [key for key in needed if key not in state_dict]
        if missing:
            raise ValueError(f"{where}: missing keys {missing}")
        for key, wanted in (("format", FORMAT), ("kind", type(self).__name__)):
            if state_dict[key] != wanted:
                raise ValueError(f"{where}: {key}: expected {wanted!r}, got {state_dict[key]!r}")
        steps, n_averaged = state_dict["steps"], state_dict["n_averaged"]
        _check_count(f"{where}: n_averaged", n_averaged, least=0)
        _check_count(f"{where}: steps", steps, least=n_averaged)
        averages = self._named_averages()
        _check_alike(f"{where}: averages", averages if n_averaged else {}, state_dict["averages"], dtypes=True)
        buffers = {}
        if state_dict["buffers"]:
            present = dict(self._model.named_buffers())
            buffers = {name: present[name] for name in _statistics(self._model)}
            _check_alike(f"{where}: buffers", buffers, state_dict["buffers"], dtypes=True)
        if n_averaged:
            _copy(averages.values(), [state_dict["averages"][name] for name in averages])
        self.buffers = {n: state_dict["buffers"][n].detach().to(b.device, copy=True) for n, b in buffers.items()}
        self._steps, self._n_averaged, self._later = steps, n_averaged, None

    def _settings(self) -> dict[str, Any]:
        return {"start_step": self.start_step, "every": self.every}

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} belongs to the parameters of one module and cannot be copied or pickled; "
            "save its state_dict()"
        )

    # ---- checks -----------------------------------------------------------------------------------------------------

    def _named_averages(self) -> dict[str, Tensor]:
        return {name: self.averages[id(p)] for name, p in zip(self._names, self.params, strict=True)}

    def _check_not_swapped(self, where: str) -> None:
        if self.swapped:
            raise RuntimeError(f"{where}: the parameters hold their averages; leave the swap() context first")

    def _check_fit(self, where: str) -> None:
        for name, param in zip(self._names, self.params, strict=True):
            average = self.averages[id(param)]
            if param.shape != average.shape or _average_dtype(param.dtype) != average.dtype:
                raise RuntimeError(
                    f"{where}: parameter {name!r} is {param.dtype} {tuple(param.shape)} now, but its average is "
                    f"{average.dtype} {tuple(average.shape)}; make a new {type(self).__name__}"
                )

    def _check_usable(self, where: str, *, may_be_empty: bool = False) -> None:
        present = dict(self._model.named_parameters())
        known = dict(zip(self._names, self.params, strict=True))
        other = [name for name in present | known if present.get(name) is not known.get(name)]
        if other:
            raise RuntimeError(
                f"{where}: parameters {other} were replaced, added or removed since the averages were made; "
                f"make a new {type(self).__name__}"
            )
        self._check_fit(where)
        if not (may_be_empty or self.n_averaged):
            raise RuntimeError(
                f"{where}: nothing was averaged yet, after {self.steps} applied steps with "
                f"start_step={self.start_step} and every={self.every}"
            )


class EMA(Average):
    r"""The exponential moving average of a module's parameters.

    The first average is a copy of the parameters; then

    .. math::
        a \leftarrow \mathrm{decay} \cdot a + (1 - \mathrm{decay}) \cdot p

    in torch.lerp's form. The same as torch's AveragedModel with `get_ema_multi_avg_fn(decay)` for fp32 and fp64, but
    for the rounding of torch's fused multiply-adds. Pass it to `pytrain.step(..., ema=ema)`, or call `update()` after
    each applied step; evaluate inside `with ema.swap():`.

    Args:
        model: the module; its parameters must be floating-point or complex, and dense.
        decay: what the average keeps of itself each time, in [0, 1).
        start_step: how many applied steps come before any is averaged, >= 0.
        every: the distance of the averaged steps, >= 1: of the applied steps, counted from 1, those with the numbers
            start_step + every, start_step + 2 * every and so on.

    Raises:
        TypeError: model is no module.
        ValueError: an argument is out of its range, or the model has no parameters, or one that cannot be averaged.

    Source: Polyak & Juditsky 1992, Acceleration of Stochastic Approximation by Averaging (SIAM J. Control Optim. 30).
    """

    constant = True

    def __init__(self, model: nn.Module, decay: float = 0.999, *, start_step: int = 0, every: int = 1) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: expected a number in [0, 1), got {decay!r}")
        super().__init__(model, start_step=start_step, every=every)
        self.decay = decay

    def _weight(self) -> float:
        return 1.0 - self.decay

    def _settings(self) -> dict[str, Any]:
        return {"decay": self.decay, **super()._settings()}


class SWA(Average):
    r"""Stochastic weight averaging: the mean of a module's parameters over all averaged steps.

    With n the number of averages taken before,

    .. math::
        a \leftarrow a + (p - a) / (n + 1)

    in torch.lerp's form. The same as torch's AveragedModel with `get_swa_multi_avg_fn()` for fp32, but for the rounding
    of torch's fused multiply-adds; for fp64 more exact, because torch rounds 1 / (n + 1) to fp32. Pass it to
    `pytrain.step(..., ema=swa)`, or call `update()` after each applied step; evaluate inside `with swa.swap():`, after
    `swa.update_bn(loader)` if the module has BatchNorm.

    Args:
        model: the module; its parameters must be floating-point or complex, and dense.
        start_step: how many applied steps come before any is averaged, >= 0.
        every: the distance of the averaged steps, >= 1, such as the learning rate's cycle: of the applied steps,
            counted from 1, those with the numbers start_step + every, start_step + 2 * every and so on.

    Raises:
        TypeError: model is no module.
        ValueError: an argument is out of its range, or the model has no parameters, or one that cannot be averaged.

    Source: Izmailov et al. 2018, algorithm 1 (arXiv:1803.05407).
    """

    def __init__(self, model: nn.Module, *, start_step: int = 0, every: int = 1) -> None:
        super().__init__(model, start_step=start_step, every=every)

    def _weight(self) -> float:
        return 1.0 / (self.n_averaged + 1)


def _average_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _copies(params: Sequence[Tensor]) -> dict[int, Tensor]:
    """A copy of each in its average's dtype, by the id of the parameter and in this order."""
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for param in filter(is_small, params):
        small.setdefault((_average_dtype(param.dtype), param.device), []).append(param)
    room = {
        id(param): place
        for (dtype, device), alike in small.items()
        for param, place in zip(alike, zeros_in_blocks([p.shape for p in alike], dtype, device), strict=True)
    }
    return {
        id(p): room[id(p)].copy_(p.detach()) if id(p) in room else p.detach().to(_average_dtype(p.dtype), copy=True)
        for p in params
    }


def _check_count(name: str, value: Any, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: expected an integer >= {least}, got {value!r}")


def _check_param(name: str, param: Tensor) -> None:
    if is_lazy(param):
        raise ValueError(f"model: parameter {name!r} has no shape yet; run the lazy module once before")
    if not (param.is_floating_point() or param.is_complex()):
        raise ValueError(
            f"model: parameter {name!r} is {param.dtype}; only floating-point and complex ones are averaged"
        )
    if param.layout != torch.strided:
        raise ValueError(f"model: parameter {name!r} is {param.layout}; only dense ones are averaged")


def _check_alike(where: str, wanted: Mapping[str, Tensor], found: Any, *, dtypes: bool = False) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{where}: expected a dict of tensors, got {type(found).__name__}")
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    if missing or unexpected:
        raise ValueError(f"{where}: missing {missing}, unexpected {unexpected}")
    for name, tensor in wanted.items():
        value = found[name]
        if not isinstance(value, Tensor):
            raise ValueError(f"{where}: {name!r}: expected a tensor, got {type(value).__name__}")
        if value.shape != tensor.shape:
            raise ValueError(f"{where}: {name!r}: expected shape {tuple(tensor.shape)}, got {tuple(value.shape)}")
        if dtypes and value.dtype != tensor.dtype:
            raise ValueError(f"{where}: {name!r}: expected {tensor.dtype}, got {value.dtype}")


def _statistics(model: nn.Module) -> list[str]:
    """The names of the buffers that BatchNorm layers have of their own."""
    return [
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for name, _ in module.named_buffers(recurse=False)
    ]


@contextmanager
def _buffers_and_modes_kept(model: nn.Module) -> Iterator[None]:
    """Take back what a forward in training mode, and torch's update_bn, does to buffers, modes and momenta."""
    modules = list(model.modules())
    modes = [module.training for module in modules]
    momenta = [(module, module.momentum) for module in modules if isinstance(module, _BatchNorm)]
    owned = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    buffers = list(model.buffers())
    kept = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        for module, name, buffer in owned:
            module._buffers[name] = buffer
        _copy(buffers, kept)
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum


@torch.no_grad()
def _copy(targets: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for target, value in zip(targets, values, strict=True):
        target.copy_(value)


@torch.no_grad()
def average_(averages: Sequence[Tensor], params: Sequence[Tensor], weight: float) -> None:
    """Move each average to its parameter by a weight in (0, 1]: torch.lerp's two forms, each operation rounded."""
    averages, params = list(averages), list(params)
    if backend.has_dtensors(averages):
        averages, params = list(map(backend.local, averages)), list(map(backend.local, params))
    if backend.facts is not None and torch.ops.pytrain._average.default(averages, params, weight) < 0:
        torch.autograd.graph.increment_version(averages)
        return
    if weight == 1.0:
        torch._foreach_copy_(averages, params)
        return
    alike: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for average, param in zip(averages, params, strict=True):
        a, p = alike.setdefault((average.device, average.dtype), ([], []))
        a += [average]
        p += [param]
    for (_, dtype), (a, p) in alike.items():
        w = torch.tensor(weight, dtype=dtype.to_real(), device="cpu").item()
        moves = [torch.empty_like(average) for average in a]
        torch._foreach_copy_(moves, p)
        torch._foreach_sub_(moves, a)
        if w < 0.5:
            torch._foreach_mul_(moves, w)
            torch._foreach_add_(a, moves)
        else:
            torch._foreach_mul_(moves, 1.0 - w)
            torch._foreach_copy_(a, p)
            torch._foreach_sub_(a, moves)
