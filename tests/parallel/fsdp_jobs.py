"""What the ranks of the pool do with DTensor parameters, and the same in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jobs
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from jobs import Group, batch, model, summed_loss
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.lr_scheduler import LambdaLR

import pytrain
from pytrain import optim
from pytrain.amp import LossScaler
from pytrain.ema import EMA
from pytrain.optim import REGISTRY, AdamW, FusedOptimizer

ELEMENTWISE = [name for name, cls in REGISTRY.items() if cls.takes_control and not any(rule.sums for rule in cls.rules)]
OTHERS = [cls for name, cls in REGISTRY.items() if name not in ELEMENTWISE] + [optim.Adafactor, optim.Muon]
SPLIT = {"fsdp": 0, "mixed": 0, "hsdp": 4, "tp": 2, "slice": 2}  # how many share the data; 0: all ranks


def sharded(group: Group, layout: str, net: nn.Sequential, **options: Any) -> nn.Sequential:
    """A model whose parameters lie on the ranks: in shards, "hsdp" in shards that two ranks have each, "tp" in shards
    of what two ranks divide already, "slice" on a part of a larger mesh; "mixed" leaves one layer whole."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    if layout in ("fsdp", "mixed"):
        mesh = DeviceMesh.from_group(group, "cpu")
        for layer in layers if layout == "fsdp" else (layers[0], layers[2]):
            fully_shard(layer, mesh=mesh, **options)
        return net if layout == "mixed" else fully_shard(net, mesh=mesh, **options)
    if layout == "hsdp":
        return fully_shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards")))
    if layout == "slice":
        root = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("other", "copies", "shards"))
        return fully_shard(net, mesh=root["copies", "shards"])
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, both["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    return fully_shard(net, mesh=both["data"])


def share(group: Group, layout: str) -> int:
    """Whose part of the data this rank has."""
    rank = dist.get_rank(group)
    return {"tp": rank // 2, "slice": rank % 2}.get(layout, rank)


def whole(x: Tensor) -> Tensor:
    """All of a DTensor, as a copy."""
    x = x.detach()
    if x.dtype == torch.int16:  # which Gloo does not gather
        return whole(x.int()).short()
    return x.full_tensor().clone() if isinstance(x, DTensor) else x.clone()


def wholes(net: nn.Module) -> list[Tensor]:
    return [whole(p) for p in net.parameters()]


def whole_state(optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    return [
        {key: whole(value) for key, value in optimizer.state.get(p, {}).items()}
        for g in optimizer.param_groups
        for p in g["params"]
    ]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The sizes of all all-reduces of this rank."""
    sizes: list[int] = []
    original = dist.all_reduce

    def all_reduce(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **options)

    dist.all_reduce = all_reduce
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def make(kind: str, params: Any, **options: Any) -> torch.optim.Optimizer:
    """An optimizer of ours, or of torch's, by name."""
    cls: Callable[..., torch.optim.Optimizer]
    cls = getattr(torch.optim, kind[6:]) if kind.startswith("torch.") else getattr(optim, kind)
    return cls(params, lr=0.01, **options)


def train(group: Group, layout: str, kind: str, step: dict[str, Any]) -> Any:
    """Three steps with a loss scale and an average: parameters, averages, norms, sizes of all-reduces, and shapes."""
    net = sharded(group, layout, model())
    optimizer, scaler, ema = make(kind, net.parameters()), LossScaler(init_scale=8.0), EMA(net, 0.5)
    schedule = LambdaLR(optimizer, lambda n: 1 / (n + 1))
    norms, size = [], dist.get_world_size(group)
    for n in range(3):
        loss = summed_loss(net, batch(10 * n + share(group, layout), 4, torch.float64))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        for p in net[2].parameters() if layout == "mixed" else ():  # which fully_shard does not reduce
            assert p.grad is not None
            dist.all_reduce(p.grad, group=group)
            p.grad /= size
        with counted() as sizes:
            norms.append(pytrain.step(optimizer, scaler, ema=ema, schedule=schedule, **step).grad_norm.item())
        optimizer.zero_grad()
    with ema.swap():
        averages = wholes(net)
    shapes = [tuple(p._local_tensor.shape) for p in net.parameters() if isinstance(p, DTensor)]
    return wholes(net), averages, norms, sizes, shapes


def train_alone(parts: int, kind: str, step: dict[str, Any]) -> Any:
    """The same in one process, on the joined batches."""
    net = model()
    optimizer, scaler, ema = make(kind, net.parameters()), LossScaler(init_scale=8.0), EMA(net, 0.5)
    schedule, norms = LambdaLR(optimizer, lambda n: 1 / (n + 1)), []
    for n in range(3):
        for part in range(parts):
            loss = summed_loss(net, batch(10 * n + part, 4, torch.float64))
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        info = pytrain.step(optimizer, scaler, ema=ema, schedule=schedule, grad_divisor=parts, **step)
        norms.append(info.grad_norm.item())
        optimizer.zero_grad()
    with ema.swap():
        averages = wholes(net)
    return wholes(net), averages, norms


def train_by_torch(group: Group, layout: str) -> Any:
    """Three steps in torch's words: parameters and norms."""
    net = sharded(group, layout, model())
    optimizer, norms = torch.optim.AdamW(net.parameters(), lr=0.01), []
    for n in range(3):
        summed_loss(net, batch(10 * n + share(group, layout), 4, torch.float64)).backward()
        norms.append(whole(nn.utils.clip_grad_norm_(net.parameters(), 0.5)).item())
        optimizer.step()
        optimizer.zero_grad()
    return wholes(net), norms


def train_by_pytrain(group: Group, layout: str, kind: str) -> Any:
    """The same by pytrain.step."""
    net = sharded(group, layout, model())
    optimizer, norms = make(kind, net.parameters()), []
    for n in range(3):
        summed_loss(net, batch(10 * n + share(group, layout), 4, torch.float64)).backward()
        norms.append(pytrain.step(optimizer, max_norm=0.5).grad_norm.item())
        optimizer.zero_grad()
    return wholes(net), norms


def beside_whole_tensors(group: Group, kinds: list[tuple[str, dict[str, Any], torch.dtype]], mixed: bool) -> list[str]:
    """Which optimizers step shards otherwise than whole tensors with the same gradients, in parameters or state."""
    unlike = []
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if mixed else None
    for name, options, dtype in kinds:
        net = sharded(group, "fsdp", model(dtype), **({"mp_policy": policy} if policy else {}))
        ours: FusedOptimizer = REGISTRY[name.lower()](net.parameters(), lr=0.01, **options)  # type: ignore[call-arg]
        params = [nn.Parameter(p) for p in wholes(net)]
        theirs: FusedOptimizer = REGISTRY[name.lower()](params, lr=0.01, **options)  # type: ignore[call-arg]
        for n in range(3):
            summed_loss(net, batch(n + dist.get_rank(group), 4, dtype)).backward()
            for p, q in zip(net.parameters(), params, strict=True):
                assert p.grad is not None
                q.grad = whole(p.grad)
            versions = [p._version for p in net.parameters()]
            ours.step()
            theirs.step()
            ours.zero_grad()
            if not all(p._version > before for p, before in zip(net.parameters(), versions, strict=True)):
                unlike.append(f"{name}, {options}: versions")
        state, expected = whole_state(ours), whole_state(theirs)
        same = all(torch.equal(p, q) for p, q in zip(wholes(net), params, strict=True))
        for mine, other in zip(state, expected, strict=True):
            same &= mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
        if not same or ours.backend != "native":
            unlike.append(f"{name}, {options}: {ours.backend}")
    return unlike


def overflow_on_one(group: Group, kind: str, layout: str, unscale: bool) -> Any:
    """A step with an inf in the shard of the last rank alone, and one after it."""
    net = sharded(group, layout, model())
    optimizer, scaler = make(kind, net.parameters()), LossScaler(init_scale=8.0)
    if layout == "hsdp":  # a step with hooks looks at the gradients again after them
        optimizer.register_step_pre_hook(lambda *_: None)
    applied, same, infos = [], [], []
    for n in range(3):
        before, state = wholes(net), whole_state(optimizer)
        scaler.scale(summed_loss(net, batch(n, 4, torch.float64))).backward()  # type: ignore[no-untyped-call]
        if n == 1 and dist.get_rank(group) == dist.get_world_size(group) - 1:
            grad = next(net.parameters()).grad
            assert isinstance(grad, DTensor)
            grad._local_tensor[0] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        infos.append(pytrain.step(optimizer, scaler, max_norm=1.0))
        applied.append(bool(infos[-1].applied))
        unlike = [not torch.equal(p, q) for p, q in zip(before, wholes(net), strict=True)]
        after = whole_state(optimizer)
        unlike += [
            not torch.equal(a.get(key, torch.empty(0)), value)
            for a, b in zip(state, after, strict=True)
            for key, value in b.items()
        ]
        same.append(not any(unlike))
        optimizer.zero_grad()
    bad = scaler.get_scale()
    if unscale:  # and one that is given up after the look
        summed_loss(net, batch(5, 4, torch.float64)).backward()
        if dist.get_rank(group) == 0:
            grad = next(net.parameters()).grad
            assert isinstance(grad, DTensor)
            grad._local_tensor[0] = float("nan")
        scaler.unscale_(optimizer)
        scaler.update()
    return applied, same, bad, scaler.get_scale(), [info.grad_norm.isnan().item() for info in infos]


def torchs_scaler(group: Group) -> Any:
    """torch's GradScaler around our optimizer: whether parameters moved, with an inf on one rank and without."""
    net = sharded(group, "fsdp", model(torch.float32))
    optimizer, scaler, moved = AdamW(net.parameters()), torch.amp.GradScaler("cpu", init_scale=8.0), []
    for n in range(2):
        before = wholes(net)
        scaler.scale(summed_loss(net, batch(n, 4, torch.float32))).backward()  # type: ignore[no-untyped-call]
        grad = next(net.parameters()).grad
        if n == 0 and dist.get_rank(group) == 1:
            assert isinstance(grad, DTensor)
            grad._local_tensor[0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moved.append([not torch.equal(p, q) for p, q in zip(before, wholes(net), strict=True)])
    return moved, optimizer.step_was_skipped


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def run(net: nn.Module, optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    """Steps on the same data on all ranks, so that two and four ranks do the same to the bit."""
    for n in range(begin, end):
        summed_loss(net, batch(n, 4, torch.bfloat16)).backward()
        optimizer.step()
        optimizer.zero_grad()


def save(group: Group, folder: str, kind: str, options: dict[str, Any]) -> Any:
    """Two steps, saved; then the state, and parameters after two more."""
    net = sharded(group, "fsdp", model(torch.bfloat16))
    optimizer = make(kind, net.parameters(), **options)
    run(net, optimizer, 0, 2)
    saved = {"net": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    kinds = {type(x) for s in optimizer.state.values() for key, x in s.items() if key != "step"}
    dcp.save(saved, checkpoint_id=folder, process_group=group)
    state = whole_state(optimizer)
    run(net, optimizer, 2, 4)
    return state, wholes(net), kinds == {DTensor}


def load(group: Group, folder: str, kind: str, options: dict[str, Any]) -> Any:
    """The state that another number of ranks has saved, and parameters after two more steps."""
    net = sharded(group, "fsdp", model(torch.bfloat16, seed=1))
    optimizer = make(kind, net.parameters(), **options)
    into = {"net": get_model_state_dict(net), "optimizer": get_optimizer_state_dict(net, optimizer)}
    dcp.load(into, checkpoint_id=folder, process_group=group)
    set_model_state_dict(net, into["net"])
    set_optimizer_state_dict(net, optimizer, into["optimizer"])
    state = whole_state(optimizer)
    run(net, optimizer, 2, 4)
    return state, wholes(net)


def load_whole(group: Group, params: list[Tensor], state: dict[str, Any]) -> Any:
    """Go on from what one process has saved; and what is said of a state that does not fit."""
    net = sharded(group, "fsdp", model(torch.bfloat16))
    with torch.no_grad():
        for p, value in zip(net.parameters(), params, strict=True):
            p.copy_(distribute_tensor(value, p.device_mesh, p.placements))  # type: ignore[attr-defined]
    optimizer = AdamW(net.parameters(), lr=0.01, master_weights=True)
    state = copy.deepcopy(state)  # the ranks were sent the same memory
    optimizer.load_state_dict(state)
    run(net, optimizer, 2, 4)
    found, before = wholes(net), wholes(net)
    state["state"][0]["exp_avg"] = torch.zeros(3, 5)
    optimizer.load_state_dict(state)
    try:
        run(net, optimizer, 4, 5)
    except ValueError as error:
        return found, str(error), all(torch.equal(p, q) for p, q in zip(before, wholes(net), strict=True))
    return found, "no error", False


def alone_to_load() -> Any:
    """What one process saves after two steps, and where it then comes to."""
    net = model(torch.bfloat16)
    optimizer = AdamW(net.parameters(), lr=0.01, master_weights=True)
    run(net, optimizer, 0, 2)
    params, state = jobs.values(net), optimizer.state_dict()
    state = {
        "state": {i: {key: x.clone() for key, x in s.items()} for i, s in state["state"].items()},
        "param_groups": state["param_groups"],
    }
    run(net, optimizer, 2, 4)
    return params, state, jobs.values(net)


# ---- what is noticed, and what is refused ---------------------------------------------------------------------------


def changes(group: Group) -> dict[str, Any]:
    """What an optimizer of DTensors, of a user's class, notices between steps."""

    class Mine(AdamW):
        def hyper(self, group: dict[str, Any]) -> tuple[float | Tensor, ...]:
            lr, *others = super().hyper(group)
            return lr * self.factor, *others

    net = sharded(group, "fsdp", model())
    first, *rest = net.parameters()
    optimizer = Mine([first], lr=0.01, ema_decay=0.5)
    optimizer.factor = 1.0
    optimizer.add_param_group({"params": rest, "lr": 0.0})
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(o is optimizer))

    def step() -> list[bool]:
        before = wholes(net)
        summed_loss(net, batch(dist.get_rank(group), 4, torch.float64)).backward()
        pytrain.step(optimizer, max_norm=1.0)
        optimizer.zero_grad()
        return [not torch.equal(p, q) for p, q in zip(before, wholes(net), strict=True)]

    found: dict[str, Any] = {"moved": step(), "hooks": seen}
    optimizer.param_groups[1]["lr"] = 0.01
    found["moved by a new lr"] = step()
    saved = copy.copy(optimizer)
    found["a copy's"] = saved.backend
    zeros = torch.zeros(first.shape, dtype=first.dtype)
    mesh = first.device_mesh  # type: ignore[attr-defined]
    optimizer.state[first]["exp_avg"] = distribute_tensor(zeros, mesh, [Replicate()])
    step()
    found["from a new state"] = whole(optimizer.state[first]["exp_avg"]).abs().max().item()
    shard = first._local_tensor  # type: ignore[attr-defined]
    first._local_tensor = shard.clone()  # type: ignore[attr-defined]  # as fully_shard does when it pads
    found["new memory"] = step()[0]
    found["old memory"] = shard.data_ptr() == first._local_tensor.data_ptr()  # type: ignore[attr-defined]
    own = wholes(net)
    with optimizer.swap_ema():
        found["averages"] = [not torch.equal(p, q) for p, q in zip(own, wholes(net), strict=True)]
    found["own again"] = [torch.equal(p, q) for p, q in zip(own, wholes(net), strict=True)]
    portable = optimizer.state_dict(portable=True)["state"][0]
    found["portable"] = {key: type(x).__name__ for key, x in portable.items()}
    hooked, before = optim.SGD([first], lr=1.0), whole(first)

    def replace(*_: object) -> None:
        first.grad = torch.full_like(first, 0.5)

    hooked.register_step_pre_hook(replace)
    first.grad = torch.zeros_like(first)
    pytrain.step(hooked)
    found["by a hook's gradient"] = torch.equal(whole(first), before - 0.5)
    adopted = torch.optim.AdamW(net.parameters(), lr=0.01)
    found["fused"] = optim.fuse(adopted).backend
    return found


def crossed(group: Group) -> str:
    """What is said of parameters on meshes of which neither has all ranks of the other."""
    root = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    params = [nn.Parameter(distribute_tensor(torch.ones(4), root[name], [Shard(0)])) for name in ("rows", "columns")]
    for p in params:
        p.grad = torch.ones_like(p)
    return said(lambda: pytrain.step(AdamW(params)))


def said(action: Callable[[], object]) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors(group: Group) -> dict[str, str]:
    """What is said of what cannot be stepped."""
    net = sharded(group, "fsdp", model())
    params = list(net.parameters())
    found = {cls.__name__: said(lambda cls=cls: cls(params[:1])) for cls in OTHERS}  # type: ignore[misc, call-arg]
    for option in ({"rounding": "stochastic"}, {"state_dtype": "8bit"}, {"step_in_backward": True}):
        found[next(iter(option))] = said(lambda option=option: AdamW(params, **option))  # type: ignore[misc]
    kept = AdamW([nn.Parameter(torch.ones(2))], rounding="stochastic")
    found["a later group"] = said(lambda: kept.add_param_group({"params": params})) + f"; {len(kept.param_groups)}"
    found["a strategy"] = said(lambda: pytrain.parallel.DDP(net, AdamW(params), group=group))
    p, optimizer = params[0], AdamW(params, lr=1.0)
    assert isinstance(p, DTensor)
    before = wholes(net)
    for name, placement in (("partial", Partial()), ("replicated", Replicate())):
        p.grad = DTensor.from_local(torch.ones(p.shape, dtype=p.dtype), p.device_mesh, [placement])
        found[name] = said(lambda: pytrain.step(optimizer))
        found[f"{name}, step()"] = said(optimizer.step)
        p.grad = p.grad.redistribute(placements=p.placements)
    found["redistributed"] = said(lambda: pytrain.step(optimizer))
    partial = DTensor.from_local(torch.ones(2), p.device_mesh, [Partial()])
    found["a partial parameter"] = said(lambda: AdamW([nn.Parameter(partial)]))
    moved = [not torch.equal(a, b) for a, b in zip(before, wholes(net), strict=True)]
    return {**found, "moved": str(moved)}
