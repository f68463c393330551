"""Columns of a table of labels, out of texts: tasks with their labels, and numbers known of the bags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from umda_fast.data.arrays import ArrayInput, FloatArray
from umda_fast.data.columns import ColumnUse
from umda_fast.data.event_columns import event_columns, half_known, perhaps, recognised
from umda_fast.data.files.identifiers import (
    alike_in_all_but_writing,
    are_measured,
    no_labels,
    perhaps_missing,
    strays,
    too_many_classes,
)
from umda_fast.data.files.labels_table import LabelTable
from umda_fast.data.labels import KindOverride, KindOverrides, ignore_label, label_columns
from umda_fast.data.metadata import Metadata
from umda_fast.errors import DataError
from umda_fast.tasks import TASK_KINDS, TaskSpec
from umda_fast.tasks.columns import parse_number


def read_metadata(table: LabelTable, rows: Sequence[int | None]) -> Metadata | None:
    """The metadata of the bags whose rows are given, NaN where missing; None without such columns.

    Raises:
        DataError: naming the table, the column and the bag.
    """
    if not table.metadata:
        return None
    values = np.full((len(rows), len(table.metadata)), np.nan)
    for column, (name, texts) in enumerate(table.metadata.items()):
        for bag, row in enumerate(rows):
            if row is None or not texts[row]:
                continue
            number = parse_number(texts[row], said=True)
            if number is None:
                raise DataError(
                    f"{table.where}: column {name!r}: expected numbers, got {texts[row]!r} for {table.names[row]!r}"
                )
            values[bag, column] = number
    return Metadata(tuple(table.metadata), values)


@dataclass(frozen=True)
class TableTasks:
    """The tasks of a table.

    Attributes:
        specs, labels: as of `label_columns`.
        uses: what its columns that may be tasks are.
        notes: what had to be guessed, one line each.
        doubts: what may be wrong with that, one line each.
    """

    specs: tuple[TaskSpec, ...]
    labels: dict[str, FloatArray]
    uses: list[ColumnUse]
    notes: list[str]
    doubts: list[str]


def read_tasks(
    table: LabelTable, rows: Sequence[int | None], kinds: KindOverrides | None, asked: Sequence[str]
) -> TableTasks:
    """Tasks and their label columns for the bags whose rows are given.

    Several labels of a multilabel task are separated by `;` in the cell; a task is multilabel only if `kinds` says.

    Args:
        asked: columns that are tasks whatever they look like.

    Raises:
        DataError: naming the table and the column.
    """
    given: dict[str, KindOverride] = (
        dict(kinds) if isinstance(kinds, Mapping) else {spec.name: spec for spec in kinds or ()}
    )
    named = {*given, *asked}
    used = sorted({row for row in rows if row is not None})
    arrays: dict[str, ArrayInput] = {}
    uses: list[ColumnUse] = []
    doubts: list[str] = []
    taken: set[str] = set()
    joined: dict[str, tuple[str, ArrayInput]] = {}
    pairs = event_columns(list(table.columns), kinds, table.where)
    doubts += perhaps(list(table.columns), pairs, kinds)
    for pair in pairs:
        given[pair.task] = pair.completes(given.get(pair.task))
        taken |= {pair.time, pair.event, *pair.others}
        parts = [["" if row is None else table.columns[name][row] for row in rows] for name in (pair.time, pair.event)]
        joined[pair.time] = pair.task, np.array(parts, dtype=object).T
        why = "asked for" if pair.asked else "its name and another's"
        uses += [
            ColumnUse(name, f"{what} of task {pair.task}", why)
            for what, name in (("time", pair.time), ("event", pair.event))
        ]
        uses += [ColumnUse(name, "left out", f"called as if it were of task {pair.task} too") for name in pair.others]
        doubts += half_known(pair, *parts)
    for name, texts in table.columns.items():
        if name in joined:
            arrays.update([joined[name]])
        if name in taken:
            continue
        if isinstance(kinds, Sequence) and name not in given:
            uses.append(ColumnUse(name, "left out", "not a task of the model"))
            continue
        reason = None if name in given or name in asked else no_labels(name, [texts[row] for row in used])
        if reason is not None:
            uses.append(ColumnUse(name, "left out", reason.why))
            if reason.groups and table.patients is None:
                doubts.append(
                    f"column {name!r} {reason.why}; if these are patients, whose bags must stay together: "
                    f"--set data.options.patient={name}"
                )
            continue
        cells = ["" if row is None else texts[row] for row in rows]
        try:
            arrays[name] = _cells(table, name, cells, given, check=name not in asked)
        except DataError as error:
            ignore_label(kinds, error)
    specs, labels = label_columns(
        arrays, len(rows), kinds if isinstance(kinds, Sequence) else given, where=table.where
    )
    uses += [ColumnUse(spec.name, f"task ({spec.kind})", _why(spec, spec.name in named)) for spec in specs]
    guessed = [spec.name for spec in specs if spec.name not in named and spec.columns is None]
    notes = [note for name in guessed for note in _notes(name, table.columns[name], used)]
    notes += recognised(specs, named)
    doubts += [
        f"task {spec.name!r}: {' and '.join(map(repr, group))} are different classes; are they one?"
        for spec in specs
        for group in alike_in_all_but_writing(spec.labels or ())
    ]
    return TableTasks(specs, labels, uses, notes, doubts)


def _cells(
    table: LabelTable, name: str, cells: Sequence[str], given: dict[str, KindOverride], check: bool
) -> ArrayInput:
    """The labels of one column as its kind takes them, which may add to what is `given`."""
    kind = given.get(name)
    wanted = kind.get("kind") if isinstance(kind, Mapping) else kind.kind if isinstance(kind, TaskSpec) else kind
    if not isinstance(wanted, str) or wanted not in TASK_KINDS:
        if wanted is None and check:
            _check_texts(table, name, cells)
        return np.array(cells, dtype=object)
    known = kind if isinstance(kind, Mapping) else asdict(kind) if isinstance(kind, TaskSpec) else {}
    array, found = TASK_KINDS[wanted].read_cells(f"{table.where}: column {name!r}", cells, known)
    if found and not isinstance(kind, TaskSpec):
        given[name] = {"kind": wanted, **found}
    return array


def _check_texts(table: LabelTable, name: str, cells: Sequence[str]) -> None:
    """Raise DataError for texts that can neither be classes nor numbers unless someone says so."""
    present = [text for text in cells if text]
    if all(parse_number(text) is not None for text in present):
        return
    others = strays(present)
    if others and are_measured(present):
        raise DataError(
            f"{table.where}: column {name!r}: expected numbers, got {others[0]!r}; if that means a missing value: "
            f"--set 'data.options.missing={json.dumps(others, ensure_ascii=False)}'"
        )
    if not too_many_classes(present):
        return
    raise DataError(
        f"{table.where}: column {name!r}: expected classes, got {len(set(present))} different texts in "
        f"{len(present)} rows, such as {present[0]!r}; leave it out with --set data.options.ignore='[{name}]', or "
        "list the tasks with --set data.options.tasks=[...]"
    )


def _why(spec: TaskSpec, asked: bool) -> str:
    if asked:
        return "asked for"
    return "its values are numbers" if spec.labels is None else f"{len(spec.labels)} different values"


def _notes(name: str, texts: Sequence[str], used: Sequence[int]) -> list[str]:
    """Values that may mean that nothing is known."""
    present = [texts[row] for row in used if texts[row]]
    return [
        f"task {name!r}: {text!r} is a value as others are, in {present.count(text)} rows; if it means a missing one: "
        f"--set 'data.options.missing={json.dumps([text], ensure_ascii=False)}'"
        for text in dict.fromkeys([*strays(present), *perhaps_missing(present)])
    ]
