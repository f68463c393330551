"""The parts of the GPU suite, each of which can run in a process of its own and emits records as it goes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from umda_fast import ops
from umda_fast.extras import MissingExtraError
from umda_fast.parity import DTYPES, run_parity
from umda_fast.parity.case import dtype_name
from umda_fast.parity.cases import all_cases

from . import capture, step_ledger, training_step
from .machine import machine, measure_rates
from .measure import QUICK_ROUNDS, ROUNDS, Clock, Contender, Timer, compare, explain, line, make_timer
from .workloads import COMPILED, OURS, WORKLOADS, Floor, Place, Problem, untiled

Record = dict[str, Any]
Emit = Callable[[Record], None]

#: Native backends by device.
BACKENDS = {"cpu": ("cpp",), "cuda": ("triton", "cuda")}
#: Seconds by which a section may overrun its time before its process is ended.
GRACE = 60.0
#: Seconds that have to be left to begin to compile a contender.
COMPILING = 25.0
STEP = "training_step"


@dataclass
class Task:
    """What one section is asked to do; travels to its process as JSON."""

    section: str
    device: str
    profile: str
    seconds: float
    ops: list[str] = field(default_factory=list)
    rates: dict[str, float] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)  #: of parity; empty: all


def measure_machine(task: Task, emit: Emit) -> None:
    """Who this is and how fast it copies and multiplies."""
    device = torch.device(task.device)
    emit({"kind": "machine", "value": machine(device)})
    rates = measure_rates(make_timer(device), device, task.profile)
    emit({"kind": "rates", "value": rates})


def check_parity(task: Task, emit: Emit) -> None:
    """Every case of the operations, on every native backend of the device; each case's rows when it is done."""
    dtypes = [getattr(torch, name) for name in task.dtypes] or DTYPES
    backends = BACKENDS[torch.device(task.device).type]
    missing = set()  # a backend that cannot serve an operation is said once
    for case in all_cases():
        # An operation on nothing but float32 has one dtype, and runs with it.
        if case.op not in task.ops or not (case.storage or torch.float32 in dtypes):
            continue
        for row in run_parity(task.device, backends=backends, cases=[case], dtypes=dtypes)["rows"]:
            known = (case.op, row["backend"], row["verdict"])
            if row["verdict"] in ("pass", "fail") or known not in missing:
                emit({"kind": "parity", "value": {**row, "op": case.op}})
            missing.add(known)


def time_operations(task: Task, emit: Emit) -> None:
    """Every size of the operations, forward and backward."""
    device, clock = torch.device(task.device), Clock(task.seconds)
    timer = make_timer(device)
    wanted = [op for op in task.ops if op not in task.refused]
    for op in task.ops:
        if op in task.refused:
            emit({"kind": "note", "value": f"{op}: not timed, it is not known to be right on this device"})
    for place, op in enumerate(wanted):
        time_operation(op, task, timer, clock.share(1 / (len(wanted) - place)), emit)
    # Only then, and at the largest size only: compiling takes longer than all else.
    for op in wanted:
        if clock.left > COMPILING or task.profile == "quick":
            time_operation(op, task, timer, clock, emit, compiling=True)
            torch.compiler.reset()
            timer.free()
        else:
            emit({"kind": "note", "value": f"{op}: {COMPILED}: left out, too little time to compile in"})


class _Steps:
    """Whole training steps of one model, on bags of any size."""

    def __init__(self, task: Task, emit: Emit) -> None:
        self.device, self.quick, self.emit = torch.device(task.device), task.profile == "quick", emit
        self.timer = make_timer(self.device, held=False)
        self.width = training_step.input_width(self.quick)
        self.model = training_step.make_model(self.device, self.width, self.quick)
        self.makers = training_step.trainees(self.model, "eager" if self.quick else None)
        self.last: dict[str, tuple[float, int]] = {}

    def measure(self, n: int, names: Sequence[str], clock: Clock, missing: Mapping[str, str]) -> None:
        """Time ``names`` on one bag of ``n``, emit the record."""
        try:
            batch = training_step.make_batch(n, self.device, self.width)
        except Exception as error:
            self.emit({"kind": "note", "value": f"{STEP}, {n:,} instances: {': '.join(explain(error))}"})
            return
        contenders = [training_step.contender(name, self.makers[name], batch) for name in names]
        expected = {name: seconds * growth(n, before) for name, (seconds, before) in self.last.items()}
        rounds = QUICK_ROUNDS if self.quick else ROUNDS
        records = compare(contenders, self.timer, clock, rounds=rounds, expected=expected)
        self.last |= {x["name"]: (x["seconds"]["median"], n) for x in records if x["seconds"]}
        records += [line(name, "missing", why) for name, why in missing.items()]
        resident = training_step.resident(self.model, batch)
        value = {"instances": n, "resident_bytes": resident, "contenders": relative(records)}
        self.emit({"kind": "step", "value": value})
        del batch, contenders
        self.timer.free()

    def largest(self, n: int, clock: Clock) -> None:
        """One step of ours on a bag that has to fit."""
        found: Record = {"instances": n, "status": "timed", "detail": "", "seconds": None, "peak_bytes": None}
        seconds, before = self.last.get(OURS, (0.0, n))
        likely = seconds * growth(n, before)
        if self.device.type == "cpu" and not self.quick:
            found |= {"status": "skipped", "detail": "on a GPU only"}
        elif likely > max(0.0, clock.left) + GRACE / 2:
            found |= {"status": "skipped", "detail": f"the time budget: it would take about {likely:.2g} s"}
        else:
            try:
                batch = training_step.make_batch(n, self.device, self.width)
                found |= training_step.finite_step(self.model, batch, self.timer)
            except Exception as error:
                found["status"], found["detail"] = explain(error)
        self.emit({"kind": "largest", "value": found})


def _refuses(task: Task, emit: Emit) -> bool:
    """A step computes with every operation."""
    if task.refused:
        text = f"{STEP}: not timed, these are not known to be right: {', '.join(task.refused)}"
        emit({"kind": "note", "value": text})
    return bool(task.refused)


def time_step(task: Task, emit: Emit) -> None:
    """A whole training step at several sizes, then the largest bag, once."""
    if _refuses(task, emit):
        return
    steps, clock, sizes = _Steps(task, emit), Clock(task.seconds), training_step.SIZES[task.profile]
    for place, n in enumerate(sizes):
        names, missing = training_step.contenders_at(n), {}
        if training_step.EXACT not in names:
            missing[training_step.EXACT] = f"timed at up to {training_step.EXACT_LIMIT:,} instances"
        steps.measure(n, names, clock.share(0.4 if place < len(sizes) - 1 else 0.6), missing)
    steps.largest(2 * sizes[-1] if steps.quick else training_step.LARGEST, clock)


def time_compiled_step(task: Task, emit: Emit) -> None:
    """The same at one size with compiled contenders, which may take longer to compile than there is time."""
    if task.refused:
        return
    training_step.allow_several_backwards()
    names = [OURS, training_step.OURS_COMPILED, training_step.COMPOSED, training_step.COMPOSED_COMPILED]
    _Steps(task, emit).measure(training_step.COMPILED_SIZES[task.profile], names, Clock(task.seconds), {})


def count_calls(task: Task, emit: Emit) -> None:
    """What a step calls and moves, in every precision, ours beside eager; nothing is timed."""
    if task.refused:
        return
    n, precisions = step_ledger.SIZES[task.profile], step_ledger.PRECISIONS
    hardware = (step_ledger.this_machine(f"this {task.device}", task.rates), *step_ledger.GPUS)
    try:
        ledgers = [
            step_ledger.ledger(n, precision, contender, task.device, hardware)
            for precision in (precisions[:1] if task.profile == "quick" else precisions)
            for contender in (OURS, step_ledger.EAGER)
        ]
    except MissingExtraError as error:
        emit({"kind": "note", "value": f"{STEP}: not counted: {error}"})
        return
    emit({"kind": "ledger", "value": ledgers})


def growth(n: int, before: int) -> float:
    """How many times as long a step may take: the graph compares all pairs of a bag."""
    return (n / before) ** 2


def check_capture(task: Task, emit: Emit) -> None:
    """CUDA graphs, streams, no waiting."""
    device = torch.device(task.device)
    for row in capture.check_all(device, BACKENDS[device.type], set(task.ops) - set(task.refused)):
        emit({"kind": "capture", "value": row})


def compiled(function: Callable[..., Any], profile: str) -> Callable[..., Any]:
    """``function`` under torch.compile as one graph for one size; in a quick run it is only traced."""
    mode: Record = {"backend": "eager"} if profile == "quick" else {}
    made = torch.compile(function, dynamic=False, fullgraph=True, **mode)

    def run(*leaves: Tensor) -> Any:
        with untiled():
            return made(*leaves)

    return run


def compiling_contenders(problem: Problem, profile: str) -> dict[str, Callable[..., Any]]:
    """Those that compile when they are first called; to be timed at one size."""
    found = dict(problem.late)
    if problem.compiled is not None:
        found[COMPILED] = compiled(problem.contenders[problem.compiled], profile)
    return found


def place_on(device: torch.device) -> Place:
    """With the dtype of features that is timed on ``device``."""
    return Place(device, torch.bfloat16 if device.type == "cuda" else torch.float32)


def time_operation(op: str, task: Task, timer: Timer, clock: Clock, emit: Emit, *, compiling: bool = False) -> None:
    """All sizes of one operation, each pass with its part of ``clock``; ``compiling``: ours and the contenders that are
    compiled, at one size."""
    workload = WORKLOADS[op]
    sizes = getattr(workload, task.profile)
    if compiling:
        sizes = (sizes[workload.compiled_size],)
    place = place_on(timer.device)
    last: dict[tuple[str, str], tuple[float, float]] = {}
    for index, size in enumerate(sizes):
        try:
            problem = workload.make(size, place)
            problem.contenders[OURS](*problem.leaves)
            served = ops.backends_used()[op]
        except Exception as error:
            status, detail = explain(error)
            emit(
                {"kind": "broken" if status == "failed" else "note", "value": f"{op}, size {size}: {status}: {detail}"}
            )
            del error
            timer.free()
            continue
        functions = dict(problem.contenders)
        absent = dict(problem.absent)
        if compiling:
            absent, functions = {}, {OURS: functions[OURS], **compiling_contenders(problem, task.profile)}
            if len(functions) == 1:
                return
        passes = list(directions(problem, functions))
        for turn, (direction, floor, contenders) in enumerate(passes):
            least = floor.seconds(task.rates)
            known = {name: value for (where, name), value in last.items() if where == direction}
            records = compare(
                contenders,
                timer,
                clock.share(1 / ((len(sizes) - index) * len(passes) - turn)),
                rounds=QUICK_ROUNDS if task.profile == "quick" else ROUNDS,
                expected={name: seconds * least / before for name, (seconds, before) in known.items()},
            )
            for record in records:
                if record["seconds"]:
                    median = record["seconds"]["median"]
                    last[direction, record["name"]] = (median, least)
                    record["rate"], record["rate_unit"] = floor.rate(median, task.rates)
                    record["share"] = least / median
            records += [line(name, "missing", why) for name, why in absent.items()]
            emit(
                {
                    "kind": "compiled" if compiling else "timing",
                    "value": {
                        "op": op,
                        "pass": direction,
                        "dtype": dtype_name(problem.dtype),
                        "shape": problem.shape,
                        "size": problem.size,
                        "backend": served,
                        "floor": {**asdict(floor), "seconds": least},
                        "contenders": relative(records),
                    },
                }
            )
        del problem, functions, passes, contenders
        timer.free()


def directions(
    problem: Problem, functions: Mapping[str, Callable[..., Any]]
) -> Iterator[tuple[str, Floor, list[Contender]]]:
    """The passes of a problem with their floors. A forward pass records what backward needs, as in training."""

    def forward(function: Callable[..., Any]) -> Callable[[Any], object]:
        return lambda _: function(*problem.leaves)

    yield "forward", problem.forward, [Contender(name, forward(f)) for name, f in functions.items()]
    if problem.backward is None:
        return
    wanted = [x for x in problem.leaves if x.requires_grad]
    like = _outputs(problem.contenders[OURS](*problem.leaves))
    cotangents = [torch.ones_like(x) if x.dim() == 0 else torch.randn_like(x) for x in like]

    def prepare(function: Callable[..., Any]) -> Callable[[], tuple[list[Tensor], list[Tensor]]]:
        def run() -> tuple[list[Tensor], list[Tensor]]:
            outputs = _outputs(function(*problem.leaves))
            return outputs, [c.to(x.dtype) for c, x in zip(cotangents, outputs, strict=True)]

        return run

    def backward(state: tuple[list[Tensor], list[Tensor]]) -> object:
        return torch.autograd.grad(state[0], wanted, state[1], allow_unused=True)

    yield "backward", problem.backward, [Contender(name, backward, prepare(f)) for name, f in functions.items()]


def _outputs(found: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def relative(records: list[Record]) -> list[Record]:
    """Adds ``ratio``, how many times as long as ours a contender takes; fields that nothing set are None."""
    ours = next((x["seconds"]["median"] for x in records if x["name"] == OURS and x["seconds"]), None)
    for record in records:
        ratio = record["seconds"]["median"] / ours if ours and record["seconds"] else None
        record |= {"ratio": ratio} | {key: record.get(key) for key in ("rate", "rate_unit", "share")}
    return records


SECTIONS: dict[str, Callable[[Task, Emit], None]] = {
    "machine": measure_machine,
    "parity": check_parity,
    "timing": time_operations,
    "step": time_step,
    "compiled step": time_compiled_step,
    "ledger": count_calls,
    "capture": check_capture,
}
