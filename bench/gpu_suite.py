"""Everything that only a GPU can show, in one command: is it right there, how fast is it, how far from the limit.

    python -m bench.gpu_suite --out DIR [--device cuda|cpu] [--quick] [--ops OP,OP] [--seconds N]

Parity of every native operation comes first, forward and backward, in every dtype; an operation that fails is not
timed, the rest goes on, and the exit code is 1. Then contenders take turns, caches flushed, CUDA events, medians. On
a GPU every part runs in a process of its own: an operation that crashes or hangs takes nothing else with it. What is
missing, runs out of memory or out of time is a line of the report. ``--device cpu --quick`` tests the script itself.

It writes ``DIR/gpu_suite.json`` and ``DIR/gpu_suite.html``, after every section anew, and on a GPU ``DIR/sections``:
the records of every process as they come, should the suite itself be killed. The JSON (seconds and bytes throughout)::

    schema, versions, commit, time   as of `umda_fast.runtime.provenance`; JSON schema: umda_fast/schemas/bench.json
    machine     as there, and device, name, capability, multiprocessors, memory_bytes, l2_bytes, driver
    run         profile (quick | cpu | cuda), ops, began (UTC), seconds, budget_seconds, heap (keep | default)
    rates       copy (bytes/s, read + written), bfloat16, tf32, float32 (FLOP/s of a matrix product), and the summary
                of each under "measured"
    backends    {native backend of the device: null, or why it cannot be used}
    parity      {op: verdict}: pass | fail | "no native kernel: ..." | "crashed: ..."
    parity_rows the rows of umda_fast.parity.run_parity
    timings     [{op, pass: forward | backward, dtype, shape, size, backend (who served ours),
                  floor: {bytes, flops, seconds, unit}, contenders: [CONTENDER]}]
    steps       [{instances, resident_bytes, contenders: [CONTENDER]}] of a whole training step; the last one again
                at one size, beside compiled contenders
    ledger      [{contender, precision, instances, device, total, blocks, operations, predicted, hardware}]: what a step
                calls and moves, counted, with predicted seconds (`bench/step_ledger.py`); empty where it was left out
    largest     {instances, status, detail, seconds, peak_bytes, finite}: one bag that has to fit
    capture     rows {op, backend, shape, verdict}: CUDA graph capture and replay, side stream, no waiting
    aims        [{aim, target, value, verdict: met | not met | not measured, detail}]
    broken      where ours raised while it was timed
    notes       sections that crashed or were left out, operations without a workload
    passed      the device's native backends are there, parity and capture hold, nothing crashed or broke

    CONTENDER = {name, status: timed | out of memory | failed | skipped | missing, detail, peak_bytes,
                 sensors: {sm_mhz, memory_mhz, watts, celsius} while it ran, or null; late: repetitions in which the
                 device waited for the host (a step is timed with the host's part),
                 seconds: {median, min, q10, q25, q75, q90, repetitions} or null,
                 rate, rate_unit (GB/s | TFLOP/s), share (of the floor, 1 is the limit), ratio (to ours)}
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from umda_fast.heap import settle_heap
from umda_fast.ops import backend_status
from umda_fast.ops._dispatch import reasons_against
from umda_fast.parity import DTYPES
from umda_fast.parity.case import dtype_name
from umda_fast.parity.cases import all_cases
from umda_fast.runtime.provenance import machine, stamped

from .aims import judge
from .brief import brief
from .measure import Clock
from .processes import Here, Processes, run_section
from .report import write_html
from .sections import BACKENDS, STEP, Task
from .workloads import OURS, WORKLOADS

Record = dict[str, Any]

#: Seconds of a whole run.
BUDGETS = {"quick": 50.0, "cpu": 900.0, "cuda": 450.0}
#: Operations that are timed by one process, and its share of the time.
GROUPS: dict[str, tuple[tuple[str, ...], float]] = {
    "cross_view": (
        ("cross_view", "norm_linear", "linear_residual", "gelu_dropout", "dropout_add_norm", "view_fusion"),
        3.0,
    ),
    "cross_view_tokens": (("cross_view_tokens",), 1.2),
    "knn": (("knn",), 1.0),
    "neighbors": (
        ("graph_transpose", "edge_cosine", "neighbor_attention", "neighbor_sum", "smoothness_energy"),
        2.2,
    ),
    "pooling and task gradients": (
        (
            "bag_pool",
            "representation_gram",
            "task_gradient_statistics",
            "combine_task_gradients",
            "linear_weight_gradient",
        ),
        1.6,
    ),
}
STEP_SHARE, COMPILED_SHARE, CAPTURE_SHARE, LEDGER_SHARE = 2.0, 2.5, 0.5, 0.5
#: Seconds of a process that checks one operation; one that hangs is ended at this and the grace, 90 s.
PARITY_SECONDS = 30.0
#: Operations whose kernels are compiled when they are called: a process per dtype, so that none comes near the limit.
COMPILED_OPS = (
    *("cross_view", "cross_view_tokens", "dropout_add_norm", "gelu_dropout", "knn", "linear_residual"),
    *("norm_linear", "view_fusion"),
)


def timed_operations() -> list[str]:
    """Operations that have a workload, and the training step."""
    return [*WORKLOADS, STEP]


def run(
    device: str,
    *,
    quick: bool = False,
    only: Sequence[str] | None = None,
    seconds: float | None = None,
    isolate: bool | None = None,
    folder: Path | None = None,
    save: Callable[[Record], None] = lambda result: None,
    say: Callable[[str], None] = print,
) -> Record:
    """Parity, then everything that may be timed; the result as the module's docstring has it.

    Args:
        device: ``cuda`` or ``cpu``.
        quick: tiny sizes, which test the script.
        only: operations, out of `timed_operations`; None for all.
        seconds: time budget; None for that of the profile.
        isolate: a process per section; None: on a GPU.
        folder: where isolated sections leave their records as they come; None: nowhere.
        save: called with the result so far after every section, of parity after every process.
        say: called with a line about every section.

    Raises:
        ValueError: an unknown operation or device.
    """
    kind = torch.device(device).type
    if kind not in BACKENDS:
        raise ValueError(f"device: expected cuda or cpu, got {device!r}")
    unknown = sorted(set(only or ()) - set(timed_operations()))
    if unknown:
        raise ValueError(f"ops: expected some of {', '.join(timed_operations())}; got {', '.join(unknown)}")
    profile = "quick" if quick else kind
    budget = Clock(BUDGETS[profile] if seconds is None else seconds)
    known = {case.op for case in all_cases()}
    # What nothing checks is not timed.
    wanted = [op for op in timed_operations() if (only is None or op in only) and op in {*known, STEP}]
    # A step computes with all of them.
    checked = sorted(known) if STEP in wanted else [x for x in wanted if x != STEP]
    isolate = kind == "cuda" if isolate is None else isolate
    here: Here | Processes = Processes(folder=folder) if isolate else Here()
    beside = Processes(max(1, min(8, (os.cpu_count() or 2) // 2)), folder) if isolate else here

    content: Record = {
        "machine": {**machine(), "device": device},
        "run": {
            "profile": profile,
            "ops": wanted,
            "began": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": None,
            "budget_seconds": budget.seconds,
            "heap": settle_heap(),
        },
        "rates": {},
        "backends": {name: backend_status()[name] for name in BACKENDS[kind]},
        "parity": {},
        "parity_rows": [],
        "timings": [],
        "steps": [],
        "ledger": [],
        "largest": None,
        "capture": [],
        "aims": [],
        "broken": [],
        "notes": [],
        "passed": False,
    }
    result: Record = stamped("bench", content)
    crashed = False
    say(f"time budget: {budget.seconds:.0f} s (--seconds); what does not fit is left out and said")

    def take(tasks: Sequence[Task], runner: Here | Processes, what: str) -> None:
        nonlocal crashed
        begin = time.monotonic()
        for task, records, problem in runner(tasks):
            for record in records:
                _store(result, record)
            if problem is not None:
                crashed |= task.section != "compiled step"  # a compiler that takes too long is no fault of ours
                if task.section == "parity":
                    result["parity"] |= dict.fromkeys(task.ops, f"crashed: {problem.removeprefix('crashed: ')}")
                result["notes"].append(f"{task.section} ({', '.join(task.ops) or 'all'}): {problem}")
            save(result)
        say(f"{what}: {time.monotonic() - begin:.1f} s, {max(0.0, budget.left):.0f} s left")

    take([Task("machine", device, profile, 60.0)], here, "machine")
    rates = {name: value for name, value in result["rates"].items() if name != "measured"}

    names = [dtype_name(dtype) for dtype in DTYPES]
    checks = [
        Task("parity", device, profile, PARITY_SECONDS, [op], dtypes=dtypes)
        for op in checked
        if op in known
        for dtypes in ([[name] for name in names] if isolate and op in COMPILED_OPS else [names])
    ]
    take(checks, beside, "parity")
    for op in checked:
        result["parity"].setdefault(op, verdict(op, result["parity_rows"], kind))
    served = ("pass", "no native kernel")
    refused = [op for op in checked if not result["parity"][op].startswith(served)]
    for op in refused:
        say(f"{op} is not known to be right on {device}: it is not timed")
    result["notes"] += [f"{op}: no workload" for op in checked if op not in WORKLOADS]
    unchecked = [op for op in WORKLOADS if op not in known and (only is None or op in only)]
    result["notes"] += [f"{op}: nothing checks it, so it is not timed" for op in unchecked]

    if rates:
        parts: list[tuple[str, Task, float]] = []
        for name, (members, share) in GROUPS.items():
            chosen = [op for op in members if op in wanted]
            if chosen:
                parts.append((name, Task("timing", device, profile, 0.0, chosen, rates, refused), share))
        if STEP in wanted:
            parts.append((f"{STEP}, counted", Task("ledger", device, profile, 0.0, [], rates, refused), LEDGER_SHARE))
            parts.append((STEP, Task("step", device, profile, 0.0, [], rates, refused), STEP_SHARE))
        parts.append(("capture", Task("capture", device, profile, 0.0, checked, rates, refused), CAPTURE_SHARE))
        if STEP in wanted:
            task = Task("compiled step", device, profile, 0.0, [], rates, refused)
            parts.append((f"{STEP}, compiled", task, COMPILED_SHARE))
        for place, (name, task, share) in enumerate(parts):
            task.seconds = max(0.0, budget.left) * share / sum(part[2] for part in parts[place:])
            if budget.left <= 0:
                result["notes"].append(f"{name}: left out, the time budget of {budget.seconds:.0f} s is spent")
                continue
            take([task], here, name)
    result["aims"] = judge(result)
    result["run"]["seconds"] = time.monotonic() - budget.begin
    missing = {name: reason for name, reason in result["backends"].items() if reason is not None}
    result["notes"] += [f"backend {name}: {reason}" for name, reason in missing.items()]
    captured = all(row["verdict"] == "pass" for row in result["capture"])
    result["broken"] += broken_contenders(result)
    result["passed"] = not (refused or missing or crashed or result["broken"]) and captured
    save(result)
    return result


def _store(result: Record, record: Record) -> None:
    """Puts a section's record where the schema has it."""
    kind, value = record["kind"], record["value"]
    lists = {"parity": "parity_rows", "timing": "timings", "step": "steps", "note": "notes"}
    lists |= {"capture": "capture", "broken": "broken"}
    if kind in lists:
        # A backend that cannot serve an operation is said by the process of each dtype.
        if kind != "parity" or value not in result[lists[kind]]:
            result[lists[kind]].append(value)
    elif kind == "compiled":  # measured later, beside ours once more: its ratio is to that
        same = ("op", "pass", "shape", "dtype")
        for timing in result["timings"]:
            if all(timing[key] == value[key] for key in same):
                timing["contenders"] += value["contenders"][1:]
    else:
        result[kind] = value


def broken_contenders(result: Record) -> list[str]:
    """Where ours raised at a size that nothing but a benchmark uses; out of memory is no fault on a small GPU."""
    found = []
    for record in [*result["timings"], *result["steps"]]:
        where = record.get("op", STEP), record.get("pass", ""), record.get("shape", record.get("instances"))
        failed = [x for x in record["contenders"] if x["name"] == OURS and x["status"] == "failed"]
        found += [f"{' '.join(map(str, where))}: {x['detail']}" for x in failed]
    largest = result["largest"]
    if largest and largest["status"] == "failed":
        found.append(f"{STEP} {largest['instances']}: {largest['detail']}")
    return found


def verdict(op: str, rows: Sequence[Record], kind: str) -> str:
    """Of one operation, from its rows of parity."""
    verdicts = [row["verdict"] for row in rows if row["op"] == op]
    if "fail" in verdicts:
        return "fail"
    if "pass" in verdicts:
        return "pass"
    reasons = [f"{b}: {'; '.join(reasons_against(op, b, kind, torch.float32))}" for b in BACKENDS[kind]]
    return f"no native kernel: {'; '.join(reasons)}"


def save_to(folder: Path, result: Record) -> None:
    """``gpu_suite.json`` and ``gpu_suite.html`` in ``folder``."""
    save_json(folder / "gpu_suite.json", result)
    write_html(folder / "gpu_suite.html", result)


def save_json(path: Path, result: Record) -> None:
    """The result as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(_plain(result), indent=1, allow_nan=False) + "\n")
    part.replace(path)


def _plain(value: Any) -> Any:
    """Numbers that JSON does not have, an infinite error of parity for one, become null."""
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line above; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_suite"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--device", choices=sorted(BACKENDS), help="default: cuda where torch finds it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a test of the script itself")
    parser.add_argument("--ops", type=lambda text: text.split(","), metavar="OP,OP", help="default: all")
    parser.add_argument("--seconds", type=float, help="time budget")
    parser.add_argument("--isolate", action=argparse.BooleanOptionalAction, help="a process per section")
    parser.add_argument("--section", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.section:
        run_section(*options.section)
        return 0
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA device; --device cpu tests the script without one")
    try:
        result = run(
            device,
            quick=options.quick,
            only=options.ops,
            seconds=options.seconds,
            isolate=options.isolate,
            folder=options.out / "sections",
            save=lambda result: save_to(options.out, result),
            say=lambda text: print(text, flush=True),
        )
    except ValueError as error:
        parser.error(str(error))
    print(brief(result))
    print(f"{'passed' if result['passed'] else 'FAILED'}: {options.out / 'gpu_suite.json'}, gpu_suite.html beside it")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
