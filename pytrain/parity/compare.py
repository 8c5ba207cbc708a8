"""Compares two recordings: the first step and tensor that differ, by how much, and what that looks like."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytrain.parity.run import Recording

LOSS, GRADIENT, PARAMETER, START = "loss", "gradient", "parameter", "initial parameter"
SHOWN = 5
ROUNDING = 1e-5  # relative; differences up to here may be those of two ways to round in fp32


@dataclass(frozen=True)
class Difference:
    """What differs.

    Args:
        step: from 1; the loss, gradients and parameters of the step, in this order.
        kind: "initial parameter", "loss", "gradient" or "parameter".
        name: the tensor's; both names where they differ.
        relative: the largest difference over the first training's largest magnitude; inf where nothing can be compared.
        text: the sizes of the difference.
    """

    step: int
    kind: str
    name: str
    relative: float
    text: str

    def __str__(self) -> str:
        what = self.kind if self.kind == LOSS else f"{self.kind} of {self.name}"
        return f"step {self.step}, {what}: {self.text}"


@dataclass
class Parity:
    """The outcome of a comparison.

    Args:
        labels: what the two trainings are called.
        tolerance: the largest relative difference that passes.
        steps: how many steps of both were compared.
        differences: all differences beyond the tolerance of the first kind in the first step that has any.
        problems: steps or parameters that only one of the two has.
        hints: what the differences look like.
        matched: how names were matched where they differ.
        largest: the largest relative difference of each kind that was seen.
    """

    labels: tuple[str, str]
    tolerance: float
    steps: int = 0
    differences: list[Difference] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    matched: list[str] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether the two trainings are the same, within the tolerance."""
        return not (self.differences or self.problems)

    @property
    def first(self) -> Difference | None:
        """The first difference in the order of loss, gradients, parameters; the parameters' own order."""
        return self.differences[0] if self.differences else None

    def __str__(self) -> str:
        a, b = self.labels
        lines = [f"{a} and {b}: {'the same training' if self.same else 'different trainings'}"]
        lines += [f"  {line}" for line in self.matched]
        lines += [f"  {line}" for line in self.problems]
        lines += [f"  {difference}" for difference in self.differences[:SHOWN]]
        if len(self.differences) > SHOWN:
            lines.append(f"  and {len(self.differences) - SHOWN} more {self.differences[0].kind}s of this step")
        lines += [f"  hint: {hint}" for hint in self.hints]
        if self.same and not any(self.largest.values()):
            lines.append(f"  {self.steps} steps: loss, gradients and parameters are equal bit for bit")
        elif self.same:
            sizes = ", ".join(f"{kind} {value:.1e}" for kind, value in self.largest.items())
            lines.append(f"  {self.steps} steps within {self.tolerance:g}; largest relative differences: {sizes}")
        return "\n".join(lines)


def compare(a: Recording, b: Recording, tolerance: float) -> Parity:
    """Compare two recordings up to the first step in which they differ."""
    outcome = Parity((a.label, b.label), tolerance)
    pairs: dict[int, list[tuple[int, int, str]]] = {}
    before: tuple[dict[str, Any], dict[str, Any]] | None = None
    for step in range(1, min(a.steps, b.steps) + 1):
        one, other = a.step(step), b.step(step)
        number = one["optimizer"]
        if number != other["optimizer"]:
            outcome.problems.append(
                f"step {step}: {a.label} steps its optimizer {number}, {b.label} its optimizer {other['optimizer']}; "
                "they are counted in the order of their first steps"
            )
            return outcome
        if number not in pairs:
            pairs[number] = _match(one, other, number, outcome)
        outcome.steps = step
        for kind, found in _differences(step, one, other, pairs[number], outcome):
            if found or (kind == START and outcome.problems):
                outcome.differences = found
                outcome.hints = list(_hints(kind, one, other, before, pairs[number], outcome))
                return outcome
        before = (one, other)
    if a.steps != b.steps:
        outcome.problems.append(f"{a.label} made {a.steps} steps, {b.label} made {b.steps}")
    return outcome


def _differences(
    step: int, one: dict[str, Any], other: dict[str, Any], pairs: Sequence[tuple[int, int, str]], outcome: Parity
) -> Iterator[tuple[str, list[Difference]]]:
    """Each kind in its order, with its differences beyond the tolerance."""
    for kind, key in ((START, "before"), (LOSS, "loss"), (GRADIENT, "gradients"), (PARAMETER, "parameters")):
        compared: list[tuple[str, Tensor | None, Tensor | None]]
        if key == "loss":
            losses = [None if r[key] is None else torch.tensor(r[key], dtype=torch.float64) for r in (one, other)]
            compared = [("loss", losses[0], losses[1])]
        elif one[key] is None or other[key] is None:
            continue
        else:
            compared = [(name, one[key][i], other[key][j]) for i, j, name in pairs]
        found = []
        for name, x, y in compared:
            relative, text = difference(x, y, outcome.labels)
            outcome.largest[kind] = max(outcome.largest.get(kind, 0.0), relative)
            if relative > outcome.tolerance:
                found.append(Difference(step, kind, name, relative, text))
        yield kind, found


def difference(x: Tensor | None, y: Tensor | None, labels: tuple[str, str]) -> tuple[float, str]:
    """How far two tensors lie apart, relative to the first one's largest magnitude, and that in words."""
    if x is None or y is None:
        return (0.0, "") if x is y else (math.inf, f"only {labels[y is not None]} has one")
    dtypes = "" if x.dtype == y.dtype else f" ({_word(x.dtype)} and {_word(y.dtype)})"
    x, y = _plain(x), _plain(y)
    both = (x == y) | (x.isnan() & y.isnan())
    if bool(both.all()):
        return 0.0, ""
    apart = torch.where(both, 0.0, (x - y).abs()).nan_to_num(nan=math.inf)
    where = int(apart.argmax())
    largest, magnitude = float(apart.flatten()[where]), float(x.abs().nan_to_num(posinf=0.0).max())
    relative = largest / (magnitude or float(y.abs().max())) if math.isfinite(largest) else math.inf
    values = f"{float(x.flatten()[where]):.9g} and {float(y.flatten()[where]):.9g}"
    if x.dim() == 0:
        return relative, f"{values}, apart by {largest:.3g} (relative {relative:.2g}){dtypes}"
    place = [int(i) for i in torch.unravel_index(torch.tensor(where), x.shape)]
    return relative, (
        f"{int((~both).sum())} of {x.numel()} elements differ, most at {place}: {values}, apart by {largest:.3g} "
        f"(relative to the largest element {relative:.2g}){dtypes}"
    )


def _plain(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).double()


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- which parameter is which -------------------------------------------------------------------------------------


def _match(one: dict[str, Any], other: dict[str, Any], optimizer: int, outcome: Parity) -> list[tuple[int, int, str]]:
    """Pair an optimizer's parameters: (place in a, place in b, name), in the order of a's optimizer.

    By the name; by the name without a prefix that one of the two has before all its names; what is left, in its order
    if the shapes agree.
    """
    names = one["names"], other["names"]
    shapes = [[tuple(param.shape) for param in record["parameters"]] for record in (one, other)]
    places = {name: j for j, name in enumerate(names[1])}
    prefix = _prefix(*names)
    found: dict[int, int] = {}
    for i, name in enumerate(names[0]):
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            j = places.get(candidate)
            if j is not None and j not in found.values() and shapes[0][i] == shapes[1][j]:
                found[i] = j
                break
    by_name = len(found)
    left = [i for i in range(len(names[0])) if i not in found], [j for j in places.values() if j not in found.values()]
    if [shapes[0][i] for i in left[0]] == [shapes[1][j] for j in left[1]]:
        found.update(zip(*left, strict=True))
        left = [], []
    a, b = outcome.labels
    if len(found) > by_name:
        example = next(f"{names[0][i]} with {names[1][j]}" for i, j in list(found.items())[by_name:])
        outcome.matched.append(f"{len(found) - by_name} parameters matched by order and shape, {example} the first")
    for label, side, k in ((a, left[0], 0), (b, left[1], 1)):
        for i in side:
            outcome.problems.append(
                f"only {label} has, in its optimizer {optimizer}, {names[k][i]} of shape {shapes[k][i]}"
            )
    both = [(i, j, names[0][i], names[1][j]) for i, j in sorted(found.items())]
    return [(i, j, mine if mine == theirs else f"{mine} ({theirs} in {b})") for i, j, mine, theirs in both]


def _prefix(first: Sequence[str], second: Sequence[str]) -> str:
    """What most names of one have before those of the other, such as "net." or "module."; else nothing."""
    counts: Counter[str] = Counter()
    for longer, shorter in ((first, second), (second, first)):
        ends = set(shorter)
        for name in longer:
            parts = name.split(".")
            counts.update(".".join(parts[:k]) + "." for k in range(1, len(parts)) if ".".join(parts[k:]) in ends)
    return counts.most_common(1)[0][0] if counts else ""


# ---- what a difference looks like ---------------------------------------------------------------------------------


def _hints(
    kind: str,
    one: dict[str, Any],
    other: dict[str, Any],
    before: tuple[dict[str, Any], dict[str, Any]] | None,
    pairs: Sequence[tuple[int, int, str]],
    outcome: Parity,
) -> Iterator[str]:
    a, b = outcome.labels
    worst = max((found.relative for found in outcome.differences), default=math.inf)
    if kind == START and outcome.differences:
        yield "different weights from the start; seed both alike and build the model first, or load one state_dict"
    elif kind == LOSS:
        yield (
            "the parameters were the same up to here; look at the batches, train or eval mode, the random numbers that "
            "were drawn before (dropout), the precision and the loss itself"
        )
    elif kind == GRADIENT:
        factor = _factor([(one["gradients"][i], other["gradients"][j]) for i, j, _ in pairs])
        if factor is not None:
            yield f"the gradients of {b} are {factor:.6g} times those of {a}: scaling, averaging or clipping differs"
        for label, mine, theirs, last in _sides(one, other, before, pairs, outcome.labels):
            if _adds_up(mine, theirs, last):
                yield f"the gradients of {label} are those of this step plus those of the last: zero_grad is missing"
    elif kind == PARAMETER:
        yield from _hyper_hints(one, other, pairs, outcome)
    if worst <= ROUNDING:
        yield f"this may be rounding (another kernel or order of sums); a tolerance of {_above(worst):g} passes it"


def _hyper_hints(
    one: dict[str, Any], other: dict[str, Any], pairs: Sequence[tuple[int, int, str]], outcome: Parity
) -> Iterator[str]:
    """Which hyperparameters of the first parameter that differs are not the same."""
    name = outcome.differences[0].name
    i, j = next((i, j) for i, j, paired in pairs if paired == name)
    mine, theirs = one["hypers"][one["groups"][i]], other["hypers"][other["groups"][j]]
    a, b = outcome.labels
    apart = [key for key in mine if key in theirs and mine[key] != theirs[key]]
    for key in apart:
        yield f"{key} of its param group is {mine[key]!r} in {a} and {theirs[key]!r} in {b}"
    if one["kind"] != other["kind"]:
        yield f"{a} has {one['kind']}, {b} has {other['kind']}"
    elif not apart:
        yield "gradients and hyperparameters are the same; look at what changes parameters besides the optimizer"


Tensors = list["Tensor | None"]


def _sides(
    one: dict[str, Any],
    other: dict[str, Any],
    before: tuple[dict[str, Any], dict[str, Any]] | None,
    pairs: Sequence[tuple[int, int, str]],
    labels: tuple[str, str],
) -> Iterator[tuple[str, Tensors, Tensors, Tensors]]:
    """(label, its gradients, the other's, its own of the step before), for each of the two."""
    if before is None or before[0]["optimizer"] != one["optimizer"]:
        return
    places = [i for i, _, _ in pairs], [j for _, j, _ in pairs]
    now = [[r["gradients"][k] for k in side] for r, side in zip((one, other), places, strict=True)]
    last = [[r["gradients"][k] for k in side] for r, side in zip(before, places, strict=True)]
    yield labels[0], now[0], now[1], last[0]
    yield labels[1], now[1], now[0], last[1]


def _adds_up(mine: Tensors, theirs: Tensors, last: Tensors) -> bool:
    """Whether mine = theirs + last throughout, and last is not zero."""
    seen = False
    for x, y, z in zip(mine, theirs, last, strict=True):
        if x is None or y is None or z is None:
            continue
        x, y, z = _plain(x), _plain(y), _plain(z)
        seen |= bool(z.any())
        if not torch.allclose(x, y + z, rtol=1e-3, atol=1e-3 * float(x.abs().max()) if x.numel() else 0.0):
            return False
    return seen


def _factor(gradients: Sequence[tuple[Tensor | None, Tensor | None]]) -> float | None:
    """The one number that takes all first gradients to the second ones, or None."""
    present = [(_plain(x).flatten(), _plain(y).flatten()) for x, y in gradients if x is not None and y is not None]
    if not present:
        return None
    x, y = (torch.cat(side) for side in zip(*present, strict=True))
    if not x.any() or not bool(x.isfinite().all() and y.isfinite().all()):
        return None
    factor = float(x @ y / (x @ x))
    return factor if float((y - factor * x).norm()) <= 1e-3 * float(y.norm()) and abs(factor - 1) > 1e-3 else None


def _above(value: float) -> float:
    """A round number of at least this value."""
    return 10.0 ** math.ceil(math.log10(value)) if value > 0 else 0.0
