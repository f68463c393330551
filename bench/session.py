"""What the benchmarks of `pytest bench` share: a device, its rates, what is right on it, and the data at hand."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from umda_fast import ops
from umda_fast.heap import settle_heap
from umda_fast.model import UMDA
from umda_fast.parity import run_parity
from umda_fast.parity.case import Case as ParityCase
from umda_fast.parity.case import dtype_name
from umda_fast.parity.cases import all_cases

from . import training_step
from .machine import PRODUCTS, measure_rates
from .measure import Contender, make_timer
from .sections import BACKENDS, STEP, compiling_contenders, directions, place_on
from .sensors import Reading, Sensors, processor_clock
from .workloads import COMPILED, OURS, WORKLOADS, Floor, Place, Problem

Record = dict[str, Any]
#: An operation and its size, or the training step and its instances.
Key = tuple[str, Any]

#: Repetitions at most: more say nothing more, and every one is written to `--benchmark-json`.
MOST_ROUNDS = 500
#: In which dtypes an operation is checked before it is timed: those it is timed in.
CHECKED = {"cpu": (torch.float32,), "cuda": (torch.bfloat16, torch.float32)}
#: Contenders of a training step that are compiled, at one size.
COMPILED_STEPS = (training_step.OURS_COMPILED, training_step.COMPOSED_COMPILED)


@dataclass(frozen=True)
class Case:
    """What one benchmark is: its place in `WORKLOADS`, and whose turn it is."""

    op: str  #: or `STEP`
    size: Any
    direction: str  #: forward or backward; of a training step: step
    contender: str


@dataclass(frozen=True)
class Group:
    """Contenders on the same data."""

    title: str
    contenders: Mapping[str, Contender]
    absent: Mapping[str, str]  #: who is not there, and why
    facts: Record  #: of all of them, for `extra_info`
    served: Any  #: the backend that served ours; of a training step, by operation
    floor: Floor | None = None  #: None: nobody has counted it


def all_cases_of(profile: str) -> list[Case]:
    """Every operation and the training step, at the sizes of ``profile`` (quick, cpu or cuda)."""
    cases = []
    for op, workload in WORKLOADS.items():
        # Who contends, and in which passes, is asked of the smallest problem there is.
        problem = workload.make(workload.quick[0], Place(torch.device("cpu"), torch.float32))
        names = [name for name in (*problem.contenders, *problem.absent, *problem.late) if name != COMPILED]
        sizes: Sequence[Any] = getattr(workload, profile)
        for size in sizes:
            contend = list(names)
            if size == sizes[workload.compiled_size] and problem.compiled is not None:
                contend.append(COMPILED)
            for direction in ("forward",) if problem.backward is None else ("forward", "backward"):
                cases += [Case(op, size, direction, name) for name in contend]
    for n in training_step.SIZES[profile]:
        contend = training_step.contenders_at(n)
        if n == training_step.COMPILED_SIZES[profile]:
            contend += COMPILED_STEPS
        cases += [Case(STEP, n, "step", name) for name in contend]
    return cases


class Session:
    """One run of ``pytest bench`` on one device.

    Args:
        device: a CPU or CUDA device.
        quick: tiny sizes.
        least_rounds, seconds: repetitions of a benchmark at least, and what they may take where that allows more.
    """

    def __init__(self, device: torch.device, quick: bool, least_rounds: int, seconds: float) -> None:
        self.device = device
        self.quick = quick
        self.profile = "quick" if quick else device.type
        self.least_rounds = least_rounds
        self.seconds = seconds
        self.timer = make_timer(device, held=False)
        self.shares: list[tuple[str, str, float]] = []  #: of the floor: group, contender, share
        self._verdicts: dict[str, str | None] = {}
        self._held: tuple[Key, dict[str, Group]] | None = None

    @cached_property
    def heap(self) -> str:
        """The heap of a training, set before anything is timed: keep or default."""
        return settle_heap()

    @cached_property
    def rates(self) -> dict[str, float]:
        """Bytes and FLOP per second of this device (`measure_rates`), measured once."""
        products = ("float32",) if self.device.type == "cpu" else PRODUCTS  # which floors there can ask for
        found = measure_rates(make_timer(self.device), self.device, self.profile, products)
        return {name: rate for name, rate in found.items() if name != "measured"}

    @cached_property
    def cases(self) -> list[ParityCase]:
        """All that is held to the reference."""
        return all_cases()

    @cached_property
    def model(self) -> UMDA:
        """Whose training step is timed."""
        return training_step.make_model(self.device, training_step.input_width(self.quick), self.quick)

    def wrong(self, op: str) -> str | None:
        """Why ``op`` must not be timed, as one line; None where it is right, or served by the reference alone."""
        if op == STEP:  # computes with all of them
            return next((found for other in WORKLOADS if (found := self.wrong(other)) is not None), None)
        if op not in self._verdicts:
            kind = self.device.type
            cases = [case for case in self.cases if case.op == op]
            judged = run_parity(str(self.device), backends=BACKENDS[kind], cases=cases, dtypes=CHECKED[kind])
            unchecked = f"{op}: no case of parity checks it; it is not timed"
            self._verdicts[op] = _failure(self.device, judged["rows"]) if cases else unchecked
        return self._verdicts[op]

    def group(self, case: Case) -> Group:
        """Whom ``case`` belongs to. Its data are kept until another operation or size is asked for."""
        key = (case.op, case.size)
        if self._held is None or self._held[0] != key:
            self.release()  # before the next are made
            made = self._step(case.size) if case.op == STEP else self._operation(case.op, case.size)
            self._held = key, made
        return self._held[1][case.direction]

    def release(self) -> None:
        """Lets go of the data at hand, and of what was compiled for them."""
        self._held = None
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        if not self.quick:  # looking for what nobody holds takes longer than tiny sizes do
            self.timer.free()

    def _operation(self, op: str, size: Any) -> dict[str, Group]:
        problem: Problem = WORKLOADS[op].make(size, place_on(self.device))
        problem.contenders[OURS](*problem.leaves)
        served = ops.backends_used()[op]
        functions = {**problem.contenders, **compiling_contenders(problem, self.profile)}
        facts = {"op": op, "dtype": dtype_name(problem.dtype), "shape": problem.shape}
        return {
            direction: Group(
                f"{op} {direction}, {problem.shape}",
                {contender.name: contender for contender in contenders},
                problem.absent,
                {**facts, "pass": direction, "bytes": floor.bytes, "flops": floor.flops},
                served,
                floor,
            )
            for direction, floor, contenders in directions(problem, functions)
        }

    def _step(self, n: int) -> dict[str, Group]:
        training_step.allow_several_backwards()
        batch = training_step.make_batch(n, self.device, training_step.input_width(self.quick))
        makers = training_step.trainees(self.model, "eager" if self.quick else None)
        makers[OURS]().step(batch)
        facts = {
            "op": STEP,
            "pass": "step",
            "shape": f"{n:,} instances",
            "resident_bytes": training_step.resident(self.model, batch),
        }
        contenders = {name: training_step.contender(name, make, batch) for name, make in makers.items()}
        return {"step": Group(f"{STEP}, {n:,} instances", contenders, {}, facts, ops.backends_used())}

    def time(self, benchmark: Any, group: Group, name: str) -> None:
        """One contender by pytest-benchmark's fixture, and what its figure means in `extra_info`; once and not timed
        with `--benchmark-disable`."""
        contender = group.contenders[name]
        kept: list[Any] = []

        def prepare() -> None:
            kept.clear()
            kept.append(contender.prepare())
            self.timer.scratch.zero_()
            self.timer.synchronize()

        def run() -> None:
            contender.run(kept[0])
            self.timer.synchronize()

        benchmark.group = group.title
        if not benchmark.enabled:
            benchmark.pedantic(run, setup=prepare)
            return
        conditions = {
            "device": str(self.device),
            "backend": group.served if name == OURS else None,
            "threads": torch.get_num_threads(),
            "heap": self.heap,
            "load": os.getloadavg()[0],
            "rates": self.rates,
        }
        prepare()
        run()  # compiles, and allocates what it keeps
        begin = time.perf_counter()
        prepare()
        run()
        fitting = int(self.seconds / max(time.perf_counter() - begin, 1e-9))
        benchmark.pedantic(run, setup=prepare, rounds=max(self.least_rounds, min(MOST_ROUNDS, fitting)))
        benchmark.extra_info |= {**group.facts, **conditions, "clocks": self._clocks()}
        if group.floor is not None:
            median = benchmark.stats.stats.median
            least = group.floor.seconds(self.rates)
            rate, unit = group.floor.rate(median, self.rates)
            benchmark.extra_info |= {"floor_seconds": least, "share": least / median, "rate": rate, "rate_unit": unit}
            self.shares.append((group.title, name, least / median))

    def _clocks(self) -> Reading:
        return Sensors(self.device).read() if self.device.type == "cuda" else processor_clock()


def _failure(device: torch.device, rows: Sequence[Record]) -> str | None:
    row = next((row for row in rows if row["verdict"] == "fail"), None)
    if row is None:
        return None
    said = row["detail"] or f"{row['tensor']} errs by {row['error']:.3g}, allowed {row['allowed']:.3g}"
    where = f"{row['backend']}, {row['dtype']}, {row['shape']}, {row['pass']}"
    return f"{row['op']} is wrong on {device} and is not timed: {where}: {said}"
