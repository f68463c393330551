"""What the tests of the CPU kernels share: error rule, poisoned memory, threads, forced instruction sets."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def run_on(instruction_set: str, module: str, function: str) -> None:
    """Call ``module.function()`` in a process that uses ``instruction_set``."""
    environment = {**os.environ, "UMDA_FAST_CPU_ISA": instruction_set, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", f"import {module}; {module}.{function}()"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "but this machine does not have it" in result.stderr:
        pytest.skip(f"this machine has no {instruction_set}")
    assert result.returncode == 0, result.stderr
