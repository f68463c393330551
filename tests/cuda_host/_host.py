"""The CUDA kernels as a host library: build it, call it, keep watch over the memory it is given.

``csrc/cuda/*.cu`` are compiled as plain C++ against ``cuda_emulation.h`` into a shared library under
``build/``, keyed by the text of everything that goes into it, so that it is built once per change.
"""

import ctypes
import fcntl
import hashlib
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"

FLAGS = [
    *("-std=c++20", "-O2", "-g1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}", f"-I{HERE}"),
]

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # umda::DType

GUARD = 4096  # bytes on either side of every buffer
_POISON = 0xFF  # NaN in every floating type
_POISON_INTEGER = 0x7F  # an index far outside


def _compile(name: str, sources: list[Path], flags: list[str], link: list[str]) -> Path:
    """Path of shared library ``name``, built when its sources have changed."""
    headers = [*CSRC.glob("*.h"), *CSRC.glob("cuda/*.h"), CSRC / "cpu" / "binding.h", *HERE.glob("*.h")]
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    features = [line for line in cpu.read_text().splitlines() if line.startswith("flags")][:1]
    digest = hashlib.sha256(version + "\n".join([*features, *flags, *link, torch.__version__]).encode())
    for path in sorted([*sources, *headers]):
        digest.update(path.name.encode() + path.read_bytes())
    directory = ROOT / "build" / "cuda_host" / digest.hexdigest()[:16]
    library = directory / f"{name}.so"
    directory.mkdir(parents=True, exist_ok=True)
    # Files of tests that begin at the same time in several processes: the others wait for the first one's library.
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _build(library, compiler, sources, flags, link)
    return library


def _build(library: Path, compiler: str, sources: list[Path], flags: list[str], link: list[str]) -> None:
    directory = library.parent

    def compile_one(source: Path) -> Path:
        target = directory / f"{source.name}.{os.getpid()}.o"
        command = [compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{result.stderr}")
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = directory / f"{library.stem}.{os.getpid()}.so"
    subprocess.run([compiler, "-shared", "-o", str(partial), *map(str, objects), *link], check=True)
    partial.rename(library)
    for path in objects:
        path.unlink()


def _kernels() -> Path:
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), *sorted(HERE.glob("*.cu")), *sorted(HERE.glob("*.cpp"))]
    return _compile("kernels", sources, FLAGS, [])


def bindings() -> Path:
    """The binding files as well, which register the operations for CPU tensors in ``umda_fast_emulated``."""
    torch_root, kernels = Path(torch.__file__).parent, _kernels()
    include = [
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DUMDA_EMULATED",
        "-isystem",
        str(torch_root / "include"),
    ]
    link = [str(kernels), f"-Wl,-rpath,{kernels.parent}", f"-L{torch_root / 'lib'}", "-ltorch_cpu"]
    return _compile("bindings", sorted((CSRC / "cuda").glob("*_binding.cpp")), [*FLAGS, *include], link)


@cache
def library() -> ctypes.CDLL:
    """The host library."""
    loaded = ctypes.CDLL(str(_kernels()))
    loaded.emulation_error.restype = ctypes.c_char_p
    return loaded


class Launch(ctypes.Structure):
    """umda::cuda::Launch."""

    _fields_ = (("stream", ctypes.c_void_p), ("max_blocks", ctypes.c_int))


def structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    """A ctypes mirror of the C++ struct ``name``, whose size is checked where the library exports it."""
    made = type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})
    size = getattr(library(), f"size_{name}", None)
    if size is not None:
        size.restype = ctypes.c_int64
        assert ctypes.sizeof(made) == size(), f"{name} differs from the C++ struct"
    return made


def dtype_code(dtype: torch.dtype) -> int:
    """umda::DType of a torch dtype."""
    return _CODES[dtype]


class EmulationError(RuntimeError):
    """What the emulation found wrong."""


def raise_error() -> None:
    """Raise what the emulation found wrong since the last call, if anything."""
    message = library().emulation_error()
    if message is not None:
        raise EmulationError(message.decode())


class Arena:
    """Buffers between guard zones."""

    def __init__(self) -> None:
        self._guarded: list[tuple[Tensor, int, int]] = []

    def _allocate(self, elements: int, dtype: torch.dtype, poison: bool) -> Tensor:
        size = elements * dtype.itemsize
        byte = _POISON if dtype.is_floating_point else _POISON_INTEGER
        whole = torch.full((size + 2 * GUARD + 64,), byte, dtype=torch.uint8)
        start = GUARD + -(whole.data_ptr() + GUARD) % 64
        self._guarded.append((whole, start, size))
        inside = whole[start : start + size]
        if not poison:
            inside.zero_()
        return inside.view(dtype)

    def put(self, x: Tensor, shift: int = 0) -> Tensor:
        """A copy of ``x`` with the same strides; the gaps between rows are poisoned as well.

        Args:
            x: any tensor.
            shift: elements by which the data is moved off its alignment.
        """
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
        storage = self._allocate(span + shift, x.dtype, poison=True)[shift:]
        copy = storage.as_strided(x.shape, x.stride(), storage.storage_offset())
        copy.copy_(x)
        return copy

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """An output, poisoned."""
        return self._allocate(math.prod(shape), dtype, poison=True).view(shape)

    def workspace(self, size: int) -> Tensor:
        """``size`` bytes of poison."""
        return self._allocate(max(1, -(-size // 4)), torch.float32, poison=True).view(torch.uint8)[:size]

    def check(self) -> None:
        """Raise what the emulation found, or a guard zone that was written to."""
        raise_error()
        for whole, start, size in self._guarded:
            byte = int(whole[0])
            for zone in (whole[:start], whole[start + size :]):
                if not bool((zone == byte).all()):
                    raise EmulationError("written outside a buffer")


def pointer(x: Tensor | None) -> int | None:
    """Address of a tensor's data."""
    return None if x is None else x.data_ptr()


def call(name: str, arguments: ctypes.Structure, arena: Arena, max_blocks: int = 1000, order: int = 0) -> None:
    """Run a launcher.

    Args:
        name: the launcher.
        arguments: its argument struct.
        arena: holds every buffer that the arguments point to.
        max_blocks: largest grid.
        order: in which threads, warps and blocks run: 0 upwards, 1 downwards, else shuffled by this seed.

    Raises:
        EmulationError: divergence, an access outside a buffer, a misaligned access.
    """
    library().emulation_set_order(ctypes.c_uint(order))
    status = getattr(library(), f"call_{name}")(ctypes.byref(arguments), ctypes.byref(Launch(None, max_blocks)))
    library().emulation_set_order(ctypes.c_uint(0))
    arena.check()
    assert status == 0


def workspace_size(name: str, arguments: ctypes.Structure) -> int:
    """Bytes of workspace that launcher ``name`` asks for."""
    function = getattr(library(), f"call_{name}_workspace")
    function.restype = ctypes.c_int64
    return int(function(ctypes.byref(arguments)))


#: Grid and order of the runs that must all give the same bits.
SCHEDULES = ((1000, 0), (1, 1), (3, 7))


def repeatable(run: Callable[[int, int], Sequence[Tensor]]) -> list[Tensor]:
    """Outputs of ``run(max_blocks, order)``, the same bits for every grid and order."""
    first, *others = [list(run(*schedule)) for schedule in SCHEDULES]
    for other in others:
        for x, y in zip(first, other, strict=True):
            assert torch.equal(_bits(x), _bits(y)), "the result depends on the grid or the order of threads"
    return first


def _bits(x: Tensor) -> Tensor:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.dtype.itemsize])


def assert_parity(
    got: Tensor,
    exact: Tensor,
    baseline: Tensor,
    factor: float,
    what: str,
    precision: torch.dtype | None = None,
) -> None:
    """Error against float64 at most ``factor`` times that of PyTorch in the same precision.

    The floor, for what the baseline gets exactly, is one rounding of the output's own type at the output's
    scale (four in float32, where sums of any order are that close).

    Args:
        got: the kernel's result.
        exact: the reference in float64.
        baseline: the reference in ``got``'s precision.
        factor: 2 for values, 3 for gradients.
        what: named in the message.
        precision: the coarsest type that a value goes through on its way, ``got``'s if None.
    """
    assert got.dtype == baseline.dtype, what
    assert got.shape == exact.shape == baseline.shape, what
    precision = precision or got.dtype
    floor = torch.finfo(precision).eps * (4 if precision == torch.float32 else 1)
    got, baseline = got.double(), baseline.double()
    finite = torch.isfinite(exact)
    assert torch.equal(got[~finite], exact[~finite]), f"{what}: infinities differ"
    got, exact, baseline = got[finite], exact[finite], baseline[finite]
    if exact.numel() == 0:
        return
    scale = float(exact.abs().max())
    error, allowed = float((got - exact).abs().max()), float((baseline - exact).abs().max())
    message = f"{what}: error {error:.3g}, PyTorch's {allowed:.3g}, scale {scale:.3g}"
    assert error <= factor * allowed + floor * scale, message
