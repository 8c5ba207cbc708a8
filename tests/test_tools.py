"""The tools that guard the kernels fire when they should: each is shown a planted fault."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import pytest

from pytrain import backend

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import check_codegen  # noqa: E402
import mutate_rules  # noqa: E402

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("objdump") is None or platform.machine() != "x86_64",
    reason="needs g++ and objdump on x86-64",
)


def findings(tmp_path: Path, level: str, *flags: str, csrc: Path = ROOT / "csrc") -> list[str]:
    """What the check says of one level's kernels, compiled with more flags."""
    target = tmp_path / f"kernels_{level}.o"
    source = csrc / "cpu" / f"kernels_{level}.cpp"
    options = ["-fPIC", *check_codegen.setting("COMPILE_FLAGS"), *flags, f"-I{csrc}"]
    check_codegen.run(["g++", *options, "-c", str(source), "-o", str(target)])
    return check_codegen.check_level(level, target)[0]


@pytest.mark.parametrize("level", check_codegen.LEVELS)
def test_the_kernels_are_clean(level: str, tmp_path: Path) -> None:
    assert findings(tmp_path, level) == []


def test_a_loop_that_is_no_longer_vectorised_is_named(tmp_path: Path) -> None:
    found = findings(tmp_path, "avx2", "-fno-tree-vectorize")
    for name in ("update<AdamW, float>", "update<Lion, double>", "decode_tile<Bf16>", "encode_tile<Fp16>"):
        assert any(line.startswith(f"avx2: {name}: no vectorised loop") for line in found), found


def test_a_call_of_libm_in_a_loop_is_found(tmp_path: Path) -> None:
    assert any("update<AdamW" in line for line in findings(tmp_path, "baseline", "-fmath-errno"))


def test_fused_multiply_adds_are_found(tmp_path: Path) -> None:
    found = findings(tmp_path, "avx2", "-mfma", "-ffp-contract=fast")
    assert any("a fused multiply-add" in line and "AdamW" in line for line in found)


def test_prefetches_that_the_compiler_has_dropped_are_found(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    header = csrc / "core" / "prefetch.h"
    header.write_text(header.read_text().replace("  __builtin_prefetch(at);\n", ""))
    found = findings(tmp_path, "avx2", csrc=csrc)
    assert any("avx2::cpu::stats" in line and "no prefetch" in line for line in found), found


@pytest.mark.skipif(backend.facts is None, reason="looks at the built module")
def test_the_module_that_reads_tensors_calls_them_into_the_caches() -> None:
    functions = check_codegen.disassemble(Path(backend.facts.__file__))
    assert any("prefetch" in op for function in functions for _, op, _ in function.lines)


def test_avx_outside_its_namespace_is_found(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = csrc / "cpu" / "kernels_avx2.cpp"
    planted = "float stray(const float* x) { float s = 0; for (int i = 0; i < 64; ++i) s += x[i] * x[i]; return s; }\n"
    source.write_text(source.read_text().replace('#include "core/half.h"', f'{planted}#include "core/half.h"'))
    found = findings(tmp_path, "avx2", csrc=csrc)
    assert any("stray(float const*)" in line and "outside its namespace" in line for line in found)


def test_a_standard_header_under_the_target_is_found(tmp_path: Path) -> None:
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    source = csrc / "cpu" / "kernels_avx2.cpp"
    planted = "#include <algorithm>\n#include <vector>\nvoid grow(std::vector<double>& v) { v.push_back(1); }\n"
    source.write_text(source.read_text().replace('#include "core/half.h"', f'{planted}#include "core/half.h"'))
    assert any(
        "weak symbol outside" in line and "std::vector" in line for line in findings(tmp_path, "avx2", csrc=csrc)
    )


def test_every_rule_codec_and_format_has_mutants_and_some_are_killed() -> None:
    """The whole run is the tool itself; here two mutants a part."""
    found = list(mutate_rules.mutants(ROOT / "csrc"))
    files = {mutant.file for mutant in found}
    guarded = {"core/half.h", "core/codec.h", "core/random.h", "core/sum.h", "cpu/storage.h"}
    assert files == set(mutate_rules.closures()) | guarded
    assert len(found) > 600
    assert {name for file in files for name in mutate_rules.rules_in(file).values()} == {
        rule.name for rule in mutate_rules.load_test().RULES.values()
    }
    assert mutate_rules.main(["--sample", "2"]) == 0


def test_a_mutant_that_no_test_kills_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    harmless = mutate_rules.Mutant("codecs", "core/random.h", 4, "", "")
    monkeypatch.setattr(mutate_rules, "mutants", lambda csrc, parts: iter([harmless]))
    assert mutate_rules.main(["--only", "codecs"]) == 1
    assert "SURVIVED" in capsys.readouterr().out
