"""Bags in files of their own: which there are, how large they are, and how the rows of their views belong together.

A view is called after its encoder if the files say which, else after its directory (`features` if there is none).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.files.bag_file import BagFile, check_step
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.layouts import find_files, unread_folders
from umda_fast.data.files.matching import match_rows
from umda_fast.data.files.names import plain_name
from umda_fast.data.files.readers import read_bag, read_coords, read_header
from umda_fast.data.files.skipped import Skipped
from umda_fast.data.metadata import Positions
from umda_fast.data.options import as_names, option
from umda_fast.errors import DataError
from umda_fast.model.specs import ViewSpec

Matching: TypeAlias = Literal["coords", "position"]


@dataclass(frozen=True, kw_only=True)
class FileOptions:
    """How files of bags are read.

    Attributes:
        views: which views, in this order; None: all, by name.
        mpp: micrometres per level-0 pixel of all slides; None takes the files' or the table's column mpp.
        match: how rows of several views are brought together: by coords, or by position in the file.
        tolerance: in micrometres, of coordinates that are not whole pixels.
        skip_bad: leave out what is bad and list it in `Splits.skipped`, instead of stopping. Reads every file once.
        read_timeout: seconds of processor time that the first reading of one file may take before it counts as bad:
            the library does not come back from some corrupt HDF5 files. (On Linux; not of a packed directory.)
    """

    views: Sequence[str] | None = None
    mpp: float | None = option(None, local=True)
    match: Matching = "coords"
    tolerance: float = 1.0
    skip_bad: bool = False
    read_timeout: float = 60.0

    @property
    def chosen_views(self) -> list[str] | None:
        """`views` as a list."""
        return None if self.views is None else as_names(self.views)

    def check(self) -> None:
        """Raise DataError for a value that no reading can be done with."""
        if self.match not in ("coords", "position"):
            raise DataError(f"match: expected coords or position, got {self.match!r}")
        if not self.tolerance > 0:
            raise DataError(f"tolerance: expected a positive number of micrometres, got {self.tolerance!r}")
        if not self.read_timeout > 0:
            raise DataError(f"read_timeout: expected a positive number of seconds, got {self.read_timeout!r}")


class SlideIndex(Protocol):
    """Bags on disk, without labels.

    Attributes:
        names, sizes, views, positions: as of a dataset; `positions` is None without coordinates.
        tool: who wrote the files, for messages.
        notes: what is worth knowing, one line each.
        absent: names of bags that are there and not used: bad, or without one of the views chosen.
    """

    names: list[str]
    sizes: IntArray
    views: tuple[ViewSpec, ...]
    positions: Positions | None
    tool: str
    notes: list[str]
    absent: set[str]

    def read(self, index: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Features by view, mask bool [n, V] (None: all there), coordinates float32 [n, 2] or None."""
        ...


@dataclass
class _Slide:
    """One bag: its file in every view that has it, and the rows that belong together.

    `rows` int32 [n, V] as of `match_rows` over the views in `files`, None where no row has to be moved.
    """

    name: str
    files: dict[str, BagFile]
    pixel_size: float
    rows: npt.NDArray[np.int32] | None = None
    size: int = 0


class FileIndex:
    """Bags in files of their own. Keeps headers only; every read opens its files and closes them.

    What is read here, when the index is made, is read in another process (`umda_fast.data.files.isolated`).
    """

    def __init__(
        self,
        path: Path,
        options: FileOptions,
        pixel_sizes: Mapping[str, float] | float | None,
        skipped: Skipped,
    ) -> None:
        options.check()
        self._match, self._tolerance = options.match, options.tolerance
        with IsolatedCalls(options.read_timeout) as isolated:
            self._open(path, options.chosen_views, pixel_sizes, skipped, isolated)

    def _open(
        self,
        path: Path,
        views: Sequence[str] | None,
        pixel_sizes: Mapping[str, float] | float | None,
        skipped: Skipped,
        isolated: IsolatedCalls,
    ) -> None:
        paths = find_files(path, isolated)
        found = {view: self._headers(files, skipped, isolated) for view, files in paths.items()}
        found = _named(found)
        there = {file.stem for files in paths.values() for file in files}
        if views is not None:
            unknown = [view for view in views if view not in found]
            if unknown:
                raise DataError(f"{path}: views: expected names among {', '.join(found)}, got {unknown[0]!r}")
            found = {view: found[view] for view in views}
        specs: list[ViewSpec] = []
        self._dtypes: dict[str, torch.dtype] = {}
        for view, files in found.items():
            width = _common_width(path, view, files, skipped)
            specs.append(ViewSpec(view, width))
            _find_duplicates(files, skipped, isolated)
            kinds = {file.dtype for file in files.values() if file.rows}
            # Half precision is kept where all files have it; anything else meets in float32.
            self._dtypes[view] = kinds.pop() if len(kinds) == 1 and torch.float64 not in kinds else torch.float32
        self.views = tuple(specs)
        names = sorted({name for files in found.values() for name in files})
        slides = [
            _Slide(name, {v: files[name] for v, files in found.items() if name in files}, math.nan) for name in names
        ]
        if skipped.skip_bad:
            slides = [slide for slide in slides if self._verified(slide, skipped, isolated)]
        for slide in slides:
            slide.pixel_size = _slide_pixel_size(slide, pixel_sizes)
        self._unit = self._common_unit(slides, skipped)
        self._slides = []
        for slide in slides:
            try:
                self._align(slide, isolated)
            except DataError as error:
                skipped(str(error))
                continue
            self._slides.append(slide)
        if not self._slides:
            raise DataError(f"{path}: expected at least one bag, got none that can be used")
        self.names = [slide.name for slide in self._slides]
        self.absent = there - set(self.names)
        self.sizes: IntArray = np.array([slide.size for slide in self._slides], dtype=np.int64)
        tools = Counter(file.tool for slide in self._slides for file in slide.files.values())
        self.tool = " and ".join(sorted(tools))
        self.positions = self._positions()
        self.notes = []
        unread = unread_folders(path)
        if unread:
            self.notes.append(f"not read, as there are files beside: {', '.join(unread)}")
        for spec in self.views:
            lacking = [slide.name for slide in self._slides if spec.name not in slide.files]
            if lacking:
                self.notes.append(f"{len(lacking)} without view {spec.name}")

    @staticmethod
    def _headers(files: Sequence[Path], skipped: Skipped, isolated: IsolatedCalls) -> dict[str, BagFile]:
        headers: dict[str, BagFile] = {}
        paths: dict[str, Path] = {}
        for file in files:
            try:
                header = isolated(file, read_header, file)
            except DataError as error:
                skipped(str(error))
                continue
            if file.stem in paths:
                skipped(f"{file}: duplicate slide: {paths[file.stem]} has the same name")
                continue
            headers[file.stem], paths[file.stem] = header, file
        return headers

    @staticmethod
    def _verified(slide: _Slide, skipped: Skipped, isolated: IsolatedCalls) -> bool:
        """Drops the files of a slide that cannot be read to the end, or hold what they must not."""
        for view, file in list(slide.files.items()):
            try:
                isolated(file.path, _check_content, file)
            except DataError as error:
                skipped(str(error))
                del slide.files[view]
        return bool(slide.files)

    def _common_unit(self, slides: list[_Slide], skipped: Skipped) -> Literal["um", "px"] | None:
        """The unit of all coordinates: micrometres where every slide has them or its pixel size is known."""
        located = [(slide, file) for slide in slides for file in slide.files.values() if file.unit is not None]
        bare = [(slide, file) for slide in slides for file in slide.files.values() if file.unit is None and file.rows]
        if not located or (bare and self._match == "position"):
            return None
        for slide, file in bare:
            skipped(
                f"{file.path}: expected coordinates as {located[0][1].path} has them, got none; to go without "
                "coordinates, rows of all views in one order: --set data.options.match=position"
            )
            _drop(slide, file)
        micrometres = [file for _, file in located if file.unit == "um"]
        pixels = [(slide, file) for slide, file in located if file.unit == "px" and math.isnan(slide.pixel_size)]
        if not micrometres:
            return "px" if pixels else "um"
        for slide, file in pixels:
            skipped(
                f"{file.path}: wrong unit: level-0 pixels, where {micrometres[0].path} has micrometres; give the pixel "
                "size: --set data.options.mpp=0.25, or a column mpp in the table of labels"
            )
            _drop(slide, file)
        return "um"

    def _align(self, slide: _Slide, isolated: IsolatedCalls) -> None:
        """Sets the size of a slide and, where its views differ in their rows, which rows belong together."""
        files = list(slide.files.values())
        if not files:
            raise DataError(f"slide {slide.name!r}: no file of it can be used")
        slide.size = files[0].rows
        if len(files) == 1:
            return
        full = [file for file in files if file.rows]
        if self._match == "position" or all(file.unit is None for file in full):
            for file in full[1:]:
                if self._match != "position":
                    raise DataError(
                        f"{file.path}: expected coordinates to match its rows with {full[0].path}, got none; if all "
                        "views have their rows in one order: --set data.options.match=position"
                    )
                if file.rows != full[0].rows:
                    raise DataError(f"{file.path}: expected {full[0].rows} rows as in {full[0].path}, got {file.rows}")
            slide.size = full[0].rows if full else 0
            if 0 < len(full) < len(files):
                slide.rows = np.column_stack(
                    [np.arange(slide.size) if file.rows else np.full(slide.size, -1) for file in files]
                )
            return
        self._check_patch_sizes(slide)
        plain = all(file.unit == "px" for file in full)
        coords = [self._coords(slide, file, "px" if plain else "um", isolated) for file in files]
        rows = match_rows(coords, 0.0 if plain else self._tolerance)
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

    def _check_patch_sizes(self, slide: _Slide) -> None:
        known = [
            (file, size)
            for file in slide.files.values()
            if not math.isnan(size := self._patch_size(slide, file, self._unit))
        ]
        for file, size in known[1:]:
            if abs(size - known[0][1]) > 0.01 * known[0][1]:
                raise DataError(
                    f"{file.path}: expected patches of {known[0][1]:g} {self._unit} as in {known[0][0].path}, "
                    f"got {size:g}"
                )

    def _patch_size(self, slide: _Slide, file: BagFile, unit: str | None) -> float:
        scale = slide.pixel_size if file.unit == "px" and unit == "um" else 1.0
        return file.patch_size * scale

    def _coords(self, slide: _Slide, file: BagFile, unit: str | None, isolated: IsolatedCalls) -> FloatArray:
        coords = isolated(file.path, read_coords, file)
        if coords is None:
            return np.zeros((file.rows, 2))
        return self._converted(slide, file, coords, unit)

    @staticmethod
    def _converted(slide: _Slide, file: BagFile, coords: FloatArray, unit: str | None) -> FloatArray:
        return coords * slide.pixel_size if file.unit == "px" and unit == "um" else coords

    def dtype(self, view: str) -> torch.dtype:
        """Of the features of a view as `read` gives them."""
        return self._dtypes[view]

    def fingerprints(self) -> list[list[str | int]]:
        """Path, size and time of every file, to see whether something changed."""
        stats = [(file.path, file.path.stat()) for slide in self._slides for file in slide.files.values()]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def _positions(self) -> Positions | None:
        if self._unit is None:
            return None
        sizes = []
        for slide in self._slides:
            known = [self._patch_size(slide, file, self._unit) for file in slide.files.values()]
            sizes.append(next((size for size in known if not math.isnan(size)), math.nan))
        pixel_sizes = np.array([slide.pixel_size for slide in self._slides])
        return Positions(self._unit, np.array(sizes), pixel_sizes)

    def read(self, index: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        slide = self._slides[index]
        widths = {view.name: view.width for view in self.views}
        views: dict[str, Tensor] = {}
        coords = np.full((slide.size, 2), np.nan)
        missing = np.zeros((slide.size, len(self.views)), dtype=np.bool_)
        order = list(slide.files)
        for column, view in enumerate(widths):
            if view not in slide.files:
                missing[:, column] = True
                continue
            file = slide.files[view]
            features, where = read_bag(file)
            features = features.to(self._dtypes[view]).reshape(file.rows, widths[view])
            if where is not None:
                check_step(file, where)
                where = self._converted(slide, file, where, self._unit)
            if slide.rows is not None:
                rows = slide.rows[:, order.index(view)]
                present = rows >= 0
                missing[:, column] = ~present
                features = _moved(features, rows, present)
                if where is not None:
                    fill = present & np.isnan(coords[:, 0])
                    coords[fill] = where[rows[fill]]
            elif where is not None and np.isnan(coords).any():
                coords = where
            views[view] = features
        mask = torch.from_numpy(~missing) if missing.any() else None
        return views, mask, None if self._unit is None else torch.from_numpy(coords.astype(np.float32))


def _moved(features: Tensor, rows: npt.NDArray[np.int32], present: npt.NDArray[np.bool_]) -> Tensor:
    out = features.new_zeros(len(rows), features.shape[1])
    out[torch.from_numpy(present)] = features[torch.from_numpy(rows[present].astype(np.int64))]
    return out


def _drop(slide: _Slide, file: BagFile) -> None:
    slide.files = {view: other for view, other in slide.files.items() if other is not file}


def _named(found: Mapping[str, dict[str, BagFile]]) -> dict[str, dict[str, BagFile]]:
    """Views called after their encoders where every view says which and no two have the same."""
    encoders = [
        Counter(file.encoder for file in files.values() if file.encoder).most_common(1) for files in found.values()
    ]
    names = [most[0][0] for most in encoders if most]
    if len(names) < len(found) or len(set(names)) < len(names):
        names = [re.sub(r"^(patch_)?features_(?=.)", "", name) for name in found]
        if len(set(names)) < len(names):
            names = list(found)
    return dict(zip(names, found.values(), strict=True))


def _common_width(path: Path, view: str, files: dict[str, BagFile], skipped: Skipped) -> int:
    """The width most files have; files with another are bad."""
    widths = Counter(file.width for file in files.values() if file.width is not None)
    if not widths:
        raise DataError(f"{path}: view {view!r}: expected features, got none in {len(files)} files")
    width = widths.most_common(1)[0][0]
    like = next(file for file in files.values() if file.width == width)
    for name, file in list(files.items()):
        if file.width not in (width, None):
            skipped(f"{file.path}: features: expected width {width} as in {like.path}, got {file.width}")
            del files[name]
    return width


def _check_content(file: BagFile) -> None:
    """Raise DataError if a file cannot be read to the end, or holds what it must not."""
    _, coords = read_bag(file)
    if coords is not None:
        check_step(file, coords)


def _same_features(one: BagFile, other: BagFile) -> bool:
    return torch.equal(read_bag(one)[0], read_bag(other)[0])


def _find_duplicates(files: dict[str, BagFile], skipped: Skipped, isolated: IsolatedCalls) -> None:
    """Slides with the same features under two names: with the same first row the whole is compared."""
    seen: dict[tuple[object, ...], list[BagFile]] = {}
    for name, file in list(files.items()):
        if not file.rows:
            continue
        alike = seen.setdefault(file.probe, [])
        try:
            same = next((other for other in alike if isolated(file.path, _same_features, file, other)), None)
        except DataError as error:
            skipped(str(error))
            del files[name]
            continue
        if same is None:
            alike.append(file)
        else:
            skipped(f"{file.path}: duplicate slide: {same.path} has the same features")
            del files[name]


def _slide_pixel_size(slide: _Slide, given: Mapping[str, float] | float | None) -> float:
    if isinstance(given, Mapping):
        number = given.get(plain_name(slide.name), math.nan)
    else:
        number = math.nan if given is None else given
    if not math.isnan(number):
        return number
    return next((file.pixel_size for file in slide.files.values() if not math.isnan(file.pixel_size)), math.nan)
