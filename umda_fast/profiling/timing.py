"""Time of a step by block and operation, from the events of `torch.profiler`.

Every event's own time, without that of the events inside it, goes to the innermost block around it; or, in a backward
pass, to the block whose forward pass made the node that runs. On a CPU the times of all places add up to the step.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from torch._C._autograd import DeviceType

from umda_fast.blocks import PREFIX, BlockRecord, Place

__all__ = ["Time", "times", "wall_seconds"]

_BACKWARD_SCOPE = 1  # at::RecordScope::BACKWARD_FUNCTION
_ENGINE = "autograd::engine::evaluate_function"
_OWN = "umda_fast::"


@dataclass
class Time:
    """Seconds: of the host, in events of all threads, and of the kernels that were started there."""

    host: float = 0.0
    device: float = 0.0


def times(events: Iterable[Any], record: BlockRecord, operations: Collection[str]) -> dict[tuple[Place, str], Time]:
    """(place, operation) -> time; the operation is "" for what lies between operations.

    Args:
        events: of a profile (`FunctionEvent`).
        record: of the blocks in the same steps.
        operations: names that may be told apart; what these call counts as theirs.
    """
    hosts = [event for event in events if event.device_type == DeviceType.CPU and not event.is_async]
    ranges = _Ranges(hosts)
    found: dict[tuple[Place, str], Time] = {}
    for event in hosts:
        place, operation = _placed(event, record, ranges, operations)
        if place is not None:
            time = found.setdefault((place, operation), Time())
            time.host += event.self_cpu_time_total * 1e-6
            if not event.name.startswith(PREFIX):  # a range's own is what its operations started
                time.device += event.self_device_time_total * 1e-6
    return found


def wall_seconds(events: Iterable[Any]) -> float:
    """Seconds in which any block was open."""
    outer = (event for event in events if _is_range(event) and not any(map(_is_range, _above(event))))
    return sum((event.time_range.elapsed_us() for event in outer), 0.0) * 1e-6


def _is_range(event: Any) -> bool:
    return bool(event.device_type == DeviceType.CPU and event.name.startswith(PREFIX))


def _above(event: Any) -> Iterable[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


class _Ranges:
    """Blocks by time, for events of the threads of the autograd engine, which no block encloses."""

    def __init__(self, events: Iterable[Any]) -> None:
        self._ranges = sorted((event for event in events if _is_range(event)), key=lambda event: event.time_range.start)
        self._starts = [event.time_range.start for event in self._ranges]

    def around(self, event: Any) -> Place | None:
        """The innermost block that was open when the event began."""
        start = event.time_range.start
        for index in range(bisect_right(self._starts, start) - 1, -1, -1):
            if self._ranges[index].time_range.end >= start:
                return Place(self._ranges[index].name.removeprefix(PREFIX), False)
            if self._ranges[index].cpu_parent is None:
                return None
        return None


def _placed(
    event: Any, record: BlockRecord, ranges: _Ranges, operations: Collection[str]
) -> tuple[Place | None, str]:
    operation = ""
    place: Place | None = None
    for one in (event, *_above(event)):
        name = one.name
        if _is_range(one):
            again = any(above.name.startswith(_ENGINE) for above in _above(one))
            return place or Place(name.removeprefix(PREFIX), again), operation
        if place is None and (one.scope == _BACKWARD_SCOPE or name.startswith(_ENGINE)) and one.sequence_nr >= 0:
            made = record.made_by(one.sequence_nr)
            if made is not None:
                place = Place(made, True)
        if name in operations and (name.startswith(_OWN) or not operation):
            operation = name
    return place or ranges.around(event), operation
