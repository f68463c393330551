"""A table of labels beside the bags, and the split files of CLAM.

The column that names the bags is called slide_id, slide, bag, filename or the like, or else is the first. A column
patient or case_id groups bags; split says train, val or test; mpp gives micrometres per level-0 pixel. Every other
column is a task. A blank cell, or NA or NaN, is a missing label.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Protocol

import numpy as np

from umda_fast.data.arrays import ArrayInput, FloatArray, IntArray
from umda_fast.data.files.readers import SUFFIXES
from umda_fast.data.files.skipped import Report
from umda_fast.data.labels import MAX_CLASSES, KindOverride, KindOverrides, label_columns
from umda_fast.data.metadata import Metadata
from umda_fast.data.splits import SPLITS
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec

# Without case, blanks, - and _.
_NAME = ("slideid", "slide", "slidename", "bag", "bagid", "bagname", "filename", "file", "case", "name")
_PATIENT = ("patient", "patientid", "caseid", "case", "subject", "subjectid")
_SPLIT = ("split",)
_PIXEL_SIZE = ("mpp", "pixelsize")
_MISSING = ("", "na", "n/a", "nan", "<na>", "null")
_SLIDE_SUFFIXES = (
    *SUFFIXES,
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".czi", ".bif", ".vms", ".vmu", ".svslide", ".qptiff"),
    *(".isyntax", ".dcm", ".png", ".jpg", ".jpeg"),
)


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


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a .csv or .tsv file; cells without surrounding blanks.

    Raises:
        DataError: naming the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable table in UTF-8, got: {error}") from error
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    try:
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        ]
    except csv.Error as error:
        raise DataError(f"{path}: expected a table of comma- or tab-separated values, got: {error}") from error
    lines = [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
    if not lines:
        raise DataError(f"{path}: expected a header and rows, got an empty file")
    header = lines[0][1]
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}: row {number}: expected {len(header)} cells as in the header, got {len(row)}")
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    if twice:
        raise DataError(f"{path}: expected distinct columns, got {twice[0]!r} more than once")
    return header, [row for _, row in lines[1:]]


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
    texts = {
        name: ["" if row[index].lower() in _MISSING else row[index] for row in rows]
        for index, name in enumerate(header)
    }
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


def plain_name(text: str) -> str:
    """A bag's name out of what a table calls it: without folders and without the suffix of a file or slide."""
    name = PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in _SLIDE_SUFFIXES else name


class Bags(Protocol):
    """Bags that a table may mean: `names`, and `absent` ones, which are there and not used."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def absent(self) -> Iterable[str]: ...


class _NameIndex:
    """Finds the bag that a table means."""

    def __init__(self, bags: Bags) -> None:
        self._rows = {name: row for row, name in enumerate(bags.names)}
        self._plain: dict[str, int | None] = {}
        for row, name in enumerate(bags.names):
            short = plain_name(name)
            self._plain[short] = None if short in self._plain else row
        self._absent = {name for bag in bags.absent for name in (bag, plain_name(bag))}

    def find(self, text: str, missing: list[str]) -> int | None:
        """The bag's index, by its exact name or else by that without folders and suffix.

        None if there is no such bag, which is added to `missing`, or if it is not used.
        """
        row = self._rows.get(text)
        row = self._plain.get(plain_name(text)) if row is None else row
        if row is None and text not in self._absent and plain_name(text) not in self._absent:
            missing.append(text)
        return row


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - 3} more" if len(texts) > 3 else ""
    return ", ".join(repr(text) for text in texts[:3]) + more


def match_names(table: LabelTable, bags: Bags, report: Report) -> list[int | None]:
    """For every bag the row of its labels, None where there is none.

    Reports labels for bags that are missing, and bags with more than one row.
    """
    index = _NameIndex(bags)
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
        report(f"{table.path}: labels for missing slides: {_some(missing)}; there are {len(names)} slides: {have}")
    return rows


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
        if wanted == "multilabel":
            named = kind.get("labels") if isinstance(kind, Mapping) else getattr(kind, "labels", None)
            arrays[name], labels = _multilabel(f"{table.path}: column {name!r}", texts, named)
            if not isinstance(kind, TaskSpec):
                given[name] = {"kind": "multilabel", "classes": len(labels), "labels": labels}
        else:
            if wanted is None:
                _check_task(table.path, name, texts)
            arrays[name] = np.array(texts, dtype=object)
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


def _multilabel(where: str, texts: Sequence[str], named: Sequence[str] | None) -> tuple[FloatArray, list[str]]:
    cells = [[part.strip() for part in text.split(";") if part.strip()] for text in texts]
    labels = list(named) if named else sorted({label for cell in cells for label in cell})
    matrix = np.zeros((len(texts), len(labels)))
    for row, cell in enumerate(cells):
        unknown = [label for label in cell if label not in labels]
        if unknown:
            raise DataError(f"{where}: expected labels among {', '.join(labels)}, got {unknown[0]!r}")
        matrix[row, [labels.index(label) for label in cell]] = 1.0
        if not texts[row]:
            matrix[row] = np.nan
    return matrix, labels


def split_files(directory: Path) -> list[Path]:
    """CLAM's splits_0.csv, splits_1.csv, ... of a directory, by number."""
    found = {
        int(match.group(1)): path
        for path in directory.glob("splits_*.csv")
        if (match := re.fullmatch(r"splits_(\d+)\.csv", path.name))
    }
    if sorted(found) != list(range(len(found))):
        raise DataError(f"{directory}: expected splits_0.csv, splits_1.csv, ... without a gap, got {sorted(found)}")
    return [found[number] for number in sorted(found)]


def read_split(path: Path, bags: Bags, report: Report) -> dict[str, IntArray]:
    """One of CLAM's split files: columns train, val and test, each with names of slides.

    Returns:
        Split -> int64 indices into the bags' names, in ascending order. A slide that the file does not name is in none.

    Raises:
        DataError: naming the file: columns missing, a slide in two splits; unless `report` skips it, a missing slide.
    """
    header, rows = read_rows(path)
    if not {"train", "test"} <= set(header):
        raise DataError(f"{path}: expected columns train, val and test, got {', '.join(map(repr, header))}")
    index = _NameIndex(bags)
    part: dict[int, str] = {}
    missing: list[str] = []
    for split in SPLITS:
        if split not in header:
            continue
        column = header.index(split)
        for text in (row[column] for row in rows):
            if not text or text.lower() in _MISSING:
                continue
            bag = index.find(text, missing)
            if bag is not None and part.setdefault(bag, split) != split:
                raise DataError(f"{path}: slide {text!r}: expected in one split, got {part[bag]} and {split}")
    if missing:
        report(f"{path}: missing slides: {_some(missing)}")
    return {
        split: np.array(sorted(bag for bag, where in part.items() if where == split), dtype=np.int64)
        for split in SPLITS
    }
