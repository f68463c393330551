"""What every benchmark here shares: contenders timed in turn, beside the machine's own rates of the same run.

A benchmark is ``python -m bench.bench_<stem> [--threads N] [--repeats N] [--heap keep|default] [--size F]
[--json FILE]``. It checks parity first and times nothing that is wrong.
"""

import argparse
import atexit
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umda_fast import profiling
from umda_fast.heap import keep_freed_pages
from umda_fast.parity.rule import allowed_error, error_of
from umda_fast.runtime.provenance import processor

Contender = Callable[[], object]

_record: dict[str, Any] = {"tables": []}
_clock: Callable[[], float] = time.perf_counter


class Seconds(float):
    """A median of seconds that also knows the least of them."""

    least: float

    def __new__(cls, times: Sequence[float]) -> "Seconds":
        self = super().__new__(cls, statistics.median(times))
        self.least = min(times)
        return self


def parser(description: str) -> argparse.ArgumentParser:
    """Options that every benchmark has; add more, then pass it to `start`."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--threads", type=int, default=torch.get_num_threads())
    result.add_argument("--repeats", type=int, default=7)
    result.add_argument("--heap", choices=["default", "keep"], default="keep")
    result.add_argument(
        "--clock",
        choices=["wall", "cpu"],
        default="wall",
        help="cpu: processor time, for a machine that others use as well; with one thread only",
    )
    result.add_argument("--size", type=float, default=1.0, help="factor on the workloads' instances")
    result.add_argument("--json", type=Path, help="write every table, with the machine's rates, to this file")
    return result


def start(options: argparse.Namespace) -> argparse.Namespace:
    """Set threads and heap, measure the machine, print both.

    ``--heap keep`` tells glibc to keep freed pages. By default it returns every large temporary to the
    system and has it faulted in again, which flatters code that makes few temporaries.
    """
    global _clock
    if options.clock == "cpu":
        if options.threads != 1:
            raise SystemExit("--clock cpu adds up the time of all threads: it needs --threads 1")
        _clock = time.process_time
    torch.set_num_threads(options.threads)
    if options.heap == "keep" and not keep_freed_pages():
        raise SystemExit("--heap keep needs glibc; use --heap default")
    options.sgemm, options.copy = sgemm_rate(), copy_rate()
    print(f"torch {torch.__version__}, {options.threads} threads, heap: {options.heap}, {options.clock} time")
    print(f"sgemm {options.sgemm / 1e9:.0f} GFLOP/s, copy {options.copy / 1e9:.1f} GB/s (read + written)")
    _record.update(
        torch=torch.__version__,
        machine=processor(),
        load=os.getloadavg()[0],
        **{name: getattr(options, name) for name in ("threads", "repeats", "heap", "clock", "size", "sgemm", "copy")},
    )
    if options.json is not None:
        atexit.register(lambda: options.json.write_text(json.dumps(_record, indent=1) + "\n"))
    return options


def arguments(description: str) -> argparse.Namespace:
    """`parser`, parsed, and `start`."""
    return start(parser(description).parse_args())


def medians(contenders: Mapping[str, Contender], repeats: int) -> dict[str, Seconds]:
    """Seconds of each contender over ``repeats`` rounds, in each of which all take their turn."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():  # warm up
        contender()
    for _ in range(repeats):
        for name, contender in contenders.items():
            begin = _clock()
            contender()
            times[name].append(_clock() - begin)
    return {name: Seconds(values) for name, values in times.items()}


def report(title: str, seconds: Mapping[str, Seconds], notes: Mapping[str, str] | None = None) -> None:
    """One line per contender: median, least, and what ours, the first, gains on it."""
    print(f"\n{title}")
    ours = next(iter(seconds.values()))
    rows = []
    for name, value in seconds.items():
        note = notes[name] if notes and name in notes else ""
        print(f"  {name:<40} {value * 1e3:9.1f} ms (least {value.least * 1e3:9.1f}) {value / ours:7.2f}x  {note}")
        rows.append({"name": name, "median": float(value), "least": value.least, "ratio": value / ours, "note": note})
    _record["tables"].append({"title": title, "rows": rows})


def traffic_note(bytes_moved: float, seconds: Seconds, copy: float) -> str:
    """Rate at which the least possible traffic moved, and its share of the copy rate."""
    rate = bytes_moved / seconds
    return f"{rate / 1e9:6.1f} GB/s of least traffic, {rate / copy:4.0%} of copy"


def require_parity(
    what: str, ours: Sequence[Tensor], exact: Sequence[Tensor], own: Sequence[Tensor], factor: float = 3
) -> None:
    """Exit unless ours err at most ``factor`` times as much against float64 as PyTorch's own composition."""
    for i, (o, e, c) in enumerate(zip(ours, exact, own, strict=True)):
        error, allowed = error_of(o, e), allowed_error(e, c, o.dtype, factor)
        if not error <= allowed:
            raise SystemExit(f"{what}: result {i} errs by {error:.3g}, allowed {allowed:.3g}; nothing was timed")


def peak_growth(module: str, contender: str, options: argparse.Namespace) -> int:
    """Bytes by which ``python -m module --peak-of contender`` grows while it runs the contender once."""
    command = [sys.executable, "-m", module, "--peak-of", contender, "--size", str(options.size)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def print_peak_growth(contender: Contender) -> None:
    """The other end of `peak_growth`."""
    before = _peak()
    contender()
    print(_peak() - before)


def _peak() -> int:
    """Most bytes this process ever held. Not getrusage's, which a process takes over from its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def best_of(contender: Contender, repeats: int) -> float:
    """Least seconds of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        begin = _clock()
        contender()
        times.append(_clock() - begin)
    return min(times)


def sgemm_rate() -> float:
    """FLOP/s of torch's float32 matrix product, 2048 x 2048."""
    a = torch.randn(2048, 2048)
    out = torch.empty_like(a)
    return 2 * 2048**3 / best_of(lambda: torch.mm(a, a, out=out), 8)


def copy_rate() -> float:
    """Bytes per second of a copy in memory, as `umda-fast profile` measures it."""
    return profiling.copy_rate(torch.device("cpu"))
