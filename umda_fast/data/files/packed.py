"""A packed directory of bags, as `umda-fast pack` writes it: every view in one file, rows back to back.

umda_fast_pack.json    what there is: views, bags, rows, checksums; written last
view_<k>.bin           features of view k, little-endian, rows of bag 0, bag 1, ...; without missing rows
coords.bin             float32 [N, 2], if there are positions
mask.bin               bytes 0 and 1 [n, V] of the bags where an instance lacks a view
labels.csv             the rows of the table of labels that name a bag, if there is one; may be edited
splits/splits_<k>.csv  CLAM's splits, if there are some
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data.arrays import IntArray
from umda_fast.data.files.skipped import Report
from umda_fast.data.metadata import Positions
from umda_fast.errors import DataError
from umda_fast.model.specs import ViewSpec

MANIFEST = "umda_fast_pack.json"
VERSION = 1
COORDS, MASK = "coords.bin", "mask.bin"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STORED: dict[str, np.dtype[Any]] = {
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}


def view_file(number: int) -> str:
    return f"view_{number}.bin"


def is_pack(source: str | os.PathLike[str]) -> bool:
    """Whether `source` is a directory that `umda-fast pack` has finished."""
    return (Path(source) / MANIFEST).is_file()


class _Mapped:
    """One file, of which the rows asked for are mapped into memory; what is written to them stays in the process.

    Every call maps anew and the mapping goes with its array: the process holds no more than the bags it uses, and
    nothing is shared with workers or left open.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], width: int, rows: int) -> None:
        expected = rows * width * dtype.itemsize
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: expected a part of a packed directory, got: {error.strerror}") from error
        if size != expected:
            raise DataError(f"{path}: truncated or of another pack: expected {expected} bytes, got {size}")
        self._path, self._dtype, self._width = path, dtype, width

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        if start == stop:
            return np.empty((0, self._width), self._dtype)
        row = self._width * self._dtype.itemsize
        begin = start * row // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        with open(self._path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), stop * row - begin, access=mmap.ACCESS_COPY, offset=begin)
        if hasattr(mmap, "MADV_WILLNEED"):
            mapped.madvise(mmap.MADV_WILLNEED)
        flat: npt.NDArray[Any] = np.frombuffer(mapped, self._dtype, (stop - start) * self._width, start * row - begin)
        return flat.reshape(stop - start, self._width)


class PackIndex:
    """The bags of a packed directory, see `umda_fast.data.files.index.SlideIndex`. Reading a bag copies nothing.

    Args:
        path: the directory.
        views: which views, in this order; None: all.
        report: is told of parts whose checksum is wrong, if `verify`; raises, or leaves the bag out.
        verify: read everything once and compare checksums.

    Raises:
        DataError: naming the file: not a pack of this version, a part missing or cut short.
    """

    def __init__(self, path: Path, *, views: Sequence[str] | None = None, report: Report, verify: bool = False) -> None:
        manifest = _read_manifest(path / MANIFEST)
        if sys.byteorder != "little":
            raise DataError(f"{path}: packed directories are little-endian and cannot be mapped on this machine")
        stored = {view["name"]: number for number, view in enumerate(manifest["views"])}
        wanted = list(stored) if views is None else list(views)
        unknown = [view for view in wanted if view not in stored]
        if unknown:
            raise DataError(f"{path}: views: expected names among {', '.join(stored)}, got {unknown[0]!r}")
        finest = manifest.get("finest")
        if finest is not None and finest not in wanted:
            raise DataError(
                f"{path}: views: expected {finest} among them, got {', '.join(wanted)}: their patches are packed "
                f"beside each of the smaller ones of {finest}; pack these views alone"
            )
        self._columns = [stored[view] for view in wanted]
        described = [manifest["views"][number] for number in self._columns]
        self.views = tuple(ViewSpec(view["name"], view["width"]) for view in described)
        bags = manifest["bags"]
        rows = np.array([bag["rows"] for bag in bags], dtype=np.int64).reshape(len(bags), len(stored))
        sizes = np.array([bag["size"] for bag in bags], dtype=np.int64)
        masked = np.array([bag["mask"] is not None for bag in bags], dtype=np.bool_)
        self._rows, self._starts = rows, _starts(rows)
        self._coord_starts = _starts(sizes)
        self._mask_starts = _starts(np.where(masked, sizes, 0))
        self._masked, self._bags = masked, bags
        self._dtypes = [DTYPES[view["dtype"]] for view in described]
        self._parts = [
            _Mapped(path / view_file(number), _STORED[view["dtype"]], view["width"], int(rows[:, number].sum()))
            for number, view in zip(self._columns, described, strict=True)
        ]
        self._mask = _Mapped(path / MASK, np.dtype(np.bool_), len(stored), int(self._mask_starts[-1]))
        unit = manifest["unit"]
        self._coords = None if unit is None else _Mapped(path / COORDS, np.dtype("<f4"), 2, int(sizes.sum()))
        keep = [index for index in range(len(bags)) if self._usable(index, path, report, verify)]
        if not keep:
            raise DataError(f"{path}: expected at least one bag, got none that can be used")
        self._keep = keep
        self.names = [bags[index]["name"] for index in keep]
        self.absent = {bag["name"] for bag in bags} - set(self.names)
        if len(wanted) < len(stored):
            # Instances that none of the chosen views has are not there.
            sizes[masked] = [int(self._kept(index).sum()) for index in np.flatnonzero(masked).tolist()]
        self.sizes: IntArray = sizes[keep]
        self.tool = f"packed, {manifest['tool']}"
        self.notes: list[str] = []
        self.guesses: list[str] = manifest.get("guesses", [])
        self.positions: Positions | None = None
        if unit is not None:
            known = {
                key: np.array([bags[index][key] for index in keep], dtype=np.float64)  # null: NaN
                for key in ("patch_size", "pixel_size")
            }
            self.positions = Positions(unit, known["patch_size"], known["pixel_size"])

    def _usable(self, index: int, path: Path, report: Report, verify: bool) -> bool:
        bag = self._bags[index]
        if bag["size"] and not any(bag["rows"][column] for column in self._columns):
            return False  # it has other views only
        wrong = self._wrong_part(index) if verify else None
        if wrong is not None:
            report(f"{path / wrong}: bag {bag['name']!r}: corrupt: its checksum is not the one it was packed with")
        return wrong is None

    def _kept(self, index: int) -> npt.NDArray[np.bool_]:
        """Which instances of a masked bag have one of the chosen views."""
        return np.logical_or.reduce(self._mask_rows(index)[:, self._columns], axis=1)  # type: ignore[no-any-return]

    def _wrong_part(self, index: int) -> str | None:
        bag = self._bags[index]
        for part, column in zip(self._parts, self._columns, strict=True):
            if checksum(part.rows(*self._starts[index : index + 2, column])) != bag["crc"][column]:
                return view_file(column)
        coords = None if self._coords is None else self._coords.rows(*self._coord_starts[index : index + 2])
        if coords is not None and checksum(coords) != bag["coords"]:
            return COORDS
        if self._masked[index] and checksum(self._mask_rows(index)) != bag["mask"]:
            return MASK
        return None

    def _mask_rows(self, index: int) -> npt.NDArray[Any]:
        return self._mask.rows(*self._mask_starts[index : index + 2])

    def read(self, index: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Features by view, mask bool [n, V] (None: all there), coordinates float32 [n, 2] or None."""
        row = self._keep[index]
        size = int(self.sizes[index])
        kept = present = None
        if self._masked[row]:
            kept = self._kept(row)
            present = torch.from_numpy(self._mask_rows(row)[kept][:, self._columns])
        views = {}
        for number, (part, view) in enumerate(zip(self._parts, self.views, strict=True)):
            column = self._columns[number]
            if size and not self._rows[row, column]:
                continue  # the whole bag lacks it
            stored = torch.from_numpy(part.rows(*self._starts[row : row + 2, column])).view(self._dtypes[number])
            if len(stored) < size and present is not None:
                full = stored.new_zeros(size, view.width)
                full[present[:, number]] = stored
                stored = full
            views[view.name] = stored
        coords = None
        if self._coords is not None:
            where = self._coords.rows(*self._coord_starts[row : row + 2])
            coords = torch.from_numpy(where if kept is None else where[kept])
        return views, present, coords


def checksum(rows: npt.NDArray[Any]) -> int:
    """CRC-32 of the bytes of a contiguous array."""
    return zlib.crc32(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)


def _starts(counts: IntArray) -> IntArray:
    """Offsets along the first axis, one more than there are counts."""
    starts = np.zeros((len(counts) + 1, *counts.shape[1:]), dtype=np.int64)
    np.cumsum(counts, axis=0, out=starts[1:])
    return starts


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: expected what `umda-fast pack` writes, got: {error}") from error
    if version != VERSION:
        raise DataError(f"{path}: expected version {VERSION} of the packed layout, got {version}; pack again")
    return manifest
