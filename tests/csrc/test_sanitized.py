"""Some of the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, in every run of the tests.

One instruction set (the baseline, in the place of all) and the operations that compile in seconds; what
``run_sanitized.sh`` beside this file does for all of them takes minutes.
"""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.csrc.cpu_checks import ROOT

STEMS = ("bag_pool", "knn")
COMPILER = shlex.split(os.environ.get("CXX") or shutil.which("g++") or "")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]
COMMON = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Icsrc"]


def _runtime(name: str) -> Path | None:
    """A library of the compiler, or None if it has none."""
    if not COMPILER:
        return None
    command = [*COMPILER, f"-print-file-name={name}"]
    path = Path(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return path if path.is_absolute() else None


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}{result.stderr}"
    return result.stdout


def _build(directory: Path) -> Path:
    torch_root = Path(torch.__file__).parent
    plain = [*COMPILER, *COMMON, "-O0", "-isystem", str(torch_root / "include")]
    instrumented = [*COMPILER, *COMMON, "-O1", "-ffp-contract=off", *SANITIZE]
    instrumented += ["-Wno-uninitialized", "-Wno-maybe-uninitialized", "-DUMDA_ISA=baseline", "-DUMDA_ISA_BASELINE=1"]
    instrumented += ["-march=x86-64-v2"] if os.uname().machine == "x86_64" else []
    steps = [(instrumented, ROOT / "csrc" / "cpu" / f"{stem}.cpp") for stem in STEMS]
    kernels = len(steps)
    steps += [(plain, ROOT / "csrc" / "cpu" / f"{stem}_binding.cpp") for stem in STEMS]
    steps += [(plain, source) for source in sorted((ROOT / "csrc").glob("*.cpp"))]
    objects = [directory / f"{source.stem}.o" for _, source in steps]
    with ThreadPoolExecutor(2) as pool:
        commands = [
            [*compiler, "-c", str(source), "-o", str(o)] for (compiler, source), o in zip(steps, objects, strict=True)
        ]
        list(pool.map(_run, commands))
    # What a kernel is called in the namespace of another set is another name for the one that is there.
    symbols = re.findall(r" T (\w*8baseline\w*)", _run(["nm", *map(str, objects[:kernels])]))
    aliases = [
        f"-Wl,--defsym={symbol.replace('8baseline', other, 1)}={symbol}"
        for symbol in symbols
        for other in ("4avx2", "6avx512")
    ]
    library = directory / "_C.abi3.so"
    libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([*COMPILER, "-shared", *SANITIZE, *aliases, "-o", str(library), *map(str, objects), *libraries])
    return library


def _copy_of_the_package(directory: Path, library: Path) -> None:
    leave_out = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "umda_fast", directory / "umda_fast", ignore=leave_out)
    shutil.copytree(ROOT / "tests" / "csrc", directory / "tests" / "csrc", ignore=leave_out)
    shutil.copy(ROOT / "tests" / "__init__.py", directory / "tests")
    shutil.copy(library, directory / "umda_fast")


@pytest.mark.skipif(_runtime("libasan.so") is None, reason="the compiler has no AddressSanitizer")
def test_kernels_under_the_sanitizers(tmp_path: Path) -> None:
    digest = hashlib.sha256(torch.__version__.encode() + Path(__file__).read_bytes())
    for path in sorted((ROOT / "csrc").rglob("*.[hc]*")):
        digest.update(path.read_bytes())
    built = ROOT / "build" / "sanitized_subset" / digest.hexdigest()[:16]
    if not (built / "done").is_file():
        built.mkdir(parents=True, exist_ok=True)
        _build(built)
        (built / "done").touch()
    library = built / "_C.abi3.so"
    assert "__asan_report_load4" in _run(["nm", "-D", str(library)])
    _copy_of_the_package(tmp_path, library)
    preload = [str(_runtime(name)) for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    environment = {
        **os.environ,
        # The interpreter is not instrumented: the runtime has to be there before it. Python leaks at exit by design.
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "UMDA_FAST_CPU_ISA": "baseline",
        "OMP_NUM_THREADS": "1",
    }
    tests = [f"tests/csrc/test_{stem}_cpu.py" for stem in STEMS]
    # Those of every instruction set and of the largest bag take longer than all others together.
    chosen = ["-p", "no:cacheprovider", "-k", "not forced and not sets and not 50000"]
    command = [sys.executable, "-m", "pytest", "-q", *chosen, *tests]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout
