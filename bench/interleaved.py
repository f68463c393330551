"""Timing of several ways to compute the same thing, in turn, beside the machine's rates of the same run."""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Mapping

import torch

Contender = Callable[[], object]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's mallopt


def arguments(description: str) -> argparse.Namespace:
    """Options that every benchmark here has; the threads and the heap are set before it returns.

    ``--heap keep`` tells glibc to keep freed pages. By default it returns every large temporary to the
    system and has it faulted in again, which flatters code that makes few temporaries.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--heap", choices=["default", "keep"], default="keep")
    parser.add_argument("--size", type=float, default=1.0, help="factor on the workloads' instances")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.heap == "keep":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    print(f"torch {torch.__version__}, {options.threads} threads, heap: {options.heap}")
    print(f"sgemm {sgemm_rate() / 1e9:.0f} GFLOP/s, copy {copy_rate() / 1e9:.1f} GB/s (read + written)")
    return options


def medians(contenders: Mapping[str, Contender], repeats: int) -> dict[str, float]:
    """Median seconds of each contender over ``repeats`` rounds, in each of which all take their turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():  # warm up
        contender()
    for _ in range(repeats):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def report(title: str, seconds: Mapping[str, float], notes: Mapping[str, str] | None = None) -> None:
    """One line per contender; the first is ours, to which the others are related."""
    print(f"\n{title}")
    ours = next(iter(seconds.values()))
    for name, value in seconds.items():
        note = f"  {notes[name]}" if notes and name in notes else ""
        print(f"  {name:<36} {value * 1e3:10.1f} ms {value / ours:7.2f}x{note}")


def best_of(contender: Contender, repeats: int) -> float:
    """Least seconds of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        contender()
        times.append(time.perf_counter() - start)
    return min(times)


def sgemm_rate() -> float:
    """FLOP/s of torch's float32 matrix product, 2048 x 2048."""
    a = torch.randn(2048, 2048)
    out = torch.empty_like(a)
    return 2 * 2048**3 / best_of(lambda: torch.mm(a, a, out=out), 8)


def copy_rate() -> float:
    """Bytes per second of a copy of 200 MB, reads and writes together."""
    a = torch.ones(50_000_000)
    out = torch.ones_like(a)
    return 2 * a.nbytes / best_of(lambda: out.copy_(a), 8)
