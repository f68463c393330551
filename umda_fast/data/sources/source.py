"""Sources by name or path: which kind, read how."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from umda_fast.data.files.layouts import is_slides
from umda_fast.data.files.packed import is_pack
from umda_fast.data.sources.digits import fold_digits_source, load_digits_source
from umda_fast.data.sources.films import fold_films_source, is_films, load_films_source
from umda_fast.data.sources.mmimdb import fold_mmimdb_source, is_mmimdb, load_mmimdb_source
from umda_fast.data.sources.npz import fold_npz_source, is_npz, load_npz_source
from umda_fast.data.sources.slides import fold_slides_source, load_slides_source
from umda_fast.data.splits import Splits
from umda_fast.errors import DataError


@dataclass(frozen=True)
class SourceFormat:
    """One kind of source.

    Attributes:
        name: what `format=` calls it.
        summary: what it is, for messages.
        recognises: whether a source is of this kind, from its content.
        load: the source (if it is a path), seed and options to splits.
        fold: the source (if it is a path), folds, repeats, seed and options to one `Splits` for every fold.
        is_path: whether `load` and `fold` take the source.
        local: options that say something about one source only, such as files beside it; they are not for another.
    """

    name: str
    summary: str
    recognises: Callable[[str], bool]
    load: Callable[..., Splits]
    fold: Callable[..., Iterator[Splits]]
    is_path: bool = True
    local: tuple[str, ...] = ()

    def options(self, folds: bool = False) -> tuple[str, ...]:
        """Names of the options that `load`, or for cross-validation `fold`, takes."""
        parameters = inspect.signature(self.fold if folds else self.load).parameters.values()
        names = (parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
        return tuple(name for name in names if name not in ("seed", "folds", "repeats"))


_SLIDES_LOCAL = ("labels", "tasks", "ignore", "splits", "fold", "mpp")

FORMATS: tuple[SourceFormat, ...] = (
    SourceFormat(
        "digits",
        "`digits`, scikit-learn's handwritten digits",
        lambda source: source == "digits",
        load_digits_source,
        fold_digits_source,
        is_path=False,
    ),
    SourceFormat(
        "npz",
        "an .npz file with X or X_<view>, ptr, y or Y",
        is_npz,
        load_npz_source,
        fold_npz_source,
    ),
    SourceFormat(
        "pack",
        "a directory that `umda-fast pack` made",
        is_pack,
        load_slides_source,
        fold_slides_source,
        local=_SLIDES_LOCAL,
    ),
    SourceFormat(
        "films",
        "a directory with movies.csv and poster_features.npy",
        is_films,
        load_films_source,
        fold_films_source,
        local=("text",),
    ),
    SourceFormat(
        "mmimdb",
        "MM-IMDb's multimodal_imdb.hdf5",
        is_mmimdb,
        load_mmimdb_source,
        fold_mmimdb_source,
    ),
    # The least particular kind of directory, so the last.
    SourceFormat(
        "slides",
        "a directory of bags (.h5 as CLAM, TRIDENT or STAMP write it, .pt, .npz) beside a labels.csv",
        is_slides,
        load_slides_source,
        fold_slides_source,
        local=_SLIDES_LOCAL,
    ),
)


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


def _checked(
    source: str | PathLike[str], format: str | None, options: dict[str, Any], folds: bool
) -> tuple[SourceFormat, list[str]]:
    """The source's kind and its positional arguments, after a look at the options."""
    text = fspath(source)
    known = find_format(text, format)
    understood = known.options(folds)
    for name in options:
        if name not in understood:
            raise DataError(
                f"{text}: option {name!r}: expected one of {', '.join(understood)} for {known.name}"
            )
    return known, [text] if known.is_path else []


def load_source(
    source: str | PathLike[str] = "digits", *, format: str | None = None, seed: int = 0, **options: Any
) -> Splits:
    """Read a source and split it into train, val and test.

    Args:
        source: `digits`, or a path (`./digits` for one of that name); its kind is recognised from the
            content.
        format: name of the kind, instead.
        seed: of splits and draws; the same data on every machine.
        options: of the kind, see `load_digits_source`, `load_npz_source`, `load_slides_source`.

    Raises:
        DataError: naming the source and what in it was wrong, or what is understood.
    """
    known, where = _checked(source, format, options, folds=False)
    return known.load(*where, seed=seed, **options)


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
    known, where = _checked(source, format, options, folds=True)
    return known.fold(*where, folds=folds, repeats=repeats, seed=seed, **options)
