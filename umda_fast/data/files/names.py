"""Which bag a name in a table means: by the name itself, or by that without folders and suffix."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Protocol

from umda_fast.data.files.readers import SUFFIXES
from umda_fast.errors import DataError

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
        self.names = bags.names
        self._rows: dict[str, list[int]] = {}
        for row, name in enumerate(bags.names):
            for form in _forms(name):
                self._rows.setdefault(form, []).append(row)
        self._absent = {form for bag in bags.absent for form in _forms(bag)}

    def find(self, text: str, missing: list[str]) -> int | None:
        """The bag's index: by its exact name, or else by that without suffix and with as many folders as are needed.

        None if there is no such bag, or if there are several, which is added to `missing`; or if it is not used.
        """
        for form in _forms(text):
            rows = self._rows.get(form, ())
            if len(rows) == 1:
                return rows[0]
            exact = [row for row in rows if self.names[row] == text]
            if exact:
                return exact[0]
        if not self._absent.intersection(_forms(text)):
            missing.append(text)
        return None

    def check_writing(self, where: str, missing: Sequence[str], found: Collection[str]) -> None:
        """Raise DataError for names that mean several bags, or one that is written in another way and not `found`: with
        other leading zeros, `.0`, case, blanks, `-`, `_` or `.`."""
        meant = {text: [self.names[row] for row in self._rows.get(plain_name(text), ())] for text in missing}
        several = [text for text in missing if len(meant[text]) > 1]
        if several:
            these = " or ".join(map(repr, meant[several[0]]))
            raise DataError(
                f"{where}: {several[0]!r} may be {these}; expected names with their folders, as these "
                f"({len(several)} such names)"
            )
        alike = [(text, self._simplified.get(_simplified(plain_name(text)), [])) for text in missing]
        miswritten = [(text, bags[0]) for text, bags in alike if len(bags) == 1 and bags[0] not in found]
        if miswritten:
            some = ", ".join(f"{text!r} for {bag!r}" for text, bag in miswritten[:3])
            raise DataError(
                f"{where}: missing slides: expected names as those of the files, got {some} ({len(miswritten)} such "
                "names); has a program taken them for numbers?"
            )

    def missing_line(self, what: str, missing: Sequence[str]) -> str:
        """Names that are no bag's, beside the nearest that are."""
        have = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        near = [
            f"{text!r} is most like {bag!r}"
            for text in missing[:3]
            for bag in difflib.get_close_matches(plain_name(text), self.names, n=1, cutoff=0.5)
        ]
        return "; ".join([f"{what}: {some_names(missing)}", f"there are {len(self.names)} slides: {have}", *near])

    @functools.cached_property
    def _simplified(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(_simplified(plain_name(name)), []).append(name)
        return found


class BagFiles:
    """The bags of a directory by what a table may call them, or their patients.

    Args:
        folders: name of a bag -> folders in which its files lie.
    """

    def __init__(self, folders: Mapping[str, Iterable[str]]) -> None:
        self._folders = {name: sorted(set(parts)) for name, parts in folders.items()}
        self._forms = {form: name for name in folders for form in _forms(name)}

    def are_named(self, texts: Sequence[str]) -> int:
        """How many of the texts name a bag."""
        return sum(not self._forms.keys().isdisjoint(_forms(text)) for text in texts if text)

    def seem_named(self, texts: Sequence[str]) -> bool:
        """Whether half of the texts, or of all bags, are named by the other."""
        present = {text for text in texts if text}
        named = {self._forms[form] for text in present for form in _forms(text) if form in self._forms}
        return bool(present) and 2 * len(named) >= min(len(present), len(self._folders))

    def seem_grouped(self, texts: Sequence[str]) -> bool:
        """Whether half of the texts, or of all bags, go together, as a patient and his slides do."""
        owners = {text: row for row, text in enumerate(texts) if text}
        found = [row for bag in self._folders if (row := self.owner(bag, owners)) is not None]
        return bool(found) and (2 * len(found) >= len(self._folders) or 2 * len(set(found)) >= len(owners))

    def owner(self, bag: str, owners: Mapping[str, int]) -> int | None:
        """The row of the patient whose slide a bag is: whose name is a folder of its file or, the longest, begins its
        name and is followed by something else than a letter or digit."""
        *folders, stem = bag.split("/")
        for stop in range(len(stem), 0, -1):
            if stem[:stop] in owners and not stem[stop : stop + 1].isalnum():
                return owners[stem[:stop]]
        return next((owners[name] for name in folders or self._folders.get(bag, []) if name in owners), None)


def _forms(name: str) -> list[str]:
    """A name as it is, and without suffix: with all its folders, fewer of them, none."""
    parts = (PureWindowsPath(name) if "\\" in name else PurePosixPath(name)).parts or ("",)
    parts = (*parts[:-1], plain_name(parts[-1]))
    return list(dict.fromkeys([name, *("/".join(parts[start:]) for start in range(len(parts)))]))


def _simplified(name: str) -> str:
    """A name without what programs change when they take it for a number, or people when they copy it."""
    name = re.sub(r"(?<=[0-9])\.0+$", "", name.lower())
    return re.sub(r"[\s_.-]", "", re.sub(r"(?<![0-9])0+(?=[0-9])", "", name))


def some_names(names: Sequence[str]) -> str:
    """The first three and how many more, for messages."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more
