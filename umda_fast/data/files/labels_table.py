"""A table of labels beside the bags: what its columns mean, and which row is which bag.

docs/data.md says which columns are what. A column that means nothing else may be a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from umda_fast.data.columns import ColumnUse
from umda_fast.data.files.column_meanings import find_meanings, part_named
from umda_fast.data.files.names import BagFiles, Bags, NameIndex
from umda_fast.data.files.skipped import Report
from umda_fast.data.files.tables import Table, known_text, with_points
from umda_fast.errors import DataError


@dataclass(frozen=True)
class LabelTable:
    """A table as it was read, one row per name.

    Attributes:
        table: the file.
        column: the number of the column that names the bags.
        names: of the rows, as written.
        by_patient: a row is a patient and all his bags.
        columns: column -> texts, blank where missing; those that may be tasks.
        metadata: column -> texts, blank where missing; numbers known of the bags.
        patients, splits, pixel_sizes: texts, or None where there is no such column.
        uses: what the other columns are.
        notes: what had to be guessed, one line each.
    """

    table: Table
    column: int
    names: list[str]
    by_patient: bool
    columns: dict[str, list[str]]
    metadata: dict[str, list[str]]
    patients: list[str] | None
    splits: list[str] | None
    pixel_sizes: list[str] | None
    uses: list[ColumnUse]
    notes: list[str]

    @property
    def where(self) -> str:
        """The file, for messages."""
        return str(self.table.path)


def read_labels(
    table: Table,
    bags: BagFiles,
    *,
    tasks: Sequence[str] | None = None,
    known: Sequence[str] = (),
    ignore: Sequence[str] = (),
    metadata: Sequence[str] = (),
    patient: str | None = None,
    missing: Sequence[str] = (),
) -> LabelTable:
    """What the columns of a table of labels mean.

    Args:
        table: as the file holds it.
        bags: those that it may name.
        tasks: the columns that are tasks; None: all that mean nothing else.
        known: names of tasks whose kinds are known, whatever their columns mean otherwise.
        ignore: columns to leave out.
        metadata: columns of numbers that are known of the bags, not to be predicted.
        patient: the column of patients; None: by its name.
        missing: texts that mean a missing value, beside those that always do.

    Raises:
        DataError: naming the file and the column.
    """
    header = table.header
    asked = {"tasks": tasks or (), "ignore": ignore, "metadata": metadata, "patient": (patient,) if patient else ()}
    for option, wanted in asked.items():
        unknown = [name for name in wanted if name not in header]
        if unknown:
            some = ", ".join(filter(None, header))
            raise DataError(f"{table.path}: {option}: expected columns among {some}, got {unknown[0]!r}")
    texts = [[known_text(row[number], missing) for row in table.rows] for number in range(len(header))]
    taken = [name for name in header if name in {*(known if tasks is None else tasks)} and name not in ignore]
    meant = find_meanings(
        header, texts, bags, taken={*taken, *metadata}, ignore=ignore, patient=patient
    )
    names = [row[meant.bag] for row in table.rows]
    if "" in names:
        what = header[meant.bag] or f"number {meant.bag + 1}"
        row = table.lines[names.index("")]
        raise DataError(f"{table.path}: column {what!r}: expected a name in every row, got a blank in row {row}")
    notes = [*table.notes, *meant.notes]

    def cells(name: str | None) -> list[str] | None:
        return None if name is None else texts[header.index(name)]

    def numbers(name: str) -> list[str]:
        column, note = with_points(table, name, texts[header.index(name)])
        notes.extend([note] if note else [])
        return column

    uses = [*meant.uses, *(ColumnUse(name, "metadata", "asked for") for name in metadata)]
    chosen = taken if tasks is not None else [name for name in header if name in taken or name in meant.left]
    if tasks is not None:
        uses += [ColumnUse(name, "left out", "not among the tasks asked for") for name in meant.left]
    return LabelTable(
        table=table,
        column=meant.bag,
        names=names,
        by_patient=meant.by_patient,
        columns={name: numbers(name) for name in chosen if name not in metadata},
        metadata={name: numbers(name) for name in metadata},
        patients=names if meant.by_patient else cells(meant.patient),
        splits=_parts(table, meant.split, names, cells(meant.split)),
        pixel_sizes=None if meant.pixel_size is None else numbers(meant.pixel_size),
        uses=uses,
        notes=notes,
    )


def _parts(table: Table, column: str | None, names: Sequence[str], texts: Sequence[str] | None) -> list[str] | None:
    parts = []
    for name, text in zip(names, texts or (), strict=texts is not None):
        part = part_named(text)
        if part is None:
            raise DataError(f"{table.path}: column {column}: expected train, val, test, got {text!r} for {name!r}")
        parts.append(part)
    return None if texts is None else parts


def match_names(
    table: LabelTable, bags: Bags, files: BagFiles, report: Report, absent: Report
) -> list[int | None]:
    """For every bag the row of its labels, None where there is none.

    Reports bags with more than one row, and, to `absent`, labels for bags that are missing.

    Raises:
        DataError: names that are written in another way than those of the bags.
    """
    if table.by_patient:
        return _match_patients(table, bags, files, report)
    index = NameIndex(bags)
    names = bags.names
    rows: list[int | None] = [None] * len(names)
    missing: list[str] = []
    for row, text in enumerate(table.names):
        bag = index.find(text, missing)
        if bag is None:
            continue
        if rows[bag] is None:
            rows[bag] = row
        else:
            line = table.table.lines[row]
            report(f"{table.where}: slide {names[bag]!r}: expected one row, got another in row {line}")
    if missing:
        index.check_writing(table.where, missing, {names[bag] for bag, row in enumerate(rows) if row is not None})
        absent(index.missing_line(f"{table.where}: labels for missing slides", missing))
    return rows


def unmatched(table: LabelTable, bags: Bags) -> str | None:
    """A line on a table that does not name a single bag, None for one that does.

    Raises:
        DataError: names that are written in another way than those of the bags.
    """
    if table.by_patient:
        return None
    index = NameIndex(bags)
    missing: list[str] = []
    for text in table.names:
        index.find(text, missing)
    if len(missing) < len(table.names):
        return None
    index.check_writing(table.where, missing, ())
    return index.missing_line(f"{table.where}: labels for missing slides", missing)


def _match_patients(table: LabelTable, bags: Bags, files: BagFiles, report: Report) -> list[int | None]:
    owners: dict[str, int] = {}
    for row, name in enumerate(table.names):
        if owners.setdefault(name, row) != row:
            report(f"{table.where}: patient {name!r}: expected one row, got another in row {table.table.lines[row]}")
    return [files.owner(bag, owners) for bag in bags.names]
