"""The CUDA library as nvcc makes it: built by setup.py's own plan, with what ptxas says about every kernel.

``python -m tests.cuda_host._nvcc`` writes the budget file anew.
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.machine_code.sass import Function, disassemble, tool

ROOT = Path(__file__).resolve().parent.parent.parent
BUDGET = Path(__file__).resolve().parent / "nvcc_budget.json"

#: The version that the budget is about; others allocate registers in other ways.
VERSION = "13.0"

#: What the package index calls the parts of nvcc.
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-cuda-crt", "nvidia-nvvm")


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports about a kernel for one target."""

    name: str
    target: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int


@dataclass(frozen=True)
class Build:
    """The library and its kernels."""

    library: Path
    kernels: tuple[Kernel, ...]
    version: str

    @cached_property
    def code(self) -> dict[tuple[str, str], Function]:
        """Machine code by kernel and target."""
        found = {}
        with tempfile.TemporaryDirectory() as folder:
            command = [str(tool("cuobjdump")), "-xelf", "all", str(self.library)]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            cubins = sorted(Path(folder).glob("*.cubin"))
            with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                for cubin, functions in zip(cubins, pool.map(disassemble, cubins), strict=True):
                    target = cubin.name.split(".")[-2]
                    names = short_names([name for name in functions if not name.startswith("$")])
                    found.update({(short, target): functions[name] for name, short in names.items()})
        return found

    def embedded(self) -> tuple[set[str], set[str]]:
        """Targets for which every source has machine code, and those for which every source has portable code (PTX)."""
        sources, found = len(list((ROOT / "csrc/cuda").glob("*.cu"))), []
        for option in ("--list-elf", "--list-ptx"):
            command = [str(tool("cuobjdump")), option, str(self.library)]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            files = Counter(re.findall(r"\.(sm_\w+)\.", text))
            found.append({target for target, count in files.items() if count == sources})
        return found[0], found[1]


def _setup() -> Any:
    spec = importlib.util.spec_from_file_location("umda_fast_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _version(nvcc: Path) -> str:
    text = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    return text.split(" V")[-1].split()[0]


def find_nvcc(setup: Any) -> Path:
    """nvcc of the budget's version, from the package index when the machine has another or none."""
    found = setup.find_nvcc()
    if found is not None and _version(found).startswith(f"{VERSION}."):
        return Path(found)
    directory = ROOT / "build" / f"nvcc-{VERSION}"
    if not list(directory.glob("nvidia/*/bin/nvcc")):
        pinned = [f"{package}=={VERSION}.*" for package in PACKAGES]
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(directory), *pinned]
        subprocess.run(command, check=True)
    return next(iter(directory.glob("nvidia/*/bin/nvcc")))


def version() -> str:
    """Of the compiler that builds."""
    return _version(find_nvcc(_setup()))


def digest() -> str:
    """Of what the library is made from, the compiler's version included."""
    found = hashlib.sha256((version() + torch.__version__).encode())
    csrc = ROOT / "csrc"
    for path in sorted([*csrc.glob("*.h"), *csrc.glob("cpu/binding.h"), *csrc.glob("cuda/*"), ROOT / "setup.py"]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


@cache
def build() -> Build:
    """Build the library in ``build/``, once for every state of its sources, by one process at a time."""
    setup = _setup()
    nvcc = find_nvcc(setup)
    directory = ROOT / "build" / "nvcc_gate" / digest()[:16]
    library, log = directory / "_C_cuda.so", directory / "ptxas.txt"
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not log.is_file():
            before = Path.cwd()
            os.chdir(ROOT)  # the plan's paths are relative
            try:
                with mock.patch.dict(os.environ, NVCC=str(nvcc)):
                    plan = setup.cuda_plan(library, directory, Path(torch.__file__).parent)
                log_text = _run(plan)
            finally:
                os.chdir(before)
            log.write_text(log_text)
    return Build(library, tuple(_parse(log.read_text())), _version(nvcc))


def _run(plan: Any) -> str:
    """Compile and link; returns what ptxas wrote."""

    def run(step: Any) -> str:
        step.output.parent.mkdir(parents=True, exist_ok=True)
        verbose = ["-Xptxas=-v"] if step.inputs[0].suffix == ".cu" else []
        result = subprocess.run([*step.command, *verbose], capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{' '.join(step.command)}\n{result.stdout}{result.stderr}"
        return result.stderr

    # The longest first.
    steps = sorted(plan.compile, key=lambda step: -step.inputs[0].stat().st_size)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        logs = list(pool.map(run, steps))
    run(plan.link)
    return "".join(logs)


def _parse(log: str) -> list[Kernel]:
    kernels = []
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)' for '(?P<target>\w+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    found = list(entry.finditer(log))
    names = short_names([match["name"] for match in found])
    for match in found:
        numbers = (int(match[key]) for key in ("registers", "stack", "stores", "loads"))
        kernels.append(Kernel(names[match["name"]], match["target"], *numbers))
    return kernels


def short_names(mangled: list[str]) -> dict[str, str]:
    """Mangled name of a kernel -> ``name<arguments of its template>``."""
    text = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    short = {}
    for name, whole in zip(mangled, text.splitlines(), strict=True):
        plain = whole.replace("(anonymous namespace)::", "").replace("umda::cuda::", "").replace("umda::", "")
        short[name] = plain.split("(")[0].removeprefix("void ")
    return short


def most_registers(kernels: tuple[Kernel, ...]) -> dict[str, int]:
    """Registers of every kernel on the target where it needs most."""
    most: dict[str, int] = {}
    for kernel in kernels:
        most[kernel.name] = max(most.get(kernel.name, 0), kernel.registers)
    return dict(sorted(most.items()))


def main() -> None:
    """Write the budget file."""
    made = build()
    budget = {"nvcc": made.version, "registers": most_registers(made.kernels)}
    BUDGET.write_text(json.dumps(budget, indent=2) + "\n")


if __name__ == "__main__":
    main()
