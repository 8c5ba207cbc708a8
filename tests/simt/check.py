"""Runs the CUDA kernels on the CPU under sanitizers and the race checker, and holds their traffic to budgets.json.

    python tests/simt/check.py [MODE ...] [--write] [--all]

Modes (default: all that this machine has compilers for): sanitize and sanitize-clang (AddressSanitizer and
UndefinedBehaviorSanitizer), races (any two accesses that the GPU's rules do not order), traffic (bytes a parameter,
widths of accesses, sectors). A few rules stand for all; --all takes them all. --write makes budgets.json anew.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from build import KERNELS, ROOT, compile_all

HERE = ROOT / "tests" / "simt"
BUDGETS = HERE / "budgets.json"
DOCS = ROOT / "docs" / "simt.md"
# Between them each number of states and sums, scalars, and both ways of measuring.
FEW = ("SGD", "AdamW", "AdamWAmsgrad", "NAdam", "Lamb", "NovoGrad")
SANITIZE = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


@dataclass(frozen=True)
class Mode:
    """How a driver is compiled and what it is run with."""

    compiler: str = "g++"
    kernels: tuple[str, ...] = ("-O1",)
    others: tuple[str, ...] = ("-O1",)
    link: tuple[str, ...] = ()
    sources: tuple[str, ...] = ("driver", "shim", "backend")
    arguments: tuple[str, ...] = ("few", "forward")


# Without splitting structs up, so that an access of 16 bytes stays one; the instrumented kernels link watch.cpp instead
# of the compiler's runtime.
WATCH = Mode(
    kernels=("-O1", "-fno-tree-sra", "-fsanitize=thread", "-fno-threadsafe-statics", "-DSIMT_WATCH"),
    others=("-O2", "-DSIMT_WATCH"),
    sources=("driver", "shim", "backend", "watch"),
)
MODES = {
    "plain": Mode(),
    "sanitize": Mode(kernels=SANITIZE, others=SANITIZE, link=SANITIZE[2:3]),
    "sanitize-clang": Mode("clang++", SANITIZE, SANITIZE, SANITIZE[2:3]),
    "races": WATCH,
    "traffic": WATCH,
}
ARGUMENTS = {"traffic": ("traffic",)}


@dataclass
class Program:
    """A driver that is built once a mode; `changed` stands in front of csrc for mutated sources."""

    folder: Path
    rules: tuple[str, ...] | None = FEW
    changed: Path | None = None
    built: dict[Mode, Path] = field(default_factory=dict)

    def includes(self) -> list[str]:
        """Where a shorter list of rules stands, and changed sources."""
        found = [f"-I{self.changed}"] if self.changed else []
        if self.rules is None:
            return found
        text = (ROOT / "csrc" / "rules" / "all.h").read_text()
        (self.folder / "rules").mkdir(parents=True, exist_ok=True)
        shorter = re.sub(r"using All = List<[^>]*>;", f"using All = List<{', '.join(self.rules)}>;", text)
        (self.folder / "rules" / "all.h").write_text(shorter)
        return [*found, f"-I{self.folder}"]

    def others(self, mode: Mode, folder: Path) -> list[Path]:
        """All but the kernels: they stand first, so that the linker takes their copies of what both have inline."""
        sources = [HERE / f"{name}.cpp" for name in mode.sources]
        return compile_all(sources, folder / "others", [*mode.others, *self.includes()], mode.compiler)

    def kernels(self, mode: Mode, folder: Path, names: tuple[str, ...] | None = None) -> list[Path]:
        """The objects of the kernels, or of those files alone."""
        sources = [path for path in KERNELS if names is None or path.stem in names]
        if self.changed:
            sources = [self.changed / "cuda" / path.name for path in sources]
        return compile_all(sources, folder / "kernels", [*mode.kernels, *self.includes()], mode.compiler)

    def build(self, mode: Mode) -> Path:
        """Compile and link."""
        if mode not in self.built:
            folder = self.folder / f"mode{len(self.built)}"
            made = folder / "driver"
            objects = [*self.others(mode, folder), *self.kernels(mode, folder)]
            subprocess.run([mode.compiler, *mode.link, *map(str, objects), "-o", str(made)], check=True)
            self.built[mode] = made
        return self.built[mode]


def run(program: Path, *arguments: str, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, timeout=timeout, check=False)


# ---- traffic -------------------------------------------------------------------------------------------------------


def compare(measured: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """What differs between what was measured and the budgets."""
    wrong = [f"{key}: no budget" for key in measured if key not in budgets]
    wrong += [f"{key}: not measured" for key in budgets if key not in measured]
    for key, value in measured.items():
        if key in budgets and budgets[key] != value:
            wrong.append(f"{key}: measured {json.dumps(value)}, budget {json.dumps(budgets[key])}")
    return wrong


def write_budgets(measured: dict[str, Any]) -> None:
    """One line a launch, so that a change shows as one; and some of them as a table into the docs."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in measured.items())
    BUDGETS.write_text(f"{{\n{lines}\n}}\n")
    rows = "| AdamW in | bytes a parameter | share of touched sectors | accesses for 4,096 parameters |\n"
    rows += "|---|--:|--:|---|\n"
    for key, value in measured.items():
        if key.startswith("adamw in "):
            widths = ", ".join(f"{count:g} of {width} bytes" for width, count in value["accesses"].items())
            rows += f"| {key[9:]} | {value['bytes']:g} | {100 * value['efficiency']:.1f} % | {widths} |\n"
    put_into(DOCS, "budgets", rows)


def put_into(page: Path, name: str, text: str) -> None:
    """Replace what stands between a page's marks."""
    begin, end = f"<!-- {name} -->\n", "<!-- end -->"
    page.write_text(re.sub(f"(?s){begin}.*?{end}", lambda _: begin + text + end, page.read_text()))


def main(argv: list[str]) -> int:
    """Run the modes asked for; 1 if one of them finds something."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("modes", nargs="*", metavar="MODE", help=", ".join(MODES))
    options.add_argument(
        "--write", action="store_true", help="write budgets.json, and the docs' table, from what is measured"
    )
    options.add_argument("--all", action="store_true", help="every rule, in the modes with a few")
    args = options.parse_args(argv)
    unknown = set(args.modes) - set(MODES)
    if unknown:
        options.error(f"no mode {', '.join(sorted(unknown))}; there are {', '.join(MODES)}")
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        few = Program(Path(folder) / "few", None if args.all else FEW)
        every = few if args.all else Program(Path(folder) / "all", None)
        for name in args.modes or [name for name in MODES if name != "plain"]:
            mode = MODES[name]
            if shutil.which(mode.compiler) is None:
                print(f"{name}: skipped, there is no {mode.compiler} here", flush=True)
                continue
            start = time.monotonic()
            program = (every if name == "traffic" else few).build(mode)
            middle = time.monotonic()
            done = run(program, *ARGUMENTS.get(name, mode.arguments))
            wrong = [] if done.returncode == 0 else [done.stdout[-4000:] + done.stderr[-4000:]]
            if name == "traffic" and not wrong:
                measured = json.loads(done.stdout)
                if args.write:
                    write_budgets(measured)
                wrong = compare(measured, json.loads(BUDGETS.read_text()))
            verdict = "\n".join(["FAILED", *wrong]) if wrong else "ok"
            seconds = f"{middle - start:.0f} s to build, {time.monotonic() - middle:.0f} s"
            print(f"{name}: {verdict} ({seconds})", flush=True)
            failed = failed or bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
