"""Checks what nvcc makes of csrc/cuda, without a GPU: registers, spills, wide accesses, calls, F64, occupancy.

    python tools/sass_gate.py            two architectures, without fp64: what CI has time for
    python tools/sass_gate.py --all      all of them
    python tools/sass_gate.py --all --update    and write tools/sass_budgets.json and the table in docs/cuda.md

Each source is compiled alone to a cubin (an architecture takes seconds to minutes) and disassembled. A finding makes
the exit status 1:
  - more registers, shared memory, spilled bytes or F64 instructions in a loop over elements than the budgets say;
  - a kernel that the budgets do not know, or that is gone;
  - an fp32 update with a spill or with F64 in its loop; AdamW's with more than 48 registers or below 75 % occupancy;
  - a direct kernel whose loop has no loads and stores of 16 bytes, or some that do not know that memory is global;
  - a call of anything but the slow paths of IEEE division and square root;
  - more than 200 kernels.
nvdisasm comes with the toolkit, or from PyPI's nvidia-cuda-nvdisasm, which is installed into build/ where neither is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import cuda_build

ROOT = Path(__file__).resolve().parents[1]
BUDGETS = ROOT / "tools" / "sass_budgets.json"
PAGE = ROOT / "docs" / "cuda.md"
BEGIN, END = "<!-- sass_gate: begin -->", "<!-- sass_gate: end -->"
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-fmad=false"]
THREADS, MIXED_THREADS = 256, 128  # of a block: csrc/cuda/job.h, mixed.h
UNITS = {"registers": 8, "shared": 1024}  # a budget is rounded up to them: fewer cost nothing, or nearly
MOST_KERNELS = 200
QUICK = (("75", "90"), ("step_fp32", "step_mixed", "stats", "copy", "control"))
ADAMW = "update<AdamW, Direct<float>>"
ADAMW_REGISTERS, ADAMW_OCCUPANCY = 48, 0.75


@dataclass(frozen=True)
class Gpu:
    """What limits the blocks of one multiprocessor.

    Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; how registers and shared
    memory are handed out: cuda_occupancy.h of the CUDA toolkit.
    """

    name: str
    architecture: str
    threads: int
    blocks: int
    shared: int  # bytes
    unit: int  # of shared memory, bytes
    reserved: int  # by the system, of shared memory, a block

    def occupancy(self, registers: int, shared: int, threads: int = THREADS) -> float:
        """Share of a multiprocessor's threads that run at a time, in blocks of so many."""
        warps = threads // 32
        by_warp = -(-32 * registers // 256) * 256  # a warp's registers, in units of 256
        by_registers = 4 * (16_384 // by_warp) // warps  # in each of four parts with 16,384 registers
        bytes_a_block = -(-(shared + self.reserved) // self.unit) * self.unit
        by_shared = self.shared // bytes_a_block if bytes_a_block else self.blocks
        blocks = min(by_registers, by_shared, self.blocks, self.threads // threads)
        return blocks * threads / self.threads


GPUS = (
    Gpu("T4", "75", 1024, 16, 65_536, 256, 0),
    Gpu("A100", "80", 2048, 32, 167_936, 128, 1024),
    Gpu("RTX 4090", "89", 1536, 24, 102_400, 128, 1024),
    Gpu("H100", "90", 2048, 32, 233_472, 128, 1024),
    Gpu("B200", "100", 2048, 32, 233_472, 128, 1024),
)


@dataclass(frozen=True)
class Instruction:
    """One line of SASS."""

    opcode: str
    arguments: str

    @property
    def target(self) -> str | None:
        """The label that it jumps to or calls."""
        found = re.search(r"`\((.+?)\)", self.arguments)
        return found[1] if found else None


@dataclass
class Code:
    """A kernel's instructions, and where its labels are among them."""

    lines: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    def element_loops(self) -> list[list[Instruction]]:
        """The loops that load or store 16 bytes and hold no such loop: from the target of a backward branch to it."""
        spans = [
            (self.labels[line.target], i)
            for i, line in enumerate(self.lines)
            if line.opcode.startswith("BRA") and line.target in self.labels and self.labels[line.target] <= i
        ]
        wide = [i for i, line in enumerate(self.lines) if WIDE.match(line.opcode)]
        holding = {span for span in spans if any(span[0] <= i <= span[1] for i in wide)}
        around = [a for a in holding if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in holding)]
        return [self.lines[start : end + 1] for start, end in sorted(around)]

    def calls(self) -> list[str]:
        """The names of what it calls; a CALL of a label is a jump that ptxas writes so where a loop ends."""
        called = {str(line.target) for line in self.lines if line.opcode.startswith(("CALL", "JMP"))}
        return sorted(name for name in called if not name.startswith(".L"))


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+\{?\s*(?:@!?U?PT?\w*\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);?")
LABEL = re.compile(r"^(\.L_x_\d+|\$\S+):")
SECTION = re.compile(r"^\s*\.section\s+(\.\S+?),")
WIDE = re.compile(r"(LD|ST)G?\.E\.(?:\w+\.)*128")
GENERIC = re.compile(r"(LD|ST)\.E\b")
LOCAL = re.compile(r"(LD|ST)L\b")
F64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX)\b|\w+(\.\w+)*\.F64\b|MUFU\.R(CP|SQ)64H")
# What mixed.h keeps out of line, and what one thread does between the passes; the slow paths of division and root; how
# architectures before sm_90 shuffle where a warp may have diverged.
ALLOWED_CALL = re.compile(
    r"\$_Z\w+\$_ZN(7pytrain4cuda5Mixed|\w+7pytrain4cuda9(settle_by|find_move)E)"
    r"|\$__internal_\d+_\$__cuda_sm\w+?_((d?sqrt|div|(dbl)?rcp)_rn_|shflsync_)"
)


def parse_sass(text: str) -> dict[str, Code]:
    """Each kernel's code, by mangled name, of nvdisasm's output."""
    found: dict[str, Code] = {}
    code: Code | None = None
    for line in text.splitlines():
        if section := SECTION.match(line):
            name = section[1]
            code = found.setdefault(name.removeprefix(".text."), Code()) if name.startswith(".text.") else None
        elif code is None:
            continue
        elif label := LABEL.match(line):
            code.labels[label[1]] = len(code.lines)
        elif instruction := INSTRUCTION.match(line):
            code.lines.append(Instruction(instruction[1], instruction[2].strip()))
    return found


@dataclass(frozen=True)
class Kernel:
    """What matters of one kernel for one architecture."""

    name: str
    registers: int
    shared: int  # bytes
    spills: int  # bytes of registers stored and loaded again, or of stack
    f64: int = 0  # instructions in loops over elements
    wrong: tuple[str, ...] = ()  # what no budget allows

    def costs(self) -> dict[str, int]:
        """What the budgets hold; zeros left out."""
        every = {"registers": self.registers, "shared": self.shared, "spills": self.spills, "f64": self.f64}
        return {key: value for key, value in every.items() if value}


USAGE = re.compile(
    r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


def read_kernels(log: str, sass: str) -> list[Kernel]:
    """The kernels of one cubin, from what ptxas -v and nvdisasm say."""
    codes = parse_sass(sass)
    kernels = []
    for symbol, stack, stores, loads, registers, rest in USAGE.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        name, code = short_name(demangled(symbol)), codes.get(symbol)
        if code is None:
            raise SystemExit(f"sass_gate: nvdisasm shows no code of {name}")
        spills = int(stores) + int(loads) or int(stack) or sum(1 for line in code.lines if LOCAL.match(line.opcode))
        loops = code.element_loops()
        f64 = 0 if "<double>" in name else sum(1 for loop in loops for line in loop if F64.match(line.opcode))
        wrong = tuple(refused(name, code, loops))
        kernels.append(Kernel(name, int(registers), int(shared[1]) if shared else 0, spills, f64, wrong))
    return kernels


def refused(name: str, code: Code, loops: list[list[Instruction]]) -> Iterable[str]:
    """What is wrong with a kernel whatever the budgets say."""
    for call in code.calls():
        if not ALLOWED_CALL.match(call):
            yield f"calls {call}"
    if not re.search(r"Direct<|Mixed|take_stats|average|copy", name):
        return
    if any("shflsync" in str(line.target) for loop in loops for line in loop):
        yield "calls a shuffle in a loop over elements"
    inside = [line.opcode for loop in loops for line in loop]
    opcodes = [line.opcode for line in code.lines] if "Mixed" in name else inside
    for direction in ("LD", "ST") if not name.startswith(("measure", "take_stats")) else ("LD",):
        if not any(WIDE.match(opcode) and opcode.startswith(direction) for opcode in opcodes):
            yield f"no loop with {direction}G.E.128"
    generic = sorted({opcode for opcode in inside if GENERIC.match(opcode)})
    if generic:
        yield f"does not know that memory is global: {', '.join(generic)}"


def demangled(symbol: str) -> str:
    """A symbol as C++ writes it."""
    return run(["c++filt", symbol]).strip()


def short_name(name: str) -> str:
    """`update<AdamW, Direct<float>>` of what c++filt says: without namespaces, result and arguments."""
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"\b\w+::", "", re.sub(r"\(.*\)$", "", name))
    return name.replace(" >", ">")


def run(command: Sequence[str | Path]) -> str:
    """A command's output; its error text on failure."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_nvdisasm(nvcc: Path) -> Path:
    """Beside nvcc, on PATH, or from PyPI."""
    folder = ROOT / "build" / "cuda-tools"
    beside, on_path = nvcc.with_name("nvdisasm"), shutil.which("nvdisasm")
    if beside.exists() or on_path:
        return beside if beside.exists() else Path(str(on_path))
    for attempt in range(2):
        for place in (Path(sysconfig.get_path("purelib")), folder):
            if found := sorted(place.glob("nvidia/*/bin/nvdisasm")):
                return found[-1]
        if attempt == 0:
            print(f"sass_gate: installing nvidia-cuda-nvdisasm into {folder.relative_to(ROOT)}", flush=True)
            run([sys.executable, "-m", "pip", "install", "--quiet", "--target", folder, "nvidia-cuda-nvdisasm"])
    raise SystemExit("sass_gate: PyPI's nvidia-cuda-nvdisasm holds no nvdisasm")


@dataclass(frozen=True)
class Work:
    """One source for one architecture, and the tools."""

    nvcc: Path
    nvdisasm: Path
    csrc: Path
    source: str
    architecture: str
    folder: Path
    digest: str  # of all sources and the flags

    def do(self) -> list[Kernel]:
        """Compile what has changed, and read it."""
        stem = f"{self.source}.{self.architecture}"
        cubin = self.folder / f"{stem}.{self.digest}.cubin"
        log = cubin.with_suffix(".log")
        start = time.monotonic()
        if not log.exists():
            for old in self.folder.glob(f"{stem}.*"):
                old.unlink()
            source = self.csrc / "cuda" / f"{self.source}.cu"
            command = [self.nvcc, *FLAGS, f"-arch=sm_{self.architecture}", f"-I{self.csrc}", "-Xptxas=-v", "-cubin"]
            done = subprocess.run([*map(str, command), str(source), "-o", str(cubin)], capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"sass_gate: {source.name} for sm_{self.architecture}:\n{done.stderr}")
            log.write_text(done.stderr)
        kernels = read_kernels(log.read_text(), run([self.nvdisasm, "-c", cubin]))
        seconds = time.monotonic() - start
        print(f"  sm_{self.architecture} {self.source}: {len(kernels)} kernels, {seconds:.0f} s", flush=True)
        return kernels


Budgets = dict[str, dict[str, dict[str, dict[str, int]]]]  # source -> kernel -> architecture -> costs
Found = dict[str, dict[str, list[Kernel]]]  # source -> architecture -> kernels


def judge(found: Found, budgets: Budgets) -> list[str]:
    """All findings."""
    findings = []
    for architecture in {name for kernels in found.values() for name in kernels}:
        count = sum(len(kernels.get(architecture, [])) for kernels in found.values())
        if count > MOST_KERNELS:
            findings.append(f"sm_{architecture}: {count} kernels, expected at most {MOST_KERNELS}")
    for source, by_architecture in found.items():
        for architecture, kernels in by_architecture.items():
            for kernel in kernels:
                allowed = budgets.get(source, {}).get(kernel.name, {}).get(architecture)
                wrong = [*kernel.wrong, *limits(kernel, architecture), *over_budget(kernel, allowed)]
                findings += [f"sm_{architecture}: {kernel.name}: {what}" for what in wrong]
            gone = {name for name, of in budgets.get(source, {}).items() if architecture in of}
            gone -= {kernel.name for kernel in kernels}
            findings += [f"sm_{architecture}: {name}: is gone from {source}.cu; --update" for name in sorted(gone)]
    return findings


def over_budget(kernel: Kernel, allowed: dict[str, int] | None) -> Iterable[str]:
    """Where a kernel takes more than its budget."""
    if allowed is None:
        yield "is not in the budgets; --update"
        return
    for what, value in kernel.costs().items():
        budget = -(-allowed.get(what, 0) // UNITS.get(what, 1)) * UNITS.get(what, 1)
        if value > budget:
            yield f"{what} {value}, budget {budget}"


def limits(kernel: Kernel, architecture: str) -> Iterable[str]:
    """What holds for fp32 updates beside the budgets."""
    if not re.match(r"update<\w+, Direct<float>>$", kernel.name):
        return
    if kernel.spills:
        yield f"spills {kernel.spills} bytes"
    if kernel.f64:
        yield f"{kernel.f64} F64 instructions in the loop over elements"
    if kernel.name != ADAMW:
        return
    if kernel.registers > ADAMW_REGISTERS:
        yield f"{kernel.registers} registers, at most {ADAMW_REGISTERS}"
    for gpu in GPUS:
        share = share_of(gpu, kernel.name, kernel.costs())
        if gpu.architecture == architecture and share < ADAMW_OCCUPANCY:
            yield f"occupancy {100 * share:.0f} % on {gpu.name}, at least {100 * ADAMW_OCCUPANCY:.0f} %"


def share_of(gpu: Gpu, name: str, costs: dict[str, int]) -> float:
    """The occupancy of a kernel."""
    threads = MIXED_THREADS if "Mixed" in name else THREADS
    return gpu.occupancy(costs["registers"], costs.get("shared", 0), threads)


ONE_BLOCK = ("control",)  # sources whose launches are of one block
SHOWN = ("AdamW", "SGDMomentum", "Lion", "Adan", "Lamb")


def tables(budgets: Budgets) -> str:
    """What docs/cuda.md shows: registers and occupancy of some kernels, and the range of every source."""
    head = ["kernel", *(f"{gpu.name} (sm_{gpu.architecture})" for gpu in GPUS), "spills, bytes", "F64 in loop"]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for source in sorted(budgets):
        for name, of in sorted(budgets[source].items()):
            rule = re.match(r"\w+<(\w+),", name)
            if rule and rule[1] not in SHOWN:
                continue
            cells = [cell(gpu, name, of.get(gpu.architecture), source) for gpu in GPUS]
            worst = {key: max(costs.get(key, 0) for costs in of.values()) for key in ("spills", "f64")}
            lines.append(f"| `{name}` | {' | '.join(cells)} | {worst['spills']} | {worst['f64']} |")
    head = ["source", "kernels", "registers", "least occupancy", "with spills or stack"]
    lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for source, kernels in sorted(budgets.items()):
        registers = [costs["registers"] for of in kernels.values() for costs in of.values()]
        shares = [
            (share_of(gpu, name, of[gpu.architecture]), gpu.name)
            for name, of in kernels.items()
            for gpu in GPUS
            if gpu.architecture in of and source not in ONE_BLOCK
        ]
        least = f"{100 * min(shares)[0]:.0f} % ({min(shares)[1]})" if shares else ""
        spilling = sum(1 for of in kernels.values() if any(costs.get("spills") for costs in of.values()))
        span = f"{min(registers)} to {max(registers)}"
        lines.append(f"| `{source}.cu` | {len(kernels)} | {span} | {least} | {spilling} |")
    total = sum(len(kernels) for kernels in budgets.values())
    return "\n".join([*lines, "", f"{total} kernels of {MOST_KERNELS} at most."])


def cell(gpu: Gpu, name: str, costs: dict[str, int] | None, source: str) -> str:
    """Registers, and the occupancy where a launch fills the GPU."""
    if costs is None:
        return ""
    share = share_of(gpu, name, costs)
    return str(costs["registers"]) + ("" if source in ONE_BLOCK else f", {100 * share:.0f} %")


def merged(found: Found, budgets: Budgets) -> Budgets:
    """The budgets with what was found; architectures that were not compiled keep theirs."""
    new = {source: {name: dict(of) for name, of in kernels.items()} for source, kernels in budgets.items()}
    for source, by_architecture in found.items():
        old, new[source] = new.get(source, {}), {}
        for architecture, kernels in by_architecture.items():
            for kernel in kernels:
                of = new[source].setdefault(kernel.name, old.get(kernel.name, {}))
                of[architecture] = kernel.costs()
    return new


def text_of(budgets: Budgets) -> str:
    """JSON with one kernel a line."""
    parts = []
    for source, kernels in sorted(budgets.items()):
        rows = [
            f"  {json.dumps(name)}: {json.dumps(dict(sorted(of.items(), key=lambda pair: int(pair[0]))))}"
            for name, of in sorted(kernels.items())
        ]
        parts.append(f"{json.dumps(source)}: {{\n" + ",\n".join(rows) + "\n }")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


def on_page(page: str, table: str) -> str:
    """The page with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"sass_gate: {PAGE.name} has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def compile_all(csrc: Path, architectures: Sequence[str], sources: Sequence[str]) -> Found:
    """Compile two at a time, the slow ones first."""
    try:
        nvcc = cuda_build.find_nvcc()
    except cuda_build.UnusableError as error:
        raise SystemExit(f"sass_gate: {error}") from error
    folder = ROOT / "build" / "sass"
    folder.mkdir(parents=True, exist_ok=True)
    nvdisasm = find_nvdisasm(nvcc)
    ordered = sorted(sources, key=lambda name: name != "step_mixed")
    texts = [path.read_bytes() for path in sorted(csrc.rglob("*")) if path.suffix in (".h", ".cu")]
    digest = hashlib.sha256(b"\0".join([str(nvcc).encode(), *map(str.encode, FLAGS), *texts])).hexdigest()[:12]
    work = [Work(nvcc, nvdisasm, csrc, s, a, folder, digest) for s in ordered for a in architectures]
    with ThreadPoolExecutor(2) as pool:
        kernels = list(pool.map(Work.do, work))
    found: Found = {}
    for one, of in zip(work, kernels, strict=True):
        found.setdefault(one.source, {})[one.architecture] = of
    return found


def main(argv: list[str]) -> int:
    """Check; 0 if nothing was found."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--all", action="store_true", help="every architecture and every source")
    options.add_argument("--arch", help="comma-separated, such as 75,90")
    options.add_argument("--sources", help="comma-separated, such as step_fp32,stats")
    options.add_argument("--csrc", type=Path, default=ROOT / "csrc")
    options.add_argument("--update", action="store_true", help="take what was found for the budgets")
    args = options.parse_args(argv)
    every = tuple(sorted(path.stem for path in (args.csrc / "cuda").glob("*.cu")))
    architectures, sources = (tuple(gpu.architecture for gpu in GPUS), every) if args.all else QUICK
    architectures = tuple(args.arch.split(",")) if args.arch else architectures
    sources = tuple(args.sources.split(",")) if args.sources else sources
    if unknown := set(sources) - set(every):
        options.error(f"--sources: expected some of {', '.join(every)}, got {', '.join(sorted(unknown))}")
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    found = compile_all(args.csrc, architectures, sources)
    if args.update:
        budgets = merged(found, {name: of for name, of in budgets.items() if name in every})
        BUDGETS.write_text(text_of(budgets))
        if PAGE.exists():
            PAGE.write_text(on_page(PAGE.read_text(), tables(budgets)))
    findings = judge(found, budgets)
    print(tables(merged(found, {})))
    for finding in findings:
        print(finding)
    count = sum(len(kernels) for by in found.values() for kernels in by.values())
    print(f"sass_gate: {count} kernels for {', '.join(f'sm_{a}' for a in architectures)}: {len(findings)} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
