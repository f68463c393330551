"""Which two columns, of times and of events, are one task of kind survival."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from umda_fast.errors import DataError
from umda_fast.tasks import TaskSpec

__all__ = ["EventColumns", "event_columns", "half_known", "perhaps", "recognised"]

Kinds: TypeAlias = Mapping[str, Any] | Sequence[TaskSpec] | None

# Names of columns, in lower case: `os_months` and `os.status` belong to `os`.
_TIME = re.compile(r"(.+)[ _.-](?:time|days|weeks|months|years)")
_EVENT = re.compile(r"(.+)[ _.-](?:event|status)")


@dataclass(frozen=True)
class EventColumns:
    """Attributes:
    task: its name.
    time, event: columns.
    others: columns that are called as if they were its time or event too.
    asked: whether someone said so; or else it is by their names.
    """

    task: str
    time: str
    event: str
    others: tuple[str, ...]
    asked: bool

    def completes(self, kind: Any) -> Any:
        """What `kinds` say of the task, None if nothing, with its columns."""
        if isinstance(kind, TaskSpec):
            return replace(kind, columns=(self.time, self.event))
        said = dict(kind) if isinstance(kind, Mapping) else {}
        further = {name: value for name, value in said.items() if name not in ("time", "event")}
        return {**further, "kind": "survival", "columns": [self.time, self.event]}


def event_columns(columns: Collection[str], kinds: Kinds, where: str) -> list[EventColumns]:
    """The tasks of kind survival in a table, or among arrays, with these columns.

    Columns named `<task>_time`, `_days`, `_weeks`, `_months` or `_years` and `<task>_event` or `_status` (in any case,
    with `.`, `-` or a blank too) are one task, unless `kinds` says that one of them is something else.

    Args:
        columns: that may be labels, in their order.
        kinds: as in `BagDataset.from_arrays`; also `{kind: survival, time: <column>, event: <column>}`. Tasks of a
            model, a sequence, are found again, and no others.

    Raises:
        DataError: several columns may be the time or the event of a task, a column that was named is not there, or the
            task would have the name of another column.
    """
    found = []
    plain = kinds if isinstance(kinds, Mapping) else {one.name: one for one in kinds or () if isinstance(one, TaskSpec)}
    claimed: set[str] = set()
    for task, kind in plain.items():
        if _kind_name(kind) != "survival":
            continue
        # A column of the task's name is both in one, unless it is named as one of the two.
        must = isinstance(kind, Mapping) and "time" in kind if task in columns else isinstance(kinds, Mapping)
        asked = _asked(task, kind, columns, f"{where}: kinds[{task!r}]", must=must)
        if asked is None and task in columns:
            continue
        pair = asked or _by_name(task, columns, claimed, where if isinstance(kinds, Mapping) else None)
        if pair is None and isinstance(kinds, Mapping):
            raise DataError(
                f"{where}: kinds[{task!r}]: expected the columns {task}_time and {task}_event, or their names, as in "
                f"{{{task}: {{kind: survival, time: ..., event: ...}}}}; got {', '.join(columns) or 'none'}"
            )
        if pair is not None:
            found.append(EventColumns(task, *pair, _others(task, pair, columns, plain), asked=True))
            claimed |= {*pair}
    if kinds is not None and not isinstance(kinds, Mapping):
        return found
    claimed |= {*plain}
    for column in columns:
        match = _TIME.fullmatch(column.lower())
        if match is None or column in claimed or match[1] in {pair.task.lower() for pair in found}:
            continue
        task = column[: len(match[1])]
        pair = _by_name(task, columns, claimed, where)
        if pair is None:
            continue
        if task in columns:
            raise DataError(
                f"{where}: {pair[0]} and {pair[1]} are a task {task!r}, of kind survival, but a column is called so; "
                f"leave one out, or name the task: {_remedy('NAME', *pair)}"
            )
        found.append(EventColumns(task, *pair, _others(task, pair, columns, plain), asked=False))
        claimed |= {*pair}
    return found


def recognised(tasks: Sequence[TaskSpec], asked: Collection[str] = ()) -> list[str]:
    """What was recognised by the names of columns, a line for each task."""
    return [
        f"{task.columns[0]} and {task.columns[1]} are one task, {task.name!r} (survival), by their names"
        for task in tasks
        if task.columns is not None and task.name not in asked
    ]


def perhaps(columns: Collection[str], found: Sequence[EventColumns], kinds: Kinds) -> list[str]:
    """A line for every column that is called the time of another, `OS.time` beside `OS`, which nobody said is its
    event."""
    if kinds is not None and not isinstance(kinds, Mapping):
        return []
    known = {name for pair in found for name in (pair.time, pair.event, *pair.others)} | {*(kinds or ())}
    lines = []
    for column in columns:
        match = _TIME.fullmatch(column.lower())
        task = "" if match is None else column[: len(match[1])]
        if task in columns and not known & {task, column}:
            lines.append(
                f"columns {task!r} and {column!r} are two tasks, in which who was censored counts as dead; if they are "
                f"an event and its time: {_remedy(task, column, task)}"
            )
    return lines


def half_known(pair: EventColumns, times: Sequence[str], events: Sequence[str]) -> list[str]:
    """A line on bags of which one of the two is not there, if there are such bags."""
    count = sum((not time) != (not event) for time, event in zip(times, events, strict=True))
    return [f"task {pair.task!r}: {count} bags have a {pair.time} or a {pair.event} only: no label"] if count else []


def _kind_name(kind: Any) -> Any:
    return kind.get("kind") if isinstance(kind, Mapping) else kind.kind if isinstance(kind, TaskSpec) else kind


def _asked(task: str, kind: Any, columns: Collection[str], where: str, must: bool) -> tuple[str, str] | None:
    """The columns that a kind names."""
    said: Any = kind if isinstance(kind, Mapping) else {"columns": kind.columns} if isinstance(kind, TaskSpec) else {}
    named: Any = said.get("columns") or (said.get("time"), said.get("event"))
    if not any(named):
        return None
    for what, name in zip(("time", "event"), named, strict=False):
        if name not in columns and must:
            raise DataError(f"{where}: {what}: expected a column among {', '.join(columns)}, got {name!r}")
    return None if {*named} - {*columns} else (named[0], named[1])


def _by_name(
    task: str, columns: Collection[str], claimed: Collection[str], where: str | None
) -> tuple[str, str] | None:
    """The columns of times and events that are called after a task; None if one is not there, or, without `where`, if
    it cannot be told which it is."""

    def called(pattern: re.Pattern[str]) -> list[str]:
        matches = {name: pattern.fullmatch(name.lower()) for name in columns if name not in claimed}
        return [name for name, match in matches.items() if match is not None and match[1] == task.lower()]

    times, events = called(_TIME), called(_EVENT)
    if not times or not events:
        return None
    for what, names in (("times", times), ("events", events)):
        if len(names) > 1 and where is None:
            return None
        if len(names) > 1:
            raise DataError(
                f"{where}: task {task!r}: expected one column of {what}, got {', '.join(names)}; which? "
                f"{_remedy(task, times[0], events[0])}"
            )
    return times[0], events[0]


def _others(task: str, pair: tuple[str, str], columns: Collection[str], kinds: Collection[str]) -> tuple[str, ...]:
    matches = {name: _TIME.fullmatch(name.lower()) or _EVENT.fullmatch(name.lower()) for name in columns}
    same = [name for name, match in matches.items() if match is not None and match[1] == task.lower()]
    return tuple(name for name in same if name not in pair and name not in kinds)


def _remedy(task: str, time: str, event: str) -> str:
    return f"--set 'data.options.kinds={{{task}: {{kind: survival, time: {time}, event: {event}}}}}'"
