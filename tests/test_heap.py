import platform
import subprocess
import sys

import pytest

from umda_fast import heap

# Each in a process of its own: the setting holds for a process.
PROBE = """
import ctypes, resource, sys
from umda_fast.heap import keep_freed_pages
if sys.argv[1] == "keep":
    assert keep_freed_pages()
libc, size = ctypes.CDLL(None), 64 << 20
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    ctypes.memset(block, 1, size)
    libc.free(block)
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


def test_a_variable_leaves_it_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap, "keep_freed_pages", lambda: True)
    monkeypatch.delenv("UMDA_FAST_HEAP", raising=False)
    assert heap.settle_heap() == "keep"
    monkeypatch.setattr(heap, "keep_freed_pages", lambda: False)  # not glibc
    assert heap.settle_heap() == "default"
    monkeypatch.setenv("UMDA_FAST_HEAP", "default")
    monkeypatch.setattr(heap, "keep_freed_pages", lambda: pytest.fail("it was told not to"))
    assert heap.settle_heap() == "default"
