"""Which files of a directory hold bags, and of which view: as CLAM, TRIDENT and STAMP leave them, or made by hand.

Understood, for one encoder (one view) or, in sub-directories, several:

    DIR/*.h5 (.hdf5, .pt, .pth, .npz)                         files
    DIR/h5_files/*.h5, DIR/pt_files/*.pt                      CLAM; .pt only of slides without .h5
    DIR/20x_256px_0px_overlap/features_<encoder>/*.h5         TRIDENT, DIR being its job directory or the one below
    DIR/<extractor>-<hash>/**/*.h5                            STAMP, which keeps the folders of the slides
    DIR/<view>/...                                            any of these below a directory for each view
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from umda_fast.data.files.isolated import IsolatedCalls
from umda_fast.data.files.packed import is_pack
from umda_fast.data.files.readers import SUFFIXES, read_header
from umda_fast.errors import DataError

_TRIDENT = re.compile(r"[\d.]+x_\d+px_\d+px_overlap")
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
    files = [Path(entry.path) for entry in shown if Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file()]
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


def _files_of(directory: Path) -> list[Path]:
    """All files of one view."""
    return _clam_files(directory) or list(files_below(directory))


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


def unread_folders(path: Path) -> list[str]:
    """Names of sub-directories with files that `find_files` leaves alone, as there are files beside them."""
    direct, folders = _entries(path)
    return [folder.name for folder in folders if direct and next(files_below(folder), None) is not None]
