import platform
import subprocess
import sys

import pytest

# Each in a process of its own: the setting holds for a process.
PROBE = """
import resource, sys
from umda_fast.heap import keep_freed_pages
import torch
torch.set_num_threads(1)
if sys.argv[1] == "keep":
    assert keep_freed_pages()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
print(step())
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROBE, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_a_freed_block_is_used_again_without_faults() -> None:
    assert faults("keep") < faults("default") / 10
