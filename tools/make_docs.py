"""Writes the pages that are made from the code: docs/tables.md and docs/optimizers/, one page an optimizer.

    python tools/make_docs.py [--check]

The cells of the tables come from running each combination. With --check nothing is written, and the exit status is 1
where a page differs from what would be.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from common import markdown  # noqa: E402

import pytrain.optim  # noqa: E402
from pytrain import backend  # noqa: E402
from pytrain.optim import FusedOptimizer  # noqa: E402

STEPS, LR = 4, 0.01
SHAPES = [(7,), (33, 7), (65, 70)]  # small and large ones: from 4,096 elements on a state can be coded
LEVELS = ("baseline", "avx2", "avx512")
BF16, FP16 = torch.bfloat16, torch.float16
SELECTORS: list[dict[str, Any]] = [  # options that choose among the rules of one optimizer
    {},
    {"amsgrad": True},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"centered": True},
    {"centered": True, "momentum": 0.9},
]
YES, MISSING = "yes", "this machine does not have"
TRUTHS: dict[tuple[str, torch.dtype], list[Tensor]] = {}  # what `truth` has found


@dataclass(frozen=True)
class Subject:
    """A rule, by the optimizer and the options that select it."""

    cls: type[FusedOptimizer]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        text = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"[{self.cls.__name__}]({page_path(self.cls)})" + (f", {text}" if text else "")

    def make(self, params: list[Tensor], **more: Any) -> FusedOptimizer:
        made: FusedOptimizer = self.cls(params, lr=LR, **self.options, **more)  # type: ignore[call-arg]
        return made


@dataclass(frozen=True)
class Format:
    """The parameters' dtype and the storage options."""

    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = [f"{key}={value!r}" for key, value in self.options.items()]
        return "<br>".join([dtype_name(self.dtype), *(f"`{option}`" for option in options)])


FORMATS = [
    Format(),
    Format(torch.float64),
    Format(BF16),
    Format(FP16),
    Format(BF16, {"master_weights": True}),
    Format(BF16, {"master_weights": "compact"}),
    Format(FP16, {"master_weights": "compact"}),
    Format(BF16, {"kahan": True}),
    Format(BF16, {"rounding": "stochastic"}),
    Format(torch.float32, {"state_dtype": "bf16"}),
    Format(torch.float32, {"state_dtype": "8bit"}),
    Format(torch.float64, {"state_dtype": "8bit"}),
    Format(BF16, {"rounding": "stochastic", "state_dtype": "8bit"}),
    Format(torch.float32, {"ema_decay": 0.9}),
    Format(torch.float32, {"zero_grad_in_step": True}),
]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- what there is ---------------------------------------------------------------------------------------------------


def optimizers() -> list[type[torch.optim.Optimizer]]:
    """The public optimizers, by name."""
    public = [getattr(pytrain.optim, name) for name in pytrain.optim.__all__]
    found = [cls for cls in public if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer)]
    return sorted((cls for cls in found if cls is not FusedOptimizer), key=lambda cls: cls.__name__.lower())


def subjects() -> list[Subject]:
    """Every rule of every optimizer; an optimizer without rules as a whole.

    Raises:
        ValueError: no entry of SELECTORS selects a rule.
    """
    found = []
    for cls in optimizers():
        if not issubclass(cls, FusedOptimizer):
            continue
        if not cls.rules:
            found.append(Subject(cls, {}))
            continue
        taken = inspect.signature(cls).parameters
        selected: dict[str, Subject] = {}
        for options in (options for options in SELECTORS if options.keys() <= taken.keys()):
            subject = Subject(cls, options)
            optimizer = subject.make([Parameter(torch.zeros(1))])
            selected.setdefault(optimizer.rule(optimizer.param_groups[0]).name, subject)
        missing = [rule.name for rule in cls.rules if rule.name not in selected]
        if missing:
            raise ValueError(f"SELECTORS: no entry selects {', '.join(missing)} of {cls.__name__}")
        found += [selected[rule.name] for rule in cls.rules]
    return found


# ---- running a combination -------------------------------------------------------------------------------------------


def make_params(source: torch.dtype, dtype: torch.dtype, *, gaps: bool = False) -> list[Tensor]:
    """Parameters of a dtype with values of about one, which are numbers of the source dtype too."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(source).to(dtype) for shape in SHAPES]
    return [Parameter(torch.stack([x, x], dim=-1)[..., 0] if gaps else x) for x in values]


def run(
    optimizer: FusedOptimizer, params: list[Tensor], source: torch.dtype, layout: torch.layout = torch.strided
) -> list[Tensor]:
    """The parameters after a few steps with gradients that are numbers of the source dtype."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        for p in params:
            g = torch.randn(p.shape, generator=generator).to(source).to(p.dtype)
            p.grad = g if layout == torch.strided else g.to_sparse()
        optimizer.step()
    return params


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference of any element; inf where there is a nan."""
    both = zip(found, exact, strict=True)
    widest = torch.complex128 if found[0].is_complex() else torch.float64
    return max((f.detach().to(widest) - e.detach()).abs().nan_to_num(nan=torch.inf).max().item() for f, e in both)


def attempt(make: Callable[[bool | None], list[Tensor]], exact: Callable[[], list[Tensor]]) -> str:
    """Run a combination: "yes", or the sentence of the error.

    Args:
        make: steps and returns the parameters, with `fused` as given; False is the torch path that is compared with.
        exact: the parameters after the same steps in fp64.
    """
    try:
        found, plain, truth = make(None), make(False), exact()
    except (ValueError, TypeError, RuntimeError) as problem:
        return sentence(problem)
    rounding = torch.finfo(found[0].dtype).eps / 2 * max(p.detach().abs().max().item() for p in truth)
    mine, theirs = error(found, truth), error(plain, truth)
    return YES if mine <= max(2 * theirs, STEPS * rounding) else f"off by {mine:.2g}, the torch path by {theirs:.2g}"


def sentence(problem: Exception) -> str:
    """An error's message as a cell: without the parameter's place, on one line."""
    text = " ".join(str(problem).split())
    text = re.sub(r"^\w+: param_groups\[\d+\]\['params'\]\[\d+\]: ", "", text)
    return text.replace("|", "\\|").replace("<", "&lt;")


def truth(subject: Subject, source: torch.dtype) -> list[Tensor]:
    """The parameters after the steps in double precision, on the torch path, with numbers of the source dtype."""
    key = (subject.name, source)
    if key not in TRUTHS:
        params = make_params(source, torch.complex128 if source.is_complex else torch.float64)
        TRUTHS[key] = run(subject.make(params, fused=False), params, source)
    return TRUTHS[key]


def with_format(subject: Subject, form: Format, *, gaps: bool = False, layout: torch.layout = torch.strided) -> str:
    """Whether a rule steps in a format."""
    source = torch.float32 if form.dtype == torch.float64 else form.dtype

    def make(fused: bool | None) -> list[Tensor]:
        params = make_params(source, form.dtype, gaps=gaps)
        return run(subject.make(params, fused=fused, **form.options), params, source, layout)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the torch path is taken
        return attempt(make, partial(truth, subject, source))


def on_kernels(subject: Subject, level: str) -> str:
    """Whether a rule steps on the kernels of an instruction set level."""

    def make(fused: bool | None) -> list[Tensor]:
        params = make_params(torch.float32, torch.float32)
        return run(subject.make(params, fused=True if fused is None else fused), params, torch.float32)

    try:
        with isa(level):
            return attempt(make, partial(truth, subject, torch.float32))
    except RuntimeError as problem:  # the level, or all kernels, are not there
        return sentence(problem)


@contextmanager
def isa(level: str) -> Iterator[None]:
    """Run at an instruction set level."""
    before = backend.isa()
    backend.isa(level)
    try:
        yield
    finally:
        backend.isa(before)


def which_backend(subject: Subject, case: str) -> str:
    """What steps parameters or gradients of a kind, once it is seen that they are stepped rightly."""
    form = Format(torch.complex64 if case == COMPLEX else torch.float32)
    layout = torch.sparse_coo if case == SPARSE else torch.strided
    found = with_format(subject, form, gaps=case == GAPS, layout=layout)
    if found != YES:
        return found
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        params = make_params(form.dtype, form.dtype, gaps=case == GAPS)
        optimizer = subject.make(params)
        run(optimizer, params, form.dtype, layout)
    reasons = [str(warning.message).partition(": ")[2] for warning in caught]
    on_torch = "torch" in {choice.backend for choice in optimizer.choices}
    return f"torch path: {(reasons or [optimizer.choices[0].reason])[0]}" if on_torch or reasons else "kernels"


PLAIN, GAPS, COMPLEX, SPARSE = "contiguous", "with gaps in memory", "complex64", "sparse gradients"


# ---- pages -----------------------------------------------------------------------------------------------------------


def tables(known: str, *, check: bool) -> str:
    """docs/tables.md.

    Args:
        known: the page as it is. A level that this machine does not have keeps the cells of a machine that has it.
        check: also keep the cells of a level that this machine has and the one that wrote the page had not.
    """
    every = subjects()
    formats = [[subject.name, *(with_format(subject, form) for form in FORMATS)] for subject in every]
    has = backend.facts.isa_levels() if backend.facts else {}
    old = read_table(known, "## Rules and instruction sets")

    def level_cell(subject: Subject, level: str) -> str:
        kept = old.get(subject.name, {}).get(level, "")
        keep = bool(kept) and (not has.get(level) or (check and MISSING in kept))
        return kept if keep else on_kernels(subject, level)

    levels = [[subject.name, *(level_cell(subject, level) for level in LEVELS)] for subject in every]
    kinds = (PLAIN, GAPS, COMPLEX, SPARSE)
    backends = [[subject.name, *(which_backend(subject, kind) for kind in kinds)] for subject in every]
    return f"""# What runs

Written by `python tools/make_docs.py`, which runs every cell: {STEPS} steps over {len(SHAPES)} tensors on the kernels,
compared with the torch path, both against fp64. A cell is "{YES}" where the largest error is at most twice the torch
path's, or the roundings of the steps; else it says both errors, or is the sentence of the exception. What the options
mean stands in [optimizers.md](optimizers.md).

The cells of the first table are those of the CUDA kernels too ([cuda.md](cuda.md)), but for Adafactor and Muon, which
take torch's operations on a GPU: `PYTRAIN_BACKEND=simt python tools/make_docs.py --check` runs every cell on them.

## Rules and formats

{markdown(["rule", *(form.name for form in FORMATS)], formats)}

## Rules and instruction sets

On the kernels, with `fused=True`, in float32. A machine that does not have a level leaves its column as it finds it.

{markdown(["rule", *LEVELS], levels)}

## Rules and backends

What steps parameters and gradients of other kinds than contiguous float32 ones, once it is seen that they are stepped
rightly.

{markdown(["rule", *kinds], backends)}
"""


def read_table(text: str, heading: str) -> dict[str, dict[str, str]]:
    """The first table under a heading: first cell -> header -> cell."""
    lines = [line for line in text.partition(heading)[2].partition("\n## ")[0].splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(rows[0], row, strict=False)) for row in rows[2:]}


def page_path(cls: type[Any]) -> str:
    """Where an optimizer's page is, seen from docs/."""
    return f"optimizers/{cls.__name__.lower()}.md"


def page(cls: type[torch.optim.Optimizer]) -> str:
    """An optimizer's page, from its docstring."""
    body, sections = split(inspect.getdoc(cls) or "")
    parts = [
        f"# {cls.__name__}",
        body,
        "## Arguments",
        f"```python\n{call(cls)}\n```",
        arguments(sections.pop("Args", "")),
        *state_of(cls),
        *(f"## {name}\n\n{section(name, text)}" for name, text in sections.items()),
        "What runs with which option and on what: [tables](../tables.md).",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def call(cls: type[torch.optim.Optimizer]) -> str:
    """The constructor's arguments with their defaults, one a line."""
    lines = []
    keyword = False
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
            lines.append("*")
            keyword = True
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        lines.append(f"**{parameter.name}" if parameter.kind is parameter.VAR_KEYWORD else parameter.name + default)
    return f"pytrain.optim.{cls.__name__}(\n" + "".join(f"    {line},\n" for line in lines) + ")"


def split(doc: str) -> tuple[str, dict[str, str]]:
    """A docstring's text with its formulas as Markdown has them, and its sections by name."""
    pieces = re.split(r"^(Args|Shape|Raises|Source):", doc, flags=re.MULTILINE)
    sections = {name: inspect.cleandoc("\n" + text) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)}
    paragraphs = []
    for paragraph in pieces[0].strip().split("\n\n"):
        formula = re.fullmatch(r"\.\. math::\n((?:    .*\n?)+)", paragraph)
        paragraphs.append(f"```math\n{inspect.cleandoc(formula[1])}\n```" if formula else linked(paragraph))
    return "\n\n".join(paragraphs), sections


def linked(text: str) -> str:
    """Text with its formulas in Markdown's form and its optimizers and papers as links."""
    text = re.sub(r":math:`([^`]*)`", r"$\1$", text)
    text = re.sub(r"`Options`", "[the options of every optimizer](../optimizers.md)", text)
    for cls in optimizers():
        text = text.replace(f"`{cls.__name__}`", f"[{cls.__name__}]({cls.__name__.lower()}.md)")
    return re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def unwrapped(text: str) -> str:
    """Lines that begin further in continue the line before them."""
    return re.sub(r"\n +", " ", text)


def arguments(text: str) -> str:
    """The section Args as a list."""
    lines = [line.partition(": ") for line in unwrapped(text).splitlines()]
    return "\n".join(
        f"- {', '.join(f'`{name}`' for name in names.split(', '))}: {linked(what)}" for names, _, what in lines
    )


def section(name: str, text: str) -> str:
    """The text of a section; its entries as a list where it can have several."""
    lines = linked(unwrapped(text)).splitlines()
    return (
        "\n".join(f"- {line}" for line in lines)
        if name == "Raises"
        else " ".join(lines)[:1].upper() + " ".join(lines)[1:]
    )


def state_of(cls: type[torch.optim.Optimizer]) -> list[str]:
    """The section on states, where rules name them."""
    if not issubclass(cls, FusedOptimizer) or not cls.rules:
        return []
    lines = []
    for subject in (subject for subject in subjects() if subject.cls is cls):
        optimizer = subject.make([Parameter(torch.zeros(1))])
        rule = optimizer.rule(optimizer.param_groups[0])
        text = ", ".join(f"`{key}={value}`" for key, value in subject.options.items()) or "By default"
        states = ", ".join(f"`{name}`" for name in rule.states) or "no state"
        numbers = "".join(f", `{name}` (one number)" for name in rule.scalars)
        step = ", `step`" if cls.steps_in_state else ""
        lines.append(f"- {text}: {states}{numbers}{step}")
    return ["## State", "\n".join(lines)]


def index() -> str:
    """docs/optimizers/README.md: all pages."""
    rows = []
    for cls in optimizers():
        summary = (inspect.getdoc(cls) or "").partition("\n")[0]
        theirs = "yes" if hasattr(torch.optim, cls.__name__) else "no"
        rows.append([f"[{cls.__name__}]({cls.__name__.lower()}.md)", summary, theirs])
    table = markdown(["class", "what it is", "in torch.optim"], rows)
    return f"# All optimizers\n\nWritten by `python tools/make_docs.py` from the docstrings.\n\n{table}\n"


def pages(docs: Path, *, check: bool) -> dict[Path, str]:
    """All pages that are made, by path."""
    known = docs / "tables.md"
    found = {docs / page_path(cls): page(cls) for cls in optimizers()}
    found[docs / "optimizers" / "README.md"] = index()
    found[known] = tables(known.read_text() if known.exists() else "", check=check)
    return found


def main(argv: list[str]) -> int:
    """Write or check the pages; 1 where --check finds one out of date."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--check", action="store_true", help="write nothing; fail where a page is out of date")
    options.add_argument("--docs", type=Path, default=ROOT / "docs", help="the folder of the pages (%(default)s)")
    args = options.parse_args(argv)
    wanted = pages(args.docs, check=args.check)
    left_over = sorted(set((args.docs / "optimizers").glob("*.md")) - set(wanted))
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if args.check:
        for path in stale + left_over:
            print(f"{path}: out of date; run python tools/make_docs.py")
        return 1 if stale or left_over else 0
    (args.docs / "optimizers").mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.write_text(wanted[path])
    for path in left_over:
        path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
