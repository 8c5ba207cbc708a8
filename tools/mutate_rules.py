"""Shows that the tests guard the kernels: changes one operator or number at a time and wants a test to fail.

    python tools/mutate_rules.py [--sample N] [--only PART] [--processes N]

Each mutant of csrc/rules goes through the comparison of tests/kernels/test_rules.py, each of the codecs in csrc/core
through tests/kernels/codec_test.cpp, and each of the walk over the storage in csrc/cpu/storage.h through
tests/kernels/kernel_test.cpp with a few rules. The exit status is 1 if a mutant survives or a rule has none that is
killed. Changes that do not compile are no mutants and do not count; nor do those of EQUIVALENT, with reasons.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNEL_TESTS = ROOT / "tests" / "kernels"
ARITHMETIC = [(r" \+ ", " - "), (r" - ", " + "), (r" \* ", " / "), (r" / ", " * ")]
RULES = [
    *ARITHMETIC,
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
CODECS = [
    *ARITHMETIC,
    (r" & ", " | "),
    (r" \| ", " & "),
    (r" \^ ", " | "),
    (r"~", ""),
    (r"(?<=>> )(\d+)", "1 + \\1"),
    (r"(?<=<< )(\d+)", "1 + \\1"),
    (r"\b(0x[0-9a-fA-F]+)u", "(\\1u ^ 1u)"),
    (r"(?<=[(=:,] )(\d+)(?=[,;)])", "(\\1 + 1)"),
]
WALK = [
    *ARITHMETIC,
    (r" < (?!n\b|n_states|part|core::sum_lanes)", " <= "),
    (r" > ", " >= "),
    (r" == ", " != "),
    (r" != ", " == "),
    (r"&&", "||"),
    (r"\|\|", "&&"),
    (r"\+ first\b", ""),
    (r"\bs8\b", "u8"),
    (r"\bu8\b", "s8"),
    (r"\btrue\b", "false"),
    (r"keys\[0\]", "keys[1]"),
    (r"keys\[1\]", "keys[2]"),
    (r"\bchance\.own\b", "chance.of_state"),
    (r"\bt\.chance\.begin\(at, first\);", ";"),
    (r"\bhalf_unit\b", "half_unit * 0"),
    (r"<core::Bf16>", "<core::Fp16>"),
    (r"(\{)?\breturn (encode|decode)_\w+\(.*\);", "\\1 return;"),
    (r"^(\s+)(zero_grad|average|encode_\w+|decode_\w+|\w+_tile)(<\w+>)?\(.*\);$", "\\1;"),
]
CODE = re.compile(r"return|=|\(T\(|[a-z_0-9]+\(.*\)[,{ ;]|: .*\{\}")
SKIPPED = re.compile(
    r"^\s*(//|#|static[ _](constexpr|assert)|template|struct|using|double \w+[,;]|namespace|for .*\{$)"
)
PARTS = {
    "rules": (RULES, ()),
    "codecs": (CODECS, ("core/half.h", "core/codec.h", "core/random.h", "core/sum.h")),
    "walk": (WALK, ("cpu/storage.h",)),
}
# A few rules that between them have each number of states and sums, and scalars; the walk is the same for all.
WALKED = ("SGD", "AdamWAmsgrad", "NAdam", "Lamb", "NovoGrad")
COMPILE = ["-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fPIC"]
RULES_COMPILE = ["-std=c++17", "-ffp-contract=off", "-fPIC"]  # as tests/kernels/test_rules.py
HEADERS = ("cmath", "cstdint", "cstdio", "cstring", "limits", "new", "string", "type_traits", "utility", "vector")
SAME = "where the two differ, both ways give the same"
HIGH = "only bits that are not kept differ"
CUT = "a bit that no random number reaches"
UNUSED = "only what is not selected differs"
EQUIVALENT = {
    ("rules/rule.h", "const double n = std::floor(x * 1.4426950408889634 - 0.5);"): "the series reaches that far",
    (
        "core/half.h",
        "const uint32_t bits = select(mask(magnitude < (0x400u ^ 1u)), as_bits(subnormal), rebiased + special);",
    ): SAME,
    ("core/half.h", "const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) + as_bits(0.5f);"): HIGH,
    ("core/half.h", "const uint32_t bits = select(mask(magnitude >= (0x477ff000u ^ 1u)), infinite, finite);"): SAME,
    (
        "core/codec.h",
        "as_float(select(mask(magnitude < (113u << 1 + 23)), magnitude, 0u)) * 1099511627776.0f));",
    ): UNUSED,
    ("core/codec.h", "const uint32_t largest = select(mask(finite > (0x7bffu ^ 1u)), 0x7bffu, finite);"): SAME,
    (
        "core/codec.h",
        "return static_cast<uint8_t>(((u >> 24) & 0x80u) | code_of(u & (0x7fffffffu ^ 1u), largest_signed, cut, 0));",
    ): CUT,
    ("core/codec.h", "const uint32_t special = mask((u & (0x7fffffffu ^ 1u)) >= 0x7f800000u);"): SAME,
    ("core/codec.h", "const uint32_t special = mask((u & 0x7fffffffu) >= (0x7f800000u ^ 1u));"): SAME,
    ("core/codec.h", "low = static_cast<int16_t>(static_cast<uint16_t>(~special & (u + (high << 16))));"): HIGH,
    ("core/codec.h", "low = static_cast<int16_t>(static_cast<uint16_t>(~special & (u - (high << 1 + 16))));"): HIGH,
    ("core/codec.h", "const uint32_t finite = mask((as_bits(added) & (0x7fffffffu ^ 1u)) < 0x7f800000u);"): SAME,
    ("cpu/storage.h", "largest = bits >= largest ? bits : largest;"): SAME,
    (
        "cpu/storage.h",
        "return core::as_float(static_cast<uint32_t>(largest <= low ? low : largest > high ? high : largest));",
    ): SAME,
    (
        "cpu/storage.h",
        "return core::as_float(static_cast<uint32_t>(largest < low ? low : largest >= high ? high : largest));",
    ): SAME,
    ("cpu/storage.h", "const int64_t m = n - i <= width ? n - i : width;"): SAME,
    (
        "cpu/storage.h",
        "const int64_t stride = storage.ema && storage.zero_grad ? 4 * tile : n;",
    ): "only the speed differs",
    ("cpu/storage.h", "const int64_t m = end - first <= stride ? end - first : stride;"): SAME,
    ("cpu/storage.h", "const int64_t m = end - first <= tile ? end - first : tile;"): SAME,
    ("cpu/storage.h", "return up <= numel ? up : numel;"): SAME,
    ("cpu/storage.h", "if (first <= last) visit(i, first, last - first);"): "a visit of nothing does nothing",
    (
        "cpu/storage.h",
        "measure_part(part, rule.memory, first, last - first <= block ? last - first : block, partial);",
    ): SAME,
    (
        "cpu/storage.h",
        "const int64_t up = element <= 0 ? 0 : (element + block + 1) / block * block;",
    ): "only who does it differs",
}


@dataclass(frozen=True)
class Mutant:
    """One change of one line."""

    part: str
    file: str
    number: int
    before: str
    after: str

    def text(self) -> str:
        return f"{self.file}:{self.number + 1}: {self.before.strip()}  ->  {self.after.strip()}"


def files_of(part: str) -> list[str]:
    """The files of a part; the rules are those of the one list, and what they include."""
    if part != "rules":
        return list(PARTS[part][1])
    return sorted(set().union(*closures().values()))


def mutants(csrc: Path, parts: Sequence[str] = tuple(PARTS)) -> Iterator[Mutant]:
    """Every change of every line of code."""
    for part in parts:
        for file in files_of(part):
            for number, line in enumerate((csrc / file).read_text().splitlines()):
                code = line.split("//")[0].rstrip()
                if SKIPPED.match(line) or not CODE.search(code):
                    continue
                seen = {code}
                for pattern, replacement in PARTS[part][0]:
                    for match in re.finditer(pattern, code):
                        after = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                        if after not in seen and (file, after.strip()) not in EQUIVALENT:
                            seen.add(after)
                            yield Mutant(part, file, number, line, after)


# ---- the rules and their files -------------------------------------------------------------------------------------


def closures() -> dict[str, set[str]]:
    """For each file that the list of rules includes, it and what it includes itself."""

    def included(file: str) -> set[str]:
        names = re.findall(r'#include "(rules/\w+\.h)"', (CSRC / file).read_text())
        return {file}.union(*(included(name) for name in names))

    return {file: included(file) for file in included("rules/all.h") - {"rules/all.h"}}


def rules_in(file: str) -> dict[str, str]:
    """The rules of a file: their structs and the names of their ops."""
    text = (CSRC / file).read_text()
    return dict(re.findall(r'struct (\w+)[^{;]*\{\s+static constexpr const char\* name = "(\w+)"', text))


def rules_with(file: str) -> dict[str, str]:
    """The rules that a change of a file may change."""
    return {k: v for user, files in closures().items() if file in files for k, v in rules_in(user).items()}


def list_only(rules: Sequence[str], place: Path) -> None:
    """Write a list of rules with no others into `place`."""
    text = (CSRC / "rules" / "all.h").read_text()
    (place / "rules").mkdir(parents=True, exist_ok=True)
    shorter = re.sub(r"using All = List<[^>]*>;", f"using All = List<{', '.join(rules)}>;", text)
    (place / "rules" / "all.h").write_text(shorter)


# ---- the judges: each says which tests failed, or None for a change that does not compile --------------------


def load_test() -> ModuleType:
    """The test module whose comparison must fail where a rule is changed."""
    spec = importlib.util.spec_from_file_location("test_rules", KERNEL_TESTS / "test_rules.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headers(workplace: Path, level: str) -> list[str]:
    """The flag that includes the standard headers, which are compiled once."""
    return ["-include", str(workplace / f"headers{level}.h")]


def compiled(command: Sequence[str | Path]) -> bool:
    return subprocess.run([str(word) for word in command], capture_output=True, check=False).returncode == 0


def fails(program: Path, *arguments: str) -> bool:
    """Whether a test fails, crashes or hangs."""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, check=False, timeout=15)
    except subprocess.TimeoutExpired:
        return True
    return done.returncode != 0


def judge_rule(test: ModuleType, file: str, place: Path, workplace: Path) -> str | None:
    """Compare the rules that `file` may change with their references."""
    rules = rules_with(file)
    list_only(list(rules), place)
    try:
        library = test.build(CSRC, place, "-O0", f"-I{place}", *headers(workplace, "-O0"))
    except subprocess.CalledProcessError:
        return None
    killers = []
    for name in rules.values():
        try:
            test.compare(library, name)
        except AssertionError:
            killers.append(name)
    return ", ".join(killers)


def judge_codec(compiler: str, place: Path, workplace: Path) -> str | None:
    """Run the test of the codecs."""
    flags = [*RULES_COMPILE, "-O0", *headers(workplace, "-O0"), f"-I{place}", f"-I{CSRC}"]
    program = place / "codec_test"
    if not compiled([compiler, *flags, KERNEL_TESTS / "codec_test.cpp", "-o", program]):
        return None
    return "codec_test" if fails(program, "few") else ""


def judge_walk(compiler: str, place: Path, workplace: Path) -> str | None:
    """Run the test of the kernels on the baseline; only its object is compiled anew."""
    flags = [*COMPILE, "-O1", *headers(workplace, "-O1"), f"-I{place}", f"-I{workplace}", f"-I{CSRC}"]
    changed = place / "kernels_baseline.o"
    if not compiled([compiler, *flags, "-c", CSRC / "cpu" / "kernels_baseline.cpp", "-o", changed]):
        return None
    program = place / "kernel_test"
    assert compiled([compiler, *sorted(workplace.glob("*.o")), changed, "-o", program])
    return "kernel_test" if fails(program, "few", "baseline") else ""


def prepare(compiler: str, workplace: Path, parts: Sequence[str]) -> None:
    """Compile what all mutants share."""
    for level in ("-O0", "-O1"):
        header = workplace / f"headers{level}.h"
        header.write_text("".join(f"#include <{name}>\n" for name in HEADERS))
        shared = RULES_COMPILE if level == "-O0" else COMPILE
        target = header.with_suffix(".h.gch")
        subprocess.run([compiler, *shared, level, "-x", "c++-header", header, "-o", target], check=True)
    if "walk" in parts:
        list_only(WALKED, workplace)
        for source in (KERNEL_TESTS / "kernel_test.cpp", *sorted((CSRC / "cpu").glob("*.cpp"))):
            if source.stem != "kernels_baseline":
                flags = [*COMPILE, "-O1", f"-I{workplace}", f"-I{CSRC}"]
                subprocess.run([compiler, *flags, "-c", source, "-o", workplace / f"{source.stem}.o"], check=True)


def verdict(mutant: Mutant | None, part: str, file: str, place: Path, workplace: Path) -> str | None:
    """What the judge of a part says of a mutant; without one, of the file as it is."""
    place.mkdir()
    if mutant is not None:
        lines = (CSRC / file).read_text().splitlines()
        lines[mutant.number] = mutant.after
        (place / file).parent.mkdir()
        (place / file).write_text("\n".join(lines) + "\n")
    test = load_test()
    if part == "rules":
        return judge_rule(test, file, place, workplace)
    return (judge_codec if part == "codecs" else judge_walk)(test.COMPILER, place, workplace)


def main(argv: list[str]) -> int:
    """Judge all mutants, or a sample."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--sample", type=int, help="only so many mutants a part, evenly spread")
    options.add_argument("--only", choices=PARTS, help="only this part")
    options.add_argument("--processes", type=int, default=2, help="how many work at once (default: 2)")
    args = options.parse_args(argv)
    parts = (args.only,) if args.only else tuple(PARTS)
    found = []
    for part in parts:
        own = list(mutants(CSRC, (part,)))
        found += own if args.sample is None else own[:: max(1, len(own) // args.sample)][: args.sample]
    survivors, killed_by, judged = [], set[str](), 0
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(args.processes) as pool:
        workplace = Path(folder)
        prepare(load_test().COMPILER, workplace, parts)
        unchanged = [(None, part, file) for part in parts for file in files_of(part)]
        jobs = [*unchanged, *((mutant, mutant.part, mutant.file) for mutant in found)]
        waiting = [
            pool.submit(verdict, *job, workplace / f"place{number}", workplace) for number, job in enumerate(jobs)
        ]
        for (mutant, _, file), answer in zip(jobs, waiting, strict=True):
            killers = answer.result()
            if mutant is None:
                assert killers == "", f"{file} as it is: {'does not compile' if killers is None else killers}"
            elif killers is not None:
                judged += 1
                print(f"{'killed by ' + killers if killers else 'SURVIVED':32}  {mutant.text()}", flush=True)
                killed_by.update(killers.split(", "))
                survivors += [] if killers else [mutant]
    whole = args.sample is None and "rules" in parts
    unguarded = sorted({name for file in closures() for name in rules_in(file).values()} - killed_by) if whole else []
    for name in unguarded:
        print(f"no mutant of rule {name} was killed")
    print(f"{judged - len(survivors)} of {judged} mutants killed")
    return 1 if survivors or unguarded else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
