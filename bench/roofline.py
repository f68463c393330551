"""The ledger of a step as a picture: bytes against floating-point operations, every operation a dot."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .workloads import OURS

Record = Mapping[str, Any]

_LEFT, _TOP, _WIDTH, _HEIGHT = 70, 34, 420, 300
_MARGIN = 40
#: Dots with a name beside them.
_NAMED = 6


def roofline(ledgers: Sequence[Record], hardware: Record) -> str:
    """SVG of ledgers of one precision, a panel each with the same axes.

    Above the dashed line, on which bytes and products take equally long, products are what is waited for; below it,
    bytes. The area of a dot is the operation's part of the predicted seconds.

    Args:
        ledgers: as `step_ledger.ledger` makes them.
        hardware: one of their `hardware`.
    """
    points = [row for one in ledgers for row in one["operations"] if row["bytes"] and row["flops"]]
    if not points:
        return ""
    x, y = _Axis([row["bytes"] for row in points]), _Axis([row["flops"] for row in points])
    panels = [_panel(one, hardware, x, y, place) for place, one in enumerate(ledgers)]
    width = len(ledgers) * (_LEFT + _WIDTH) + _MARGIN
    height = _TOP + _HEIGHT + _MARGIN + 10
    label = f"predicted roofline of a training step, {ledgers[0]['precision']}, {hardware['name']}"
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' height='{height}' role='img' "
        f"aria-label='{escape(label)}'>{''.join(panels)}</svg>"
    )


class _Axis:
    """Powers of ten around some positive numbers."""

    def __init__(self, values: Sequence[float]) -> None:
        self.low = math.floor(math.log10(min(values)))
        self.high = max(math.ceil(math.log10(max(values))), self.low + 1)

    def __call__(self, value: float) -> float:
        """Where a number lies between the ends, 0 to 1."""
        return (math.log10(value) - self.low) / (self.high - self.low)


def _panel(one: Record, hardware: Record, x: _Axis, y: _Axis, place: int) -> str:
    left, bottom = _LEFT + place * (_LEFT + _WIDTH), _TOP + _HEIGHT

    def at(moved: float, flops: float) -> tuple[float, float]:
        return left + x(moved) * _WIDTH, bottom - y(flops) * _HEIGHT

    title = f"{one['contender']}, {one['precision']}: {one['total']['calls']:,} calls; predicted for {hardware['name']}"
    shapes = [
        f"<text x='{left}' y='{_TOP - 14}'>{escape(title)}</text>",
        f"<rect x='{left}' y='{_TOP}' width='{_WIDTH}' height='{_HEIGHT}' style='fill:none;stroke:var(--line)'/>",
        f"<text x='{left + _WIDTH}' y='{bottom + 34}' text-anchor='end'>bytes of a step</text>",
        f"<text x='{left + 6}' y='{_TOP + 16}'>FLOP of a step</text>",
    ]
    shapes += [_tick(left + x(10.0**e) * _WIDTH, bottom + 17, e, "middle") for e in _ticks(x)]
    shapes += [_tick(left - 6, bottom - y(10.0**e) * _HEIGHT + 4, e, "end") for e in _ticks(y)]
    shapes.append(_balance(hardware["products"][one["precision"]] / hardware["copy"], x, y, at))
    rows = [row for row in one["operations"] if row["bytes"] and row["flops"]]
    rate = hardware["products"][one["precision"]]
    parts = [max(row["bytes"] / hardware["copy"], row["flops"] / rate) for row in rows]
    whole = sum(parts)
    colour = "--ours" if one["contender"] == OURS else "--theirs"
    order = sorted(range(len(rows)), key=lambda i: -parts[i])
    for rank, i in enumerate(order):
        row, (cx, cy) = rows[i], at(rows[i]["bytes"], rows[i]["flops"])
        radius = 2.0 + 26.0 * math.sqrt(parts[i] / whole)
        said = (
            f"{row['operation']}: {row['calls']:,} calls, {row['bytes']:,} bytes, {row['flops']:,} FLOP, predicted "
            f"{parts[i] / whole:.1%} of the step's device time"
        )
        shapes.append(
            f"<circle cx='{cx:.1f}' cy='{cy:.1f}' r='{radius:.1f}' style='fill:var({colour});fill-opacity:.55'>"
            f"<title>{escape(said)}</title></circle>"
        )
        if rank < _NAMED:
            anchor, dx = ("end", -radius - 3) if x(row["bytes"]) > 0.6 else ("start", radius + 3)
            name = row["operation"].split("::")[-1]
            shapes.append(f"<text x='{cx + dx:.1f}' y='{cy + 4:.1f}' text-anchor='{anchor}'>{escape(name)}</text>")
    return "".join(shapes)


def _ticks(axis: _Axis) -> range:
    return range(axis.low, axis.high + 1, max(1, (axis.high - axis.low + 4) // 5))


def _tick(x: float, y: float, exponent: int, anchor: str) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' style='fill:var(--soft)'>10"
        f"<tspan dy='-5' font-size='9'>{exponent}</tspan></text>"
    )


def _balance(ratio: float, x: _Axis, y: _Axis, at: Any) -> str:
    """The line `FLOP = ratio * bytes` as far as it lies inside; nothing where it does not."""
    begin = max(x.low, y.low - math.log10(ratio))
    end = min(x.high, y.high - math.log10(ratio))
    if begin >= end:
        return ""
    (x1, y1), (x2, y2) = (at(10.0**e, ratio * 10.0**e) for e in (begin, end))
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' "
        "style='stroke:var(--ink)' stroke-dasharray='4 3'/>"
    )
