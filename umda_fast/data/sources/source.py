"""Sources by name or path: which kind, read how."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from umda_fast.data.files.layouts import is_slides
from umda_fast.data.files.packed import is_pack
from umda_fast.data.options import local_options, option_names, path_options
from umda_fast.data.sources.base import Source
from umda_fast.data.sources.digits import DigitsSource, is_digits
from umda_fast.data.sources.films import FilmsSource, is_films
from umda_fast.data.sources.mmimdb import MmimdbSource, is_mmimdb
from umda_fast.data.sources.npz import NpzSource, is_npz
from umda_fast.data.sources.slides import SlidesSource
from umda_fast.data.splits import Splits
from umda_fast.errors import DataError


@dataclass(frozen=True)
class SourceFormat:
    """One kind of source.

    Attributes:
        name: what `format=` calls it.
        summary: what it is, for messages.
        recognises: whether a source is of this kind, from its content.
        source: the `Source` made with options: a dataclass of them.
    """

    name: str
    summary: str
    recognises: Callable[[str], bool]
    source: Callable[..., Source]

    def options(self, folds: bool = False) -> tuple[str, ...]:
        """Names of the options of a source, or of its cross-validation."""
        return option_names(self.source, folds)

    @property
    def local(self) -> tuple[str, ...]:
        """Options that say something about one source only, such as files beside it; they are not for another."""
        return local_options(self.source)

    @property
    def paths(self) -> tuple[str, ...]:
        """Options that name files or directories."""
        return path_options(self.source)


_SLIDES = "a directory of bags (.h5 as CLAM, TRIDENT or STAMP write it, .pt, .npz) beside a labels.csv"

FORMATS: tuple[SourceFormat, ...] = (
    SourceFormat("digits", "`digits`, scikit-learn's handwritten digits", is_digits, DigitsSource),
    SourceFormat("npz", "an .npz file with X or X_<view>, ptr, y or Y", is_npz, NpzSource),
    SourceFormat("pack", "a directory that `umda-fast pack` made", is_pack, SlidesSource),
    SourceFormat("films", "a directory with movies.csv and poster_features.npy", is_films, FilmsSource),
    SourceFormat("mmimdb", "MM-IMDb's multimodal_imdb.hdf5", is_mmimdb, MmimdbSource),
    SourceFormat("slides", _SLIDES, is_slides, SlidesSource),  # the least particular kind of directory, so the last
)
"""Every kind of source, in the order in which they are tried."""


def find_format(source: str, format: str | None = None) -> SourceFormat:
    """The kind of a source, by its content or by the name given.

    Raises:
        DataError: unknown, listing what is understood.
    """
    understood = "; ".join(known.summary for known in FORMATS)
    if format is not None:
        for known in FORMATS:
            if known.name == format:
                return known
        names = ", ".join(known.name for known in FORMATS)
        raise DataError(f"format: expected one of {names}, got {format!r}")
    for known in FORMATS:
        if known.recognises(source):
            return known
    what = "a kind of data not understood" if Path(source).exists() else "no such file or directory"
    raise DataError(f"{source}: {what}; expected {understood}")


def _checked(text: str, format: str | None, options: dict[str, Any], folds: bool) -> Source:
    """The source's kind with its options, after a look at their names."""
    known = find_format(text, format)
    understood = known.options(folds)
    for name in options:
        if name not in understood:
            raise DataError(f"{text}: option {name!r}: expected one of {', '.join(understood)} for {known.name}")
    return known.source(**options)


def load_source(
    source: str | PathLike[str] = "digits", *, format: str | None = None, seed: int = 0, **options: Any
) -> Splits:
    """Read a source and split it into train, val and test.

    Args:
        source: `digits`, or a path (`./digits` for one of that name); its kind is recognised from the
            content.
        format: name of the kind, instead.
        seed: of splits and draws; the same data on every machine.
        options: of the kind, see `DigitsSource`, `NpzSource`, `SlidesSource`, `FilmsSource`, `MmimdbSource`.

    Raises:
        DataError: naming the source and what in it was wrong, or what is understood.
    """
    path = fspath(source)
    return _checked(path, format, options, folds=False).load_splits(path, seed)


def load_folds(
    source: str | PathLike[str] = "digits",
    *,
    folds: int = 10,
    repeats: int = 1,
    seed: int = 0,
    format: str | None = None,
    **options: Any,
) -> Iterator[Splits]:
    """Read a source for cross-validation: one `Splits` for every fold of every repeat, in that order.

    A fold's `test` is what it is tested on, its `val` is taken from the other bags. Arguments as of
    `load_source`.

    Raises:
        DataError: as `load_source`; folds or repeats out of range.
    """
    path = fspath(source)
    return _checked(path, format, options, folds=True).load_folds(path, folds, repeats, seed)
