"""Gate 1: every Triton kernel, forward and backward, in Triton's interpreter against the float64 reference.

The tests proper are the other modules beside this file; see ``conftest.py`` for why they run in processes of their own.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETED_MODULES

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started = {
        module: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / module)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=HERE.parent.parent,
        )
        for module in INTERPRETED_MODULES
    }
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("module", INTERPRETED_MODULES)
def test_interpreted(module: str, processes: dict[str, subprocess.Popen[str]]) -> None:
    output, _ = processes[module].communicate()
    assert processes[module].returncode == 0, output
    assert " passed" in output, output
    assert " skipped" not in output, output
