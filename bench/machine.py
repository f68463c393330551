"""The machine a benchmark runs on: what it is, with which software, how fast it copies and multiplies."""

import subprocess
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from umda_fast.runtime import provenance

from .measure import Timer, summary

Record = dict[str, Any]


def machine(device: torch.device) -> Record:
    """Name and sizes of the device and its host."""
    found: Record = {
        **provenance.machine(),
        "device": str(device),
        "name": provenance.processor(),
        "capability": None,
        "multiprocessors": None,
        "memory_bytes": None,
        "l2_bytes": None,
        "driver": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "capability": f"sm_{properties.major}{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "driver": driver(),
        }
    return found


def driver() -> str | None:
    """Version of the GPU's driver, None where it cannot be asked."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip().split("\n")[0]


#: Matrix rates: dtype, and the precision that `torch.set_float32_matmul_precision` is asked for.
PRODUCTS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def measure_rates(timer: Timer, device: torch.device, profile: str, products: Iterable[str] = PRODUCTS) -> Record:
    """Copy (bytes/s, read + written) and matrix products (FLOP/s) of this device, medians.

    Args:
        products: which of `PRODUCTS`; a CPU without instructions for bfloat16 takes minutes for that one.
    """
    elements = {"quick": 1 << 18, "cpu": 1 << 26, "cuda": 1 << 28}[profile]
    side = {"quick": 128, "cpu": 2048, "cuda": 8192}[profile]
    rounds = 3 if profile == "quick" else 20
    source = torch.randn(elements, device=device)
    target = torch.empty_like(source)
    nbytes = 2 * source.nbytes
    measured = {"copy": [timer(_copy, (source, target)) for _ in range(rounds + 2)][2:]}
    del source, target
    timer.free()
    a = torch.randn(side, side, device=device)
    for name in products:
        dtype, precision = PRODUCTS[name]
        x = a.to(dtype)
        out = torch.empty_like(x)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            times = [timer(_square, (x, out)) for _ in range(rounds // 2 + 2)]
        finally:
            torch.set_float32_matmul_precision(before)
        measured[name] = times[2:]
    summaries = {name: summary(times) for name, times in measured.items()}
    rates: Record = {name: 2.0 * side**3 / found["median"] for name, found in summaries.items()}
    rates["copy"] = nbytes / summaries["copy"]["median"]
    return {**rates, "measured": summaries}


def _copy(pair: tuple[Tensor, Tensor]) -> None:
    pair[1].copy_(pair[0])


def _square(pair: tuple[Tensor, Tensor]) -> None:
    torch.mm(pair[0], pair[0], out=pair[1])
