"""Which files of a directory hold bags, and in which folders: as CLAM, TRIDENT and STAMP leave them, or made by hand.

Understood, for one encoder or several, of one kind of patches or several:

    DIR/*.h5 (.hdf5, .pt, .pth, .npz)                         files
    DIR/h5_files/*.h5, DIR/pt_files/*.pt                      CLAM; .pt only of slides without .h5
    DIR/20x_256px_0px_overlap/features_<encoder>/*.h5         TRIDENT, DIR being its job directory or the one below
    DIR/<extractor>-<hash>/**/*.h5                            STAMP, which keeps the folders of the slides
    DIR/<folder>/...                                          any of these below, a folder for each view or site

Which of these files make a view is decided by what they say (`umda_fast.data.files.view_groups`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from umda_fast.data.files.header_fields import tiling_of
from umda_fast.data.files.packed import is_pack
from umda_fast.data.files.readers import SUFFIXES
from umda_fast.errors import DataError

_TRIDENT = re.compile(r"(\d+(?:\.\d+)?)x_(\d+)px_(\d+)px_overlap")
_NOT_FEATURES = re.compile(r"patches|slide_features_.*")  # coordinates alone; one vector for a slide
_DEPTH = 4  # levels of directories below a view that are looked at


def is_slides(source: str) -> bool:
    """Whether `source` is a directory with files of bags somewhere below."""
    path = Path(source)
    return path.is_dir() and not is_pack(source) and next(files_below(path), None) is not None


def _entries(directory: Path) -> tuple[list[Path], list[Path]]:
    """Files of bags and directories, by name, without what is hidden or holds no patch features."""
    try:
        entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{directory}: cannot be read: {error.strerror or error}") from error
    if any(entry.name == "metrics.jsonl" for entry in entries):
        return [], []  # a run directory, whose checkpoint is no bag
    shown = [entry for entry in entries if not entry.name.startswith((".", "_"))]
    # A link to what is gone is a file too, which cannot be read.
    bags = [entry for entry in shown if Path(entry.name).suffix.lower() in SUFFIXES]
    files = [Path(entry.path) for entry in bags if entry.is_file() or not os.path.exists(entry.path)]
    folders = [Path(entry.path) for entry in shown if entry.is_dir() and not _NOT_FEATURES.fullmatch(entry.name)]
    return files, folders


def files_below(directory: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Files that may be bags, in a directory and those below it."""
    files, folders = _entries(directory)
    yield from files
    if depth:
        for folder in folders:
            yield from files_below(folder, depth - 1)


def _clam_files(directory: Path) -> list[Path] | None:
    """The files of one CLAM feature directory, .pt only for slides without .h5; None if it is none."""
    files: list[Path] = []
    for folder in ("h5_files", "pt_files"):
        if (directory / folder).is_dir():
            known = {file.stem for file in files}
            files += [file for file in _entries(directory / folder)[0] if file.stem not in known]
    return files or None


@dataclass(frozen=True)
class Folder:
    """Files of bags that lie together.

    Attributes:
        parts: the folder's path below the directory, without those that only say which tool or which patches.
        files: in it.
        tiling: of which patches, as of `BagFile`, if its path says.
    """

    parts: tuple[str, ...]
    files: list[Path]
    tiling: str | None = None


def find_folders(path: Path) -> list[Folder]:
    """The folders with files of bags in a directory, by path; only itself where it has some.

    Raises:
        DataError: no file.
    """
    files = _clam_files(path) or _entries(path)[0]
    if files:
        return [Folder((), files, _tiling(path.name))]
    folders = _entries(path)[1]
    sizes = [folder for folder in folders if _TRIDENT.fullmatch(folder.name)]
    start = Folder((), [], _tiling(path.name))
    found = [inner for folder in sizes or folders for inner in _folders_below(folder, start, _DEPTH)]
    if not found:
        raise DataError(f"{path}: expected files of bags ({', '.join(SUFFIXES)}), got none")
    return found


def _folders_below(directory: Path, above: Folder, depth: int) -> Iterator[Folder]:
    tiling = _tiling(directory.name)
    here = replace(above, tiling=tiling) if tiling else replace(above, parts=(*above.parts, directory.name))
    clam = _clam_files(directory)
    files, folders = _entries(directory)
    if clam or files:
        yield replace(here, files=clam or files)
    if depth and not clam:
        for folder in folders:
            yield from _folders_below(folder, here, depth - 1)


def _tiling(name: str) -> str | None:
    """What TRIDENT's name of a folder says of its patches, as `tiling_of` does."""
    match = _TRIDENT.fullmatch(name)
    return None if match is None else tiling_of(*(float(part) for part in match.groups()))


def unread_folders(path: Path) -> list[str]:
    """Names of sub-directories with files that `find_folders` leaves alone, as there are files beside them."""
    direct, folders = _entries(path)
    return [folder.name for folder in folders if direct and next(files_below(folder), None) is not None]
