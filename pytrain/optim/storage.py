"""How an optimizer stores parameters and states: the options, the formats, and each format's codec in torch.

The codecs are the reference of csrc/core/{half,codec,random}.h, bit for bit; the torch path steps with them, and
checkpoints are converted by them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from pytrain.optim.base import Options, Rule

LOW_PRECISION = (torch.bfloat16, torch.float16)
CODE_BLOCK = 256  # elements of an 8-bit state that share a scale
RANDOM_TILE = 512  # elements that share a call of the generator of random numbers
CODED_FROM = 4096  # elements from which on a state is kept in 8 bits
FORMATS = ("fp32", "fp64", "bf16", "fp16", "s8", "u8")  # numbered as core::Format in csrc/core/segment.h
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.uint8)
FORMAT_OF = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16"}
CODES = ("s8", "u8")
KEEPS = ("", "master", "master_low", "compensation")  # state keys, numbered as core::Keep
OPTIONS = (
    "amp_scaling", "master_weights", "rounding", "kahan", "state_dtype", "ema_decay", "zero_grad_in_step",
    "step_in_backward", "seed",
)  # fmt: skip
SCALE = "_scale"  # what a coded state's key and its scales' key differ by


class Cut(NamedTuple):
    """What a parameter is of a larger one, whose other elements are stepped elsewhere: that parameter's `cut`.

    Attributes:
        number: the larger one's place among all parameters of the optimizer.
        begin: the element of it, in the order of its memory, that the parameter begins with.
        numel: how many elements it has.
    """

    number: int
    begin: int
    numel: int


def cut_of(param: Tensor, number: int = 0) -> Cut:
    """A parameter's cut; that of a whole one, the optimizer's parameter `number`, where it has none."""
    cut: Cut | None = getattr(param, "cut", None)
    return Cut(number, 0, param.numel()) if cut is None else cut


@dataclass(frozen=True)
class Storage:
    """The storage options of an optimizer, checked."""

    keep: str = ""  # what stands beside a low-precision parameter: one of KEEPS
    stochastic: bool = False
    state: str | None = None  # "fp32", "bf16", "8bit"; None keeps states as torch does
    ema_decay: float | None = None
    zero_grad: bool = False
    in_backward: bool = False
    seed: int = 0

    @staticmethod
    def of(options: Options) -> Storage:
        """Check the options.

        Raises:
            TypeError: an option that there is not.
            ValueError: a value out of its range, or options that exclude each other.
        """
        for name in options:
            if name not in OPTIONS:
                raise TypeError(
                    f"unexpected argument {name!r}; the options of every optimizer are {', '.join(OPTIONS)}"
                )
        master, kahan = options.get("master_weights", False), options.get("kahan", False)
        rounding, state = options.get("rounding", "nearest"), options.get("state_dtype")
        decay, seed = options.get("ema_decay"), options.get("seed", 0)
        _one_of("master_weights", master, (False, True, "compact"))
        _one_of("rounding", rounding, ("nearest", "stochastic"))
        _one_of("state_dtype", state, (None, "fp32", "bf16", "8bit"))
        if decay is not None and not 0 <= decay < 1:
            raise ValueError(f"ema_decay: expected in [0, 1), got {decay}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected in [0, 2**63), got {seed}")
        if master and kahan:
            raise ValueError("kahan: a master already keeps what a rounding loses; leave kahan or master_weights unset")
        if master and rounding == "stochastic":
            raise ValueError(
                "rounding: with master_weights the parameter is its rounded master; use rounding='nearest'"
            )
        if kahan and rounding == "stochastic":
            raise ValueError("rounding: kahan already keeps what a rounding loses; use rounding='nearest'")
        return Storage(
            keep="compensation" if kahan else {False: "", True: "master", "compact": "master_low"}[master],
            stochastic=rounding == "stochastic",
            state=state,
            ema_decay=decay,
            zero_grad=options.get("zero_grad_in_step", False),
            in_backward=options.get("step_in_backward", False),
            seed=seed,
        )

    @property
    def needs_steps(self) -> bool:
        """Whether averages or random numbers need a step count, also where the rule needs none."""
        return self.stochastic or self.ema_decay is not None

    def check_param(self, param: Tensor, where: str) -> None:
        """Raise ValueError where a parameter's dtype excludes an option."""
        if param.dtype == torch.float64 and self.state is not None:
            raise ValueError(
                f"{where}: state_dtype={self.state!r}, but the parameter is float64, which is stepped and kept in "
                "float64 throughout; leave state_dtype unset"
            )
        if param.dtype == torch.float16 and self.keep == "master_low":
            raise ValueError(
                f"{where}: master_weights='compact', but the parameter is float16, which is not the upper half of a "
                "float32; use master_weights=True"
            )
        if param.dtype.is_complex and self != Storage(zero_grad=self.zero_grad, in_backward=self.in_backward):
            raise ValueError(f"{where}: {param.dtype} parameters are kept as torch does; leave the options unset")

    def kept(self, param: Tensor) -> str:
        """What stands beside this parameter: a state key, or nothing."""
        return self.keep if param.dtype in LOW_PRECISION else ""

    def format(self, rule: Rule, name: str, param: Tensor, value: Tensor | None, *, drop_in: bool) -> str:
        """How a state is kept; `value` is what there is of it, `drop_in` whether torch has the same optimizer."""
        if param.dtype == torch.float64 or param.dtype not in FORMAT_OF:
            return "fp64"
        exact = name in rule.exact
        if self.state is None:
            if value is not None:
                return {torch.uint8: coded(rule, name), torch.bfloat16: "bf16", torch.float16: "fp16"}.get(
                    value.dtype, "fp32"
                )
            wide = self.keep in ("master", "master_low") or (exact and not drop_in)
            return "fp32" if wide and param.dtype in LOW_PRECISION else FORMAT_OF[param.dtype]
        if self.state == "8bit" and not exact and cut_of(param).numel >= CODED_FROM:
            return coded(rule, name)
        return "bf16" if self.state == "bf16" and not exact else "fp32"


def elementwise(optimizer: Any) -> set[str]:
    """The states that have a number an element also where a parameter has no dimensions."""
    rules: Sequence[Rule] = getattr(optimizer, "rules", ())
    return {name for rule in rules for name in rule.states} | {*KEEPS, "ema"}


def coded(rule: Rule, name: str) -> str:
    """The 8-bit format of a state: squares and their like have no sign."""
    return "u8" if name in rule.positive else "s8"


def _one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if not any(value is a or (isinstance(a, str) and value == a) for a in allowed):
        raise ValueError(f"{name}: expected {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}, got {value!r}")


# ---- random bits -----------------------------------------------------------------------------------------------------


def philox(counter: list[np.ndarray[Any, Any]], key: tuple[int, int]) -> list[np.ndarray[Any, Any]]:
    """Philox4x32-10 of Salmon et al. 2011 (doi:10.1145/2063384.2063405): four words of 32 bits a counter."""
    low = np.uint64(0xFFFFFFFF)
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    key0, key1 = key
    for _ in range(10):
        left, right = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        a, b, c, d = (
            (right >> np.uint64(32)) ^ b ^ np.uint64(key0),
            right & low,
            (left >> np.uint64(32)) ^ d ^ np.uint64(key1),
            left & low,
        )
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def _spread(lane: np.ndarray[Any, Any], key: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """A hash of 32 bits, as in csrc/core/random.h."""
    low = np.uint64(0xFFFFFFFF)
    x = (lane * np.uint64(0x9E3779B9) + key) & low
    x ^= x >> np.uint64(16)
    x = (x * np.uint64(0x7FEB352D)) & low
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(0x846CA68B)) & low
    out: np.ndarray[Any, Any] = x ^ (x >> np.uint64(16))
    return out


def random_bits(seed: int, parameter: int, stream: int, step: float, numel: int, begin: int = 0) -> Tensor:
    """16 random bits for each of `numel` elements from `begin` on, as int64.

    Stream 0 rounds the parameter, 1 + i its state i.
    """
    first = begin // RANDOM_TILE
    tile = np.arange(first, -(-(begin + numel) // RANDOM_TILE), dtype=np.uint64)[:, None]
    ones, low16 = np.ones_like(tile), np.uint64(0xFFFF)
    counter = [
        tile & np.uint64(0xFFFFFFFF),
        tile >> np.uint64(32),
        ones * np.uint64(int(step)),
        ones * np.uint64(parameter),
    ]
    keys = philox(counter, (seed & 0xFFFFFFFF, seed >> 32))
    bits = _spread(np.arange(256, dtype=np.uint64)[None, :], keys[0])
    x = np.concatenate([bits & low16, bits >> np.uint64(16)], axis=1)
    if stream:
        key = _spread(np.full_like(tile, stream - 1), keys[1])
        x = ((x ^ (key & low16)) * np.uint64(0x9E37)) & low16
        x ^= x >> np.uint64(7)
        x = ((x * np.uint64(0x5CB5)) & low16) ^ (key >> np.uint64(16))
    return torch.from_numpy(x.reshape(-1)[begin - first * RANDOM_TILE :][:numel].astype(np.int64))


# ---- codecs; x is always fp32 ----------------------------------------------------------------------------------------


def flat(x: Tensor) -> Tensor:
    """A tensor without gaps as one row, in the order of its memory."""
    return x if x.dim() == 1 and x.is_contiguous() else x.as_strided((x.numel(),), (1,))


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def _floats(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def round_by_chance(x: Tensor, dtype: torch.dtype, random: Tensor) -> Tensor:
    """Round up with the probability of the part that is cut off; inf, nan and what overflows as `x.to(dtype)` does."""
    if dtype == torch.bfloat16:
        up = _floats((_bits(x) + random) & 0xFFFF0000).to(dtype)
        return torch.where(x.isfinite(), up, x.to(dtype))
    tiny = 2.0**-14
    units = (x.abs().clamp(max=tiny) * 2.0**40).to(torch.int64)
    low = ((units + random) >> 16).float() * 2.0**-24
    high = _floats((_bits(x.abs()) + (random >> 3)) & ~0x1FFF).clamp(max=65504.0)
    magnitude = torch.where(x.abs() < tiny, low, high)
    return torch.where(x.abs() < 65520, torch.copysign(magnitude, x).to(dtype), x.to(dtype))


def encode_codes(x: Tensor, kind: str, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One row of fp32 as 8-bit codes and one fp32 scale a block of 256: see csrc/core/codec.h for the format."""
    largest = 127 if kind == "s8" else 255
    n = x.numel()
    blocks = torch.nn.functional.pad(x, (0, -n % CODE_BLOCK)).reshape(-1, CODE_BLOCK)
    scale = blocks.abs().nan_to_num(nan=torch.inf).amax(1) if n else blocks.new_zeros(0)
    scale = torch.where(scale == 0, 0.0, scale.clamp(2.0**-100, torch.finfo(torch.float32).max))
    relative = (blocks * (1 / scale)[:, None]).reshape(-1)[:n]
    bits = _bits(relative) & 0x7FFFFFFF if kind == "s8" else _bits(relative)
    code = ((bits + (1 << 19 if random is None else random << 4)) >> 20) - ((127 << 3) - largest)
    least = (relative > 0).to(torch.int64) if kind == "u8" else torch.zeros_like(code)
    code = torch.maximum(code, least).clamp(max=largest)
    if kind == "s8":
        code = code | ((_bits(relative) >> 24) & 0x80)
    coded = torch.where(scale.repeat_interleave(CODE_BLOCK)[:n] == 0, 0, code)
    return coded.to(torch.uint8), scale


def decode_codes(codes: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The inverse of `encode_codes`, up to the codes' precision."""
    largest = 127 if kind == "s8" else 255
    code = codes.to(torch.int64)
    magnitude = code & 0x7F if kind == "s8" else code
    value = torch.where(magnitude == 0, 0.0, _floats((magnitude + (127 << 3) - largest) << 20))
    value = value * scale.repeat_interleave(CODE_BLOCK)[: code.numel()]
    return torch.where(code >= 0x80, -value, value) if kind == "s8" else value


def decode_state(state: dict[str, Tensor], name: str, kind: str) -> Tensor:
    """A state's values: fp32, or fp64 as they are."""
    value = state[name]
    if kind in CODES:
        out = torch.empty_like(value, dtype=torch.float32)
        flat(out).copy_(decode_codes(flat(value), state[name + SCALE], kind))
        return out
    return value if kind == "fp64" else value.float()


def encode_state(state: dict[str, Tensor], name: str, kind: str, x: Tensor, random: Tensor | None = None) -> None:
    """Store fp32 values into a state that has its memory."""
    if kind in CODES:
        codes, scale = encode_codes(flat(x), kind, random)
        flat(state[name]).copy_(codes)
        state[name + SCALE].copy_(scale)
    elif random is not None and kind in ("bf16", "fp16"):
        flat(state[name]).copy_(round_by_chance(flat(x), state[name].dtype, random))
    elif state[name] is not x:
        state[name].copy_(x)


def decode_param(param: Tensor, kept: Tensor | None, keep: str) -> Tensor:
    """A low-precision parameter's fp32 values, with what is kept beside it."""
    p = param.detach().float()
    if kept is None or not keep:
        return p
    if keep == "master":
        return torch.where(kept.to(param.dtype) == param, kept, p)
    if keep == "master_low":
        return _floats((_bits(p) + kept.to(torch.int64)) & 0xFFFFFFFF)
    return p - kept.float()


def encode_param(param: Tensor, kept: Tensor | None, keep: str, x: Tensor, random: Tensor | None = None) -> Tensor:
    """Store fp32 values into a low-precision parameter; returns what an average is taken of."""
    if keep == "master":
        assert kept is not None
        kept.copy_(x)
        param.copy_(x)
        return x
    if keep == "master_low":
        assert kept is not None
        bits = _bits(x)
        high = torch.where(x.isfinite(), (bits + 0x8000) & 0xFFFF0000, bits & 0xFFFF0000 | (x.isnan() * 0x400000))
        param.copy_(_floats(high))
        kept.copy_(torch.where(x.isfinite(), bits - high, 0))
        return x
    if keep == "compensation":
        assert kept is not None
        param.copy_(x)
        added = param.float() - x
        kept.copy_(torch.where(added.isfinite(), added, 0.0))
        return decode_param(param, kept, keep)
    if random is None:
        param.copy_(x)
    else:
        out = torch.empty_like(param)
        flat(out).copy_(round_by_chance(flat(x), param.dtype, random))
        param.copy_(out)
    return param.detach().float()
