"""One-off rewrite of a directory of bags into the layout of `umda_fast.data.files.packed`.

Everything is written into `<out>.partial`, which takes the name `out` when it is whole. A journal in it says which
bags are done, so that a packing that was stopped goes on where it was.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch

from umda_fast.data.files.directory import OpenedSlides, open_slides
from umda_fast.data.files.file_options import FileOptions, Matching
from umda_fast.data.files.index import FileIndex
from umda_fast.data.files.label_files import LabelOptions
from umda_fast.data.files.labels_table import LabelTable
from umda_fast.data.files.layouts import is_slides
from umda_fast.data.files.packed import COORDS, DTYPES, MANIFEST, MASK, VERSION, checksum, view_file
from umda_fast.data.files.tables import with_points
from umda_fast.data.splits import SPLITS
from umda_fast.errors import DataError

_JOURNAL = "journal.jsonl"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class PackResult:
    """What `pack_slides` wrote: bags, instances, bytes of all files, bags kept from a packing that was stopped, and
    what was skipped."""

    bags: int
    instances: int
    bytes: int
    resumed: int
    skipped: tuple[str, ...]


def pack_slides(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    labels: str | None = None,
    splits: str | None = None,
    views: Sequence[str] | None = None,
    mpp: float | None = None,
    match: Matching = FileOptions.match,
    tolerance: float = FileOptions.tolerance,
    skip_bad: bool = FileOptions.skip_bad,
    read_timeout: float = FileOptions.read_timeout,
    progress: Callable[[int, int, int], None] | None = None,
) -> PackResult:
    """Write the bags of `source` into the new directory `out`, float16 and float32 as they are.

    Args:
        source: a directory of bags, see `umda_fast.data.files.layouts`.
        out: must not exist. `<out>.partial` is continued if it comes from the same files and options.
        labels: the table of labels, as of `LabelOptions`.
        splits: as of `open_slides`.
        views, mpp, match, tolerance, skip_bad, read_timeout: as of `FileOptions`.
        progress: called after every bag with bags done, bags in all, and the bag's instances.

    Raises:
        DataError: `out` exists, or the source cannot be read, naming the file.
    """
    path, target = Path(source), Path(out)
    if not is_slides(str(path)):
        raise DataError(f"{path}: expected a directory of bags, one file each; other kinds of data need no packing")
    if target.exists():
        raise DataError(f"{target}: expected a directory to make, got one that is there; choose another")
    files = FileOptions(
        views=views, mpp=mpp, match=match, tolerance=tolerance, skip_bad=skip_bad, read_timeout=read_timeout
    )
    opened = open_slides(str(path), LabelOptions(labels=labels), splits, files)
    index = opened.index
    if not isinstance(index, FileIndex):
        raise DataError(f"{path}: is packed already")
    partial = target.with_name(f"{target.name}.partial")
    settings = _settings(index)
    journal = _continued(partial, settings)
    if journal is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / _JOURNAL).write_text(json.dumps(settings) + "\n", encoding="utf-8")
        journal = []
    bags = _write_bags(partial, index, settings, journal, progress)
    _write_tables(partial, opened)
    manifest = {**settings["manifest"], "version": VERSION, "bags": bags}
    (partial / MANIFEST).write_text(json.dumps(manifest, separators=(",", ":")) + "\n", encoding="utf-8")
    (partial / _JOURNAL).unlink()
    _sync(partial)
    os.replace(partial, target)
    return PackResult(
        bags=len(bags),
        instances=sum(bag["size"] for bag in bags),
        bytes=sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        resumed=len(journal),
        skipped=tuple(opened.skipped.lines),
    )


def _settings(index: FileIndex) -> dict[str, Any]:
    """What must be the same for a packing to go on: the files and how they are read."""
    views = []
    for view in index.views:
        dtype = index.dtype(view.name)
        views.append({"name": view.name, "width": view.width, "dtype": _NAMES[dtype]})
    positions = index.positions
    return {
        "manifest": {
            "tool": index.tool,
            "unit": None if positions is None else positions.unit,
            "views": views,
            "guesses": index.guesses,
            "finest": index.finest,
        },
        "sources": index.fingerprints(),
        "names": index.names,
        "sizes": index.sizes.tolist(),
    }


def _continued(partial: Path, settings: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The bags that are whole in a packing that was stopped; None if it was of something else."""
    try:
        lines = (partial / _JOURNAL).read_text(encoding="utf-8").splitlines()
        if json.loads(lines[0]) != settings:
            return None
    except (OSError, ValueError, IndexError):
        return None
    entries = []
    for line in lines[1:]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # the line that was being written
    return _intact(partial, settings, entries)


def _intact(partial: Path, settings: dict[str, Any], entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first entries whose data is there with the right checksum: after a power cut it may not be."""
    views = settings["manifest"]["views"]
    good: list[dict[str, Any]] = []
    with _Files(partial, len(views), "rb") as files:
        for entry in entries:
            parts = [
                (file, rows * view["width"] * DTYPES[view["dtype"]].itemsize, crc)
                for file, rows, view, crc in zip(files.views, entry["rows"], views, entry["crc"], strict=True)
            ]
            if entry["coords"] is not None:
                parts.append((files.coords, entry["size"] * 8, entry["coords"]))
            if entry["mask"] is not None:
                parts.append((files.mask, entry["size"] * len(views), entry["mask"]))
            if any(_checksum_of(file, count) != crc for file, count, crc in parts):
                break
            good.append(entry)
    return good


def _checksum_of(file: BinaryIO, count: int) -> int | None:
    data = np.frombuffer(file.read(count), np.uint8)
    return checksum(data) if len(data) == count else None


class _Files:
    """The binary files of a packing, open together."""

    def __init__(self, directory: Path, views: int, mode: str) -> None:
        names = [*(view_file(number) for number in range(views)), COORDS, MASK]
        for name in names:
            (directory / name).touch()
        self.all: list[Any] = [open(directory / name, mode) for name in names]  # noqa: SIM115  # closed by __exit__
        *self.views, self.coords, self.mask = self.all

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.all:
            file.close()


def _write_bags(
    partial: Path,
    index: FileIndex,
    settings: dict[str, Any],
    journal: Sequence[dict[str, Any]],
    progress: Callable[[int, int, int], None] | None,
) -> list[dict[str, Any]]:
    views = settings["manifest"]["views"]
    bags = list(journal)
    with (
        _Files(partial, len(views), "r+b") as files,
        open(partial / _JOURNAL, "w", encoding="utf-8") as log,
    ):
        # What was written after the last whole bag goes.
        for number, (file, view) in enumerate(zip(files.views, views, strict=True)):
            itemsize = DTYPES[view["dtype"]].itemsize
            _cut(file, sum(bag["rows"][number] for bag in bags) * view["width"] * itemsize)
        _cut(files.coords, sum(bag["size"] * 8 for bag in bags if bag["coords"] is not None))
        _cut(files.mask, sum(bag["size"] * len(views) for bag in bags if bag["mask"] is not None))
        for line in (settings, *bags):
            log.write(json.dumps(line) + "\n")
        log.flush()
        for number in range(len(bags), len(index.names)):
            bag = _write_bag(files, index, number)
            for file in files.all:
                file.flush()
            log.write(json.dumps(bag) + "\n")
            log.flush()
            bags.append(bag)
            if progress is not None:
                progress(len(bags), len(index.names), bag["size"])
        for file in files.all:
            os.fsync(file.fileno())
    return bags


def _cut(file: BinaryIO, size: int) -> None:
    file.truncate(size)
    file.seek(size)


def _write_bag(files: _Files, index: FileIndex, number: int) -> dict[str, Any]:
    features, mask, coords = index.read(number)
    size = int(index.sizes[number])
    rows, checks = [], []
    for column, view in enumerate(index.views):
        part = features.get(view.name)
        if part is None:
            part = torch.empty(0, view.width, dtype=index.dtype(view.name))
        elif mask is not None:
            part = part[mask[:, column]]
        rows.append(len(part))
        checks.append(_append(files.views[column], part.contiguous().reshape(-1).view(torch.uint8).numpy()))
    positions = index.positions

    def known(values: npt.NDArray[np.float64]) -> float | None:
        return None if np.isnan(values[number]) else float(values[number])

    return {
        "name": index.names[number],
        "size": size,
        "rows": rows,
        "crc": checks,
        "coords": None if coords is None else _append(files.coords, coords.numpy().astype("<f4")),
        "mask": None if mask is None else _append(files.mask, mask.numpy()),
        "patch_size": None if positions is None else known(positions.patch_size),
        "pixel_size": None if positions is None else known(positions.pixel_size),
    }


def _append(file: BinaryIO, array: npt.NDArray[Any]) -> int:
    file.write(array.reshape(-1).view(np.uint8).data)
    return checksum(array)


def _write_labels(path: Path, labels: LabelTable, bags: Sequence[str], rows: Sequence[int | None]) -> None:
    """The rows of a table that name a bag, one for each bag under its own name, also where the table has one for each
    patient or leaves out folders."""
    table = labels.table
    own, patients = ("slide_id", "patient") if labels.by_patient else (table.header[labels.column],) * 2
    columns = {own: list(bags)}
    for number, name in enumerate(table.header):
        title = patients if number == labels.column else name
        if title and title not in columns:
            texts = with_points(table, name, [row[number] for row in table.rows])[0]
            columns[title] = ["" if row is None else texts[row] for row in rows]
    named = [row is not None for row in rows]
    kept = zip(*(compress(cells, named) for cells in columns.values()), strict=True)
    _write_csv(path, [list(columns), *map(list, kept)])


def _write_tables(partial: Path, opened: OpenedSlides) -> None:
    """The table of labels, and the splits with the slides there are."""
    if opened.table is not None:
        _write_labels(partial / "labels.csv", opened.table, opened.index.names, opened.rows)
    if opened.split_files:
        (partial / "splits").mkdir(exist_ok=True)
    names = opened.index.names
    for number, file in enumerate(opened.split_files):
        parts = opened.read_split(file)
        columns = [[names[row] for row in parts[split]] for split in SPLITS]
        length = max(len(column) for column in columns)
        padded = [column + [""] * (length - len(column)) for column in columns]
        lines = [["", *SPLITS], *([str(line), *cells] for line, cells in enumerate(zip(*padded, strict=True)))]
        _write_csv(partial / "splits" / f"splits_{number}.csv", lines)


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    path.write_text(text.getvalue(), encoding="utf-8")


def _sync(directory: Path) -> None:
    """Everything on the disk before the directory gets its name."""
    for path in (*directory.rglob("*"), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
