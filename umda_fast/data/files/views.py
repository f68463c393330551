"""The views of a directory: which file of which slide each has, what it is called, its width and its dtype.

A view is called after its encoder if the files say which, else after its directory (`features` if there is none).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from umda_fast.data.files.bag_file import BagFile
from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.layouts import find_files
from umda_fast.data.files.readers import read_bag, read_header
from umda_fast.data.files.skipped import Skipped
from umda_fast.errors import DataError
from umda_fast.model.specs import ViewSpec


@dataclass(frozen=True)
class ViewFiles:
    """One view of a directory.

    Attributes:
        spec: name and width.
        dtype: of the features when they are read.
        files: slide -> its file in this view.
    """

    spec: ViewSpec
    dtype: torch.dtype
    files: dict[str, BagFile]


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
    paths = find_files(path, isolated)
    found = {view: _headers(files, skipped, isolated) for view, files in paths.items()}
    found = _named(found)
    there = {file.stem for files in paths.values() for file in files}
    if chosen is not None:
        unknown = [view for view in chosen if view not in found]
        if unknown:
            raise DataError(f"{path}: views: expected names among {', '.join(found)}, got {unknown[0]!r}")
        found = {view: found[view] for view in chosen}
    return [_view(path, name, files, skipped, isolated) for name, files in found.items()], there


def _view(path: Path, name: str, files: dict[str, BagFile], skipped: Skipped, isolated: IsolatedCalls) -> ViewFiles:
    width = _common_width(path, name, files, skipped)
    _find_duplicates(files, skipped, isolated)
    dtypes = {file.dtype for file in files.values() if file.rows}
    # Half precision is kept where all files have it; anything else meets in float32.
    dtype = dtypes.pop() if len(dtypes) == 1 and torch.float64 not in dtypes else torch.float32
    return ViewFiles(ViewSpec(name, width), dtype, files)


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
