"""The table of labels in a directory of bags or beside it: which file it is, and what it says of the bags."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umda_fast.data.files.header_fields import check_pixel_size
from umda_fast.data.files.labels_table import LabelTable, match_names, read_labels, unmatched
from umda_fast.data.files.names import BagFiles, Bags
from umda_fast.data.files.skipped import Report, Skipped
from umda_fast.data.files.tables import SUFFIXES, Table, read_table
from umda_fast.data.labels import KindOverrides
from umda_fast.data.options import as_names, option
from umda_fast.data.positive import Positive
from umda_fast.errors import DataError


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What is read of a table of labels.

    Attributes:
        kinds, positive: as in `BagDataset.from_arrays`.
        labels: the table, .csv, .tsv or .xlsx; None looks for labels.csv, ... in the directory, then beside it.
        tasks, ignore: columns of the table that are tasks, or that are not.
        patient: the column of patients, where its name does not say so.
        missing: texts that mean a missing value, beside those that always do (docs/data.md).
        metadata: columns of numbers that are known of a bag (an age, a magnification) and condition the model.
        partial: whether the table and split files may name bags that are not there; else that is a fault.
    """

    kinds: KindOverrides | None = None
    positive: Positive | None = None
    labels: str | None = option(None, local=True, path=True)
    tasks: Sequence[str] | None = option(None, local=True)
    ignore: Sequence[str] = option((), local=True)
    metadata: Sequence[str] = ()
    patient: str | None = option(None, local=True)
    missing: Sequence[str] = ()
    partial: bool = option(False, local=True)


class LabelFile:
    """The table of labels of a directory, read in two steps: its cells, and what they mean when the bags are known.

    Args:
        path: the directory.
        options: which table, and what of it.
        mpp: micrometres per level-0 pixel of all slides, whatever the table says.

    Raises:
        DataError: several tables, or one that cannot be read.
    """

    def __init__(self, path: Path, options: LabelOptions, mpp: float | None) -> None:
        self._path, self._options = path, options
        self._pixel_size = None if mpp is None else check_pixel_size("mpp", mpp)
        self._bags = BagFiles({})
        self._table: LabelTable | None = None
        self._cells: Table | None = None
        self._beside = False
        if options.labels is not None:
            self._cells = read_table(Path(options.labels))
            return
        found = _find_labels(path)
        if len(found) > 1:
            raise DataError(f"{found[0]}: expected one table of labels, got {found[1].name} too")
        if found:
            self._cells, self._beside = read_table(found[0]), found[0].parent != path

    def meet(self, folders: Mapping[str, Sequence[str]]) -> list[float]:
        """Tell the names of all bags, and the folders in which their files lie.

        Returns:
            Micrometres per level-0 pixel of every bag, NaN where nothing but its files says.

        Raises:
            DataError: naming the column, or the bag.
        """
        self._bags = BagFiles(folders)
        if self._cells is not None:
            self._table = _meant(self._cells, self._bags, self._options)
        table = self._table
        if self._pixel_size is not None or table is None or table.pixel_sizes is None:
            return [math.nan if self._pixel_size is None else self._pixel_size] * len(folders)
        said = [
            check_pixel_size(f"{table.where}: slide {name!r}: mpp", text) if text else math.nan
            for name, text in zip(table.names, table.pixel_sizes, strict=True)
        ]
        rows = match_names(table, _Names(list(folders)), self._bags, Skipped(True), Skipped(True))
        return [math.nan if row is None else said[row] for row in rows]

    def rows_of(self, bags: Bags, report: Report) -> tuple[LabelTable | None, list[int | None], str]:
        """The table, for every bag its row or None, and why there is no table if there is none.

        Raises:
            DataError: the table in the directory names none of its bags.
        """
        nothing: list[int | None] = [None] * len(bags.names)
        if self._table is None:
            return None, nothing, self._nothing_found()
        strangers = unmatched(self._table, bags)
        if strangers is None:
            absent = Skipped(True) if self._options.partial else report
            return self._table, match_names(self._table, bags, self._bags, report, absent), ""
        if not self._beside and not self._options.partial:
            raise DataError(strangers)
        return None, nothing, strangers  # of another directory's bags, it seems

    def _nothing_found(self) -> str:
        """What to say of a directory without a table of labels, with one of another name that names its bags."""
        line = (
            f"{self._path}: expected labels of at least one task, got none: there is no "
            f"{' or '.join(f'labels{suffix}' for suffix in SUFFIXES)} in it or beside it"
        )
        tables = [
            file
            for directory in (self._path, self._path.parent)
            for file in sorted(directory.glob("*"))
            if file.suffix.lower() in SUFFIXES and file.is_file() and file.stat().st_size < _LARGEST
        ]
        found = next((file for file in tables[:_LOOKED_AT] if _names_bags(file, self._bags)), None)
        return line if found is None else f"{line}; is it {found.name}? --set data.options.labels={found}"


@dataclass(frozen=True)
class _Names:
    names: Sequence[str]
    absent: Sequence[str] = ()


def _find_labels(path: Path) -> list[Path]:
    """Tables of labels in a directory, or else beside it."""
    for directory in (path, path.parent):
        found = [directory / f"labels{suffix}" for suffix in SUFFIXES]
        found = [file for file in found if file.is_file()]
        if found:
            return found
    return []


def _meant(table: Table, bags: BagFiles, options: LabelOptions) -> LabelTable:
    kinds = options.kinds or {}
    metadata = as_names(options.metadata)
    if not isinstance(kinds, Mapping):  # a trained model's: what it knows of bags and nobody does here is missing
        metadata = [name for name in metadata if name in table.header]
    return read_labels(
        table,
        bags,
        tasks=None if options.tasks is None else as_names(options.tasks),
        known=list(kinds) if isinstance(kinds, Mapping) else [spec.name for spec in kinds],
        ignore=as_names(options.ignore),
        metadata=metadata,
        patient=options.patient,
        missing=as_names(options.missing),
    )


_LOOKED_AT, _LARGEST = 20, 10_000_000  # tables of other names and bytes of one, to find the labels among them


def _names_bags(file: Path, bags: BagFiles) -> bool:
    """Whether a table has a column of bags or patients, and others that may be labels."""
    try:
        table = read_table(file)
    except DataError:
        return False
    columns = [[row[number] for row in table.rows] for number in range(len(table.header))]
    known = any(bags.seem_named(column) or bags.seem_grouped(column) for column in columns)
    return known and len(columns) > 1 and not file.name.startswith(("process_list", "splits_"))
