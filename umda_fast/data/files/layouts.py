"""Which files of a directory hold bags, and in which folders: as CLAM, TRIDENT and STAMP leave them, or made by hand.

Understood, for one encoder or several, of one kind of patches or several:

    DIR/*.h5 (.hdf5, .pt, .pth, .npz)                         files
    DIR/h5_files/*.h5, DIR/pt_files/*.pt                      CLAM; .pt only of slides without .h5
    DIR/20x_256px_0px_overlap/features_<encoder>/*.h5         TRIDENT, DIR being its job directory or the one below
    DIR/20x_256px_0px_overlap/slide_features_<encoder>/*.h5   TRIDENT, of whole slides: where asked for, or else alone
    DIR/<extractor>-<hash>/**/*.h5                            STAMP, which keeps the folders of the slides
    DIR/<folder>/...                                          any of these below, a folder for each view or site

Which of these files make a view is decided by what they say (`umda_fast.data.files.view_groups`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from umda_fast.data.files.header_fields import tiling_of
from umda_fast.data.files.packed import is_pack
from umda_fast.data.files.readers import SUFFIXES
from umda_fast.errors import DataError

_TRIDENT = re.compile(r"(\d+(?:\.\d+)?)x_(\d+)px_(\d+)px_overlap")
_NOT_FEATURES = "patches"  # coordinates alone
_WHOLE = re.compile(r"slide_features_(.+)")  # one vector for a slide
_DEPTH = 4  # levels of directories below a view that are looked at


def is_slides(source: str) -> bool:
    """Whether `source` is a directory with files of bags somewhere below."""
    path = Path(source)
    return path.is_dir() and not is_pack(source) and next(files_below(path, whole=True), None) is not None


def _entries(directory: Path, whole: Collection[str] | bool = False) -> tuple[list[Path], list[Path]]:
    """Files of bags and directories, by name, without what is hidden or holds no features; of TRIDENT's folders of
    whole slides those of the encoders in `whole`, all or none."""
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
    folders = [Path(entry.path) for entry in shown if entry.is_dir() and _is_wanted(entry.name, whole)]
    return files, folders


def _is_wanted(folder: str, whole: Collection[str] | bool) -> bool:
    found = _WHOLE.fullmatch(folder)
    if found is not None:
        return whole if isinstance(whole, bool) else not {found[1], f"{found[1]}_slide"}.isdisjoint(whole)
    return folder != _NOT_FEATURES


def files_below(directory: Path, depth: int = _DEPTH, whole: bool = False) -> Iterator[Path]:
    """Files that may be bags, in a directory and those below it; `whole`: in folders of whole slides too."""
    files, folders = _entries(directory, whole)
    yield from files
    if depth:
        for folder in folders:
            yield from files_below(folder, depth - 1, whole)


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


def find_folders(path: Path, whole: Collection[str] = ()) -> list[Folder]:
    """The folders with files of bags in a directory, by path; only itself where it has some.

    Args:
        whole: views, among them those of whole slides of which TRIDENT's folders count too; all folders do where there
            is nothing else.

    Raises:
        DataError: no file.
    """
    files = _clam_files(path) or _entries(path)[0]
    if files:
        return [Folder((), files, _tiling(path.name))]
    found = _found_below(path, whole) or _found_below(path, True)
    if not found:
        raise DataError(f"{path}: expected files of bags ({', '.join(SUFFIXES)}), got none")
    return found


def whole_folders(path: Path) -> list[str]:
    """Encoders of TRIDENT's folders of whole slides in a directory; none where its own files are all that is read."""
    if _clam_files(path) or _entries(path)[0]:
        return []
    found = (_WHOLE.fullmatch(folder.parts[-1]) for folder in _found_below(path, True) if folder.parts)
    return [match[1] for match in found if match is not None]


def _found_below(path: Path, whole: Collection[str] | bool) -> list[Folder]:
    folders = _entries(path, whole)[1]
    sizes = [folder for folder in folders if _TRIDENT.fullmatch(folder.name)]
    start = Folder((), [], _tiling(path.name))
    return [inner for folder in sizes or folders for inner in _folders_below(folder, start, _DEPTH, whole)]


def _folders_below(
    directory: Path, above: Folder, depth: int, whole: Collection[str] | bool
) -> Iterator[Folder]:
    tiling = _tiling(directory.name)
    here = replace(above, tiling=tiling) if tiling else replace(above, parts=(*above.parts, directory.name))
    clam = _clam_files(directory)
    files, folders = _entries(directory, whole)
    if clam or files:
        yield replace(here, files=clam or files)
    if depth and not clam:
        for folder in folders:
            yield from _folders_below(folder, here, depth - 1, whole)


def _tiling(name: str) -> str | None:
    """What TRIDENT's name of a folder says of its patches, as `tiling_of` does."""
    match = _TRIDENT.fullmatch(name)
    return None if match is None else tiling_of(*(float(part) for part in match.groups()))


def unread_folders(path: Path) -> list[str]:
    """Names of sub-directories with files that `find_folders` leaves alone, as there are files beside them."""
    direct, folders = _entries(path)
    return [folder.name for folder in folders if direct and next(files_below(folder), None) is not None]
