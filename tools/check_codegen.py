"""Checks the machine code of the kernels: vectorised at its width, inside its namespace, without fused multiply-add.

    python tools/check_codegen.py [--compiler clang++] [--csrc FOLDER]

For each instruction set the kernels are compiled with the flags of setup.py and disassembled. A finding names the
function, and makes the exit status 1:
  - a hot loop (of a rule, a codec, a sum) without packed instructions of its level's width in a loop, or
    with a call in it, or one that computes with scalar square roots or divisions only;
  - an instruction beyond the x86-64 baseline outside the namespace of its level, in any object of the kernel library;
  - a weak function that is not of the project (a standard header compiled under a target attribute);
  - a function that calls memory into the caches, and in which the compiler has left nothing of that;
  - a fused multiply-add, which would change bits between levels;
  - more than 200 kernels in a level.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
# The loops over elements, by what a vectorised body cannot do without: a packed product in a rule, packed sums, shifts
# or widening moves in a codec, logic in a test of bits.
HOT = {
    r"update|measure|average_tile|scale_tile|add_scaled_tile": re.compile(r"^v?mulp[sd]$"),
    r"(?:scaled_)?square|(?:un)?factored_\w+|average": re.compile(r"^v?mulp[sd]$"),
    r"sum_squares": re.compile(r"^v?mulpd$"),
    r"clamp_tile": re.compile(r"^v?(min|max|cmp\w*|blendv?)p[sd]$"),
    r"inverse_roots": re.compile(r"^v?sqrtp[sd]$"),
    r"sum|add_to_columns": re.compile(r"^v?addp[sd]$"),
    r"\w*codes\w*|\w+code_\w*tile\w*|random_tile": re.compile(r"^v?p(sll|srl|sra|unpck|mov[sz]x|mov[dq]w)"),
    r"largest_magnitude|finite_words": re.compile(r"^v?(pand|por[dq]?|andp[sd]|pternlog|ptestn?m|mulpd)"),
}
MOST_KERNELS = 200
CALLS_AHEAD = re.compile(r"::cpu::stats\(|::Table::fit_rows\(")
HEADER = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
LINE = re.compile(r"^\s*(?P<address>[0-9a-f]+):\s+(?P<op>\S+)\s*(?P<args>.*)$")
FUSED = re.compile(r"^vfn?m(add|sub)")
BEYOND = re.compile(r"%[yz]mm|%k[0-7]")


@dataclass
class Function:
    """A function's name and its instructions."""

    name: str
    lines: list[tuple[int, str, str]] = field(default_factory=list)


def disassemble(path: Path) -> list[Function]:
    """The functions of an object file, with demangled names."""
    text = run(["objdump", "-d", "--no-show-raw-insn", "-C", str(path)])
    functions: list[Function] = []
    for line in text.splitlines():
        if header := HEADER.match(line):
            functions.append(Function(header["name"]))
        elif functions and (found := LINE.match(line)):
            functions[-1].lines.append((int(found["address"], 16), found["op"], found["args"]))
    return functions


def run(command: list[str]) -> str:
    """A command's output; its error text on failure."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


def setting(name: str) -> list[str]:
    """A list of strings that setup.py assigns to a name at its top."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            assert isinstance(node.value, ast.List)
            return [item.value for item in node.value.elts if isinstance(item, ast.Constant)]
    raise SystemExit(f"setup.py assigns no {name}")


def loops(function: Function) -> Iterator[list[tuple[int, str, str]]]:
    """The bodies of innermost loops: from the target of a backward jump to the jump."""
    for i, (address, op, args) in enumerate(function.lines):
        if not op.startswith("j"):
            continue
        target = re.match(r"^(?:\*)?([0-9a-f]+)\b", args)
        if not target or not function.lines[0][0] <= int(target[1], 16) <= address:
            continue
        start = int(target[1], 16)
        body = [line for line in function.lines[: i + 1] if line[0] >= start]
        inner = [b for b in body[:-1] if b[1].startswith("j") and _goes_back(b, start)]
        if not inner:
            yield body


def _goes_back(line: tuple[int, str, str], start: int) -> bool:
    target = re.match(r"^([0-9a-f]+)\b", line[2])
    return bool(target) and start <= int(target[1], 16) <= line[0]  # type: ignore[index]


def hot_name(name: str) -> str | None:
    """The short name of a hot loop, such as update<AdamW, float>; None for other functions."""
    found = re.search(rf"::(?:cpu|core)::({'|'.join(HOT)})(?:<(.*?)>)?\(", name)
    if not found:
        return None
    parts = [part.strip().rsplit("::", 1)[-1] for part in (found[2] or "").split(",")]
    what = ", ".join(p for p in parts if p and not p.isdigit())
    return f"{found[1]}<{what}>" if what else f"{found[1]} #{name.partition('(')[2]}"


def vector_loop(name: str, function: Function, register: str) -> str | None:
    """None if the function has a proper vector loop; else what is wrong."""
    bodies = list(loops(function)) or [function.lines]  # a short loop may be unrolled as a whole
    wanted = next(packed for names, packed in HOT.items() if re.match(rf"({names})[< ]", name))
    packed = [body for body in bodies if any(wanted.match(op) and f"%{register}" in args for _, op, args in body)]
    if not packed:
        return f"no vectorised loop in %{register}"
    if any(op.startswith("call") for body in bodies for _, op, _ in body):
        return "a call inside a loop"
    for word in ("sqrt", "div"):
        scalar = any(re.match(rf"^v?{word}s[sd]$", op) for body in bodies for _, op, _ in body)
        vector = any(re.match(rf"^v?{word}p[sd]$", op) and f"%{register}" in a for b in packed for _, op, a in b)
        if scalar and not vector:
            return f"only scalar {word} in the loop"
    return None


def check_level(level: str, path: Path) -> tuple[list[str], str]:
    """Findings in one level's object, and its row of the table."""
    findings: list[str] = []
    functions = disassemble(path)
    hot = {name: f for f in functions if (name := hot_name(f.name))}
    for name, function in hot.items():
        if wrong := vector_loop(name, function, LEVELS[level]):
            findings.append(f"{level}: {name}: {wrong}")
    if not hot:
        findings.append(f"{level}: no hot loop was found")
    if len(hot) > MOST_KERNELS:
        findings.append(f"{level}: {len(hot)} kernels, expected at most {MOST_KERNELS}")
    for function in functions:
        if any(FUSED.match(op) for _, op, _ in function.lines):
            findings.append(f"{level}: {function.name}: a fused multiply-add")
    for symbol in run(["nm", "-C", "--defined-only", str(path)]).splitlines():
        kind, name = symbol.split(maxsplit=2)[1:]
        if kind in "WVwvu" and f"pytrain::{level}::" not in name:
            findings.append(f"{level}: weak symbol outside pytrain::{level}: {name}")
    findings += outside(path, functions) + not_ahead(level, functions)
    return findings, f"{level:10} {len(hot):6} kernels  %{LEVELS[level]}"


def not_ahead(stem: str, functions: list[Function]) -> list[str]:
    """Functions that prefetch in the source only: GCC drops calls of functions that do nothing else."""
    ahead = [f for f in functions if CALLS_AHEAD.search(f.name)]
    return [f"{stem}: {f.name}: no prefetch" for f in ahead if not any("prefetch" in op for _, op, _ in f.lines)]


def outside(path: Path, functions: list[Function]) -> list[str]:
    """Functions that use AVX outside the namespaces of the levels that may."""
    found = []
    for function in functions:
        owner = re.search(r"pytrain::(avx2|avx512)::", function.name)
        for _, op, args in function.lines:
            beyond = BEYOND.search(args) or (op.startswith("v") and "%xmm" in args)
            if beyond and (owner is None or (owner[1] == "avx2" and re.search(r"%zmm|%k[0-7]", args))):
                found.append(f"{path.stem}: {function.name}: {op} {args} outside its namespace")
                break
    return found


def compile_all(compiler: str, csrc: Path, folder: Path, extra: list[str]) -> dict[str, Path]:
    """Compile every source of the kernel library; those that need torch only where it is importable."""
    try:
        from torch.utils.cpp_extension import include_paths

        torch_flags = [f"-isystem{path}" for path in include_paths()]
    except ImportError:
        torch_flags = []
        print("torch is not importable: csrc/ops is not checked")
    flags = ["-fPIC", "-fvisibility=hidden", *setting("COMPILE_FLAGS"), *extra, f"-I{csrc}"]
    objects: dict[str, Path] = {}
    commands = []
    for source in setting("KERNEL_SOURCES"):
        path = csrc / Path(source).relative_to("csrc")
        if "/ops/" in source and not torch_flags:
            continue
        objects[path.stem] = folder / f"{path.stem}.o"
        defines = ["-DTORCH_TARGET_VERSION=0x020A000000000000"] if "/ops/" in source else []
        commands.append([compiler, *flags, *defines, *torch_flags, "-c", str(path), "-o", str(objects[path.stem])])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, commands))
    return objects


def check(compiler: str, csrc: Path, extra: list[str]) -> list[str]:
    """All findings; prints the table."""
    findings: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for stem, path in compile_all(compiler, csrc, Path(folder), extra).items():
            level = stem.removeprefix("kernels_")
            if level in LEVELS:
                found, row = check_level(level, path)
                print(row)
            else:
                functions = disassemble(path)
                found = outside(path, functions) + not_ahead(stem, functions)
            findings += found
    return findings


def main(argv: list[str]) -> int:
    """Check; 0 if nothing was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--compiler", default=os.environ.get("CXX", "g++"))
    options.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    options.add_argument("--flag", action="append", default=[], help="one more compiler flag (to see a check fire)")
    args = options.parse_args(argv)
    findings = check(args.compiler, args.csrc, args.flag)
    for finding in findings:
        print(finding)
    print(f"{args.compiler}: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
