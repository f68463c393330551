"""Compiled kernels: machine code, and what each takes of a multiprocessor, read from cubins and libraries."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .sass import Function, disassemble, tool

__all__ = ["Binary", "read", "read_library"]

_USAGE = re.compile(r"Function (\S+):\s+REG:(\d+)\s+STACK:(\d+)\s+SHARED:(\d+)\s+LOCAL:(\d+)")
_SECTION = re.compile(r"^\.nv\.info\.(\S+)$")
_THREADS = re.compile(r"Attribute:\s+EIATTR_(?:MAX_THREADS|REQNTID)\n.*\n\s+Value:\s+(0x[0-9a-f]+)")


@dataclass(frozen=True)
class Binary:
    """A kernel for one architecture: bytes of stack and of local memory per thread, of shared memory per program."""

    function: Function
    registers: int
    stack: int
    shared: int  #: without what a launch adds
    local: int
    threads: int  #: the most, or the only number, that a program may have; 0: the kernel does not say


def _run(name: str, *arguments: str) -> str:
    return subprocess.run([str(tool(name)), *arguments], check=True, capture_output=True, text=True).stdout


def read(cubin: Path | bytes) -> dict[str, Binary]:
    """The kernels of a cubin by (mangled) name."""
    if isinstance(cubin, bytes):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            return read(Path(file.name))
    functions = disassemble(cubin)
    threads: dict[str, int] = {}
    sections = re.split(r"^(?=\.\S+$)", _run("cuobjdump", "-elf", str(cubin)), flags=re.MULTILINE)
    for section in sections:
        if (name := _SECTION.match(section.split("\n", 1)[0])) and (found := _THREADS.search(section)):
            threads[name[1]] = int(found[1], 16)
    usage = _USAGE.findall(_run("cuobjdump", "--dump-resource-usage", str(cubin)))
    found = {}
    for name, registers, stack, shared, local in usage:
        if name in functions:
            numbers = int(registers), int(stack), int(shared), int(local)
            found[name] = Binary(functions[name], *numbers, threads.get(name, 0))
    return found


def read_library(library: Path, target: str) -> dict[str, Binary]:
    """The kernels that a library holds for a target ("sm_90a") by mangled name."""
    found: dict[str, Binary] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(tool("cuobjdump")), "-xelf", "all", str(library.resolve())]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        for cubin in sorted(Path(folder).glob(f"*.{target}.cubin")):
            found |= read(cubin)
    return found
