"""What an import costs and needs, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: triton is not found, as where it is not installed.
WITHOUT_TRITON = """
from importlib.machinery import PathFinder
find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else find_spec(name, *rest)
"""


def run(code: str, **environment: str) -> str:
    """Standard output of ``code`` in a new process; its error output is shown where it fails."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_package_alone_imports_nothing() -> None:
    assert run("import sys, umda_fast; print(umda_fast.__version__, 'torch' in sys.modules)").endswith(" False")


def test_operations_need_no_triton_and_touch_no_gpu() -> None:
    """CUDA is not even asked for at import: neither initialised nor its library loaded."""
    code = """
import sys
import torch
asked = []
torch.cuda.is_available = lambda: asked.append("is_available")
torch.cuda._lazy_init = lambda: asked.append("init")
before = "triton" in sys.modules
import umda_fast, umda_fast.ops, umda_fast.model, umda_fast.sgl, umda_fast.data
assert not asked, asked
assert ("triton" in sys.modules) == before
assert "umda_fast.kernels" not in sys.modules
print("done")
"""
    assert run(code) == "done"


def test_without_triton() -> None:
    """The reference and the C++ kernels serve, and what is missing is said."""
    code = (
        WITHOUT_TRITON
        + """
import torch
from umda_fast.errors import BackendUnavailableError
from umda_fast.ops import backend_status, backends_used, bag_attention_pool

z, scores, ptr = torch.randn(5, 4), torch.randn(5, 2), torch.tensor([0, 2, 5])
for backend in ("reference", "cpp"):
    bag_attention_pool(z, scores, ptr, backend=backend)
    assert backends_used()["bag_pool"] == backend
assert backend_status()["triton"] == "triton is not installed", backend_status()
try:
    bag_attention_pool(z, scores, ptr, backend="triton")
except BackendUnavailableError as error:
    assert "triton is not installed" in str(error), error
    assert "bag_pool has no Triton kernel" in str(error), error
    assert "these are on cpu" in str(error), error
else:
    raise AssertionError("served by triton")
print("done")
"""
    )
    assert run(code) == "done"


def test_without_the_extension() -> None:
    """A machine that built nothing computes on the reference, and says so."""
    code = """
from pathlib import Path
is_file = Path.is_file
Path.is_file = lambda self: not self.name.startswith("_C") and is_file(self)
import torch
from umda_fast.errors import BackendUnavailableError
from umda_fast.ops import backend_status, backends_used, knn_graph, neighbor_sum

x = torch.randn(7, 4, requires_grad=True)
graph = knn_graph(x, torch.tensor([0, 7]), 2)
neighbor_sum(x, graph, graph.similarity.exp()).sum().backward()
assert x.grad is not None
assert set(backends_used().values()) == {"reference"}, backends_used()
status = backend_status()["cpp"]
assert status is not None and "_C.abi3.so was not built" in status, status
try:
    knn_graph(x, torch.tensor([0, 7]), 2, backend="cpp")
except BackendUnavailableError as error:
    assert status in str(error)
    print("done")
"""
    assert run(code) == "done"
