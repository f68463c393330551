"""Options of a source: fields of frozen dataclasses, which say name, type, default and meaning once.

`SourceFormat.options` lists them, for messages and for a run's `data.options`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

from umda_fast.errors import DataError

_Value = TypeVar("_Value")


def option(default: _Value, *, folds: bool = True, local: bool = False, path: bool = False) -> _Value:
    """A field that is an option, as a plain default is, and what is special about it.

    Args:
        default: its value if it is not given.
        folds: whether cross-validation has it too.
        local: whether it says something about one source only, such as files beside it; it is not for another.
        path: whether it names a file or a directory.
    """
    value: _Value = field(default=default, metadata={"folds": folds, "local": local, "path": path})
    return value


def option_names(options: Any, folds: bool = False) -> tuple[str, ...]:
    """Names of the options of a dataclass; those of cross-validation only with `folds`."""
    return tuple(item.name for item in fields(options) if item.metadata.get("folds", True) or not folds)


def local_options(options: Any) -> tuple[str, ...]:
    """Names of the options of a dataclass that say something about one source only."""
    return tuple(item.name for item in fields(options) if item.metadata.get("local", False))


def path_options(options: Any) -> tuple[str, ...]:
    """Names of the options of a dataclass that name files or directories."""
    return tuple(item.name for item in fields(options) if item.metadata.get("path", False))


def as_names(value: str | Sequence[str]) -> list[str]:
    """A sequence of names; one name is a sequence of one."""
    return [value] if isinstance(value, str) else [str(name) for name in value]


def some_of(where: str | Path, option: str, names: str | Sequence[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Those of `known` that are named, in the order of `known`; None: all.

    Raises:
        DataError: an unknown name, or none at all.
    """
    chosen = list(known) if names is None else as_names(names)
    strange = [name for name in chosen if name not in known]
    if strange or not chosen:
        got = repr(strange[0]) if strange else "none"
        raise DataError(f"{where}: {option}: expected some of {', '.join(known)}, got {got}")
    return tuple(name for name in known if name in chosen)
