"""Which bag a name in a table means: by the name itself, or by that without folders and suffix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Protocol

from umda_fast.data.files.readers import SUFFIXES

_SLIDE_SUFFIXES = (
    *SUFFIXES,
    *(".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".czi", ".bif", ".vms", ".vmu", ".svslide", ".qptiff"),
    *(".isyntax", ".dcm", ".png", ".jpg", ".jpeg"),
)


def plain_name(text: str) -> str:
    """A bag's name out of what a table calls it: without folders and without the suffix of a file or slide."""
    name = PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name
    suffix = PurePosixPath(name).suffix
    return name.removesuffix(suffix) if suffix.lower() in _SLIDE_SUFFIXES else name


class Bags(Protocol):
    """Bags that a table may mean: `names`, and `absent` ones, which are there and not used."""

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def absent(self) -> Iterable[str]: ...


class NameIndex:
    """Finds the bag that a table means."""

    def __init__(self, bags: Bags) -> None:
        self._rows = {name: row for row, name in enumerate(bags.names)}
        self._plain: dict[str, int | None] = {}
        for row, name in enumerate(bags.names):
            short = plain_name(name)
            self._plain[short] = None if short in self._plain else row
        self._absent = {name for bag in bags.absent for name in (bag, plain_name(bag))}

    def find(self, text: str, missing: list[str]) -> int | None:
        """The bag's index, by its exact name or else by that without folders and suffix.

        None if there is no such bag, which is added to `missing`, or if it is not used.
        """
        row = self._rows.get(text)
        row = self._plain.get(plain_name(text)) if row is None else row
        if row is None and text not in self._absent and plain_name(text) not in self._absent:
            missing.append(text)
        return row


def some_names(names: Sequence[str]) -> str:
    """The first three and how many more, for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
