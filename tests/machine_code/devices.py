"""The three GPUs that shares are predicted for: what a multiprocessor can do in a cycle, and how fast a copy is.

Sources. Counts, clocks, memory and matrix rates: NVIDIA's data sheets and architecture papers of A100, H100/H200 and
B200. Results per cycle of each kind of instruction: table "Throughput of Native Arithmetic Instructions" of the CUDA
C++ Programming Guide. Latencies without load: Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU
Architecture via Microbenchmarking", 2024 (memory 466 cycles on A100 and 479 on H100, second-level cache 262 and 263).

Assumed, and not published by the maker: `COPY`, `LOADED`, that B200 has H200's latencies and cache, and how fast B200
runs tensor instructions of one warp.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["DEVICES", "SCHEDULERS", "SHARED_BYTES", "WARP", "Device"]

WARP = 32
#: Of a multiprocessor; each issues one instruction of a warp per cycle and has a tensor core.
SCHEDULERS = 4
#: Bytes of shared memory that a multiprocessor serves per cycle.
SHARED_BYTES = 128.0
#: Share of the memory's nominal rate that a copy reaches, read and written together.
COPY = 0.9
#: Latency of memory that is kept busy, in times of that of idle memory.
LOADED = 1.5


@dataclass(frozen=True)
class Device:
    """A GPU. Rates are of one multiprocessor and cycle."""

    name: str
    architecture: int  #: compute capability, 80 for 8.0
    multiprocessors: int
    hertz: float  #: boost clock
    memory: float  #: bytes/s, nominal
    tensor: float  #: bfloat16 FLOP of the tensor cores, dense
    warp_tensor: float  #: the same through instructions of a single warp (HMMA), which later chips run slower
    float_lanes: int  #: float32 results
    shared_bytes: int  #: shared memory that programs may have, of which each takes `PROGRAM_SHARED` more
    memory_latency: float  #: cycles, without load
    cache_latency: float  #: cycles, of the second-level cache
    integer_lanes: int = 64
    special_lanes: int = 16
    memory_lanes: int = 32  #: lanes whose address is served, shared memory included
    cache_bytes: float = 5120.0  #: of the second-level cache, in all
    registers: int = 65536
    warps: int = 64
    programs: int = 32

    @property
    def copy_bytes(self) -> float:
        """Bytes, read and written, that a copy moves for each multiprocessor and cycle."""
        return COPY * self.memory / (self.multiprocessors * self.hertz)

    @property
    def latency(self) -> float:
        """Cycles that a load from memory takes while a copy runs."""
        return LOADED * self.memory_latency

    def lanes(self) -> Mapping[str, float]:
        """Lanes per cycle by pipe."""
        return {
            "issue": SCHEDULERS * WARP,
            "fma": self.float_lanes,
            "alu": self.integer_lanes,
            "special": self.special_lanes,
            "memory": self.memory_lanes,
        }

    def resident(self, warps: int, registers: int, shared: int) -> int:
        """How many programs of ``warps`` warps a multiprocessor holds; registers per thread, shared memory in bytes
        per program. Registers are handed out 256 to a warp."""
        per_warp = -(-registers * WARP // 256) * 256
        return min(
            self.programs,
            self.warps // warps,
            self.registers // (per_warp * warps),
            self.shared_bytes // (shared + PROGRAM_SHARED),
        )


#: Bytes of shared memory that the system keeps for every program.
PROGRAM_SHARED = 1024

DEVICES = {
    device.architecture: device
    for device in (
        Device("A100", 80, 108, 1.41e9, 2.039e12, 2048, 2048, 64, 164 * 1024, 466, 262),
        # Luo et al.: instructions of one warp reach 63 % of the rate of those of four.
        Device("H200", 90, 132, 1.98e9, 4.8e12, 4096, 0.63 * 4096, 128, 228 * 1024, 479, 263),
        Device("B200", 100, 148, 1.965e9, 8.0e12, 8192, 2048, 128, 228 * 1024, 479, 263),
    )
}
