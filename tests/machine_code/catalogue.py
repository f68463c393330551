"""The kernels whose shares are predicted, at the shapes that the GPU suite times, and where their machine code is from.

Triton kernels are compiled ahead of time in their pinned configurations; the CUDA library is the one that gate 4
builds. Both are kept in ``build/``: Triton's cache goes by the content of a kernel, the library's folder by that of its
sources, so that a kernel is compiled when it has changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from unittest import mock

from tests.cuda_host import _nvcc
from tests.kernels import aot_cases
from tests.kernels.aot_cases import BF16
from umda_fast.kernels._aot import compile_kernel
from umda_fast.kernels._launch import Launch

from . import calibration
from .binary import Binary, read, read_library
from .cost import ONCE, Nest, Prediction, path, predict, work
from .devices import DEVICES

__all__ = ["CALIBRATION", "ENTRIES", "TARGETS", "Entry", "kept_kernels"]

TRITON_CACHE = _nvcc.ROOT / "build" / "triton_cubins"
#: What the CUDA library holds for each compute capability.
TARGETS = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}


@dataclass(frozen=True)
class Entry:
    """A kernel at a shape.

    Attributes:
        name: operation, pass and shape.
        kernel: name of the kernel; of a CUDA kernel with the arguments of its template.
        launches: of a Triton kernel: the launches of its operation, with tensors on the ``meta`` device.
        nest: how often its loops turn at this shape, where that matters.
        floor: bytes of the floor, of a warp for each turn of the hot loop. None: all that it asks for.
        dynamic: bytes of shared memory that a launch of a CUDA kernel adds.
    """

    name: str
    kernel: str
    launches: Callable[[], list[Launch]] | None = None
    nest: Nest = ONCE
    floor: float | None = None
    dynamic: int = 0

    def _launch(self) -> Launch:
        assert self.launches is not None
        [launch] = [x for x in self.launches() if x.kernel.__name__ == self.kernel]
        return launch

    def source(self) -> str:
        """Digest of what the kernel is compiled from; with another one its figures may be others."""
        if self.launches is None:
            return _nvcc.digest()[:16]
        x = self._launch()
        options = sorted(x.constexprs.items()), x.num_warps, x.num_stages, x.max_registers
        return hashlib.sha256(f"{x.kernel.cache_key} {options}".encode()).hexdigest()[:16]

    def binary(self, architecture: int) -> Binary:
        """Its machine code for a compute capability."""
        if self.launches is None:
            return _library(architecture)[self.kernel]
        launch = self._launch()
        with kept_kernels():
            compiled = compile_kernel(launch, architecture)
        [found] = read(compiled.asm["cubin"]).values()
        shared, threads = int(compiled.metadata.shared), 32 * launch.num_warps
        return Binary(found.function, found.registers, found.stack, shared, found.local, threads)

    def predict(self, architecture: int) -> tuple[Binary, Prediction]:
        """What it can reach on the GPU of a compute capability."""
        binary = self.binary(architecture)
        flops = 0.0
        if any(x.name.startswith("UTC") for x in binary.function.code):
            # Fifth-generation products have their shape in a register; the tile is that of the fourth's code.
            flops = work(path(self.binary(90).function, self.nest)).flops
        device = DEVICES[architecture]
        return binary, predict(binary, device, self.nest, dynamic=self.dynamic, floor=self.floor, flops=flops)


@contextmanager
def kept_kernels() -> Iterator[None]:
    """Inside, Triton keeps what it compiles in ``build/``."""
    TRITON_CACHE.mkdir(parents=True, exist_ok=True)
    with mock.patch.dict(os.environ, TRITON_CACHE_DIR=str(TRITON_CACHE)):
        yield


@cache
def _library(architecture: int) -> dict[str, Binary]:
    found = read_library(Path(_nvcc.build().library), TARGETS[architecture])
    return {short: found[name] for name, short in _nvcc.short_names(list(found)).items()}


def _all() -> Iterator[Entry]:
    cross = partial(aot_cases.cross_view_launches, BF16, 3, 4, 64)
    yield Entry("cross_view forward, V 3, H 4, Dh 64", "cross_view_forward_registers", cross)
    yield Entry("cross_view backward, V 3, H 4, Dh 64", "cross_view_backward_registers", cross)
    for width in (64, 128):
        tokens = partial(aot_cases.token_launches, BF16, 3, width, 512)
        for way in ("forward", "backward_queries", "backward_keys"):
            name = f"cross_view_tokens {way.replace('_', ', ')}, Dh {width}"
            yield Entry(name, f"cross_view_tokens_{way}", tokens)
    for width in (64, 256):
        search = partial(aot_cases.knn_launches, BF16, width, 8, "cosine")
        yield Entry(f"knn, d {width}, k 8", "knn_search", search)
    layers = partial(aot_cases.projection_launches, BF16, 256)
    yield Entry("norm_linear forward, D 256", "norm_linear_kernel", layers)
    yield Entry("linear_residual forward, D 256", "linear_residual_kernel", layers)
    gelu = partial(aot_cases.gelu_dropout_launches, BF16, 512)
    norm = partial(aot_cases.dropout_add_norm_launches, BF16, BF16, 256)
    for way in ("forward", "backward"):
        yield Entry(f"gelu_dropout {way}, D 512", f"gelu_dropout_{way}_kernel", gelu)
        yield Entry(f"dropout_add_norm {way}, D 256", f"dropout_add_norm_{way}_kernel", norm)
    fusion = partial(aot_cases.view_fusion_launches, BF16, 3, 256, 128)
    for way in ("forward", "cosines", "backward_y", "backward_cosines"):
        yield Entry(f"view_fusion {way.replace('_', ', ')}, V 3, D 256, P 128", f"view_fusion_{way}", fusion)

    # CUDA, bfloat16 rows of 256 columns (512 bytes, one load of a warp), 8 tasks, 8 neighbours.
    row, tasks, degree = 512.0, 8, 8
    # Forward: 4 rows a turn, 32 for a turn around it, beside which the weights of 32 rows and 8 tasks are computed in 8
    # turns.
    yield Entry(
        "bag_pool forward, D 256, T 8",
        "pool_units<bfloat16, 8, true>",
        nest=Nest((8,), beside=tasks),
        floor=4 * (row + 2 * tasks),
    )
    # Backward: 4 rows a turn, each of which runs over the tasks and, for each, over the 3 upper levels of a sum of 32
    # lanes; weights and scores' gradients before and behind take one turn.
    yield Entry(
        "bag_pool backward, D 256, T 8",
        "unpool_units<bfloat16, true>",
        nest=Nest((1,), inside=(tasks, 3), storing=True),
        floor=4 * 2 * (row + 2 * tasks),
        dynamic=4 * 4 * (2 * 4 * tasks + 4 * tasks),
    )
    # One row for a warp, 4 of its edges a turn; sums of lanes and partial sums do not occur.
    whole = Nest((degree / 4, 1, 1, 1, 1, 1), beside=0)
    yield Entry(
        "neighbor_sum forward, D 256, 8 edges",
        "gather_rows<bfloat16, true>",
        nest=whole,
        floor=((degree + 1) * row + 8 * degree) / (degree / 4),
    )
    # 2 edges a turn of 32 for a warp, a sum of 32 lanes (5 turns) for each; a node's own row comes once per 8 edges.
    for name, distance in (("edge_cosine", "false"), ("smoothness_energy", "true")):
        yield Entry(
            f"{name} forward, D 256, 8 edges",
            f"pair_edges<bfloat16, {distance}, true>",
            nest=Nest((1, 16), beside=5),
            floor=2 * (row + row / degree + 8),
        )
    # Heads of 64 columns: 8 lanes to a row, 4 rows at a time; of a turn's 16 places of gather_rows 8 are used.
    head = row / 4
    yield Entry(
        "neighbor_attention forward, scores, H 4, Dh 64, 8 edges",
        "pair_edges<bfloat16, false, true>",
        nest=Nest((1, 4), beside=3),
        floor=8 * (head + head / degree + 8),
    )
    yield Entry(
        "neighbor_attention forward, sum, H 4, Dh 64, 8 edges",
        "gather_rows<bfloat16, true>",
        nest=Nest((1, 1, 1, 1, 1, 1), beside=2),
        floor=(degree + 1) * head + 8 * degree,
    )
    # A turn is 4 columns of a lane: the average read and written, the gradient read; 2 turns, then the products.
    yield Entry(
        "task_gradient_statistics, T 8",
        "smooth_and_multiply<false>",
        nest=Nest((2,)),
        floor=32 * 4 * 3 * 4,
        dynamic=4 * tasks * 260,
    )
    # 4 tasks a turn, 2 turns for 4 columns of a lane.
    yield Entry("combine_task_gradients, T 8", "combine", nest=Nest((2,), beside=0), floor=32 * 16 * (4 + 0.5))


ENTRIES: tuple[Entry, ...] = tuple(_all())
#: Published kernels, and each as an entry.
CALIBRATION = tuple(
    (published, Entry(published.name, published.launches()[0].kernel.__name__, published.launches))
    for published in calibration.CALIBRATION
)
