"""The state of each parameter: which tensors it has under a storage format, made, converted, laid out
and handed to the kernels for a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pytrain import backend
from pytrain.control import ABSENT, MAX_SUMS, NOT_ALL
from pytrain.optim.storage import (
    CODE_BLOCK,
    CODES,
    DTYPES,
    FORMAT_OF,
    FORMATS,
    KEEPS,
    LOW_PRECISION,
    SCALE,
    Cut,
    Storage,
    coded,
    cut_of,
    decode_param,
    decode_state,
    encode_param,
    encode_state,
)

if TYPE_CHECKING:
    from pytrain.optim.base import FusedOptimizer, Rule

CPU = torch.device("cpu")
PLACE = torch.empty(0, device="cpu")  # keeps the place of a key until its tensor is made
SMALL, BLOCK_BYTES = 16384, 2**20  # tensors of up to so many elements share blocks of up to so many bytes
LINE_BYTES = 64
EMAS = ("", "own", "lent")  # numbered as _table in csrc/ops/optim.cpp does
MAX_STATES = 4  # csrc/core/segment.h


class UnfitError(ValueError):
    """A parameter, gradient or state that cannot be stepped; nothing was written."""


@dataclass(frozen=True)
class Formats:
    """How one parameter and its states are kept: `states` beside `Rule.states`, `keep` as in storage.KEEPS."""

    states: tuple[str, ...]
    keep: str
    ema: str  # whose an average beside it is: "" none's, "own" the optimizer's state's, "lent" that of a pytrain.ema

    @property
    def coded(self) -> bool:
        """Whether a state is in 8-bit codes, which no inf or nan may enter."""
        return any(kind in CODES for kind in self.states)

    def words(self, param: Tensor, storage: Storage) -> list[int]:
        """All that is the same for the parameters of a table, as `storage_from` in csrc/ops/optim.cpp reads it."""
        kinds = [FORMAT_OF[param.dtype], *self.states, *[FORMAT_OF[param.dtype]] * (MAX_STATES - len(self.states))]
        flags = [storage.zero_grad, storage.stochastic, storage.seed]
        device = -1 if param.device.type == "cpu" else param.device.index
        return [*map(FORMATS.index, kinds), KEEPS.index(self.keep), EMAS.index(self.ema), *flags, device]


@dataclass(frozen=True)
class Entry:
    """A parameter of an optimizer: its place, its rule, and how it is kept."""

    param: Tensor
    group: int
    options: dict[str, Any]  # the group
    number: int  # in the order of all param groups, as in a state_dict
    where: str
    rule: Rule
    formats: Formats

    @property
    def cut(self) -> Cut:
        """Which parameter of all ranks it is, or is a part of."""
        return cut_of(self.param, self.number)


@dataclass
class Plan:
    """The parameters of one rule, dtype and storage format, and the number of their table in the kernel library."""

    rule: Rule
    formats: Formats
    entries: list[Entry] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)  # counts of a rule whose state has none
    params: list[Tensor] = field(default_factory=list)
    bases: list[Tensor] = field(default_factory=list)  # what shares its autograd version with the states
    touched: list[Tensor] = field(default_factory=list)  # params and bases
    pairs: Tensor | None = None  # memory for what `backend.reader` finds (behind its hints), or None to pass lists
    address: int = 0  # of that memory
    found: int = NOT_ALL  # what a call of the kernels has said that `Settled.gather` made already
    here: bool = False  # may the kernels be called past torch's dispatcher?
    table: int = 0
    averaged: frozenset[int] = frozenset()  # ids of the parameters whose averages were lent
    sums: list[Tensor] = field(default_factory=list)  # one, where others have parts of what the rule sums over
    numbers: Tensor = ABSENT  # the places of its parameters' wholes in the optimizer, there too

    @property
    def device(self) -> torch.device:
        """Where all its tensors are."""
        return self.entries[0].param.device

    def sums_of(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """The places in the optimizer of the parameters in some rows (no rows: all), and the sums over these."""
        (sums,) = self.sums
        return (self.numbers[rows], sums[: len(rows)]) if rows else (self.numbers, sums)

    def written(self, params: list[Tensor], rows: list[int]) -> list[Tensor]:
        """What a step of these writes, as autograd counts versions: it then refuses graphs of before."""
        return params + self.bases if rows else self.touched

    def finish(self, optimizer: FusedOptimizer) -> None:
        """Hand the states over to the kernel library."""
        rule, formats = self.rule, self.formats
        held = [optimizer.state.get(entry.param, {}) for entry in self.entries]
        kinds = list(zip(rule.states, formats.states, strict=True))
        states = [state[name] for state in held for name in rule.states]
        scales = [state[name + SCALE] for state in held for name, kind in kinds if kind in CODES]
        kept = [state[formats.keep] for state in held] if formats.keep else []
        emas = [state["ema"] for state in held] if formats.ema == "own" else []
        if formats.ema == "lent":
            emas = [optimizer.averages[id(entry.param)] for entry in self.entries]
            self.averaged = frozenset(id(entry.param) for entry in self.entries)
        scalars = [state[name] for state in held for name in rule.scalars]
        if optimizer.counts_steps:
            self.steps = [state["step"] for state in held]
        everything = (*states, *scales, *kept, *emas, *scalars, *self.steps)
        self.params = [entry.param for entry in self.entries]
        self.bases = list({id(base): base for base in (s if s._base is None else s._base for s in everything)}.values())
        self.touched = self.params + self.bases
        if rule.sums and optimizer.join_sums is not None:
            self.sums = [torch.zeros(len(self.entries), MAX_SUMS, dtype=torch.float64, device=self.device)]
            self.numbers = torch.tensor([entry.cut.number for entry in self.entries], device=self.device)
        groups = [entry.group for entry in self.entries]
        parts = [number for entry in self.entries for number in entry.cut]
        words = formats.words(self.params[0], optimizer.storage)
        self.table = torch.ops.pytrain._table(
            rule.name, states, scales, kept, emas, scalars, self.steps, self.sums, groups, parts, words
        )
        if backend.facts and backend.reader:
            trails, pairs = backend.facts.trail_words * len(self.params), backend.facts.pair_words * len(self.params)
            self.pairs = torch.zeros(trails + pairs, dtype=torch.int64, device="cpu")[trails:]
            self.address, self.here = self.pairs.data_ptr(), backend.is_here(self.device)


def formats_of(optimizer: FusedOptimizer, rule: Rule, param: Tensor) -> Formats:
    """The formats that the options ask for; without `state_dtype` a state stays in the dtype that it has."""
    storage, state = optimizer.storage, optimizer.state.get(param, {})
    drop_in = hasattr(torch.optim, type(optimizer).__name__)
    kinds = tuple(storage.format(rule, name, param, state.get(name), drop_in=drop_in) for name in rule.states)
    lent = optimizer.averages.get(id(param))
    ema = "own" if storage.ema_decay is not None else "lent" if lent is not None and fits(lent, param) else ""
    return Formats(kinds, storage.kept(param), ema)


def fits(average: Tensor, param: Tensor) -> bool:
    """Whether the loop over a parameter can walk this average beside it."""
    wide = torch.float32 if param.dtype in LOW_PRECISION else param.dtype
    return average.dtype == wide and average.stride() == torch.empty_like(param, device="meta").stride()


def needed(optimizer: FusedOptimizer, rule: Rule, formats: Formats) -> list[str]:
    """The keys that a parameter's state must have."""
    keys = [*rule.states, *rule.scalars]
    keys += [name + SCALE for name, kind in zip(rule.states, formats.states, strict=True) if kind in CODES]
    keys += [formats.keep] if formats.keep else []
    keys += ["ema"] if formats.ema == "own" else []
    return [*keys, "step"] if optimizer.counts_steps else keys


def check_states(state: dict[str, Tensor], param: Tensor, rule: Rule, where: str) -> None:
    """Raise UnfitError where a state has another shape or device than its parameter."""
    for name in (*rule.states, *KEEPS[1:], "ema"):
        value = state.get(name)
        if value is not None and (value.shape != param.shape or value.device != param.device):
            raise UnfitError(
                f"{where}: its state {name!r} has shape {tuple(value.shape)} on {value.device}, "
                f"expected {tuple(param.shape)} on {param.device}"
            )


def conform(optimizer: FusedOptimizer, entry: Entry) -> None:
    """Convert what there is of a parameter's state to its formats: a checkpoint may come from other ones."""
    param, rule, formats = entry.param, entry.rule, entry.formats
    state = optimizer.state.get(param)
    if not state or param.is_complex():
        return
    for name, kind in zip(rule.states, formats.states, strict=True):
        value = state.get(name)
        if value is None or value.dtype == _dtype(param, kind):
            continue
        x = decode_state(state, name, coded(rule, name) if value.dtype == torch.uint8 else "fp32")
        state.pop(name + SCALE, None)
        _allocate(state, param, name, kind)
        wide = torch.float64 if kind == "fp64" else torch.float32
        encode_state(state, name, kind, torch.empty_like(param, dtype=wide).copy_(x))
    for keep in KEEPS[1:]:
        kept = state.get(keep)
        if kept is None or keep == formats.keep:
            continue
        x = decode_param(param, kept, keep)
        del state[keep]
        if formats.keep:
            make(optimizer, entry, formats.keep)
            encode_param(param, state[formats.keep], formats.keep, x)


def make(optimizer: FusedOptimizer, entry: Entry, key: str) -> None:
    """Give a parameter one entry of its state that it does not have."""
    param, rule = entry.param, entry.rule
    state = optimizer.state[param]
    if key in rule.states:
        kind = entry.formats.states[rule.states.index(key)]
        begin = optimizer.initial(key, param, entry.options)
        _allocate(state, param, key, kind)
        if isinstance(begin, Tensor) or begin != 0.0:
            wide = param.dtype if kind == "fp64" else torch.float32
            values = torch.zeros_like(param, dtype=wide, requires_grad=False) + begin
            encode_state(state, key, kind, values.detach().to(wide))
    elif key == "step":
        # A checkpoint without counts but with a momentum is past its first step.
        past = rule.counts and any(state.get(name) is not None for name in rule.states)
        state[key] = torch.full((), float(past), dtype=torch.float32, device=backend.home_of_numbers(param))
    elif key == "ema":
        state[key] = param.detach().to(torch.float32 if param.dtype in LOW_PRECISION else param.dtype, copy=True)
    elif key == "master":
        state[key] = param.detach().to(torch.float32, copy=True)
    elif key == "master_low":
        state[key] = torch.zeros_like(param, dtype=torch.int16, requires_grad=False)
    elif key == "compensation":
        state[key] = torch.zeros_like(param, requires_grad=False)
    elif key in rule.scalars:
        begin = optimizer.initial(key, param, entry.options)
        state[key] = torch.full((), float(begin), dtype=torch.float32, device=backend.home_of_numbers(param))


def _dtype(param: Tensor, kind: str) -> torch.dtype:
    return param.dtype if kind == "fp64" else DTYPES[FORMATS.index(kind)]


def _allocate(state: dict[str, Tensor], param: Tensor, name: str, kind: str) -> None:
    """Memory for a state, and for its scales where it is coded."""
    state[name] = torch.zeros_like(param, dtype=_dtype(param, kind), requires_grad=False)
    if kind in CODES:
        state[name + SCALE] = torch.zeros(-(-param.numel() // CODE_BLOCK), dtype=torch.float32, device=param.device)


def make_all(optimizer: FusedOptimizer, entries: list[Entry]) -> None:
    """Give parameters the state that they lack; small zeros from common blocks, which are quick to make and to walk."""
    small: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, str]]] = {}
    for entry in entries:
        param, rule, formats = entry.param, entry.rule, entry.formats
        keys = needed(optimizer, rule, formats)
        if not keys:
            continue
        state = optimizer.state[param]
        shared = is_small(param)
        fresh = all(state.get(name) is None for name in rule.states)
        for key in sorted(keys, key=lambda key: key != "step"):
            if state.get(key) is not None:
                continue
            begin = optimizer.initial(key, param, entry.options) if key in rule.states else 0.0
            zero = not isinstance(begin, Tensor) and begin == 0.0
            if shared and zero and key in rule.states and formats.states[rule.states.index(key)] not in CODES:
                kind = formats.states[rule.states.index(key)]
                small.setdefault((_dtype(param, kind), param.device), []).append((param, key))
                state[key] = PLACE
            elif shared and fresh and key == "step":
                small.setdefault((torch.float32, backend.home_of_numbers(param)), []).append((param, key))
                state[key] = PLACE
            else:
                make(optimizer, entry, key)
    for (dtype, device), needs in small.items():
        shapes = [() if name == "step" else param.shape for param, name in needs]
        for (param, name), made in zip(needs, zeros_in_blocks(shapes, dtype, device), strict=True):
            optimizer.state[param][name] = made


def is_small(tensor: Tensor) -> bool:
    """Whether what lies beside this tensor may share a block."""
    return tensor.numel() <= SMALL and tensor.is_contiguous() and not backend.has_dtensors([tensor])


def zeros_in_blocks(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Contiguous zeros of each shape; each starts a cache line, but for those of one element (step counts)."""
    per_line = LINE_BYTES // dtype.itemsize
    numels = [math.prod(shape) for shape in shapes]
    sizes = [1 if not shape else -(-numel // per_line) * per_line for shape, numel in zip(shapes, numels, strict=True)]
    made: list[Tensor] = []
    while len(made) < len(shapes):
        begin = end = len(made)
        total = 0
        while end < len(shapes) and (end == begin or (total + sizes[end]) * dtype.itemsize <= BLOCK_BYTES):
            total += sizes[end]
            end += 1
        block, offset = torch.zeros(total, dtype=dtype, device=device), 0
        for i in range(begin, end):
            made += [block[offset : offset + numels[i]].view(tuple(shapes[i]))]
            offset += sizes[i]
    return made


def lay_out(optimizer: FusedOptimizer, entry: Entry, seen: set[int]) -> None:
    """Replace each tensor by a copy where it lies in memory unlike the parameter, or where another parameter has it."""
    param, rule, formats = entry.param, entry.rule, entry.formats
    state = optimizer.state.get(param, {})
    layout = param if param.is_contiguous() else torch.empty_like(param, device="meta")
    kinds = dict(zip(rule.states, formats.states, strict=True))
    for name in (*rule.states, *([formats.keep] if formats.keep else []), *(["ema"] if formats.ema == "own" else [])):
        value = state[name]
        if value.stride() != layout.stride() or id(value) in seen:
            kind = kinds.get(name, "")
            x = decode_state(state, name, kind) if kind in CODES else value
            state[name] = torch.empty_like(param, dtype=value.dtype, requires_grad=False)
            if kind in CODES:
                state[name + SCALE] = state[name + SCALE].clone()
                encode_state(state, name, kind, torch.empty_like(param, dtype=torch.float32).copy_(x))
            else:
                state[name].copy_(value)
        seen.add(id(state[name]))
    for name in (*rule.scalars, *(["step"] if optimizer.counts_steps else [])):
        state[name] = lay_out_number(state[name], seen, backend.home_of_numbers(param))


def one_number(value: Tensor, optimizer: FusedOptimizer, group: int, name: str) -> Tensor:
    """A hyperparameter that is a tensor, as one without dimensions."""
    if value.numel() == 1 and not value.is_complex():
        return value.detach().view(())
    raise ValueError(
        f"{type(optimizer).__name__}: param_groups[{group}]: {name}: expected one real element, got a tensor of "
        f"shape {tuple(value.shape)} and {value.dtype}"
    )


def lay_out_number(value: Tensor | float, seen: set[int], device: torch.device = CPU) -> Tensor:
    """A count or scalar as one float32 on its device, whatever a checkpoint holds; no two parameters share one."""
    good = isinstance(value, Tensor) and value.dtype == torch.float32 and value.device == device and value.numel() == 1
    if not good or id(value) in seen:
        value = torch.tensor(float(value), dtype=torch.float32, device=device)
    assert isinstance(value, Tensor)
    seen.add(id(value))
    return value


def plain(optimizer: FusedOptimizer, param: Tensor, rule: Rule) -> dict[str, Tensor]:
    """A parameter's state as torch.optim keeps it: fp32 (or wider) tensors, without what our formats add."""
    state = optimizer.state.get(param, {})
    formats = formats_of(optimizer, rule, param)
    kinds = dict(zip(rule.states, formats.states, strict=True))
    added = {*KEEPS, "ema", *(name + SCALE for name in rule.states)}
    if not optimizer.steps_in_state:
        added.add("step")
    out = {}
    for key, value in state.items():
        if key in kinds:
            out[key] = decode_state(state, key, kinds[key]).clone()
        elif key not in added:
            out[key] = value
    return out
