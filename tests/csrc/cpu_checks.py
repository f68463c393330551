"""What the tests of the CPU kernels share: error rule, poisoned memory, threads, forced instruction sets."""

import atexit
import ctypes
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

import umda_fast.ops  # noqa: F401  (defines the operations and loads the library)
from umda_fast.parity.rule import assert_close as assert_close

ROOT = Path(__file__).resolve().parents[2]

#: Sets that are not the best one of the machine are tested in a process of their own.
FORCED_SETS = ("baseline", "avx2")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors are full of NaN: an element that a kernel forgets to write shows."""
    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def loaded_set() -> str:
    """The instruction set that the library serves, or why it serves none; chosen when it is first asked for."""
    library = ctypes.CDLL(str(ROOT / "umda_fast/_C.abi3.so"))
    library.umda_fast_cpu_isa.restype = ctypes.c_char_p
    return str(library.umda_fast_cpu_isa().decode())


def run_on(instruction_set: str, module: str, function: str) -> None:
    """Call ``module.function()`` in a process that uses ``instruction_set``.

    The process is forked from one that has imported torch and the library but called nothing: which set serves is
    decided once in a process, by the first call.
    """
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps([instruction_set, module, function]) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    assert answer, f"the server ended with exit code {server.wait()}"
    problem = json.loads(answer)
    if problem is not None and "but this machine does not have it" in problem:
        pytest.skip(f"this machine has no {instruction_set}")
    assert problem is None, problem


@cache
def _server() -> subprocess.Popen[str]:
    """One for all tests of this process; it ends when its input does."""
    server = subprocess.Popen(
        [sys.executable, "-c", "from tests.csrc.cpu_checks import serve; serve()"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    atexit.register(server.stdin.close)
    return server


def serve() -> None:
    """Answer each line ``[instruction set, module, function]`` with null, or with what went wrong as a string."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a check prints is no answer
    for line in sys.stdin:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            problem = _call(*json.loads(line))
            with os.fdopen(writing, "w") as pipe:
                pipe.write(json.dumps(problem))
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            problem = pipe.read()
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        answers.write((problem or json.dumps(f"the process ended with exit code {code}: {line.strip()}")) + "\n")
        answers.flush()


def _call(instruction_set: str, module: str, function: str) -> str | None:
    os.environ["UMDA_FAST_CPU_ISA"] = instruction_set
    try:
        served = loaded_set()
        if instruction_set in FORCED_SETS and served != instruction_set:
            return f"{instruction_set} was asked for, the library says: {served}"
        getattr(importlib.import_module(module), function)()
    except BaseException:
        return traceback.format_exc()
    return None
