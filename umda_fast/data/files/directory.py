"""A directory of bags opened: its bags, the table of labels and the split files that lie in it or beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from umda_fast.data.arrays import IntArray
from umda_fast.data.files.file_options import FileOptions
from umda_fast.data.files.index import FileIndex, SlideIndex
from umda_fast.data.files.label_files import LabelFile, LabelOptions
from umda_fast.data.files.labels_table import LabelTable
from umda_fast.data.files.packed import PackIndex, is_pack
from umda_fast.data.files.skipped import Skipped
from umda_fast.data.files.split_files import named_in, read_split, split_files
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
        partial: whether split files may name bags that are not there.
    """

    path: str
    index: FileIndex | PackIndex
    table: LabelTable | None
    rows: list[int | None]
    no_table: str
    split_files: list[Path]
    skipped: Skipped
    partial: bool

    def read_split(self, file: Path) -> dict[str, IntArray]:
        """The parts that one of the split files names.

        Raises:
            DataError: as the function of that name; of the slides of a split there is none.
        """
        parts = read_split(file, self.index, Skipped(True) if self.partial else self.skipped)
        self.check_parts(str(file), [split for split, _ in named_in(file)], parts)
        return parts

    def check_parts(self, where: str, named: Sequence[str], parts: Mapping[str, IntArray]) -> None:
        """Raise DataError if a split that is `named`, once for each of its slides, has lost them all."""
        for split, count in Counter(named).items():
            if not len(parts[split]) and not self.partial:
                raise DataError(f"{where}: {split}: expected some of its {count} slides, got none that can be used")


def find_splits(path: Path) -> Path | None:
    """A directory with CLAM's splits_0.csv, ...: `path` itself, its `splits`, or `splits` beside it."""
    for directory in (path, path / "splits", path.parent / "splits"):
        if (directory / "splits_0.csv").is_file():
            return directory
    return None


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
    table = LabelFile(where, labels, files.mpp)
    index: FileIndex | PackIndex
    if is_pack(where):
        if files.mpp is not None:
            raise DataError(f"{path}: mpp: expected when packing; positions of a packed directory are settled")
        index = PackIndex(where, views=files.chosen_views, report=skipped, verify=files.skip_bad)
        table.meet(dict.fromkeys(index.names, ()))
    else:
        index = FileIndex(where, files, table.meet, skipped)
    found = table.rows_of(index, skipped)
    return OpenedSlides(path, index, *found, _split_files(where, splits, index), skipped, labels.partial)


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
