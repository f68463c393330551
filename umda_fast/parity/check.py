"""What `umda-fast parity` asks: several devices, some backends, some operations, and what must have been tested."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from umda_fast.errors import DataError
from umda_fast.parity import NATIVE, run_parity
from umda_fast.parity.cases import all_cases

__all__ = ["EXIT_CODES", "check_parity", "failure_line", "junit_xml"]

EXIT_CODES = {"passed": 0, "failed": 1, "nothing tested": 3, "not all that was required": 3}
"""Of `umda-fast parity`, by outcome."""

Row = Mapping[str, Any]


def check_parity(
    *,
    devices: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    ops: Collection[str] | None = None,
    require: Collection[str] = (),
    asked: str = "--backend",
) -> dict[str, Any]:
    """`run_parity` on every device, and what came of it.

    Args:
        devices: of torch; None: the CPU, and CUDA if there is a device.
        backends: native ones, each of which must be able to serve something on one of the devices; None: all, as far
            as they are there.
        ops: operations; None: all.
        require: backends of which at least one row must have been tested.
        asked: who named `backends`, for messages.

    Returns:
        `devices`; `rows` as of `run_parity` with `device` (what one device cannot test is left out where another did);
        `tested`, rows that were judged, and `failed`, by backend; `missing`, what was required and not tested;
        `outcome`, a key of `EXIT_CODES`; `passed`: whether that is "passed"; `seconds`.

    Raises:
        DataError: an unknown device, backend or operation, or one named in `devices` or `backends` that is not there.
    """
    begin = time.monotonic()
    known = {case.op for case in all_cases()}
    _expect("--ops", ops or (), sorted(known))
    _expect("--backend", backends or (), NATIVE)
    _expect("--require", require, NATIVE)
    places = _devices(devices)
    cases = [case for case in all_cases() if ops is None or case.op in ops]
    wanted = NATIVE if backends is None else tuple(backends)
    rows: list[dict[str, Any]] = []
    for device in places:
        found = run_parity(device, backends=wanted, cases=cases)["rows"]
        rows += [{"device": device, **row} for row in found]
    judged = [row for row in rows if row["verdict"] in ("pass", "fail")]
    tested = {name: sum(row["backend"] == name for row in judged) for name in wanted}
    for name in backends or ():
        if not tested[name]:
            reasons = dict.fromkeys(row["verdict"] for row in rows if row["backend"] == name)
            raise DataError(f"{asked} {name}: tests nothing on {', '.join(places)}; {'; '.join(reasons)}")
    served = {(row["backend"], row["op"]) for row in judged} | {(name, "every") for name in tested if tested[name]}
    rows = [row for row in rows if row["verdict"] in ("pass", "fail") or (row["backend"], row["op"]) not in served]
    missing = [name for name in require if not tested.get(name)]
    failed = {name: sum(r["backend"] == name and r["verdict"] == "fail" for r in judged) for name in tested}
    if any(failed.values()):
        outcome = "failed"
    elif not judged:
        outcome = "nothing tested"
    else:
        outcome = "not all that was required" if missing else "passed"
    return {
        "devices": list(places),
        "rows": rows,
        "tested": tested,
        "failed": failed,
        "missing": missing,
        "outcome": outcome,
        "passed": outcome == "passed",
        "seconds": time.monotonic() - begin,
    }


def _expect(option: str, given: Collection[str], known: Collection[str]) -> None:
    strange = [name for name in given if name not in known]
    if strange:
        raise DataError(f"{option}: expected some of {', '.join(known)}; got {', '.join(strange)}")


def _devices(given: Sequence[str] | None) -> Sequence[str]:
    if given is None:
        return ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    for name in given:
        kind, _, index = name.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
            raise DataError(f"--device: expected cpu or cuda, got {name!r}")
        if kind == "cuda" and not torch.cuda.is_available():
            raise DataError(f"--device {name}: torch finds no CUDA device")
        if kind == "cuda" and index and int(index) >= torch.cuda.device_count():
            raise DataError(f"--device {name}: torch finds {torch.cuda.device_count()} CUDA device(s)")
    return given


def failure_line(row: Row) -> str:
    """A row that failed, in one line."""
    what = " ".join(str(row[key]) for key in ("backend", "op", "dtype", "shape", "pass", "device"))
    if row["detail"]:
        return f"FAIL {what}: {row['detail']}"
    return f"FAIL {what}: {row['tensor']}: error {row['error']:.3g}, allowed {row['allowed']:.3g}"


def junit_xml(report: Mapping[str, Any]) -> str:
    """The report of `check_parity` as JUnit XML: a test case for each row, skipped where a backend is not there, and
    one for each backend that was required."""
    cases = [
        *(_case(row) for row in report["rows"]),
        *(_whole(f"required: {name}", "it tested nothing") for name in report["missing"]),
        *([_whole("something is tested", "nothing was")] if report["outcome"] == "nothing tested" else []),
    ]
    counts = {
        "tests": str(len(cases)),
        "failures": str(sum(case.find("failure") is not None for case in cases)),
        "errors": "0",
        "skipped": str(sum(case.find("skipped") is not None for case in cases)),
        "time": f"{report['seconds']:.3f}",
    }
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S")
    suite = ET.Element("testsuite", {"name": "umda_fast.parity", "timestamp": stamp, **counts})
    suite.extend(cases)
    totals = {name: counts[name] for name in ("tests", "failures", "errors")}
    suites = ET.Element("testsuites", {"name": "umda_fast.parity", **totals})
    suites.append(suite)
    ET.indent(suites)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _case(row: Row) -> ET.Element:
    name = " ".join(str(row[key]) for key in ("dtype", "shape", "pass", "device"))
    case = ET.Element("testcase", classname=f"parity.{row['backend']}.{row['op']}", name=name)
    if row["verdict"] == "fail":
        ET.SubElement(case, "failure", message=failure_line(row)).text = failure_line(row)
    elif row["verdict"] != "pass":
        ET.SubElement(case, "skipped", message=row["verdict"])
    return case


def _whole(name: str, problem: str) -> ET.Element:
    case = ET.Element("testcase", classname="parity", name=name)
    ET.SubElement(case, "failure", message=problem).text = problem
    return case
