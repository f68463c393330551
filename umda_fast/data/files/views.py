"""The views of a directory: which file of which slide each has, what it is called, its width and its dtype.

Which files are one view: `umda_fast.data.files.view_groups`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from umda_fast.data.files.bag_file import BagFile
from umda_fast.data.files.file_options import FileOptions
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.layouts import find_folders
from umda_fast.data.files.nesting import grid_step, match_views, shared_share
from umda_fast.data.files.readers import read_bag, read_coords, read_header
from umda_fast.data.files.skipped import Skipped
from umda_fast.data.files.view_groups import View, bag_names, groups_of, turned, view_names, views_of
from umda_fast.errors import DataError
from umda_fast.model.specs import ViewSpec


@dataclass(frozen=True)
class ViewFiles:
    """One view of a directory.

    Attributes:
        spec: name and width.
        dtype: of the features when they are read.
        files: slide -> its file in this view.
        whole: as of `BagFile`, of all of them.
    """

    spec: ViewSpec
    dtype: torch.dtype
    files: dict[str, BagFile]
    whole: str = ""


def read_views(
    path: Path, chosen: Sequence[str] | None, skipped: Skipped, isolated: IsolatedCalls
) -> tuple[list[ViewFiles], set[str]]:
    """Headers of all files of a directory, by view.

    Args:
        path: the directory.
        chosen: names of views, in this order; None: all, by directory.
        skipped: is told of files that are not used.
        isolated: reads.

    Returns:
        The views, and the names of all slides that have a file, used or not.

    Raises:
        DataError: no such view, no features; unless `skipped` skips it, a file that cannot be used.
    """
    folders = find_folders(path, chosen or ())
    together = partial(_together, isolated)
    headers, by_folder = turned(
        [(folder, _headers(folder.files, skipped, isolated)) for folder in folders], together
    )
    groups = [group for folder, files in headers for group in groups_of(folder, files)]
    views = views_of(groups, together)
    if not views:
        count = sum(len(folder.files) for folder in folders)
        raise DataError(f"{path}: expected features, got none that can be read in {count} files")
    found: dict[str, dict[str, BagFile]] = {}
    for name, files in zip(_names(views), bag_names(views), strict=True):
        found[name] = {}
        for bag, members in files.items():
            found[name][bag] = members[0]
            for other in members[1:]:
                skipped(f"{other.path}: duplicate slide: {members[0].path} has the same name")
    read = {header.path for _, files in headers for header in files.values()}
    unread = {file for folder in folders for file in folder.files} - read
    there = {bag for files in found.values() for bag in files}
    there |= {file.parent.name if by_folder else file.stem for file in unread}
    if chosen is not None:
        unknown = [view for view in chosen if view not in found]
        if unknown:
            raise DataError(f"{path}: views: expected names among {', '.join(found)}, got {unknown[0]!r}")
        found = {view: found[view] for view in chosen}
    _check_whole(path, found, chosen is not None)
    return [_view(path, name, files, skipped, isolated) for name, files in found.items()], there


def _whole(files: Mapping[str, BagFile]) -> str:
    return next((file.whole for file in files.values()), "")


def _names(views: Sequence[View]) -> list[str]:
    """Views of patches are called as they are alone; one of whole slides that would be called alike has a word more."""
    kinds = [next((file.whole for group in view.groups for file in group.files.values()), "") for view in views]
    names: dict[int, str] = {}
    for whole in sorted(set(kinds)):
        own = [number for number, kind in enumerate(kinds) if kind == whole]
        for number, name in zip(own, view_names([views[number] for number in own]), strict=True):
            names[number] = f"{name}_{whole}" if name in names.values() else name
    return [names[number] for number in range(len(views))]


def _check_whole(path: Path, found: Mapping[str, Mapping[str, BagFile]], chosen: bool) -> None:
    """Raise DataError for features of whole slides beside patches that nobody asked for, and for those of whole
    patients beside any of slides."""
    kinds = {name: _whole(files) for name, files in found.items()}
    if len(set(kinds.values())) < 2:
        return
    for name, whole in kinds.items():
        if whole == "patient":
            raise DataError(
                f"{next(iter(found[name].values())).path}: expected features of slides as the other views, got "
                f"features of a whole patient; take one of them: --set data.options.views=[{name}]"
            )
    if chosen:
        return
    wholes = [name for name, whole in kinds.items() if whole]
    raise DataError(
        f"{next(iter(found[wholes[0]].values())).path}: features of a whole slide, beside patches: to take both, "
        f"--set 'data.options.views=[{', '.join(found)}]', or name the views without {', '.join(wholes)}"
    )


def _view(path: Path, name: str, files: dict[str, BagFile], skipped: Skipped, isolated: IsolatedCalls) -> ViewFiles:
    width = _common_width(path, name, files, skipped)
    _find_duplicates(files, skipped, isolated)
    dtypes = {file.dtype for file in files.values() if file.rows}
    # Half precision is kept where all files have it; anything else meets in float32.
    dtype = dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32
    return ViewFiles(ViewSpec(name, width), dtype, files, _whole(files))


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


def _together(isolated: IsolatedCalls, one: BagFile, other: BagFile) -> float | None:
    """How much of the patches of two files lies on each other; None where that cannot be known."""
    if one.unit is None or one.unit != other.unit or not one.rows or not other.rows:
        return None
    try:
        coords = [part for file in (one, other) if (part := isolated(file.path, read_coords, file)) is not None]
    except DataError:
        return None  # said when its content is needed
    sizes = [one.patch_size, other.patch_size]
    if any(map(math.isnan, sizes)):
        sizes = [grid_step(part) for part in coords]
    if any(map(math.isnan, sizes)):
        sizes = [math.nan, math.nan]
    table, _ = match_views(coords, sizes, 0.0 if one.unit == "px" else FileOptions.tolerance)
    return 1.0 if table is None else shared_share(table, 0, 1, [one.rows, other.rows], sizes)


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
