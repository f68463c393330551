"""The build: what instruction sets share (nothing), the SIMD layer of each, and machines that cannot build."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.csrc.cpu_checks import ROOT, loaded_set, run_on

CXX = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++") or ""
X86 = platform.machine().lower() in ("x86_64", "amd64")
SETS = {"baseline": "x86-64-v2", "avx2": "x86-64-v3", "avx512": "x86-64-v4"} if X86 else {"baseline": ""}
KERNELS = sorted(p for p in (ROOT / "csrc/cpu").glob("*.cpp") if not p.stem.endswith("_binding"))


def compile_for(instruction_set: str, source: Path, *options: str) -> None:
    march = [f"-march={SETS[instruction_set]}"] if SETS[instruction_set] else []
    names = [f"-DUMDA_ISA={instruction_set}", f"-DUMDA_ISA_{instruction_set.upper()}=1", f"-I{ROOT / 'csrc'}"]
    quiet = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    command = [CXX, "-std=c++20", "-ffp-contract=off", *march, *names, *quiet, *options, str(source)]
    subprocess.run(command, check=True)


def check_baseline() -> None:
    assert loaded_set() == "baseline"


def check_unknown() -> None:
    assert "must be baseline, avx2 or avx512, got 'sse9'" in loaded_set()


@pytest.mark.parametrize("instruction_set", SETS)
def test_simd_layer(instruction_set: str, tmp_path: Path) -> None:
    compile_for(instruction_set, ROOT / "tests/csrc/simd_check.cpp", "-O2", "-o", str(tmp_path / "check"))
    if instruction_set not in available_sets():
        return  # it compiles; running it takes a machine that has it
    result = subprocess.run([tmp_path / "check"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def available_sets() -> list[str]:
    """The sets of this machine: everything up to the one that the library chose."""
    names = list(SETS)
    return names[: names.index(loaded_set()) + 1]


@pytest.mark.parametrize("source", KERNELS, ids=lambda p: p.stem)
def test_kernel_objects_share_nothing(source: Path, tmp_path: Path) -> None:
    """No inline function outside the set's own namespace: the linker would keep one copy for all sets."""
    instruction_set = list(SETS)[-1]
    # Without optimisation nothing is inlined away: whatever could be shared shows.
    compile_for(instruction_set, source, "-O0", "-c", "-o", str(tmp_path / "kernel.o"))
    symbols = subprocess.run(
        ["nm", "-C", "--defined-only", tmp_path / "kernel.o"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weak = [line.split(maxsplit=2) for line in symbols if line.split(maxsplit=2)[1] in "WVu"]
    shared = [name for _, _, name in weak if f"umda::{instruction_set}::" not in name]
    assert [name for name in shared if name != "DW.ref.__gxx_personality_v0"] == []


def test_forced_set_is_used() -> None:
    run_on("baseline", __name__, "check_baseline")


def test_unknown_set_is_refused() -> None:
    run_on("sse9", __name__, "check_unknown")


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """``setup.py build_ext`` in a copy of the sources: a build that fails removes the library of an older one."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", dirs_exist_ok=True)
    (tmp_path / "umda_fast").mkdir(exist_ok=True)
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path, env={**os.environ, "UMDA_FAST_CUDA": "0", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_without_a_compiler(tmp_path: Path) -> None:
    stale = tmp_path / "umda_fast/_C.abi3.so"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier build")
    result = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"))
    assert result.returncode == 0, result.stderr
    assert "was NOT built" in result.stderr
    assert "no C++ compiler found" in result.stderr
    assert not stale.exists()


def test_required_extension_without_a_compiler(tmp_path: Path) -> None:
    result = build(tmp_path, CXX=str(tmp_path / "no-such-compiler"), UMDA_FAST_EXTENSION="1")
    assert result.returncode != 0


def test_the_compilers_message_is_printed(tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = build(tmp_path, CXX=str(compiler))
    assert result.returncode == 0
    assert "this compiler is broken" in result.stderr


def test_switched_off(tmp_path: Path) -> None:
    stale = tmp_path / "umda_fast/_C.abi3.so"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier build")
    result = build(tmp_path, UMDA_FAST_EXTENSION="0")
    assert result.returncode == 0
    assert "pure Python" in result.stderr
    assert not stale.exists()


def test_switch_with_a_wrong_value(tmp_path: Path) -> None:
    result = build(tmp_path, UMDA_FAST_EXTENSION="maybe")
    assert result.returncode != 0
    assert "UMDA_FAST_EXTENSION must be auto, 0 or 1, got 'maybe'" in result.stderr
