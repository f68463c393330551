"""One slide in several views: one unit for all coordinates, and which rows of the views belong together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.files.bag_file import BagFile, Unit
from umda_fast.data.files.file_options import FileOptions, Matching
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.nesting import LEAST_RATIO, SAME_SIZE, grid_step, match_views, shared_share
from umda_fast.data.files.readers import read_coords
from umda_fast.data.files.skipped import Skipped
from umda_fast.errors import DataError

LEAST_SHARE = 0.5
"""How much of a view must lie on another for both to be of one slide."""

_TRIED = 20  # slides, for what is the same in all


@dataclass
class Slide:
    """One bag: its file in every view that has it, and the rows that belong together.

    Attributes:
        name: of the bag.
        files: view -> its file; views that lack the bag are absent.
        pixel_size: micrometres per level-0 pixel, NaN if not known.
        rows: int32 [n, V] as of `match_views` over the views in `files`, None where no row has to be moved.
        size: n.
        finest: the views in `files` by size of their patches, whose coordinates an instance has.
        nested: how patches of different sizes were brought together, in words; blank where there are none.
    """

    name: str
    files: dict[str, BagFile]
    pixel_size: float = math.nan
    rows: npt.NDArray[np.int32] | None = None
    size: int = 0
    finest: list[str] = field(default_factory=list)
    nested: str = ""

    @property
    def patches(self) -> dict[str, BagFile]:
        """Those of `files` whose rows are patches; the others have one, which is of the whole slide."""
        return {view: file for view, file in self.files.items() if not file.whole}

    def drop(self, file: BagFile) -> None:
        """Leave out a file that cannot be used."""
        self.files = {view: other for view, other in self.files.items() if other is not file}

    def set_pixel_size(self, given: float) -> None:
        """The pixel size given, or, for NaN, the one that a file of it says."""
        known = (size for size in (given, *(file.pixel_size for file in self.files.values())) if not math.isnan(size))
        self.pixel_size = next(known, math.nan)

    def patch_size(self, unit: Unit | None) -> float:
        """Edge of the smallest patches in `unit`, of the files that know it, else NaN."""
        sizes = [self.patch_size_in(file, unit) for file in self.files.values()]
        return min((size for size in sizes if not math.isnan(size)), default=math.nan)

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
    bare = [(slide, file) for slide in slides for file in slide.patches.values() if file.unit is None and file.rows]
    if not located or (bare and match == "position"):
        return None
    for slide, file in bare:
        skipped(
            f"{file.path}: expected coordinates as {located[0][1].path} has them, got none; to go without "
            "coordinates, rows of all views in one order: --set data.options.match=position; features of a whole slide "
            "are one vector, [D]"
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


def align(
    slide: Slide, unit: Unit | None, options: FileOptions, ratios: Mapping[str, float], isolated: IsolatedCalls
) -> None:
    """Sets the size of a slide and, where its views differ in their rows, which rows belong together.

    Args:
        ratios: how much larger the steps of a view are than those of the first, where views differ (`step_ratios`).

    Raises:
        DataError: naming the file: no coordinates to match by, other rows, patches of a size that fits no other or
            elsewhere.
    """
    if not slide.files:
        raise DataError(f"slide {slide.name!r}: no file of it can be used")
    patches = slide.patches
    slide.size, slide.finest = 0, list(patches)
    if patches:
        _align_patches(slide, patches, unit, options, ratios, isolated)
    if len(patches) < len(slide.files):
        _append_whole(slide, patches)


def _append_whole(slide: Slide, patches: Mapping[str, BagFile]) -> None:
    """One more instance, of the whole slide: it has the views that are of it, and they are of nothing else."""
    size, columns = slide.size, []
    for view, file in slide.files.items():
        if file.whole:
            columns.append(np.r_[np.full(size, -1, np.int32), np.int32(0)])
            continue
        rows = slide.rows
        own = np.arange(size, dtype=np.int32) if rows is None else rows[:, list(patches).index(view)]
        columns.append(np.r_[own, np.int32(-1)])
    slide.rows = np.column_stack(columns) if patches else None
    slide.size = size + 1


def _align_patches(
    slide: Slide,
    patches: Mapping[str, BagFile],
    unit: Unit | None,
    options: FileOptions,
    ratios: Mapping[str, float],
    isolated: IsolatedCalls,
) -> None:
    files = list(patches.values())
    slide.size = files[0].rows
    if len(files) == 1:
        return
    full = [file for file in files if file.rows]
    if options.match == "position" or all(file.unit is None for file in full):
        _align_by_position(slide, files, full, options.match)
        return
    common = _matching_unit(full)
    coords = [_coords(slide, file, common, isolated) for file in files]
    sizes = _sizes(slide, common, coords, ratios)
    _check_sizes(files, sizes, common)
    rows, order = match_views(coords, sizes, 0.0 if common == "px" else options.tolerance)
    slide.finest = [list(patches)[view] for view in order]
    if rows is None:
        return
    _check_shares(files, coords, rows, sizes)
    if order != list(range(len(order))) or max(sizes) > min(sizes) * (1.0 + SAME_SIZE):
        about = ", ".join(f"{list(patches)[view]} {sizes[view]:g} {common}" for view in order)
        guessed = any(math.isnan(file.patch_size) for file in files)
        slide.nested = f"large patches stand beside each small one in them ({about}{', by their steps' * guessed})"
    slide.rows = rows.astype(np.int32)
    slide.size = len(slide.rows)


def _sizes(slide: Slide, unit: Unit, coords: Sequence[FloatArray], ratios: Mapping[str, float]) -> list[float]:
    """Edge of the patches of every view, in `unit`; all NaN where views do not differ as far as is known.

    What a file does not say follows from the steps of the grids.
    """
    said = [slide.patch_size_in(file, unit) for file in slide.patches.values()]
    if not any(map(math.isnan, said)) or (not ratios and len({size for size in said if not math.isnan(size)}) < 2):
        return [math.nan] * len(said) if any(map(math.isnan, said)) else said
    steps = [ratios.get(view, 1.0) for view in slide.patches]
    units = [size / step for size, step in zip(said, steps, strict=True) if not math.isnan(size)]
    if not units:
        units = [
            found / step for part, step in zip(coords, steps, strict=True) if not math.isnan(found := grid_step(part))
        ]
    one = float(np.median(units)) if units else 1.0
    return [one * step if math.isnan(size) else size for size, step in zip(said, steps, strict=True)]


def step_ratios(slides: Sequence[Slide], views: Sequence[str], isolated: IsolatedCalls) -> dict[str, float]:
    """How much larger the steps of every view are than those of the first, where files do not say how large their
    patches are; {} where all are alike. Slides that are tried must agree, but for one in five."""
    ratios: dict[str, list[float]] = {view: [] for view in views[1:]}
    tried = [
        slide
        for slide in slides
        if views[0] in slide.files and any(math.isnan(file.patch_size) and file.unit for file in slide.files.values())
    ]
    for slide in tried[:: max(1, len(tried) // _TRIED)]:
        common = _matching_unit(list(slide.patches.values()))
        steps = {view: grid_step(_coords(slide, file, common, isolated)) for view, file in slide.patches.items()}
        for view in ratios.keys() & steps.keys():
            ratios[view].append(steps[view] / steps[views[0]])
    found = {view: ratio for view, values in ratios.items() if not math.isnan(ratio := _agreed(values))}
    return found if any(abs(ratio - 1.0) > SAME_SIZE for ratio in found.values()) else {}


def _agreed(values: Sequence[float]) -> float:
    """What four in five of some numbers are, or NaN."""
    known = np.array([value for value in values if not math.isnan(value)])
    middle = float(np.median(known)) if len(known) else math.nan
    return middle if (np.abs(known - middle) <= SAME_SIZE * middle).sum() >= 0.8 * max(len(known), 1) else math.nan


def _matching_unit(files: Sequence[BagFile]) -> Unit:
    return "px" if all(file.unit == "px" for file in files if file.rows) else "um"


def _check_sizes(files: Sequence[BagFile], sizes: Sequence[float], unit: Unit) -> None:
    """Raise DataError for patches that are neither of one size nor large enough to hold others."""
    known = sorted((size, index) for index, size in enumerate(sizes) if not math.isnan(size))
    for (small, one), (large, other) in pairwise(known):
        if SAME_SIZE < large / small - 1.0 < LEAST_RATIO - 1.0:
            raise DataError(
                f"{files[other].path}: expected patches of {small:g} {unit} as in {files[one].path}, or at least "
                f"{LEAST_RATIO:g} times as large, got {large:g}; choose a view: --set data.options.views=[...]"
            )


def _check_shares(
    files: Sequence[BagFile], coords: Sequence[FloatArray], rows: IntArray, sizes: Sequence[float]
) -> None:
    """Raise DataError for a view of which less than `LEAST_SHARE` lies on any other."""
    counts = [file.rows for file in files]
    full = [index for index, count in enumerate(counts) if count]
    for view in [*full[1:], *full[:1]] if len(full) > 1 else []:
        shares = {other: shared_share(rows, view, other, counts, sizes) for other in full if other != view}
        other = max(shares, key=shares.__getitem__)
        if shares[other] < LEAST_SHARE:
            one, two = files[other], files[view]
            spans = "; ".join(
                f"{file.path} spans {where.min(axis=0).round(1).tolist()} to {where.max(axis=0).round(1).tolist()}"
                for file, where in ((one, coords[other]), (two, coords[view]))
            )
            raise DataError(
                f"{two.path}: wrong unit or slide: expected at least {LEAST_SHARE:.0%} of its patches on those of "
                f"{one.path}, or the other way round, got {shares[other]:.0%} ({spans})"
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


def _coords(slide: Slide, file: BagFile, unit: Unit, isolated: IsolatedCalls) -> FloatArray:
    coords = isolated(file.path, read_coords, file)
    return np.zeros((file.rows, 2)) if coords is None else slide.coords_in(file, coords, unit)
