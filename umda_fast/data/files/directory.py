"""A directory of bags opened: its bags, the table of labels and the split files that lie in it or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from umda_fast.data.arrays import IntArray
from umda_fast.data.files.header_fields import check_pixel_size
from umda_fast.data.files.index import READ_TIMEOUT, FileIndex, Matching, SlideIndex
from umda_fast.data.files.labels_table import LabelTable, match_names, read_labels
from umda_fast.data.files.names import plain_name
from umda_fast.data.files.packed import PackIndex, is_pack
from umda_fast.data.files.skipped import Skipped
from umda_fast.data.files.split_files import read_split, split_files
from umda_fast.errors import DataError


@dataclass(frozen=True)
class OpenedSlides:
    """A directory opened: its bags and the files beside them, nothing yet said about tasks.

    Attributes:
        path: as it was given.
        index: the bags.
        table, rows: the table of labels, if there is one, and for every bag its row or None.
        split_files: CLAM's split files.
        skipped: what has been skipped so far.
    """

    path: str
    index: FileIndex | PackIndex
    table: LabelTable | None
    rows: list[int | None]
    split_files: list[Path]
    skipped: Skipped

    def read_splits(self, fold: int | None = None) -> list[dict[str, IntArray]]:
        """The parts of every split file, or of one."""
        chosen = self.split_files if fold is None else self.split_files[fold : fold + 1]
        return [read_split(file, self.index, self.skipped) for file in chosen]


def find_labels(path: Path) -> list[Path]:
    """Tables of labels in a directory, or else beside it."""
    for directory in (path, path.parent):
        found = [directory / f"labels{suffix}" for suffix in (".csv", ".tsv")]
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


def open_slides(
    path: str,
    *,
    labels: str | None = None,
    tasks: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    metadata: Sequence[str] = (),
    splits: str | None = None,
    views: Sequence[str] | None = None,
    mpp: float | None = None,
    match: Matching = "coords",
    tolerance: float = 1.0,
    skip_bad: bool = False,
    read_timeout: float = READ_TIMEOUT,
) -> OpenedSlides:
    """Index a directory, packed or not, and find its table of labels and its splits.

    Arguments and errors as of `umda_fast.data.sources.slides.load_slides_source`.
    """
    where = Path(path).resolve()
    if not where.is_dir():
        raise DataError(f"{path}: expected a directory of bags, got {'a file' if where.exists() else 'nothing there'}")
    skipped = Skipped(skip_bad)
    table, beside = _table(
        where, labels, _list("tasks", tasks), _list("ignore", ignore) or [], _list("metadata", metadata) or []
    )
    chosen = _list("views", views)
    index: FileIndex | PackIndex
    if is_pack(where):
        if mpp is not None:
            raise DataError(f"{path}: mpp: expected when packing; positions of a packed directory are settled")
        index = PackIndex(where, views=chosen, report=skipped, verify=skip_bad)
    else:
        sizes = _pixel_sizes(table, mpp)
        index = FileIndex(
            where,
            views=chosen,
            pixel_sizes=sizes,
            match=match,
            tolerance=tolerance,
            read_timeout=read_timeout,
            skipped=skipped,
        )
    rows: list[int | None] = [None] * len(index.names)
    if table is not None:
        # A table beside the directory may be another directory's.
        if beside and all(row is None for row in match_names(table, index, Skipped(True))):
            table = None
        else:
            rows = match_names(table, index, skipped)
    return OpenedSlides(path, index, table, rows, _split_files(where, splits, index), skipped)


def _list(argument: str, value: Sequence[str] | None) -> list[str] | None:
    """A sequence of names; one name is a sequence of one."""
    if value is None:
        return None
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _table(
    path: Path, labels: str | None, tasks: Sequence[str] | None, ignore: Sequence[str], metadata: Sequence[str]
) -> tuple[LabelTable | None, bool]:
    """The table of labels, and whether it was found beside the directory and not in it."""
    if labels is not None:
        return read_labels(Path(labels), tasks=tasks, ignore=ignore, metadata=metadata), False
    found = find_labels(path)
    if len(found) > 1:
        raise DataError(f"{found[0]}: expected one table of labels, got {found[1].name} too")
    if not found:
        return None, False
    beside = found[0].parent != path
    return read_labels(found[0], tasks=tasks, ignore=ignore, metadata=metadata), beside


def _pixel_sizes(table: LabelTable | None, mpp: float | None) -> dict[str, float] | float | None:
    if mpp is not None:
        return check_pixel_size("mpp", mpp)
    if table is None or table.pixel_sizes is None:
        return None
    return {
        plain_name(name): check_pixel_size(f"{table.path}: slide {name!r}: mpp", text)
        for name, text in zip(table.names, table.pixel_sizes, strict=True)
        if text
    }


def _split_files(path: Path, given: str | None, index: SlideIndex) -> list[Path]:
    if given is not None:
        directory = Path(given)
        if directory.is_file():
            return [directory]
        files = split_files(directory)
        if not files:
            raise DataError(f"{given}: expected splits_0.csv, ... or one such file, got none")
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
