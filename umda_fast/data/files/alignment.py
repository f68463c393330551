"""One slide in several views: one unit for all coordinates, and which rows of the views belong together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from umda_fast.data.arrays import FloatArray
from umda_fast.data.files.bag_file import BagFile, Unit
from umda_fast.data.files.file_options import FileOptions, Matching
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.matching import match_rows
from umda_fast.data.files.readers import read_coords
from umda_fast.data.files.skipped import Skipped
from umda_fast.errors import DataError


@dataclass
class Slide:
    """One bag: its file in every view that has it, and the rows that belong together.

    Attributes:
        name: of the bag.
        files: view -> its file; views that lack the bag are absent.
        pixel_size: micrometres per level-0 pixel, NaN if not known.
        rows: int32 [n, V] as of `match_rows` over the views in `files`, None where no row has to be moved.
        size: n.
    """

    name: str
    files: dict[str, BagFile]
    pixel_size: float = math.nan
    rows: npt.NDArray[np.int32] | None = None
    size: int = 0

    def drop(self, file: BagFile) -> None:
        """Leave out a file that cannot be used."""
        self.files = {view: other for view, other in self.files.items() if other is not file}

    def set_pixel_size(self, given: float) -> None:
        """The pixel size given, or, for NaN, the one that a file of it says."""
        known = (size for size in (given, *(file.pixel_size for file in self.files.values())) if not math.isnan(size))
        self.pixel_size = next(known, math.nan)

    def patch_size(self, unit: Unit | None) -> float:
        """Edge of a patch in `unit`, as the first file says that knows it, else NaN."""
        sizes = (self.patch_size_in(file, unit) for file in self.files.values())
        return next((size for size in sizes if not math.isnan(size)), math.nan)

    def patch_size_in(self, file: BagFile, unit: Unit | None) -> float:
        """Edge of a patch of one file in `unit`, NaN if not known."""
        return file.patch_size * self.pixel_size if self._rescaled(file, unit) else file.patch_size

    def coords_in(self, file: BagFile, coords: FloatArray, unit: Unit | None) -> FloatArray:
        """Coordinates of one file in `unit`."""
        return coords * self.pixel_size if self._rescaled(file, unit) else coords

    @staticmethod
    def _rescaled(file: BagFile, unit: Unit | None) -> bool:
        return file.unit == "px" and unit == "um"


def common_unit(slides: Sequence[Slide], match: Matching, skipped: Skipped) -> Unit | None:
    """The unit of all coordinates: micrometres where every slide has them or its pixel size is known.

    Files without coordinates where others have them, and pixels where others have micrometres, are dropped.
    """
    located = [(slide, file) for slide in slides for file in slide.files.values() if file.unit is not None]
    bare = [(slide, file) for slide in slides for file in slide.files.values() if file.unit is None and file.rows]
    if not located or (bare and match == "position"):
        return None
    for slide, file in bare:
        skipped(
            f"{file.path}: expected coordinates as {located[0][1].path} has them, got none; to go without "
            "coordinates, rows of all views in one order: --set data.options.match=position"
        )
        slide.drop(file)
    micrometres = [file for _, file in located if file.unit == "um"]
    pixels = [(slide, file) for slide, file in located if file.unit == "px" and math.isnan(slide.pixel_size)]
    if not micrometres:
        return "px" if pixels else "um"
    for slide, file in pixels:
        skipped(
            f"{file.path}: wrong unit: level-0 pixels, where {micrometres[0].path} has micrometres; give the pixel "
            "size: --set data.options.mpp=0.25, or a column mpp in the table of labels"
        )
        slide.drop(file)
    return "um"


def align(slide: Slide, unit: Unit | None, options: FileOptions, isolated: IsolatedCalls) -> None:
    """Sets the size of a slide and, where its views differ in their rows, which rows belong together.

    Raises:
        DataError: naming the file: no coordinates to match by, other rows, patches of another size or elsewhere.
    """
    files = list(slide.files.values())
    if not files:
        raise DataError(f"slide {slide.name!r}: no file of it can be used")
    slide.size = files[0].rows
    if len(files) == 1:
        return
    full = [file for file in files if file.rows]
    if options.match == "position" or all(file.unit is None for file in full):
        _align_by_position(slide, files, full, options.match)
        return
    _check_patch_sizes(slide, unit)
    plain = all(file.unit == "px" for file in full)
    coords = [_coords(slide, file, "px" if plain else "um", isolated) for file in files]
    rows = match_rows(coords, 0.0 if plain else options.tolerance)
    if rows is None:
        return
    slide.rows = rows.astype(np.int32)
    slide.size = len(slide.rows)
    shared = (slide.rows >= 0).sum(axis=1) > 1
    if len(full) > 1 and not shared.any():
        spans = "; ".join(
            f"{file.path} spans {where.min(axis=0).round(1).tolist()} to {where.max(axis=0).round(1).tolist()}"
            for file, where in zip(files, coords, strict=True)
            if file.rows
        )
        raise DataError(
            f"{full[1].path}: wrong unit or slide: no patch lies where one of {full[0].path} does ({spans})"
        )


def _align_by_position(slide: Slide, files: Sequence[BagFile], full: Sequence[BagFile], match: Matching) -> None:
    """Row k of every view is instance k; a view without rows lacks the whole bag."""
    for file in full[1:]:
        if match != "position":
            raise DataError(
                f"{file.path}: expected coordinates to match its rows with {full[0].path}, got none; if all "
                "views have their rows in one order: --set data.options.match=position"
            )
        if file.rows != full[0].rows:
            raise DataError(f"{file.path}: expected {full[0].rows} rows as in {full[0].path}, got {file.rows}")
    slide.size = full[0].rows if full else 0
    if 0 < len(full) < len(files):
        columns = [np.arange(slide.size) if file.rows else np.full(slide.size, -1) for file in files]
        slide.rows = np.column_stack(columns)


def _check_patch_sizes(slide: Slide, unit: Unit | None) -> None:
    sizes = [(file, slide.patch_size_in(file, unit)) for file in slide.files.values()]
    known = [(file, size) for file, size in sizes if not math.isnan(size)]
    for file, size in known[1:]:
        first, expected = known[0]
        if abs(size - expected) > 0.01 * expected:
            raise DataError(
                f"{file.path}: expected patches of {expected:g} {unit} as in {first.path}, got {size:g}"
            )


def _coords(slide: Slide, file: BagFile, unit: Unit, isolated: IsolatedCalls) -> FloatArray:
    coords = isolated(file.path, read_coords, file)
    return np.zeros((file.rows, 2)) if coords is None else slide.coords_in(file, coords, unit)
