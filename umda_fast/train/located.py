"""Where the data of a run is: as it was named, where it was when the run began, or in the same place beside the run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from umda_fast.data import FORMATS
from umda_fast.data.sources.digits import is_digits
from umda_fast.errors import DataError
from umda_fast.runtime.config import DataConfig

__all__ = ["located", "recorded_paths", "same_place"]


def recorded_paths(data: DataConfig, run: Path) -> dict[str, list[str]]:
    """What `DataConfig.paths` of a run in the directory `run` is to be."""
    return {
        text: [os.path.abspath(text), os.path.relpath(os.path.realpath(text), os.path.realpath(run))]
        for _, text in _named(data)
        if os.path.exists(text)
    }


def _named(data: DataConfig) -> Iterator[tuple[str | None, str]]:
    """The source (None) and the options of it that name files, with what they name."""
    if is_digits(data.source):
        return
    yield None, data.source
    for name in sorted({name for known in FORMATS for name in known.paths}):
        if isinstance(data.options.get(name), str):
            yield name, data.options[name]


def _candidates(data: DataConfig, run: Path, text: str) -> list[str]:
    absolute, beside = data.paths.get(text) or [text, text]
    places = [absolute, os.path.normpath(run / beside), text, os.path.normpath(run / text)]
    return list(dict.fromkeys(places))


def located(
    data: DataConfig, run: Path, advice: str = "say with --data where the bags are now", *, options_only: bool = False
) -> DataConfig:
    """`data` of the run in the directory `run` with what it names where it is now.

    Tried in this order: where it was when the run began, the same place as seen from the run directory (both may have
    been moved), as it was named from the working directory, and from the run directory. Says on standard error if it
    is not the first. `advice` is what to do if it is in none; with `options_only` the source does not matter.

    Raises:
        DataError: the source is in none of them.
    """
    source, options = data.source, dict(data.options)
    for name, text in _named(data):
        if name is None and options_only:
            continue
        places = _candidates(data, run, text)
        found = next((place for place in places if os.path.exists(place)), None)
        if found is None and name is None:
            recorded = repr(text) if places[0] == text else f"{text!r} ({places[0]})"
            raise DataError(f"{run}: its data, {recorded}, is not there; {advice}")
        if found is None:  # a name that is no path, or the source says what is wrong
            continue
        if found != places[0]:
            print(f"{run}: {text}: taken from {found} (it was {places[0]})", file=sys.stderr)
        if name is None:
            source = found
        else:
            options[name] = found
    return replace(data, source=source, options=options)


def same_place(data: DataConfig, run: Path, source: str) -> bool:
    """Whether `source` is the data of the run in the directory `run`."""
    if not os.path.exists(source):
        return source == data.source
    places = _candidates(data, run, data.source)
    found = next((place for place in places if os.path.exists(place)), None)
    return found is not None and os.path.realpath(found) == os.path.realpath(source)
