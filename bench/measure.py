"""Contenders timed in turn on one device, past its caches; what cannot run becomes a line, never a crash."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sensors import Reading, Sensors, typical

#: Repetitions of a contender: at least, at most.
ROUNDS = (5, 30)
QUICK_ROUNDS = (2, 3)
#: Seconds for which a stream is held before what is timed: at first, at most.
HOLD = (5e-4, 2e-2)
#: Seconds that the least number of repetitions may take even when the clock has run out, by compiling for example.
PATIENCE = 2.0


class Timer:
    """Times a call on the CPU. `CudaTimer` replaces what differs on a GPU, and nothing else does."""

    def __init__(self, device: torch.device, scratch: int = 1 << 20) -> None:
        self.device = device
        #: Writing it drives everything else out of the caches.
        self.scratch = torch.zeros(scratch, dtype=torch.uint8, device=device)
        #: What the sensors said during the calls since somebody looked, and calls that the host was too slow for.
        self.readings: list[Reading] = []
        self.late = 0

    def __call__(self, run: Callable[[Any], object], state: Any) -> float:
        """Seconds of ``run(state)``, its data not in any cache."""
        self.scratch.zero_()
        begin = time.perf_counter()
        run(state)
        return time.perf_counter() - begin

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked for."""

    def memory(self) -> int | None:
        """Bytes of the device that tensors hold now; None where nobody counts."""
        return None

    def reset_peak(self) -> None:
        """Begin to watch for the peak."""

    def peak(self) -> int | None:
        """Most bytes that tensors held since `reset_peak`."""
        return None

    def free(self) -> None:
        """Give back what nobody holds any more."""
        gc.collect()


class CudaTimer(Timer):
    """The same by CUDA events on the current stream, where work is asynchronous and memory is counted.

    Python needs tens of microseconds to launch what is timed, during which the device would stand idle behind the first
    event. So the stream is held before that event, long enough for everything behind it to be waiting there already;
    how long is learnt, from calls during which the hold ran out.

    Args:
        device: a CUDA device.
        held: False times as a user has it, the host's part included where the device waits for it.
    """

    def __init__(self, device: torch.device, held: bool = True) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        super().__init__(device, 4 * max(cache, 32 << 20))
        self.sensors = Sensors(device)
        self.hold = HOLD[0] if held else 0.0
        self.cycles_per_second = self._cycles_per_second() if held else 0.0

    def __call__(self, run: Callable[[Any], object], state: Any) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        self.scratch.zero_()
        if self.hold:
            torch.cuda._sleep(int(self.hold * self.cycles_per_second))
        begin.record()
        run(state)
        late = bool(self.hold) and begin.query()  # passed already: the device ran while Python still launched
        end.record()
        self.readings.append(self.sensors.read())
        self.synchronize()
        if late:
            self.late += 1
            self.hold = min(2 * self.hold, HOLD[1])
        return float(begin.elapsed_time(end)) / 1e3

    def _cycles_per_second(self) -> float:
        """By the clock at which a held stream counts."""
        seconds, cycles = 0.0, 1 << 20
        for _ in range(3):  # the first also loads the kernel
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            self.synchronize()
            seconds = float(begin.elapsed_time(end)) / 1e3
        return cycles / seconds

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory(self) -> int | None:
        return torch.cuda.memory_allocated(self.device)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def make_timer(device: torch.device, held: bool = True) -> Timer:
    """The timer of ``device``; ``held``: of what a GPU does, without the host's part."""
    return CudaTimer(device, held) if device.type == "cuda" else Timer(device)


@dataclass(frozen=True)
class Contender:
    """What is timed: ``run`` of what ``prepare``, which is not timed, made anew for every repetition."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


@dataclass
class Clock:
    """The time that a part of the suite may take."""

    seconds: float
    begin: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        """Seconds that are left, possibly below 0."""
        return self.seconds - (time.monotonic() - self.begin)

    def share(self, part: float) -> "Clock":
        """A clock of its own for ``part`` of what is left."""
        return Clock(max(0.0, self.left) * part)


def summary(times: Sequence[float]) -> dict[str, Any]:
    """Median, least and quantiles of seconds, and every repetition."""
    ordered = torch.tensor(sorted(times), dtype=torch.float64)
    q10, q25, q75, q90 = torch.quantile(ordered, torch.tensor([0.1, 0.25, 0.75, 0.9], dtype=torch.float64)).tolist()
    return {
        "median": statistics.median(times),
        "min": min(times),
        "q10": q10,
        "q25": q25,
        "q75": q75,
        "q90": q90,
        "repetitions": list(times),
    }


def line(name: str, status: str, detail: str = "") -> dict[str, Any]:
    """The record of a contender that was not timed."""
    return {"name": name, "status": status, "detail": detail, "seconds": None, "peak_bytes": None}


def explain(error: BaseException) -> tuple[str, str]:
    """Status and detail of a contender that raised."""
    text = next((part.strip() for part in str(error).splitlines() if part.strip()), "")
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory", text[:300]
    return "failed", f"{type(error).__name__}: {text}"[:300]


def compare(
    contenders: Sequence[Contender],
    timer: Timer,
    clock: Clock,
    *,
    rounds: tuple[int, int] = ROUNDS,
    expected: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Time the contenders, all of them in each of several rounds.

    Args:
        contenders: in the order in which they take turns.
        timer: of their device.
        clock: what may be spent; as many rounds as fit into it, within ``rounds``.
        rounds: least and most repetitions; fewer, but one, where the clock runs out.
        expected: seconds that a contender will take, where that is known: one that would overrun is left out.

    Returns:
        One record per contender: ``name``, ``status`` (``timed``, ``out of memory``, ``failed`` or ``skipped``),
        ``detail``, ``seconds`` (`summary`, or None), ``peak_bytes``, by which the device's memory grew (or None), and
        of one that was timed ``sensors`` (medians of `Sensors.read`, or None) and ``late``, repetitions in which the
        device waited for the host.
    """
    expected = expected or {}
    records: dict[str, dict[str, Any]] = {}
    costs: dict[str, float] = {}  # of one repetition, its preparation included
    for contender in contenders:
        name, likely = contender.name, expected.get(contender.name, 0.0)
        if 3 * likely > max(PATIENCE, clock.left):
            records[name] = line(name, "skipped", f"the time budget: a call would take about {likely:.2g} s")
            continue
        try:
            contender.run(contender.prepare())  # compiles, and allocates what it keeps
            timer.synchronize()
            before = timer.memory()
            timer.reset_peak()
            begin = time.perf_counter()
            timer(contender.run, contender.prepare())
            costs[name] = time.perf_counter() - begin
            peak = timer.peak()
            grown = None if peak is None or before is None else peak - before
            records[name] = {**line(name, "timed"), "peak_bytes": grown}
        except Exception as error:
            records[name] = line(name, *explain(error))
            del error  # its traceback holds tensors
            timer.free()
    running = [contender for contender in contenders if contender.name in costs]
    times: dict[str, list[float]] = {contender.name: [] for contender in running}
    readings: dict[str, list[Reading]] = {contender.name: [] for contender in running}
    late = dict.fromkeys(times, 0)
    count = rounds[0]
    if costs:
        count = min(rounds[1], max(rounds[0], int(clock.left / max(sum(costs.values()), 1e-6))))
    begin = time.monotonic()
    for turn in range(count):
        if turn and clock.left < 0 and (turn >= rounds[0] or time.monotonic() - begin > PATIENCE):
            break
        for contender in list(running):
            timer.readings, timer.late = [], 0
            try:
                times[contender.name].append(timer(contender.run, contender.prepare()))
                readings[contender.name] += timer.readings
                late[contender.name] += timer.late
            except Exception as error:
                records[contender.name] = line(contender.name, *explain(error))
                running.remove(contender)
                del error
                timer.free()
    for contender in running:
        name = contender.name
        records[name] |= {"seconds": summary(times[name]), "sensors": typical(readings[name]), "late": late[name]}
    return [records[contender.name] for contender in contenders]


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested lists, tuples and mappings."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return sum(x.nbytes for x in leaves if isinstance(x, Tensor))
