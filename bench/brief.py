"""The result of a suite as lines for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from .sections import STEP
from .step_ledger import lines as ledger_lines

Record = Mapping[str, Any]

#: Of a share beyond the limit.
OVER = (
    "over 100 % of the floor: the floor is the time in which the least bytes are copied from memory to memory; what "
    "stays in a cache between two calls, or is smaller than one, moves faster"
)


def brief(result: Record) -> str:
    """Failures, every contender at every size, the aims of a GPU, what was left out."""
    passing = sum(text == "pass" for text in result["parity"].values())
    lines = [f"parity: {passing} of {len(result['parity'])} operations pass"]
    lines += [f"  {op}: {text}" for op, text in result["parity"].items() if text != "pass"]
    lines += [f"  capture, {x['op']}: {x['verdict']}" for x in result["capture"] if x["verdict"] != "pass"]
    for timing in result["timings"]:
        lines.append(f"{timing['op']:<25} {timing['pass']:<9} {timing['shape']} ({timing['backend']})")
        lines += _contenders(timing["contenders"])
    for step in result["steps"]:
        lines.append(f"{STEP:<25} {step['instances']:,} instances")
        lines += _contenders(step["contenders"])
    lines += ledger_lines(result.get("ledger", ()))
    lines += [OVER] if beyond(result) else []
    judged = [x for x in result["aims"] if x["verdict"] != "not measured"]
    lines += [f"aim: {x['aim']}: {x['verdict']} ({x['detail']})" for x in judged]
    if result["run"]["profile"] == "cuda":
        lines.append(f"{len(result['aims']) - len(judged)} of {len(result['aims'])} aims not measured")
    lines += [f"BROKEN: {text}" for text in result["broken"]]
    lines += [f"note: {text}" for text in result["notes"]]
    run = result["run"]
    if run["seconds"] is not None:
        lines.append(f"{run['seconds']:.0f} s of a budget of {run['budget_seconds']:.0f} s (--seconds)")
    return "\n".join(lines)


def beyond(result: Record) -> bool:
    """Whether anything was faster than the floor."""
    return any((entry["share"] or 0.0) > 1.0 for timing in result["timings"] for entry in timing["contenders"])


def _contenders(entries: list[Record]) -> Iterator[str]:
    for entry in entries:
        name = f"    {entry['name']:<46} "
        if not entry["seconds"]:
            yield name + entry["status"] + (f": {entry['detail']}" if entry["detail"] else "")
            continue
        figure = f"{entry['seconds']['median'] * 1e3:10.3f} ms"
        figure += "" if entry["ratio"] is None else f" {entry['ratio']:7.2f} x"
        if entry.get("rate"):
            figure += f" {entry['rate']:8.1f} {entry['rate_unit']:<8}"
        if entry.get("share"):
            figure += f" {entry['share']:4.0%} of the floor"
        yield name + figure
