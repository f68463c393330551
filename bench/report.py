"""The suite's result as one HTML file that needs nothing else: tables, and bars against the limit."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .brief import OVER, beyond
from .roofline import roofline
from .workloads import OURS

_STYLE = """
:root { --ink: #1c2430; --soft: #5d6878; --line: #dfe4ea; --ours: #0072b2; --theirs: #aab4c0; --bad: #b3261e;
  --good: #1a7f4e; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b5; --line: #323b47; --ours: #56b4e9;
  --theirs: #65717f; --bad: #ff8a80; --good: #6fd3a2; --paper: #14181e; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1080px;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem }
h3 { font-size: .95rem; margin: 1.4rem 0 .2rem; font-weight: 600 }
p { margin: .3rem 0 } .soft { color: var(--soft) } .bad { color: var(--bad); font-weight: 600 }
.good { color: var(--good) } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; min-width: 60%; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 500 } td.n, th.n { text-align: right }
svg { display: block; max-width: 100% } svg text { font: 12px system-ui, sans-serif; fill: var(--ink) }
"""

_BAR, _GAP, _NAMES, _BARS, _FIGURES = 16, 6, 290, 420, 330


def write_html(path: Path, result: Mapping[str, Any]) -> None:
    """Write the report, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.html")
    part.write_text(render(result), encoding="utf-8")
    part.replace(path)


def render(result: Mapping[str, Any]) -> str:
    """The page."""
    machine, run = result["machine"], result["run"]
    took = "" if run["seconds"] is None else f", {run['seconds']:.0f} s"
    changed = "" if result["commit"]["clean"] in (True, None) else " and changes"
    title = f"umda_fast on {machine.get('name', machine['device'])}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='soft'>{escape(run['began'])}, commit {escape(str(result['commit']['hash'] or 'unknown'))}"
        f"{changed}, profile {escape(run['profile'])}{took} of {run['budget_seconds']:.0f} s</p>",
        "<p class='good'>Everything passed.</p>"
        if result["passed"]
        else "<p class='bad'>Not everything passed, or the run was not finished: see parity, capture and notes.</p>",
        _section("Aims", _aims(result["aims"])) if run["profile"] == "cuda" else "",
        _section("Machine", _machine(result)),
        _section("Parity with the float64 reference", _parity(result)),
        _section("CUDA graphs, streams, waiting", _capture(result)),
        _section("Operations", (f"<p>{escape(OVER)}.</p>" if beyond(result) else "") + _timings(result["timings"])),
        _section("A whole training step", _steps(result)),
        _section("What a step calls and moves", _ledger(result["ledger"])) if result.get("ledger") else "",
        _section("Notes", _notes(result)),
    ]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _notes(result: Mapping[str, Any]) -> str:
    lines = [f"<p class='bad'>{escape(text)}</p>" for text in result["broken"]]
    lines += [f"<p>{escape(text)}</p>" for text in result["notes"]]
    return "".join(lines) or "<p>None.</p>"


def _section(title: str, content: str) -> str:
    return f"\n<h2>{escape(title)}</h2>{content}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Cells are HTML already."""

    def line(cells: Sequence[str], tag: str) -> str:
        parts = (f"<{tag}{' class=n' if i in numbers else ''}>{cell}</{tag}>" for i, cell in enumerate(cells))
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<div class='scroll'><table>{line([escape(x) for x in head], 'th')}{body}</table></div>"


def _verdict(text: str) -> str:
    kind = {"pass": "good", "met": "good", "not measured": "soft"}.get(text, "bad")
    return f"<span class='{'soft' if text.startswith('no native') else kind}'>{escape(text)}</span>"


def _aims(aims: Sequence[Mapping[str, Any]]) -> str:
    rows = (
        [escape(x["aim"]), f"{x['target']:.3g}", _number(x["value"]), _verdict(x["verdict"]), escape(x["detail"])]
        for x in aims
    )
    return _table(("aim", "at least", "measured", "", ""), rows, (1, 2))


def _machine(result: Mapping[str, Any]) -> str:
    rates = result["rates"]
    said = {name: value for name, value in result["machine"].items() if value is not None and name != "devices"}
    rows = [(name.replace("_", " "), str(value)) for name, value in said.items()]
    rows += [(f"version of {name}", value) for name, value in result["versions"].items()]
    if rates:
        rows.append(("copy, read + written", f"{rates['copy'] / 1e9:,.0f} GB/s"))
        rows += [(f"matrix product, {x}", f"{rates[x] / 1e12:,.2f} TFLOP/s") for x in ("bfloat16", "tf32", "float32")]
    return _table(("", ""), ([escape(a), escape(b)] for a, b in rows))


def _parity(result: Mapping[str, Any]) -> str:
    rows = []
    for op, text in result["parity"].items():
        judged = [row for row in result["parity_rows"] if row["op"] == op and row["allowed"] is not None]
        shares = [row["error"] / row["allowed"] for row in judged if row["error"] is not None and row["allowed"]]
        worst = max(shares, default=None)
        rows.append([escape(op), _verdict(text), str(len(judged)), _number(worst)])
    failed = [row for row in result["parity_rows"] if row["verdict"] == "fail"]
    page = _table(("operation", "", "checks", "worst error / allowed"), rows, (2, 3))
    if failed:
        keys = ("op", "backend", "dtype", "shape", "pass", "tensor", "error", "allowed")
        page += "<h3>Failed</h3>" + _table(keys, ([escape(str(row[key])) for key in keys] for row in failed))
    return page


def _capture(result: Mapping[str, Any]) -> str:
    rows = (
        [escape(x["op"]), escape(x["backend"]), escape(x["shape"]), _verdict(x["verdict"])] for x in result["capture"]
    )
    return _table(("operation", "backend", "shape", ""), rows)


def _timings(timings: Sequence[Mapping[str, Any]]) -> str:
    page = (
        "<p class='soft'>Bars: share of the floor, the time in which this machine copies the least bytes, or does the "
        "least products, that the pass needs; the line at the right is the limit. Times are medians.</p>"
    )
    for timing in timings:
        head = f"{timing['op']} {timing['pass']}, {timing['shape']}, {timing['dtype']} ({timing['backend']})"
        page += f"<h3>{escape(head)}</h3>{_bars(timing['contenders'])}"
    return page


def _bars(contenders: Sequence[Mapping[str, Any]]) -> str:
    """One bar per contender as long as its share of the floor, its figures beside it."""
    height = len(contenders) * (_BAR + _GAP) + _GAP
    shapes = []
    for place, entry in enumerate(contenders):
        y = _GAP + place * (_BAR + _GAP)
        middle = y + _BAR - 4
        shapes.append(f"<text x='{_NAMES - 8}' y='{middle}' text-anchor='end'>{escape(entry['name'][:46])}</text>")
        if entry["seconds"]:
            share = entry["share"] or 0.0
            length = max(1.0, min(share, 1.0) * _BARS)
            colour = "--ours" if entry["name"] == OURS else "--theirs"
            shapes.append(
                f"<rect x='{_NAMES}' y='{y}' width='{length:.1f}' height='{_BAR}' rx='2' style='fill:var({colour})'/>"
            )
            text = f"{_time(entry['seconds']['median'])}, {_number(entry['rate'])} {entry['rate_unit']}, {share:.1%}"
            if entry["name"] != OURS and entry["ratio"] is not None:
                text += f", {entry['ratio']:.2f}x our time"
        else:
            text = entry["status"] + (f": {entry['detail']}" if entry["detail"] else "")
        short = text if len(text) <= 110 else text[:109] + "…"
        x = _NAMES + _BARS + 12 if entry["seconds"] else _NAMES + 4
        soft = "" if entry["seconds"] else " style='fill:var(--soft)'"
        shapes.append(f"<text x='{x}' y='{middle}'{soft}>{escape(short)}<title>{escape(text)}</title></text>")
    limit = _NAMES + _BARS
    shapes.append(
        f"<line x1='{limit}' x2='{limit}' y1='0' y2='{height}' style='stroke:var(--ink)' stroke-dasharray='3 3'/>"
    )
    width = _NAMES + _BARS + _FIGURES
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img' "
        f"aria-label='share of the floor by contender'>{''.join(shapes)}</svg>"
    )


def _steps(result: Mapping[str, Any]) -> str:
    rows = []
    for step in result["steps"]:
        for entry in step["contenders"]:
            peak = entry["peak_bytes"]
            timed = entry["seconds"] is not None
            rows.append(
                [
                    f"{step['instances']:,}",
                    escape(entry["name"]),
                    _time(entry["seconds"]["median"]) if timed else escape(f"{entry['status']}: {entry['detail']}"),
                    _number(entry["ratio"]),
                    "-" if peak is None else f"{(peak + step['resident_bytes']) / 2**30:.2f}",
                ]
            )
    head = ("instances", "contender", "median of a step", "times ours", "peak GiB, inputs and parameters included")
    page = _table(head, rows, (0, 3, 4))
    largest = result["largest"]
    if largest:
        figure = escape(largest["detail"])
        if largest["seconds"] is not None:
            figure = _time(largest["seconds"])
            figure += "" if largest["peak_bytes"] is None else f", {largest['peak_bytes'] / 2**30:.1f} GiB allocated"
            figure += ", all parameters finite" if largest["finite"] else ", <span class='bad'>not finite</span>"
        page += f"<p>One bag of {largest['instances']:,} instances: {escape(largest['status'])}, {figure}</p>"
    return page


def _ledger(ledgers: Sequence[Mapping[str, Any]]) -> str:
    """Calls and bytes, which were counted, predicted seconds, and a picture for each precision and hardware."""
    rows = []
    for one in ledgers:
        n, sums = one["instances"], one["total"]
        counted = [f"{sums['calls']:,}", f"{sums['bytes'] / n / 1e3:,.1f}", f"{sums['flops'] / n / 1e6:,.2f}"]
        for row in one["predicted"]:
            seconds = [f"predicted {_time(row[key])}" for key in ("step", "bytes", "products", "launches")]
            rows.append([f"{n:,}", escape(one["precision"]), escape(one["contender"]), *counted])
            rows[-1] += [escape(row["hardware"]), *seconds]
            counted = [""] * 3
    head = (
        *("instances", "precision", "contender", "calls", "KB an instance", "MFLOP an instance"),
        *("on", "a step", "bytes alone", "products alone", "launches alone"),
    )
    page = (
        "<p class='soft'>Calls, bytes and floating-point operations were counted. Seconds are predicted from them and "
        "from the rates of the data sheet, or those that this run measured: no step was timed for them. A dot is an "
        "operation, its area its part of the predicted time; above the dashed line products are waited for, below it "
        "bytes.</p>"
    )
    page += _table(head, rows, (0, 3, 4, 5, 7, 8, 9, 10))
    for precision in dict.fromkeys(one["precision"] for one in ledgers):
        same = [one for one in ledgers if one["precision"] == precision]
        for hardware in same[0]["hardware"]:
            page += f"<h3>{escape(precision)}, predicted for {escape(hardware['name'])}</h3>"
            page += f"<div class='scroll'>{roofline(same, hardware)}</div>"
    return page


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:,.3g}"


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
