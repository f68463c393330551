"""A directory of bags opened: its bags, the table of labels and the split files that lie in it or beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from umda_fast.data.arrays import IntArray
from umda_fast.data.files.file_options import FileOptions
from umda_fast.data.files.header_fields import check_pixel_size
from umda_fast.data.files.index import FileIndex, PixelSizes, SlideIndex
from umda_fast.data.files.labels_table import LabelTable, match_names, read_labels, unmatched
from umda_fast.data.files.layouts import files_below
from umda_fast.data.files.names import BagFiles
from umda_fast.data.files.packed import PackIndex, is_pack
from umda_fast.data.files.skipped import Skipped
from umda_fast.data.files.split_files import is_split, read_split, split_files
from umda_fast.data.files.tables import SUFFIXES, read_table
from umda_fast.data.labels import KindOverrides
from umda_fast.data.options import as_names, option
from umda_fast.errors import DataError


@dataclass(frozen=True)
class OpenedSlides:
    """A directory opened: its bags and the files beside them, nothing yet said about tasks.

    Attributes:
        path: as it was given.
        index: the bags.
        table, rows: the table of labels, if there is one, and for every bag its row or None.
        no_table: why there is none.
        split_files: CLAM's split files.
        skipped: what has been skipped so far.
    """

    path: str
    index: FileIndex | PackIndex
    table: LabelTable | None
    rows: list[int | None]
    no_table: str
    split_files: list[Path]
    skipped: Skipped

    def read_split(self, file: Path) -> dict[str, IntArray]:
        """The parts that one of the split files names."""
        return read_split(file, self.index, self.skipped)


def find_labels(path: Path) -> list[Path]:
    """Tables of labels in a directory, or else beside it."""
    for directory in (path, path.parent):
        found = [directory / f"labels{suffix}" for suffix in SUFFIXES]
        found = [file for file in found if file.is_file()]
        if found:
            return found
    return []


def find_splits(path: Path) -> Path | None:
    """A directory with CLAM's splits_0.csv, ...: `path` itself, its `splits`, or `splits` beside it."""
    for directory in (path, path / "splits", path.parent / "splits"):
        if (directory / "splits_0.csv").is_file():
            return directory
    return None


@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """What is read of a table of labels.

    Attributes:
        kinds: as in `BagDataset.from_arrays`.
        labels: the table, .csv, .tsv or .xlsx; None looks for labels.csv, ... in the directory, then beside it.
        tasks, ignore: columns of the table that are tasks, or that are not.
        patient: the column of patients, where its name does not say so.
        missing: texts that mean a missing value, beside those that always do (docs/data.md).
        metadata: columns of numbers that are known of a bag (an age, a magnification) and condition the model.
    """

    kinds: KindOverrides | None = None
    labels: str | None = option(None, local=True, path=True)
    tasks: Sequence[str] | None = option(None, local=True)
    ignore: Sequence[str] = option((), local=True)
    metadata: Sequence[str] = ()
    patient: str | None = option(None, local=True)
    missing: Sequence[str] = ()


def open_slides(path: str, labels: LabelOptions, splits: str | None, files: FileOptions) -> OpenedSlides:
    """Index a directory, packed or not, and find its table of labels and its splits.

    Args:
        path: the directory, or one that `umda-fast pack` made.
        labels: which table, and what of it.
        splits: a directory with CLAM's splits_0.csv, ..., or one such file; None looks for `splits_0.csv` in the
            directory, in its `splits`, then in `splits` beside it.
        files: how the bags' files are read.

    Raises:
        DataError: naming the file, what was expected and what came.
    """
    where = Path(path).resolve()
    if not where.is_dir():
        raise DataError(f"{path}: expected a directory of bags, got {'a file' if where.exists() else 'nothing there'}")
    skipped = Skipped(files.skip_bad)
    index: FileIndex | PackIndex
    if is_pack(where):
        if files.mpp is not None:
            raise DataError(f"{path}: mpp: expected when packing; positions of a packed directory are settled")
        index = PackIndex(where, views=files.chosen_views, report=skipped, verify=files.skip_bad)
        at = BagFiles([PurePath(name) for name in index.names])
        table, beside = _table(where, labels, at)
    else:
        at = BagFiles([file.relative_to(where) for file in files_below(where)])
        table, beside = _table(where, labels, at)
        index = FileIndex(where, files, _pixel_sizes(table, at, files.mpp), skipped)
    rows: list[int | None] = [None] * len(index.names)
    no_table = "" if table is not None else _no_table(where)
    if table is not None:
        strangers = unmatched(table, index)
        if strangers is None:
            rows = match_names(table, index, at, skipped)
        elif beside:
            table, no_table = None, strangers  # of another directory's bags, it seems
        else:
            raise DataError(strangers)
    return OpenedSlides(path, index, table, rows, no_table, _split_files(where, splits, index), skipped)


def _no_table(path: Path) -> str:
    """What to say of a directory without a table of labels, with tables of other names that are there."""
    others = [
        file
        for directory in (path, path.parent)
        for file in sorted(directory.glob("*"))
        if file.suffix.lower() in (*SUFFIXES, ".xls", ".ods") and file.is_file() and not is_split(file)
    ]
    line = (
        f"{path}: expected labels of at least one task, got none: there is no "
        f"{' or '.join(f'labels{suffix}' for suffix in SUFFIXES)} in it or beside it"
    )
    if not others:
        return line
    return f"{line}; is it {others[0].name}? --set data.options.labels={others[0]}"


def _table(path: Path, options: LabelOptions, bags: BagFiles) -> tuple[LabelTable | None, bool]:
    """The table of labels, and whether it was found beside the directory and not in it."""
    if options.labels is not None:
        file, beside = Path(options.labels), False
    else:
        found = find_labels(path)
        if len(found) > 1:
            raise DataError(f"{found[0]}: expected one table of labels, got {found[1].name} too")
        if not found:
            return None, False
        file, beside = found[0], found[0].parent != path
    kinds = options.kinds or {}
    table = read_labels(
        read_table(file),
        bags,
        tasks=None if options.tasks is None else as_names(options.tasks),
        known=list(kinds) if isinstance(kinds, Mapping) else [spec.name for spec in kinds],
        ignore=as_names(options.ignore),
        metadata=as_names(options.metadata),
        patient=options.patient,
        missing=as_names(options.missing),
    )
    return table, beside


@dataclass(frozen=True)
class _Names:
    names: Sequence[str]
    absent: Sequence[str] = ()


def _pixel_sizes(table: LabelTable | None, bags: BagFiles, mpp: float | None) -> PixelSizes:
    """Micrometres per level-0 pixel of bags by name, NaN where nothing but their files says."""
    given = None if mpp is None else check_pixel_size("mpp", mpp)

    def sizes(names: Sequence[str]) -> list[float]:
        if given is not None or table is None or table.pixel_sizes is None:
            return [math.nan if given is None else given] * len(names)
        said = [
            check_pixel_size(f"{table.where}: slide {name!r}: mpp", text) if text else math.nan
            for name, text in zip(table.names, table.pixel_sizes, strict=True)
        ]
        rows = match_names(table, _Names(names), bags, Skipped(True))
        return [math.nan if row is None else said[row] for row in rows]

    return sizes


def _split_files(path: Path, given: str | None, index: SlideIndex) -> list[Path]:
    if given is not None:
        directory = Path(given)
        if directory.is_file():
            return [directory]
        files = split_files(directory) or [file for file in [directory / "splits.csv"] if file.is_file()]
        if not files:
            raise DataError(f"{given}: expected splits_0.csv, ... or one such file, or a run directory, got none")
        return files
    directory_found = find_splits(path)
    if directory_found is None:
        return []
    files = split_files(directory_found)
    if directory_found.parent == path.parent and directory_found != path:
        # Beside the directory: may be another directory's.
        parts = read_split(files[0], index, Skipped(True))
        return files if any(len(rows) for rows in parts.values()) else []
    return files
