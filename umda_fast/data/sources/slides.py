"""A directory of bags, one file each, as CLAM, TRIDENT and STAMP leave it, or made by hand.

Understood, for one encoder (one view) or, in sub-directories, several:

    DIR/*.h5 (.hdf5, .pt, .pth, .npz)                         files
    DIR/h5_files/*.h5, DIR/pt_files/*.pt                      CLAM; .pt only of slides without .h5
    DIR/20x_256px_0px_overlap/features_<encoder>/*.h5         TRIDENT, DIR being its job directory or the one below
    DIR/<extractor>-<hash>/**/*.h5                            STAMP, which keeps the folders of the slides
    DIR/<view>/...                                            any of these below a directory for each view

A view is called after its encoder if the files say which, else after its directory (`features` if there is none).
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data._random import IntArray
from umda_fast.data.bags import Bag, BagDataset, Positions, label_tensor
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.labels_table import (
    LabelTable,
    match_names,
    plain_name,
    read_labels,
    read_metadata,
    read_split,
    read_tasks,
    split_files,
)
from umda_fast.data.files.matching import match_rows
from umda_fast.data.files.packed import PackIndex, is_pack
from umda_fast.data.files.readers import (
    SUFFIXES,
    BagFile,
    check_pixel_size,
    check_step,
    read_bag,
    read_coords,
    read_header,
)
from umda_fast.data.labels import ClassWeights, FloatArray, KindOverrides, fixed_tasks, label_columns
from umda_fast.data.splits import SPLITS, Splits, held_out, k_fold, split_bags
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec

_TRIDENT = re.compile(r"[\d.]+x_\d+px_\d+px_overlap")
_NOT_FEATURES = re.compile(r"patches|slide_features_.*")  # coordinates alone; one vector for a slide
_DEPTH = 4  # levels of directories below a view that are looked at

Matching: TypeAlias = Literal["coords", "position"]

READ_TIMEOUT = 60.0
"""Seconds of processor time that the first reading of one file may take."""


def is_slides(source: str) -> bool:
    """Whether `source` is a directory with files of bags somewhere below."""
    path = Path(source)
    return path.is_dir() and not is_pack(source) and next(_files_below(path), None) is not None


# ---- which files ----


def _entries(directory: Path) -> tuple[list[Path], list[Path]]:
    """Files of bags and directories, by name, without what is hidden or holds no patch features."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {error.strerror or error}") from error
    if any(entry.name == "metrics.jsonl" for entry in entries):
        return [], []  # a run directory, whose checkpoint is no bag
    shown = [entry for entry in entries if not entry.name.startswith((".", "_"))]
    files = [Path(entry.path) for entry in shown if Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()]
    folders = [Path(entry.path) for entry in shown if entry.is_dir() and not _NOT_FEATURES.fullmatch(entry.name)]
    return files, folders


def _files_below(directory: Path, depth: int = _DEPTH) -> Iterator[Path]:
    files, folders = _entries(directory)
    yield from files
    if depth:
        for folder in folders:
            yield from _files_below(folder, depth - 1)


def _clam_files(directory: Path) -> list[Path] | None:
    """The files of one CLAM feature directory, .pt only for slides without .h5; None if it is none."""
    files: list[Path] = []
    for folder in ("h5_files", "pt_files"):
        if (directory / folder).is_dir():
            known = {file.stem for file in files}
            files += [file for file in _entries(directory / folder)[0] if file.stem not in known]
    return files or None


def _files_of(directory: Path) -> list[Path]:
    """All files of one view."""
    return _clam_files(directory) or list(_files_below(directory))


def find_files(path: Path, isolated: IsolatedCalls) -> dict[str, list[Path]]:
    """The files of every view, views called after their directories, `features` where there is only `path` itself.

    `isolated` reads a header or two, where directories may be views or folders of slides.

    Raises:
        DataError: no file, or features of several patch sizes.
    """
    clam = _clam_files(path)
    if clam is not None:
        return {"features": clam}
    files, folders = _entries(path)
    if files:
        return {"features": files}
    sizes = [folder for folder in folders if _TRIDENT.fullmatch(folder.name)]
    if len(sizes) > 1:
        names = ", ".join(folder.name for folder in sizes)
        raise DataError(f"{path}: expected patches of one size, got {names}; give one of these directories")
    if sizes:
        return find_files(sizes[0], isolated)
    views = {folder.name: _files_of(folder) for folder in folders}
    views = {name: files for name, files in views.items() if files}
    if not views:
        raise DataError(f"{path}: expected files of bags ({', '.join(SUFFIXES)}), got none")
    if len(views) > 1 and _one_view(list(views.values()), isolated):
        return {"features": [file for files in views.values() for file in files]}
    return views


def _one_view(groups: Sequence[Sequence[Path]], isolated: IsolatedCalls) -> bool:
    """Whether directories are folders of slides, not views: different slides, of one encoder and width."""
    stems = [file.stem for files in groups for file in files]
    if len(set(stems)) < len(stems):
        return False
    kinds = set()
    for files in groups:
        try:
            header = isolated(files[0], read_header, files[0])
        except DataError:
            continue
        if header.width is not None:
            kinds.add((header.encoder, header.width))
    return len(kinds) == 1


# ---- the index ----


class Skipped:
    """Collects what is skipped; without `skip_bad` the first bad thing is an error."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.lines: list[str] = []

    def __call__(self, message: str) -> None:
        if not self.skip_bad:
            raise DataError(message)
        self.lines.append(message)


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
        *,
        views: Sequence[str] | None = None,
        pixel_sizes: Mapping[str, float] | float | None = None,
        match: Matching = "coords",
        tolerance: float = 1.0,
        read_timeout: float = READ_TIMEOUT,
        skipped: Skipped,
    ) -> None:
        if match not in ("coords", "position"):
            raise DataError(f"match: expected coords or position, got {match!r}")
        if not tolerance > 0:
            raise DataError(f"tolerance: expected a positive number of micrometres, got {tolerance!r}")
        if not read_timeout > 0:
            raise DataError(f"read_timeout: expected a positive number of seconds, got {read_timeout!r}")
        self._match, self._tolerance = match, tolerance
        with IsolatedCalls(read_timeout) as isolated:
            self._open(path, views, pixel_sizes, skipped, isolated)

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
        direct, folders = _entries(path)
        unread = [folder.name for folder in folders if direct and next(_files_below(folder), None) is not None]
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


# ---- the source ----


class SlideStore:
    """Bags of an index with their labels; `skipped` grows as long as its source is being opened."""

    def __init__(
        self, index: SlideIndex, tasks: Sequence[TaskSpec], labels: Mapping[str, FloatArray], skipped: list[str]
    ) -> None:
        self._index = index
        self._tasks = tuple(tasks)
        self.names: Sequence[str] = index.names
        self.sizes = index.sizes
        self.labels = labels
        self.positions = index.positions
        self.skipped = skipped

    def load(self, index: int) -> Bag:
        views, mask, coords = self._index.read(index)
        labels = {}
        for task in self._tasks:
            value = self.labels[task.name][index]
            if not np.isnan(value).any():
                labels[task.name] = label_tensor(task, value)
        return Bag(self.names[index], views, mask, labels, coords)


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

    Arguments and errors as of `load_slides_source`.
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


@dataclass(frozen=True)
class _Source:
    """A source opened and labelled: all bags, and what decides on its splits."""

    opened: OpenedSlides
    dataset: BagDataset
    groups: list[str] | None
    notes: list[str]
    kinds: KindOverrides | None
    class_weights: ClassWeights

    def splits(self, parts: Mapping[str, IntArray], how: str) -> Splits:
        whole, path = self.dataset, self.opened.path
        datasets = {split: whole.subset(rows, f"{path} ({split})") for split, rows in parts.items()}
        unit = whole.positions.unit if whole.positions is not None else None
        positions = {"um": "positions in micrometres", "px": "positions in level-0 pixels", None: "no positions"}[unit]
        description = (
            f"{len(whole)} bags ({self.opened.index.tool}), {int(whole.sizes.sum())} instances, "
            f"{len(whole.views)} view(s), {len(whole.tasks)} task(s); {'; '.join([positions, *self.notes, how])}"
        )
        name = Path(path).resolve().name
        splits = Splits(
            name,
            description,
            train=datasets["train"],
            val=datasets["val"],
            test=datasets["test"],
            whole=whole,
        )
        return splits.fitted(self.class_weights, keep=fixed_tasks(self.kinds))

    def with_val(self, parts: dict[str, IntArray], val_share: float, seed: int) -> dict[str, IntArray]:
        """`parts`, with bags for validation taken out of train where there are none."""
        if len(parts["val"]):
            return parts
        return parts | held_out(self.dataset, parts["train"], val_share, seed, self.groups)


def _label(opened: OpenedSlides, kinds: KindOverrides | None, class_weights: ClassWeights) -> _Source:
    index, table, rows = opened.index, opened.table, opened.rows
    notes = list(index.notes)
    groups = None
    if table is not None:
        specs, columns = read_tasks(table, rows, kinds)
        bare = sum(row is None for row in rows)
        notes += [f"labels from {table.path.name}", *([f"{bare} bags not in it"] if bare else [])]
        if table.patients is not None:
            groups = [
                f"patient {table.patients[row]}" if row is not None and table.patients[row] else f"slide {bag}"
                for bag, row in zip(index.names, rows, strict=True)
            ]
    else:
        specs, columns = label_columns({}, len(rows), kinds, where=opened.path)
        notes.append("no table of labels (labels.csv)")
    dataset = BagDataset(SlideStore(index, specs, columns, opened.skipped.lines), index.views, specs, opened.path)
    if table is not None:
        dataset = dataset.with_metadata(read_metadata(table, rows))
    return _Source(opened, dataset, groups, notes, kinds, class_weights)


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


def _split_column(opened: OpenedSlides) -> dict[str, IntArray] | None:
    """The parts that the table's column `split` says, if it has one; bags not in the table are in none."""
    table = opened.table
    if table is None or table.splits is None:
        return None
    for name, text in zip(table.names, table.splits, strict=True):
        if text not in SPLITS:
            raise DataError(f"{table.path}: column split: expected {', '.join(SPLITS)}, got {text!r} for {name!r}")
    said = np.array(["" if row is None else table.splits[row] for row in opened.rows])
    return {split: np.flatnonzero(said == split) for split in SPLITS}


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


def load_slides_source(
    path: str,
    *,
    seed: int = 0,
    kinds: KindOverrides | None = None,
    labels: str | None = None,
    tasks: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    metadata: Sequence[str] = (),
    splits: str | None = None,
    fold: int = 0,
    val_share: float = 0.15,
    test_share: float = 0.2,
    class_weights: ClassWeights = None,
    views: Sequence[str] | None = None,
    mpp: float | None = None,
    match: Matching = "coords",
    tolerance: float = 1.0,
    skip_bad: bool = False,
    read_timeout: float = READ_TIMEOUT,
) -> Splits:
    """A directory of bags, see the head of this module, with a table of labels.

    The split is that of CLAM's split files, or else of the table's column `split`, or else at random, stratified,
    with all bags of a patient on one side.

    Args:
        path: the directory, or one that `umda-fast pack` made.
        seed: of the split.
        kinds: as in `BagDataset.from_arrays`.
        labels: the table, .csv or .tsv; None looks for labels.csv or labels.tsv in the directory, then beside it.
        tasks, ignore: columns of the table that are tasks, or that are not.
        metadata: columns of numbers that are known of a bag (an age, a magnification) and condition the model.
        splits: a directory with CLAM's splits_0.csv, ..., or one such file; None looks for `splits_0.csv` in the
            directory, in its `splits`, then in `splits` beside it.
        fold: which of the split files.
        val_share, test_share: of the bags.
        class_weights: "balanced" or None.
        views: which views, in this order; None: all, by name.
        mpp: micrometres per level-0 pixel of all slides; None takes the files' or the table's column mpp.
        match: how rows of several views are brought together: by coords, or by position in the file.
        tolerance: in micrometres, of coordinates that are not whole pixels.
        skip_bad: leave out what is bad and list it in `Splits.skipped`, instead of stopping. Reads every file once.
        read_timeout: seconds of processor time that the first reading of one file may take before it counts as bad:
            the library does not come back from some corrupt HDF5 files. (On Linux; not of a packed directory.)

    Raises:
        DataError: naming the file, what was expected and what came.
    """
    opened = open_slides(
        path,
        labels=labels,
        tasks=tasks,
        ignore=ignore,
        metadata=metadata,
        splits=splits,
        views=views,
        mpp=mpp,
        match=match,
        tolerance=tolerance,
        skip_bad=skip_bad,
        read_timeout=read_timeout,
    )
    files = opened.split_files
    if files and not 0 <= fold < len(files):
        raise DataError(f"{files[0].parent}: fold: expected 0 to {len(files) - 1}, got {fold}")
    source = _label(opened, kinds, class_weights)
    said = _split_column(opened)
    if files:
        parts = source.with_val(opened.read_splits(fold)[0], val_share, seed)
        how = f"split by {files[fold].name}"
    elif said is not None:
        parts, how = source.with_val(said, val_share, seed), "split by the column split"
    else:
        shares = {"train": 1.0 - val_share - test_share, "val": val_share, "test": test_share}
        parts = split_bags(source.dataset, shares, seed, source.groups)
        how = "split at random" + (" by patient" if source.groups is not None else "")
    return source.splits(parts, how)


def fold_slides_source(
    path: str,
    *,
    folds: int,
    repeats: int = 1,
    seed: int = 0,
    kinds: KindOverrides | None = None,
    labels: str | None = None,
    tasks: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    metadata: Sequence[str] = (),
    splits: str | None = None,
    val_share: float = 0.15,
    class_weights: ClassWeights = None,
    views: Sequence[str] | None = None,
    mpp: float | None = None,
    match: Matching = "coords",
    tolerance: float = 1.0,
    skip_bad: bool = False,
    read_timeout: float = READ_TIMEOUT,
) -> Iterator[Splits]:
    """Cross-validation: CLAM's split files as they are, or else stratified folds, bags of a patient together.

    `val_share` of every fold's other bags validate. Arguments and errors as of `load_slides_source`.
    """
    opened = open_slides(
        path,
        labels=labels,
        tasks=tasks,
        ignore=ignore,
        metadata=metadata,
        splits=splits,
        views=views,
        mpp=mpp,
        match=match,
        tolerance=tolerance,
        skip_bad=skip_bad,
        read_timeout=read_timeout,
    )
    files = opened.split_files
    if files and (folds, repeats) != (len(files), 1):
        raise DataError(
            f"{files[0].parent}: expected {len(files)} folds and 1 repeat, one for each split file, "
            f"got {folds} and {repeats}"
        )
    source = _label(opened, kinds, class_weights)
    if files:
        for fold, parts in enumerate(opened.read_splits()):
            yield source.splits(source.with_val(parts, val_share, seed + fold), f"split by {files[fold].name}")
        return
    for cut in k_fold(source.dataset, folds, repeats, seed, source.groups):
        # Its own stream for every fold, or all folds would break ties alike.
        inner = held_out(source.dataset, cut.train, val_share, seed + folds * cut.repeat + cut.fold, source.groups)
        how = f"fold {cut.fold} of {folds}, repeat {cut.repeat}" + (" by patient" if source.groups else "")
        yield source.splits({**inner, "test": cut.test}, how)
