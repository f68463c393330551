"""Columns of a table of labels, out of texts: tasks with their labels, and numbers known of the bags."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from umda_fast.data.arrays import ArrayInput, FloatArray
from umda_fast.data.files.labels_table import LabelTable
from umda_fast.data.labels import MAX_CLASSES, KindOverride, KindOverrides, label_columns
from umda_fast.data.metadata import Metadata
from umda_fast.errors import DataError
from umda_fast.tasks import TASK_KINDS, TaskSpec


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
            if row is not None and texts[row]:
                try:
                    values[bag, column] = float(texts[row])
                except ValueError:
                    raise DataError(
                        f"{table.path}: column {name!r}: expected numbers, got {texts[row]!r} for {table.names[row]!r}"
                    ) from None
    return Metadata(tuple(table.metadata), values)


def read_tasks(
    table: LabelTable, rows: Sequence[int | None], kinds: KindOverrides | None
) -> tuple[tuple[TaskSpec, ...], dict[str, FloatArray]]:
    """Tasks and their label columns for the bags whose rows are given.

    Several labels of a multilabel task are separated by `;` in the cell; a task is multilabel only if `kinds` says.

    Raises:
        DataError: naming the table and the column.
    """
    columns = {
        name: ["" if row is None else texts[row] for row in rows]
        for name, texts in table.columns.items()
        if isinstance(kinds, Mapping) or kinds is None or any(spec.name == name for spec in kinds)
    }
    arrays: dict[str, ArrayInput] = {}
    given: dict[str, KindOverride] = (
        dict(kinds) if isinstance(kinds, Mapping) else {spec.name: spec for spec in kinds or ()}
    )
    for name, texts in columns.items():
        kind = given.get(name)
        wanted = kind.get("kind") if isinstance(kind, Mapping) else kind.kind if isinstance(kind, TaskSpec) else kind
        if not isinstance(wanted, str) or wanted not in TASK_KINDS:
            if wanted is None:
                _check_task(table.path, name, texts)
            arrays[name] = np.array(texts, dtype=object)
            continue
        known = kind if isinstance(kind, Mapping) else asdict(kind) if isinstance(kind, TaskSpec) else {}
        arrays[name], found = TASK_KINDS[wanted].read_cells(f"{table.path}: column {name!r}", texts, known)
        if found and not isinstance(kind, TaskSpec):
            given[name] = {"kind": wanted, **found}
    fixed = kinds if isinstance(kinds, Sequence) else given
    return label_columns(arrays, len(rows), fixed, where=str(table.path))


def _check_task(path: Path, name: str, texts: Sequence[str]) -> None:
    """Raise DataError for a column that cannot be a task unless someone says so: constants, free text."""
    present = [text for text in texts if text]
    distinct = set(present)
    advice = (
        f"leave it out with --set data.options.ignore='[{name}]', or list the tasks with --set data.options.tasks=[...]"
    )
    if len(distinct) == 1:
        raise DataError(
            f"{path}: column {name!r}: expected labels that differ, got {present[0]!r} everywhere; {advice}"
        )
    try:
        [float(text) for text in distinct]
    except ValueError:
        if len(distinct) > max(2, min(MAX_CLASSES, len(present) // 2)):
            raise DataError(
                f"{path}: column {name!r}: expected classes, got {len(distinct)} different texts in {len(present)} "
                f"rows, such as {present[0]!r}; {advice}"
            ) from None
