"""Bags in files of their own: which there are, how large they are, and how one of them is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.files.alignment import Slide, align, common_unit, step_ratios
from umda_fast.data.files.bag_file import BagFile, check_step
from umda_fast.data.files.column_meanings import part_named
from umda_fast.data.files.file_options import FileOptions
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.layouts import unread_folders, whole_folders
from umda_fast.data.files.names import some_names
from umda_fast.data.files.readers import read_bag
from umda_fast.data.files.skipped import Skipped
from umda_fast.data.files.views import read_views
from umda_fast.data.metadata import Positions
from umda_fast.errors import DataError
from umda_fast.model.specs import ViewSpec

PixelSizes: TypeAlias = Callable[[Mapping[str, Sequence[str]]], list[float]]
"""Called with the names of all bags and the folders in which their files lie: micrometres per level-0 pixel, or NaN."""


class SlideIndex(Protocol):
    """Bags on disk, without labels.

    Attributes:
        names, sizes, views, positions: as of a dataset; `positions` is None without coordinates.
        tool: who wrote the files, for messages.
        notes: what is worth knowing, one line each.
        guesses: what had to be guessed, one line each.
        absent: names of bags that are there and not used: bad, or without one of the views chosen.
    """

    names: list[str]
    sizes: IntArray
    views: tuple[ViewSpec, ...]
    positions: Positions | None
    tool: str
    notes: list[str]
    guesses: list[str]
    absent: set[str]

    def read(self, index: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        """Features by view, mask bool [n, V] (None: all there), coordinates float32 [n, 2] or None."""
        ...


class FileIndex:
    """Bags in files of their own. Keeps headers only; every read opens its files and closes them.

    Beside what `SlideIndex` has, `whole` are the views of whole slides, and `finest` is the view of the smallest
    patches, where others hold several of them.

    What is read here, when the index is made, is read in another process (`umda_fast.data.files.isolated`).

    Args:
        path: the directory.
        options: how its files are read.
        pixel_sizes: of the slides, NaN: as their files say.
        skipped: is told of what is not used.

    Raises:
        DataError: naming the file, what was expected and what came.
    """

    def __init__(
        self,
        path: Path,
        options: FileOptions,
        pixel_sizes: PixelSizes,
        skipped: Skipped,
    ) -> None:
        options.check()
        with IsolatedCalls(options.read_timeout) as isolated:
            found, there = read_views(path, options.chosen_views, skipped, isolated)
            self.views: tuple[ViewSpec, ...] = tuple(view.spec for view in found)
            self._dtypes = {view.spec.name: view.dtype for view in found}
            names = sorted({name for view in found for name in view.files})
            slides = [
                Slide(name, {view.spec.name: view.files[name] for view in found if name in view.files})
                for name in names
            ]
            if skipped.skip_bad:
                slides = [slide for slide in slides if _verified(slide, skipped, isolated)]
            folders = {slide.name: _folders(path, slide) for slide in slides}
            for slide, size in zip(slides, pixel_sizes(folders), strict=True):
                slide.set_pixel_size(size)
            self._unit = common_unit(slides, options.match, skipped)
            views = [view.spec.name for view in found if not view.whole]
            self.whole = {view.spec.name for view in found if view.whole}
            ratios = step_ratios(slides, views, isolated) if len(views) > 1 and options.match == "coords" else {}
            self._slides = [slide for slide in slides if self._aligned(slide, options, ratios, skipped, isolated)]
        if not self._slides:
            raise DataError(f"{path}: expected at least one bag, got none that can be used")
        self.names = [slide.name for slide in self._slides]
        self.absent = there - set(self.names)
        self.sizes: IntArray = np.array([slide.size for slide in self._slides], dtype=np.int64)
        tools = Counter(file.tool for slide in self._slides for file in slide.files.values())
        self.tool = " and ".join(sorted(tools))
        self.positions = self._positions()
        self.notes = self._notes(path)
        nested = [slide for slide in self._slides if slide.nested]
        self.finest = nested[0].finest[0] if nested else None
        self.guesses = [*_folder_notes(path, self._slides), *(slide.nested for slide in nested[:1])]

    def _aligned(
        self,
        slide: Slide,
        options: FileOptions,
        ratios: Mapping[str, float],
        skipped: Skipped,
        isolated: IsolatedCalls,
    ) -> bool:
        """Whether the rows of its views could be brought together."""
        try:
            align(slide, self._unit, options, ratios, isolated)
        except DataError as error:
            skipped(str(error))
            return False
        return True

    def _positions(self) -> Positions | None:
        if self._unit is None:
            return None
        sizes = np.array([slide.patch_size(self._unit) for slide in self._slides])
        return Positions(self._unit, sizes, np.array([slide.pixel_size for slide in self._slides]))

    def _notes(self, path: Path) -> list[str]:
        notes = []
        unread = unread_folders(path)
        if unread:
            notes.append(f"not read, as there are files beside: {', '.join(unread)}")
        names = [spec.name for spec in self.views]
        # A view of whole slides that would be called as one of patches is, has a word more.
        whole = [f"{name}_slide" if name in names else name for name in whole_folders(path)] if not self.whole else []
        if whole:
            asked = ", ".join([*names, *whole])
            notes.append(f"features of whole slides, not read: {', '.join(whole)}; data.options.views=[{asked}]")
        for spec in self.views:
            lacking = sum(spec.name not in slide.files for slide in self._slides)
            if lacking:
                notes.append(f"{lacking} without view {spec.name}")
        for one, other in combinations([spec.name for spec in self.views], 2):
            both = [slide.files for slide in self._slides if {one, other} <= slide.files.keys()]
            if both and all(files[one].rows and files[one].probe == files[other].probe for files in both):
                notes.append(f"views {one} and {other} seem to be the same features")
        return notes

    def dtype(self, view: str) -> torch.dtype:
        """Of the features of a view as `read` gives them."""
        return self._dtypes[view]

    def fingerprints(self) -> list[list[str | int]]:
        """Path, size and time of every file, to see whether something changed."""
        stats = [(file.path, file.path.stat()) for slide in self._slides for file in slide.files.values()]
        return [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def read(self, index: int) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
        slide = self._slides[index]
        views: dict[str, Tensor] = {}
        places: dict[str, FloatArray] = {}
        rows = {view: None if slide.rows is None else slide.rows[:, k] for k, view in enumerate(slide.files)}
        missing = np.zeros((slide.size, len(self.views)), dtype=np.bool_)
        for column, spec in enumerate(self.views):
            if spec.name not in slide.files:
                missing[:, column] = True
                continue
            file, moved = slide.files[spec.name], rows[spec.name]
            features, where = read_bag(file)
            features = features.to(self._dtypes[spec.name]).reshape(file.rows, spec.width)
            if where is not None:
                check_step(file, where)
                places[spec.name] = slide.coords_in(file, where, self._unit)
            if moved is not None:
                missing[:, column] = moved < 0
                features = _moved(features, moved, moved >= 0)
            views[spec.name] = features
        coords = np.full((slide.size, 2), np.nan)
        for view in reversed(slide.finest):  # where several have an instance, the finest says where it lies
            moved = rows[view]
            if view not in places:
                continue
            if moved is None:
                coords = places[view]
            else:
                coords[moved >= 0] = places[view][moved[moved >= 0]]
        mask = torch.from_numpy(~missing) if missing.any() else None
        return views, mask, None if self._unit is None else torch.from_numpy(coords.astype(np.float32))


def _folder_notes(path: Path, slides: Sequence[Slide]) -> list[str]:
    """What the folders of slides were taken for, where that is not plain."""
    notes = []
    apart = [slide.name for slide in slides if "/" in slide.name]
    if apart:
        notes.append(f"{len(apart)} names that several folders have, told apart as {some_names(apart)}")
    if all(slide.name.split("/")[-1] not in {file.path.stem for file in slide.files.values()} for slide in slides):
        notes.append("bags are called after their folders, which hold files of the same names")
    named = {part_named(parts[0]) for slide in slides if (parts := _folders(path, slide))}
    if "train" in named and len(named) > 1:
        notes.append("folders called train, val, test are no split")
    return notes


def _folders(path: Path, slide: Slide) -> list[str]:
    """Names of the folders in which a slide's files lie, below `path`."""
    return [part for file in slide.files.values() for part in file.path.relative_to(path).parts[:-1]]


def _moved(features: Tensor, rows: npt.NDArray[np.int32], present: npt.NDArray[np.bool_]) -> Tensor:
    out = features.new_zeros(len(rows), features.shape[1])
    out[torch.from_numpy(present)] = features[torch.from_numpy(rows[present].astype(np.int64))]
    return out


def _verified(slide: Slide, skipped: Skipped, isolated: IsolatedCalls) -> bool:
    """Drops the files of a slide that cannot be read to the end, or hold what they must not."""
    for view, file in list(slide.files.items()):
        try:
            isolated(file.path, _check_content, file)
        except DataError as error:
            skipped(str(error))
            del slide.files[view]
    return bool(slide.files)


def _check_content(file: BagFile) -> None:
    """Raise DataError if a file cannot be read to the end, or holds what it must not."""
    _, coords = read_bag(file)
    if coords is not None:
        check_step(file, coords)
