"""Shows that the tests guard the rules: changes one sign, operator or coefficient at a time and wants a test to fail.

    python tools/mutate_rules.py [--sample N]

Each mutant of csrc/rules is compiled alone, and the comparison of tests/kernels/test_rules.py runs against it. The exit
status is 1 if a mutant survives or a rule has none. Changes that do not compile are no mutants and do not count.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CHANGES = [
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " / "),
    (r" / ", " * "),
    (r" > ", " < "),
    (r" < ", " > "),
    (r"\bbeta1\b", "beta2"),
    (r"\bbeta2\b", "beta1"),
    (r"\bweight1\b", "weight2"),
    (r"\bweight2\b", "weight1"),
    (r"1\.0 - ", ""),
    (r"\? 1\.0 - h\.dampening : 1\.0", "? 1.0 : 1.0 - h.dampening"),
    (r"n & 1\b", "n & 2"),
    (r"\bmomentum\b", "keep"),
]
CODE = re.compile(r"return|=|\(T\(|[a-z_0-9]+\(.*\)[,{ ]|: .*\{\}")
SKIPPED = re.compile(r"^\s*(//|#|static constexpr|template|struct|using|double |namespace|for )")


@dataclass(frozen=True)
class Mutant:
    """One change of one line."""

    file: str
    number: int
    before: str
    after: str

    def text(self) -> str:
        return f"{self.file}:{self.number}: {self.before.strip()}  ->  {self.after.strip()}"


def mutants(csrc: Path) -> Iterator[Mutant]:
    """Every change of every line of code in the rules."""
    for path in sorted((csrc / "rules").glob("*.h")):
        if path.name == "all.h":
            continue
        for number, line in enumerate(path.read_text().splitlines()):
            code = line.split("//")[0]
            if SKIPPED.match(line) or not CODE.search(code):
                continue
            seen = set()
            for pattern, replacement in CHANGES:
                for match in re.finditer(pattern, code):
                    after = code[: match.start()] + replacement + code[match.end() :]
                    if after not in seen and after != code:
                        seen.add(after)
                        yield Mutant(path.name, number, line, after)


def judge() -> ModuleType:
    """The test module whose comparison must fail."""
    spec = importlib.util.spec_from_file_location("test_rules", ROOT / "tests" / "kernels" / "test_rules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def verdict(test: ModuleType, mutant: Mutant, folder: Path, number: int) -> str | None:
    """The rules whose comparison failed, "" if none did, None for a change that does not compile."""
    place = folder / str(number)
    shutil.copytree(ROOT / "csrc" / "rules", place / "rules")
    path = place / "rules" / mutant.file
    lines = path.read_text().splitlines()
    lines[mutant.number] = mutant.after
    path.write_text("\n".join(lines) + "\n")
    try:
        library = test.build(place, place)
    except subprocess.CalledProcessError:
        return None
    killers = []
    for name in test.RULES:
        try:
            test.compare(library, name)
        except AssertionError:
            killers.append(name)
    return ", ".join(killers)


def main(argv: list[str]) -> int:
    """Judge all mutants, or a sample."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sample", type=int, help="only so many mutants, chosen by chance")
    args = options.parse_args(argv)
    test = judge()
    found = list(mutants(ROOT / "csrc"))
    if args.sample is not None:
        found = random.sample(found, min(args.sample, len(found)))
    survivors, killed_rules, judged = [], set(), 0
    with tempfile.TemporaryDirectory() as folder:
        for name in test.RULES:  # unchanged, all agree
            test.compare(test.build(ROOT / "csrc", Path(folder)), name)
        for number, mutant in enumerate(found):
            killers = verdict(test, mutant, Path(folder), number)
            if killers is None:
                continue
            judged += 1
            print(f"{'killed by ' + killers if killers else 'SURVIVED':32}  {mutant.text()}", flush=True)
            killed_rules.update(killers.split(", "))
            if not killers:
                survivors.append(mutant)
    unguarded = set() if args.sample is not None else set(test.RULES) - killed_rules
    for name in sorted(unguarded):
        print(f"no mutant of rule {name} was killed")
    print(f"{judged - len(survivors)} of {judged} mutants killed")
    return 1 if survivors or unguarded else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
