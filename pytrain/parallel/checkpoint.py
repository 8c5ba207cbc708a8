"""Checkpoints of a strategy: a folder to which each rank writes what it owns, or one file with all of it.

Both forms go from each strategy, on any number of ranks, into each other.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pytrain.folders import Chunk, open_folder, read_chunks, together, write_folder
from pytrain.optim.storage import CODE_BLOCK, elementwise
from pytrain.parallel.base import Share, Strategy
from pytrain.parallel.zero import code_blocks, is_scales
from pytrain.sealed import CheckpointError, read_checkpoint, write_checkpoint

FORMAT = 1


def save(strategy: Strategy, path: str | os.PathLike[str], *, extra: Any = None, portable: bool = False) -> None:
    """Save the module, the optimizer and `extra`; all ranks must call this. What is at `path` is whole at any time.

    Args:
        strategy: whose module and optimizer.
        path: a folder that there is not yet; where `portable`, a file.
        extra: plain data (numbers, strings, tensors, containers of them), that of rank 0.
        portable: write one file, which replaces one that is there; every rank gathers the whole state for it.

    Raises:
        CheckpointError: on all ranks: something cannot be written, or could not be read back safely.
    """
    path, group, module = Path(path), strategy.ranks.group, strategy.module
    groups = [{**g, "params": names} for g, names in zip(strategy.optimizer.param_groups, strategy.names, strict=True)]
    plain = {"format": FORMAT, "groups": groups, "extra": extra}
    with strategy.ranks.at("the checkpoint"):
        if portable:
            order, state = [name for names in strategy.names for name in names], strategy.state_dict()["state"]
            plain["state"] = {order[number]: each for number, each in state.items()}
            plain["module"] = together(group, lambda: _tensors(module))
            together(group, lambda: write_checkpoint(path, plain) if strategy.ranks.rank == 0 else None)
        else:
            plain["layouts"] = {name: _layout(p) for name, p in module.named_parameters()}
            write_folder(path, together(group, lambda: _chunks(strategy)), plain, group)


def load(strategy: Strategy, path: str | os.PathLike[str]) -> Any:
    """Load what `save` wrote, under any strategy on any number of ranks, and return `extra`; all ranks must call this.

    From a folder each rank reads all parameters and its own part of the state. Nothing is written to the module or the
    optimizer before all is read. State goes to parameters by their names.

    Raises:
        CheckpointError: on all ranks: it is missing, damaged, unsafe, or does not fit the module or the optimizer.
    """
    path, ranks, group = Path(path), strategy.ranks, strategy.ranks.group
    with ranks.at("the loading of a checkpoint"):
        if together(group, path.is_dir):
            plain, metadata = together(group, lambda: open_folder(path, ranks.rank, ranks.size))
            values, chunks, part = together(group, lambda: _room(path, strategy, plain, metadata.state_dict_metadata))
            read_chunks(path, metadata, chunks, group)
        else:
            plain = together(group, lambda: read_checkpoint(path))
            values, part = together(group, lambda: _whole(path, strategy, plain))
    strategy.optimizer.load_state_dict(part)
    with torch.no_grad():
        for name, value in _tensors(strategy.module).items():
            value.copy_(values[name])
    return plain["extra"]


# In a folder tensors are called module.<name>, and <how it is cut>.<state>.<parameter>: "elements" are a number an
# element in the order of the parameter's memory, "blocks" a scale a block of 8-bit codes; "whole" is not cut.


def _chunks(strategy: Strategy) -> dict[str, Chunk]:
    """What this rank has; of buffers, which are each rank's own, those of rank 0."""
    params, first = dict(strategy.module.named_parameters(remove_duplicate=False)), strategy.ranks.rank == 0
    whole = {f"module.{name}": t for name, t in _tensors(strategy.module).items() if first or name in params}
    chunks, per_element = {}, elementwise(strategy.optimizer)
    for name, share in _shares(strategy).items():
        state, numel = strategy.optimizer.state.get(share.param, {}), share.owner.numel()
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(f"state {key!r} of {name} is of {type(value).__name__}, expected a tensor")
            if is_scales(key, state):
                begin, count = share.begin // CODE_BLOCK, -(-numel // CODE_BLOCK)
                chunks[f"blocks.{key}.{name}"] = Chunk(value, [begin], [count])
            elif value.shape == share.param.shape and (value.dim() or key in per_element):
                if value.stride() != _layout(share.param)[1]:
                    value = torch.empty_like(share.param, dtype=value.dtype).copy_(value)
                row = value.as_strided((value.numel(),), (1,))
                chunks[f"elements.{key}.{name}"] = Chunk(row, [share.begin], [numel])
            else:
                whole[f"whole.{key}.{name}"] = value
    return chunks | {name: Chunk(value, [0] * value.dim(), value.shape) for name, value in whole.items()}


def _room(path: Path, strategy: Strategy, plain: dict[str, Any], saved: Mapping[str, Any]) -> Any:
    """Memory for what this rank is to have: the module's, all chunks, and the optimizer's state, which are of these."""
    sizes = {name.removeprefix("module."): each.size for name, each in saved.items() if name.startswith("module.")}
    groups = _fit(path, strategy, plain, sizes)
    shares, per_element = _shares(strategy), elementwise(strategy.optimizer)
    numbers, chunks, values = {name: number for number, name in enumerate(shares)}, {}, {}
    state: dict[int, dict[str, Tensor]] = {}
    for where, each in saved.items():
        (kind, _, rest), begin, shape = where.partition("."), [0] * len(each.size), list(each.size)
        key, _, name = rest.partition(".")
        if kind != "module" and name not in shares:
            continue
        if kind in ("elements", "blocks"):
            share = shares[name]
            if plain["layouts"][name] != _layout(share.owner):
                strides = [layout[1] for layout in (plain["layouts"][name], _layout(share.owner))]
                raise CheckpointError(
                    f"checkpoint {path}: {name} was saved with strides {strides[0]}, the model has {strides[1]}; lay "
                    "it out alike, or save with portable=True"
                )
            cut = (share.begin, share.end) if kind == "elements" else code_blocks(share.begin, share.end)
            begin, shape = [cut[0]], [cut[1] - cut[0]]
        part = torch.empty(shape, dtype=each.properties.dtype, device="cpu")
        chunks[where] = Chunk(part, begin, each.size)
        if kind == "module":
            values[rest] = part
        else:
            view = kind == "elements" or (part.numel() == 1 and key in per_element)
            here = part.as_strided(*_layout(shares[name].param)) if view else part
            state.setdefault(numbers[name], {})[key] = here
    for group in groups:
        group["params"] = [numbers[name] for name in group["params"] if name in numbers]
    return values, chunks, {"state": state, "param_groups": groups}


def _whole(path: Path, strategy: Strategy, plain: dict[str, Any]) -> Any:
    """The module's tensors of a file, and this rank's part of the state."""
    groups = _fit(path, strategy, plain, {name: each.shape for name, each in plain.get("module", {}).items()})
    numbers = {name: i for i, name in enumerate(name for names in strategy.names for name in names)}
    for group in groups:
        group["params"] = [numbers[name] for name in group["params"]]
    state = {numbers[name]: each for name, each in plain["state"].items()}
    return plain["module"], strategy.own_part({"state": state, "param_groups": groups})


def _fit(path: Path, strategy: Strategy, plain: dict[str, Any], saved: Mapping[str, Sequence[int]]) -> Any:
    """The saved param groups in the order of the optimizer's, if the checkpoint fits."""
    if plain.get("format") != FORMAT or "groups" not in plain:
        raise CheckpointError(f"checkpoint {path} was not written by pytrain.parallel.checkpoint, format {FORMAT}")
    own = {name: value.shape for name, value in _tensors(strategy.module).items()}
    for name in sorted({*own, *saved}):
        here, there = (tuple(each[name]) if name in each else "nothing" for each in (own, saved))
        if here != there:
            raise CheckpointError(f"checkpoint {path} is of another model: {name} is {there} there, {here} here")
    groups = {frozenset(group["params"]): group for group in plain["groups"]}
    for number, names in enumerate(strategy.names):
        if len(groups) != len(strategy.names) or frozenset(names) not in groups:
            raise CheckpointError(f"checkpoint {path} has no param group of just the parameters of number {number}")
    return [{**groups[frozenset(names)], "params": names} for names in strategy.names]


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; shared ones once."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"the module's state {name!r} is of {type(value).__name__}, expected a tensor")
        found.setdefault(id(value), (name, value.detach()))
    return dict(found.values())


def _shares(strategy: Strategy) -> dict[str, Share]:
    """What this rank has the state of, by the parameter's name, in the order of the optimizer."""
    names = {id(p): name for name, p in strategy.module.named_parameters()}
    return {names[id(share.owner)]: share for each in strategy.shares() for share in each}


def _layout(param: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of what there is for each element of a parameter."""
    layout = torch.empty_like(param, device="meta")
    return tuple(layout.shape), tuple(layout.stride())
