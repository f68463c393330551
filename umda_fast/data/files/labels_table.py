"""A table of labels beside the bags: what its columns mean, and which row is which bag.

The column that names the bags is called slide_id, slide, bag, filename or the like, or else is the first. A column
patient or case_id groups bags; split says train, val or test; mpp gives micrometres per level-0 pixel. Every other
column is a task. A blank cell, or NA or NaN, is a missing label.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umda_fast.data.files.names import Bags, NameIndex, some_names
from umda_fast.data.files.skipped import Report
from umda_fast.data.files.tables import known_text, read_rows
from umda_fast.errors import DataError

# Without case, blanks, - and _.
_NAME = ("slideid", "slide", "slidename", "bag", "bagid", "bagname", "filename", "file", "case", "name")
_PATIENT = ("patient", "patientid", "caseid", "case", "subject", "subjectid")
_SPLIT = ("split",)
_PIXEL_SIZE = ("mpp", "pixelsize")


@dataclass(frozen=True)
class LabelTable:
    """A table as it was read, one row per name.

    Attributes:
        path: of the file.
        names: of the rows, as written.
        columns: column -> texts, blank where missing; those that may be tasks.
        metadata: column -> texts, blank where missing; numbers known of the bags.
        patients, splits, pixel_sizes: texts, or None where there is no such column.
    """

    path: Path
    names: list[str]
    columns: dict[str, list[str]]
    metadata: dict[str, list[str]]
    patients: list[str] | None
    splits: list[str] | None
    pixel_sizes: list[str] | None


def read_labels(
    path: Path, *, tasks: Sequence[str] | None = None, ignore: Sequence[str] = (), metadata: Sequence[str] = ()
) -> LabelTable:
    """Read a table of labels.

    Args:
        path: .csv or .tsv.
        tasks: the columns that are tasks; None: all that mean nothing else.
        ignore: columns to leave out.
        metadata: columns of numbers that are known of the bags, not to be predicted.

    Raises:
        DataError: naming the file and the column.
    """
    header, rows = read_rows(path)
    for argument, wanted in (("tasks", tasks or ()), ("ignore", ignore), ("metadata", metadata)):
        unknown = [name for name in wanted if name not in header]
        if unknown:
            raise DataError(f"{path}: {argument}: expected columns among {', '.join(header)}, got {unknown[0]!r}")
    texts = {name: [known_text(row[index]) for row in rows] for index, name in enumerate(header)}
    plain = {name: re.sub(r"[\s_-]", "", name.lower()) for name in header}
    claimed = {*(tasks or ()), *metadata}

    def find(meanings: Sequence[str]) -> str | None:
        for meaning in meanings:
            for name in header:
                if plain[name] == meaning and name not in claimed:
                    claimed.add(name)
                    return name
        return None

    name_column = find(_NAME) or header[0]
    claimed.add(name_column)
    patient, split, pixel_size = find(_PATIENT), find(_SPLIT), find(_PIXEL_SIZE)
    names = [cells[header.index(name_column)] for cells in rows]
    if "" in names:
        row = names.index("") + 2
        raise DataError(f"{path}: column {name_column!r}: expected a name in every row, got a blank in row {row}")
    left = [name for name in header if name not in claimed and name not in ignore]
    return LabelTable(
        path=path,
        names=names,
        columns={name: texts[name] for name in (left if tasks is None else tasks)},
        metadata={name: texts[name] for name in metadata},
        patients=texts[patient] if patient else None,
        splits=texts[split] if split else None,
        pixel_sizes=texts[pixel_size] if pixel_size else None,
    )


def match_names(table: LabelTable, bags: Bags, report: Report) -> list[int | None]:
    """For every bag the row of its labels, None where there is none.

    Reports labels for bags that are missing, and bags with more than one row.
    """
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
            report(f"{table.path}: slide {names[bag]!r}: expected one row, got another in row {row + 2}")
    if missing:
        have = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        report(f"{table.path}: labels for missing slides: {some_names(missing)}; there are {len(names)} slides: {have}")
    return rows
