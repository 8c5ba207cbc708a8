"""The gate over the CUDA kernels' machine code fires when it should: each rule is shown a planted fault in SASS."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import sass_gate  # noqa: E402
from sass_gate import Code, Gpu, Kernel  # noqa: E402

SYMBOL = "_ZN7pytrain4cuda6updateINS_11cuda_device5rules5AdamWENS0_6DirectIfEEEEvNS0_3JobE"
NAME = sass_gate.ADAMW
needs_filter = pytest.mark.skipif(shutil.which("c++filt") is None, reason="needs c++filt, which demangles")
LOG = (
    "ptxas info    : Compiling entry function '{symbol}' for 'sm_90'\n"
    "ptxas info    : Function properties for {symbol}\n"
    "    {stack} bytes stack frame, {spills} bytes spill stores, {spills} bytes spill loads\n"
    "ptxas info    : Used {registers} registers, used 1 barriers, 220 bytes smem\n"
)
# A loop over chunks around one over elements, with the slow path of a square root after the end.
SASS = """
	.section	.text.{symbol},"ax",@progbits
.text.{symbol}:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   DFMA R8, R8, R8, R8 ;
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_2:
        /*0030*/                   LDG.E.128 R12, desc[UR8][R2.64] ;
        /*0040*/              @!P1 CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*0050*/                   {planted} ;
        /*0060*/                   STG.E.128 desc[UR8][R2.64], R12 ;
        /*0070*/               @P0 BRA `(.L_x_2) ;
        /*0080*/              @!P2 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
$__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath:
        /*00a0*/                   RET.REL.NODEC R60 `({symbol}) ;
.L_x_3:
        /*00b0*/                   BRA `(.L_x_3);
	.section	.nv.constant0.{symbol},"a",@progbits
        /*0000*/                   .byte 0x00
"""


def read(planted: str = "FADD R12, R12, R13", *, registers: int = 38, spills: int = 0, sass: str = SASS) -> Kernel:
    """The planted kernel as the gate reads it."""
    log = LOG.format(symbol=SYMBOL, stack=spills, spills=spills, registers=registers)
    (kernel,) = sass_gate.read_kernels(log, sass.format(symbol=SYMBOL, planted=planted))
    return kernel


def findings(kernel: Kernel, allowed: dict[str, int] | None = None) -> list[str]:
    """What the gate says of a kernel for sm_90; without a budget, one that it just keeps."""
    budgets = {"step_fp32": {kernel.name: {"90": kernel.costs() if allowed is None else allowed}}}
    return sass_gate.judge({"step_fp32": {"90": [kernel]}}, budgets)


@needs_filter
def test_a_clean_kernel_is_read_and_passes() -> None:
    kernel = read()
    assert kernel == Kernel(NAME, registers=38, shared=220, spills=0)
    assert findings(kernel) == []


@needs_filter
@pytest.mark.parametrize(
    ("planted", "registers", "spills", "expected"),
    [
        ("DADD R4, R4, R6", 38, 0, "1 F64 instructions in the loop over elements"),
        ("F2F.F32.F64 R4, R6", 38, 0, "1 F64 instructions in the loop over elements"),
        ("MUFU.RCP64H R4, R6", 38, 0, "1 F64 instructions in the loop over elements"),
        ("FADD R4, R4, R6", 49, 0, "49 registers, at most 48"),
        ("FADD R4, R4, R6", 41, 0, "occupancy 62 % on H100, at least 75 %"),
        ("FADD R4, R4, R6", 40, 8, "spills 16 bytes"),
        ("STL.64 [R1], R4", 40, 0, "spills 1 bytes"),
        ("CALL.REL.NOINC `($__internal_1_$__cuda_sm20_div_u64)", 40, 0, "calls $__internal_1_$__cuda_sm20_div_u64"),
        ("CALL.REL.NOINC `(_Z4slowf)", 40, 0, "calls _Z4slowf"),
        ("LD.E.128 R4, desc[UR8][R6.64]", 40, 0, "does not know that memory is global: LD.E.128"),
    ],
)
def test_a_planted_fault_is_found(planted: str, registers: int, spills: int, expected: str) -> None:
    assert f"sm_90: {NAME}: {expected}" in findings(read(planted, registers=registers, spills=spills))


@needs_filter
@pytest.mark.parametrize("direction", ["LD", "ST"])
def test_narrow_accesses_are_found(direction: str) -> None:
    kernel = read(sass=SASS.replace(f"{direction}G.E.128", f"{direction}G.E.64"))
    assert findings(kernel) == [f"sm_90: {NAME}: no loop with {direction}G.E.128"]


@needs_filter
def test_a_fault_outside_the_loop_over_elements_is_none() -> None:
    planted = SASS.replace("EXIT ;", "EXIT ;\n        /*0098*/                   DMUL R4, R4, R4 ;")
    assert findings(read(sass=planted)) == []


def test_remainders_of_an_unrolled_loop_do_not_make_the_outer_one_a_loop_over_elements() -> None:
    peeled = SASS.replace("BAR.SYNC.DEFER_BLOCKING 0x0 ;", "LDG.E.128 R4, desc[UR8][R6.64] ;")
    code = sass_gate.parse_sass(peeled.format(symbol="k", planted="NOP"))["k"]
    (loop,) = code.element_loops()
    assert [line.opcode for line in loop] == ["LDG.E.128", "CALL.REL.NOINC", "NOP", "STG.E.128", "BRA"]


def test_a_kernel_without_loops_has_none() -> None:
    assert Code().element_loops() == [] and Code().calls() == []


def test_costs_above_the_budget_are_found_and_below_it_are_not() -> None:
    kernel = Kernel("measure<Lamb, Direct<float>>", registers=49, shared=1025, spills=4, f64=4)
    more = findings(kernel, {"registers": 47, "shared": 300, "f64": 3})
    assert [line.rpartition(": ")[2] for line in more] == [
        "registers 49, budget 48",
        "shared 1025, budget 1024",
        "spills 4, budget 0",
        "f64 4, budget 3",
    ]
    assert findings(kernel, {"registers": 50, "shared": 1030, "spills": 8, "f64": 8}) == []


def test_a_kernel_that_is_new_or_gone_is_found() -> None:
    kernel = Kernel("update<Lion, Mixed>", registers=40, shared=0, spills=0)
    budgets = {"step_mixed": {"update<Adam, Mixed>": {"90": {"registers": 40}}}}
    assert sass_gate.judge({"step_mixed": {"90": [kernel]}}, budgets) == [
        "sm_90: update<Lion, Mixed>: is not in the budgets; --update",
        "sm_90: update<Adam, Mixed>: is gone from step_mixed.cu; --update",
    ]
    new = sass_gate.merged({"step_mixed": {"90": [kernel]}}, budgets)
    assert sass_gate.judge({"step_mixed": {"90": [kernel]}}, json.loads(sass_gate.text_of(new))) == []


def test_an_update_keeps_the_architectures_that_were_not_compiled() -> None:
    kernel = Kernel("upload", registers=30, shared=0, spills=0)
    new = sass_gate.merged({"control": {"90": [kernel]}}, {"control": {"upload": {"75": {"registers": 32}}}})
    assert new == {"control": {"upload": {"75": {"registers": 32}, "90": {"registers": 30}}}}


def test_too_many_kernels_are_found() -> None:
    many = [Kernel(f"k{i}", registers=32, shared=0, spills=0) for i in range(sass_gate.MOST_KERNELS + 1)]
    budgets = {"step_fp32": {kernel.name: {"90": kernel.costs()} for kernel in many}}
    assert sass_gate.judge({"step_fp32": {"90": many}}, budgets) == ["sm_90: 201 kernels, expected at most 200"]


@pytest.mark.parametrize(
    ("gpu", "registers", "shared", "share"),
    [
        ("T4", 64, 0, 1.0),
        ("T4", 65, 0, 0.75),
        ("A100", 40, 220, 0.75),
        ("A100", 41, 220, 0.625),
        ("RTX 4090", 40, 220, 1.0),
        ("RTX 4090", 48, 220, 5 * 256 / 1536),
        ("H100", 32, 0, 1.0),
        ("H100", 32, 48_000, 0.5),
        ("B200", 255, 0, 0.125),
    ],
)
def test_occupancy_follows_registers_and_shared_memory(gpu: str, registers: int, shared: int, share: float) -> None:
    (of,) = [one for one in sass_gate.GPUS if one.name == gpu]
    assert of.occupancy(registers, shared) == pytest.approx(share)


def toolkit_header() -> Path | None:
    """cuda_occupancy.h beside nvcc."""
    try:
        header = sass_gate.cuda_build.find_nvcc().parent.parent / "include" / "cuda_occupancy.h"
    except sass_gate.cuda_build.UnusableError:
        return None
    return header if header.exists() and shutil.which("g++") else None


PROGRAM = r"""
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
  int major, minor, threads, shared, registers, bytes;
  while (std::scanf("%d %d %d %d %d %d", &major, &minor, &threads, &shared, &registers, &bytes) == 6) {
    cudaOccDeviceProp gpu;
    gpu.computeMajor = major, gpu.computeMinor = minor;
    gpu.maxThreadsPerBlock = 1024, gpu.maxThreadsPerMultiprocessor = threads;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536, gpu.warpSize = 32;
    gpu.sharedMemPerBlock = 49152, gpu.sharedMemPerMultiprocessor = shared;
    gpu.sharedMemPerBlockOptin = shared - 1024, gpu.reservedSharedMemPerBlock = major > 7 ? 1024 : 0;
    gpu.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = bytes;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    cudaOccDeviceState state;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, 256, 0)) return 1;
    std::printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.skipif(toolkit_header() is None, reason="needs g++ and cuda_occupancy.h of the CUDA toolkit")
def test_occupancy_is_that_of_the_toolkit(tmp_path: Path) -> None:
    header = toolkit_header()
    assert header is not None
    source, program = tmp_path / "occupancy.cpp", tmp_path / "occupancy"
    source.write_text(PROGRAM)
    subprocess.run(["g++", "-O0", f"-I{header.parent}", str(source), "-o", str(program)], check=True)
    asked = [
        (gpu, registers, shared)
        for gpu in sass_gate.GPUS
        for registers in (16, 32, 33, 40, 41, 48, 57, 64, 72, 80, 96, 128, 168, 255)
        for shared in (0, 220, 1100, 9000, 20_000, 40_000)
    ]
    lines = [f"{g.architecture[:-1]} {g.architecture[-1]} {g.threads} {g.shared} {r} {s}" for g, r, s in asked]
    done = subprocess.run([str(program)], input="\n".join(lines), capture_output=True, text=True, check=True)
    theirs = [int(line) for line in done.stdout.split()]
    assert theirs == [round(gpu.occupancy(r, s) * gpu.threads / 256) for gpu, r, s in asked]


def test_the_page_shows_the_budgets() -> None:
    budgets = json.loads(sass_gate.BUDGETS.read_text())
    page = sass_gate.PAGE.read_text()
    assert sass_gate.on_page(page, sass_gate.tables(budgets)) == page
    assert sum(len(kernels) for kernels in budgets.values()) <= sass_gate.MOST_KERNELS


def test_every_gpu_of_the_tables_is_one_that_the_gate_knows() -> None:
    assert all(isinstance(gpu, Gpu) and gpu.architecture in ("75", "80", "89", "90", "100") for gpu in sass_gate.GPUS)
