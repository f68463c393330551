"""The CUDA library builds with nvcc for every target, within its budget of registers, stores whole vectors, and is
complete."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda_host._nvcc import BUDGET, Build, build, most_registers

TARGETS = {"sm_80", "sm_90a", "sm_100", "sm_120"}

#: Compute capabilities, from the first with bfloat16 to those of the compiler that builds.
CAPABILITIES = ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1))

#: Kernels that write rows of features; with ``true`` as last argument of their template, 16 bytes at a time.
WRITERS = ("gather_parts", "gather_rows", "merge_units", "pool_units", "unpool_units")

#: Registers by which a patch release of nvcc may exceed the budget: the unit in which they are handed out.
SLACK = 8

#: What only a CUDA build of torch exports, with C linkage.
CUDA_SYMBOLS = {
    "aoti_torch_get_current_cuda_stream",
    "torch_c10_cuda_check_msg",
    "torch_c10_cuda_free_error_msg",
}

OPERATIONS = [
    *("graph_transpose", "representation_gram", "task_gradient_statistics", "combine_task_gradients"),
    *(
        name + suffix
        for name in ("bag_pool", "edge_cosine", "neighbor_attention", "neighbor_sum", "smoothness_energy")
        for suffix in ("", "_backward")
    ),
]


@pytest.fixture(scope="module")
def made() -> Build:
    return build()


def test_every_kernel_is_there_for_every_target(made: Build) -> None:
    names = {kernel.name for kernel in made.kernels}
    assert names == set(json.loads(BUDGET.read_text())["registers"])
    for name in names:
        assert {kernel.target for kernel in made.kernels if kernel.name == name} == TARGETS, name


def test_nothing_spills(made: Build) -> None:
    spilling = [k for k in made.kernels if k.stack or k.spill_stores or k.spill_loads]
    assert not spilling


def test_registers_stay_within_the_budget(made: Build) -> None:
    budget = json.loads(BUDGET.read_text())["registers"]
    over = {name: used for name, used in most_registers(made.kernels).items() if used > budget[name] + SLACK}
    assert not over, f"over budget (python -m tests.cuda_host._nvcc writes a new one): {over}"


def test_every_device_finds_code(made: Build) -> None:
    """A device runs machine code of its own major version up to its minor one, and what it can compile from PTX."""
    machine, portable = made.embedded()
    assert machine == TARGETS

    def version(target: str) -> tuple[int, int]:
        number = int(target.removeprefix("sm_").rstrip("a"))
        return number // 10, number % 10

    for major, minor in CAPABILITIES:
        own = any(version(x)[0] == major and version(x)[1] <= minor for x in machine)
        compiled = any(version(x) <= (major, minor) for x in portable)
        assert own or compiled, f"sm_{major}{minor}"


def test_rows_are_stored_as_vectors(made: Build) -> None:
    """Not as four times 4 bytes, which nvcc makes of a vector that was put together from parts."""
    writers = {x for x in made.code if x[0].split("<")[0] in WRITERS and x[0].endswith("true>")}
    assert {target for _, target in writers} == TARGETS
    assert {name.split("<")[0] for name, _ in writers} == set(WRITERS)
    split = {x: made.code[x].widths("store") for x in writers if not made.code[x].widths("store")[16]}
    assert not split


def _symbols(library: Path, option: str) -> set[str]:
    command = ["nm", "-D", option, str(library)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].split("@")[0] for line in output.splitlines()}


def test_it_needs_nothing_that_only_cuda_builds_of_torch_have_but_these(made: Build) -> None:
    needed = _symbols(made.library, "--undefined-only")
    libraries = Path(torch.__file__).parent / "lib"
    torch_exports = set().union(*(_symbols(p, "--defined-only") for p in libraries.glob("libtorch*.so")))
    from_torch = {s for s in needed if s.startswith(("aoti_", "torch_"))}
    assert from_torch - torch_exports <= CUDA_SYMBOLS
    assert not any(s.startswith("cuda") for s in needed), "the CUDA runtime must be linked in"


def test_the_loader_is_told_of_libtorch(made: Build) -> None:
    """Through libtorch.so a CUDA build of torch brings in what only it has; built beside a CPU-only torch, which needs
    nothing of that library, the linker would leave it out and nothing here would load."""
    output = subprocess.run(["readelf", "-d", str(made.library)], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in output.splitlines() if "(NEEDED)" in line}
    assert {"libtorch.so", "libtorch_cpu.so", "libc10.so"} <= needed


def test_it_registers_every_operation(made: Build, tmp_path: Path) -> None:
    """In a process of its own, where a stub stands in for what a CPU build of torch lacks."""
    stub = tmp_path / "stub.so"
    source = tmp_path / "stub.c"
    source.write_text("\n".join(f"int {name}(void) {{ return 0; }}" for name in sorted(CUDA_SYMBOLS)))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(stub), str(source)], check=True)
    script = f"""
import ctypes, torch
ctypes.CDLL({str(stub)!r}, ctypes.RTLD_GLOBAL)
for name in {OPERATIONS!r}:
    torch.library.define("umda_fast::" + name, "() -> ()")
torch.ops.load_library({str(made.library)!r})
for name in {OPERATIONS!r}:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("umda_fast::" + name, "CUDA"), name
"""
    subprocess.run([sys.executable, "-c", script], check=True)
