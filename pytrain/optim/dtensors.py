"""DTensor parameters (FSDP2, tensor parallelism): each rank steps its own shards; norms and flags are of all ranks.

Loaded only where an optimizer is given a DTensor.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor

from pytrain import backend
from pytrain.control import CONTROL_HEAD, CONTROL_ROW, FOUND_INF, SUMSQ, WRITE
from pytrain.optim.states import UnfitError
from pytrain.optim.storage import elementwise

if TYPE_CHECKING:
    from torch.optim.optimizer import Optimizer

    from pytrain.optim.base import FusedOptimizer


class Spread:
    """How the parameters of an optimizer lie on the ranks of a mesh.

    Each rank sums the squares of what it holds. An element that several ranks hold is counted once: with the inverse of
    their number.

    Attributes:
        meshes: those of its parameters, in the order of these, which all ranks have.
        rows: for each param group the number of shards that most of its elements are cut into.
        others: parameters of another number, with that and the group.

    Raises:
        UnfitError: a parameter's values are sums that are still to be taken (Partial).
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.meshes: dict[DeviceMesh, None] = {}
        self.rows: list[int] = []
        self.others: list[tuple[int, int, Tensor]] = []
        for index, group in enumerate(optimizer.param_groups):
            sizes: dict[int, int] = defaultdict(int)
            counted = []
            for i, param in enumerate(group["params"]):
                shards = 1
                if isinstance(param, DTensor):
                    where = f"{type(optimizer).__name__}: param_groups[{index}]['params'][{i}]"
                    shards = _count_shards(param, where)
                    self.meshes[param.device_mesh] = None
                sizes[shards] += param.numel()
                counted.append((shards, index, param))
            most = max(sizes, key=lambda shards: sizes[shards], default=1)
            self.rows.append(most)
            self.others += [one for one in counted if one[0] != most]

    def own(self, control: Tensor, size: int) -> Tensor:
        """What this rank adds to the sums of squares, a param group, where `size` ranks add."""
        sums = control[CONTROL_HEAD:].view(-1, CONTROL_ROW)[:, SUMSQ]
        sums = sums * torch.tensor([row / size for row in self.rows], dtype=sums.dtype).to(sums.device)
        for shards, group, param in self.others:
            if param.grad is not None:
                norm = torch.linalg.vector_norm(backend.local(param.grad), dtype=torch.float64)
                sums[group] += norm.square().to(sums.device) * ((shards - self.rows[group]) / size)
        return sums


class Meshes:
    """The ranks that must agree on a step of optimizers: `pytrain.step`'s `shards`.

    Raises:
        ValueError: two meshes of which neither has all ranks of the other, or a strategy that shards them once more.
    """

    def __init__(
        self, spreads: Sequence[Spread | None], optimizers: Sequence[Optimizer], shards: object = None
    ) -> None:
        if shards is not None:
            raise ValueError(
                "step: the parameters are DTensors, which lie on a mesh of ranks already; step them without a strategy"
            )
        self.spreads = [spread or Spread(optimizer) for spread, optimizer in zip(spreads, optimizers, strict=True)]
        meshes = {mesh: None for spread in self.spreads for mesh in spread.meshes}
        self.mesh = max(meshes, key=lambda mesh: mesh.size())
        for mesh in meshes:
            if mesh is not self.mesh and not set(mesh.mesh.flatten().tolist()) <= set(
                self.mesh.mesh.flatten().tolist()
            ):
                raise ValueError(
                    f"step: parameters lie on {mesh} and on {self.mesh}, which lacks ranks of the first; step them by "
                    "optimizers of their own"
                )

    def agree_on(self, controls: list[Tensor]) -> None:
        """One small all-reduce of the flags and the sums of squares; on a mesh of several dimensions that is not all
        ranks, one a dimension."""
        size = self.mesh.size()
        parts = []
        for spread, control in zip(self.spreads, controls, strict=True):
            parts += [control[FOUND_INF : FOUND_INF + 1], spread.own(control, size)]
        home = controls[0].device
        message = torch.cat([part.to(home) for part in parts]).to(self.mesh.device_type)
        for group in _groups(self.mesh):
            dist.all_reduce(message, group=group)
        at = 0
        for spread, control in zip(self.spreads, controls, strict=True):
            told = message[at : at + 1 + len(spread.rows)].to(control.device)
            control[FOUND_INF] = told[0]
            sums = torch.where(told[0] > 0, torch.nan, told[1:])  # no norm, as where one rank has it all
            control[CONTROL_HEAD:].view(-1, CONTROL_ROW)[:, SUMSQ] = sums
            at += len(told)

    def publish(self) -> None:
        """Each rank keeps its own shards."""


class Shards:
    """What steps a FusedOptimizer with DTensors: one of the same class and options whose parameters are their shards.

    The optimizer's own state has the shards' states as DTensors that share their memory, as torch's optimizers have
    them. Hooks, loss scaling and the caller see the optimizer alone.

    Raises:
        ValueError: its rule or its storage needs whole tensors.
        UnfitError: as `Spread`.
    """

    def __init__(self, optimizer: FusedOptimizer) -> None:
        _check(optimizer)
        self.spread = Spread(optimizer)
        self._inner: FusedOptimizer | None = None
        self._locals: list[tuple[DTensor, Tensor, str]] = []  # a parameter, its shard and its place
        self._watches: list[Any] = []  # over the optimizer's objects, and over those of the inner one

    def measure(self, optimizer: FusedOptimizer, grad_coef: float, clip_value: float) -> Tensor:
        """Pass 1 over this rank's shards."""
        inner = self._begin(optimizer)
        try:
            control = inner.measure(grad_coef, clip_value, {}, 0.0)
        except BaseException:
            self._drop_grads()
            raise
        optimizer._measured, optimizer.settles = inner._measured, False
        return control

    def write(self, optimizer: FusedOptimizer, mode: int) -> None:
        """Pass 2."""
        assert self._inner is not None
        optimizer._measured = None
        if mode == WRITE and optimizer._hooked():  # hooks may have changed the gradients
            self._take_grads()
        self._finish(optimizer, lambda inner: inner._write(mode))

    def run(self, optimizer: FusedOptimizer, inv_scale: float, found_inf: Tensor | None, scale: Tensor | None) -> None:
        """A plain step, which needs nothing of other ranks."""
        self._begin(optimizer)
        self._finish(optimizer, lambda inner: inner._run_settled(inv_scale, found_inf, scale))

    def abandon(self) -> None:
        """Take back a `measure` whose pass 2 will not come."""
        assert self._inner is not None
        self._inner.abandon()
        self._drop_grads()

    def inner(self, optimizer: FusedOptimizer) -> FusedOptimizer:
        """The optimizer of the shards, made anew where parameters, their shards or state are other objects."""
        known = self._inner is not None and all(param._local_tensor is shard for param, shard, _ in self._locals)
        outer = self._watches[0] if self._watches else None
        if not known or outer is None or backend.facts.check(outer, optimizer.param_groups, optimizer.state) == 2:
            self._make(optimizer)
        assert self._inner is not None
        return self._inner

    # ---- between the two optimizers --------------------------------------------------------------------------------

    @torch.no_grad()
    def _make(self, optimizer: FusedOptimizer) -> None:
        self.spread, self._locals, self._watches = Spread(optimizer), [], []
        optimizer.spread = self.spread
        keys = elementwise(optimizer)
        state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            params = []
            for i, param in enumerate(group["params"]):
                params.append(backend.local(param))
                given = optimizer.state.get(param)
                if isinstance(param, DTensor):
                    where = f"{type(optimizer).__name__}: param_groups[{index}]['params'][{i}]"
                    self._locals.append((param, params[-1], where))
                    given = given and {
                        key: _cut(param, value, f"{where}: its state {key!r}") if key in keys else value
                        for key, value in given.items()
                    }
                if given:
                    state[params[-1]] = given
            groups.append({**_options(group), "params": params})
        kind = type(optimizer)
        self._inner = kind.__new__(kind)
        self._inner.__dict__.update(optimizer.__dict__)  # also what a subclass of the user's has
        self._inner.__setstate__({"param_groups": groups, "state": state})
        self._inner._warned = optimizer._warned

    def _begin(self, optimizer: FusedOptimizer) -> FusedOptimizer:
        inner = self.inner(optimizer)
        for group, mine in zip(optimizer.param_groups, inner.param_groups, strict=True):
            mine.update(_options(group))
        self._take_grads()
        return inner

    def _take_grads(self) -> None:
        for param, shard, where in self._locals:
            grad = param.grad
            if grad is not None and (not isinstance(grad, DTensor) or grad._spec is not param._spec):
                _check_grad(param, grad, where)
            shard.grad = None if grad is None else backend.local(grad)

    def _drop_grads(self) -> None:
        for _, shard, _ in self._locals:
            shard.grad = None

    def _finish(self, optimizer: FusedOptimizer, step: Any) -> None:
        """Let the inner optimizer step, and the outer one know of it."""
        inner = self._inner
        assert inner is not None
        try:
            step(inner)
        finally:
            self._drop_grads()
        optimizer._skipped = inner._skipped
        torch.autograd.graph.increment_version([param for param, _, _ in self._locals if param.grad is not None])
        if not self._watches or backend.facts.check(self._watches[1], inner.param_groups, inner.state) == 2:
            self._tell_state(optimizer, inner)

    def _tell_state(self, optimizer: FusedOptimizer, inner: FusedOptimizer) -> None:
        keys = elementwise(optimizer)
        pairs: Iterator[tuple[Tensor, Tensor]] = (
            pair
            for group, mine in zip(optimizer.param_groups, inner.param_groups, strict=True)
            for pair in zip(group["params"], mine["params"], strict=True)
        )
        for param, shard in pairs:
            state = inner.state.get(shard, {})
            if isinstance(param, DTensor):
                state = {key: _beside(param, value) if key in keys else value for key, value in state.items()}
            if state:
                optimizer.state[param] = state
        if backend.facts:
            watch = backend.facts.watch
            self._watches = [watch(one.param_groups, one.state) for one in (optimizer, inner)]


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _check(optimizer: FusedOptimizer) -> None:
    """Raise ValueError where shards do not do."""
    name, storage = type(optimizer).__name__, optimizer.storage
    reason = ""
    if not optimizer.takes_control or any(optimizer.rule(group).sums for group in optimizer.param_groups):
        reason = f"{name} needs whole tensors"
    elif storage.stochastic:
        reason = "rounding='stochastic' draws its numbers a whole tensor at a time"
    elif storage.state == "8bit":
        reason = "state_dtype='8bit' has blocks of codes that shards would cut; 'bf16' goes"
    elif storage.in_backward:
        reason = "step_in_backward=True steps before gradients are reduced"
    if reason:
        raise ValueError(f"{name}: a parameter is a DTensor, of which ranks hold shards, and {reason}")


def _count_shards(param: DTensor, where: str) -> int:
    """How many shards its elements are cut into."""
    shards = []
    for dim, placement in enumerate(param.placements):
        if placement.is_partial():
            raise UnfitError(f"{where}: it has placements {param.placements}; a Partial one cannot be stepped")
        shards += [1 if placement.is_replicate() else param.device_mesh.size(dim)]
    return math.prod(shards)


def _check_grad(param: DTensor, grad: Tensor, where: str) -> None:
    if not isinstance(grad, DTensor):
        raise UnfitError(f"{where}: its gradient is a plain tensor, expected a DTensor as the parameter is")
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        raise UnfitError(
            f"{where}: its gradient has placements {grad.placements} on {grad.device_mesh}, expected "
            f"{param.placements} on {param.device_mesh}; p.grad = p.grad.redistribute(placements=p.placements) first"
        )


def _cut(param: DTensor, value: Tensor, where: str) -> Tensor:
    """This rank's shard of a state, which may be a whole tensor or lie on the ranks otherwise."""
    if value.shape != param.shape:
        raise UnfitError(f"{where} has shape {tuple(value.shape)}, expected {tuple(param.shape)}")
    if not isinstance(value, DTensor):
        value = distribute_tensor(value, param.device_mesh, param.placements, src_data_rank=None)
    elif value.placements != param.placements or value.device_mesh != param.device_mesh:
        value = value.redistribute(param.device_mesh, param.placements)
    return backend.local(value)


def _beside(param: DTensor, shard: Tensor) -> DTensor:
    """A DTensor of this shard that lies on the ranks as a parameter does."""
    return DTensor.from_local(
        shard, param.device_mesh, param.placements, run_check=False, shape=param.shape, stride=param.stride()
    )


def _groups(mesh: DeviceMesh) -> list[dist.ProcessGroup | None]:
    """The process groups over which a sum is that over the mesh."""
    if mesh.ndim > 1 and mesh.size() == dist.get_world_size():
        return [None]
    return list(mesh.get_all_groups())
