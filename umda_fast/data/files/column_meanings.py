"""Which column of a table of labels names the bags, the patients, the split and the pixel size.

By the name of the column, in the words that people and programs use; the bags and the split also by the values.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from umda_fast.data.columns import ColumnUse
from umda_fast.data.splits import SPLITS

# Without case, blanks, `-`, `_` and `.`; the most usual first.
_BAG = ("slideid", "slide", "slidename", "bag", "bagid", "bagname", "filename", "file", "case", "name")
_PATIENT = (
    *("patient", "patientid", "patid", "patientname", "patientnumber", "patientnr", "patientno", "patientbarcode"),
    *("bcrpatientbarcode", "patientuid", "pid", "patientencoded", "caseid", "case", "casesubmitterid"),
    *("casessubmitterid", "submitterid", "subject", "subjectid", "participant", "participantid", "individual"),
    *("individualid", "donor", "donorid", "personid", "mrn"),
)
_SPLIT = ("split",)
_PIXEL_SIZE = ("mpp", "pixelsize")
_FOLD = ("fold", "folds", "foldid", "cvfold", "kfold")

_NAMELESS = re.compile(r"|Unnamed: [0-9]+(_level_[0-9]+|\.[0-9]+)*|\.\.\.[0-9]+|_c[0-9]+", re.IGNORECASE)

_PARTS = {
    **{split: split for split in SPLITS},
    "training": "train",
    "validation": "val",
    "valid": "val",
    "testing": "test",
}


def part_named(text: str) -> str | None:
    """The split that a cell names: `train`, `val` or `test`."""
    return _PARTS.get(text.lower())


def plain_header(name: str) -> str:
    """A column's name without case, blanks, `-`, `_` and `.`."""
    return re.sub(r"[\s_.-]", "", name.lower())


@dataclass(frozen=True)
class Meanings:
    """Columns by what they mean, None where there is none.

    Attributes:
        bag: its column's number, whatever its name.
        patient, split, pixel_size: names of columns.
        by_patient: `bag` names patients, each of one or more bags.
        left: names of columns that may be tasks.
        uses: every column that is none.
        notes: what had to be guessed, one line each.
    """

    bag: int
    patient: str | None
    split: str | None
    pixel_size: str | None
    by_patient: bool
    left: list[str]
    uses: list[ColumnUse] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class KnownBags(Protocol):
    """The bags of a directory, by which a column of their names, or of their patients, is known."""

    def are_named(self, texts: Sequence[str]) -> int:
        """How many of the texts name a bag."""
        ...

    def seem_named(self, texts: Sequence[str]) -> bool:
        """Whether half of the texts, or of all bags, are named by the other."""
        ...

    def seem_grouped(self, texts: Sequence[str]) -> bool:
        """Whether half of the texts, or of all bags, go together, as a patient and his slides do."""
        ...


@dataclass(frozen=True)
class _Columns:
    """A header, the cells of every column, and which columns are taken already or not wanted."""

    header: Sequence[str]
    texts: Sequence[Sequence[str]]
    taken: Collection[str]
    ignore: Collection[str]

    def called(self, words: Sequence[str], but: Collection[str | None] = ()) -> list[str]:
        """Columns that are free and have one of these names, in the order of `words`; all free ones for no words."""
        free = [
            name
            for name in self.header
            if not (_NAMELESS.fullmatch(name) or name in self.taken or name in self.ignore or name in but)
        ]
        return [name for word in words for name in free if plain_header(name) == word] if words else free

    def cells(self, name: str) -> Sequence[str]:
        return self.texts[self.header.index(name)]


def find_meanings(
    header: Sequence[str],
    texts: Sequence[Sequence[str]],
    bags: KnownBags,
    *,
    taken: Collection[str] = (),
    ignore: Collection[str] = (),
    patient: str | None = None,
) -> Meanings:
    """Find out what the columns of a table mean.

    Args:
        header: names of the columns.
        texts: cells of every column, blank where missing.
        bags: those that the table may name.
        taken: columns that someone says are something else.
        ignore: columns to leave out.
        patient: the column of patients, if someone says.
    """
    columns = _Columns(header, texts, taken, ignore)
    bag, why, by_patient = _bag_column(columns, bags, patient)
    uses = {header[bag]: ColumnUse(header[bag] or f"column {bag + 1}", "bag", why or "its name")}
    notes = [] if why is None else [f"bags are named by the column {header[bag] or bag + 1!r}, {why}"]

    def find(words: Sequence[str], use: str) -> str | None:
        name = next(iter(columns.called(words, but=uses)), None)
        if name is not None:
            uses[name] = ColumnUse(name, use, "its name")
        return name

    if patient is not None and not by_patient:
        uses[patient] = ColumnUse(patient, "patient", "asked for")
    elif not by_patient:
        patient = find(_PATIENT, "patient")
    split = find(_SPLIT, "split")
    pixel_size = find(_PIXEL_SIZE, "pixel size")
    left = []
    for number, name in enumerate(header):
        if name in taken or (name in uses and name):
            continue
        parts = {part_named(text) for text in texts[number] if text}
        if name not in ignore and None not in parts and len(parts) > 1 and "train" in parts and split is None:
            split = name
            uses[name] = ColumnUse(name, "split", "its values")
            notes.append(f"column {name!r} is the split, by its values")
            continue
        reason = "asked for" if name in ignore else _reason_by_name(name, by_patient, split)
        if reason is None:
            left.append(name)
        elif number != bag:
            uses[name or f"column {number + 1}"] = ColumnUse(name or f"column {number + 1}", "left out", reason)
    patient = None if by_patient else patient
    return Meanings(bag, patient, split, pixel_size, by_patient, left, list(uses.values()), notes)


def _reason_by_name(name: str, by_patient: bool, split: str | None) -> str | None:
    """Why a column with such a name is no task, or None."""
    plain = plain_header(name)
    if _NAMELESS.fullmatch(name):
        return "it has no name"
    if plain in _PATIENT:
        return f"another name of the {'bag' if by_patient else 'patient'}"
    if plain in _BAG and plain != "name":
        return "another name of the bag"
    if plain in _FOLD:
        return "folds are those of split files, or made"
    if plain in _SPLIT and name != split:
        return "another split"
    return None


def _bag_column(columns: _Columns, bags: KnownBags, patient: str | None) -> tuple[int, str | None, bool]:
    """The number of the column that names the bags, why if not by its name, and whether it names patients."""
    header, texts = columns.header, columns.texts
    usual = header.index(next(iter([*columns.called(_BAG, but=(patient,)), *columns.called(()), *header])))
    if bags.are_named(texts[usual]):
        return usual, None, False
    best = max(range(len(header)), key=lambda number: bags.are_named(texts[number]))
    if bags.seem_named(texts[best]):
        return best, "whose values are their names", False
    for name in [*([patient] if patient else []), *columns.called(_PATIENT), header[usual]]:
        if bags.seem_grouped(columns.cells(name)):
            return header.index(name), "a row for each patient, whose slides have that name in front or as folder", True
    return usual, None, False
