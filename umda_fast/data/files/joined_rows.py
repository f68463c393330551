"""A table with a row for each slide as one with a row for each bag of several slides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from umda_fast.data.columns import ColumnUse
from umda_fast.data.files.labels_table import LabelTable
from umda_fast.data.files.table_columns import read_tasks
from umda_fast.data.labels import KindOverrides, ignore_label
from umda_fast.errors import DataError
from umda_fast.tasks.columns import parse_number


@dataclass(frozen=True)
class PatientBags:
    """Which slides make up which bag.

    Attributes:
        names: of the bags: the patient, or the slide where nobody says whose it is.
        members: rows of the slides of every bag.
        patients: of every bag, blank for a slide of nobody.
    """

    names: list[str]
    members: list[list[int]]
    patients: list[str]

    @property
    def bag_of(self) -> dict[int, int]:
        """The bag of every slide."""
        return {slide: bag for bag, slides in enumerate(self.members) for slide in slides}


def bags_of_patients(where: str, slides: Sequence[str], patients: Sequence[str]) -> PatientBags:
    """A bag for every patient, in the order of their first slides, and one for each slide of nobody.

    Args:
        where: the table, for messages.
        slides: names of the slides.
        patients: of every slide, blank where not known.

    Raises:
        DataError: a slide of nobody has the name of a patient.
    """
    found: dict[tuple[str, str], list[int]] = {}
    for row, (slide, patient) in enumerate(zip(slides, patients, strict=True)):
        found.setdefault(("patient", patient) if patient else ("slide", slide), []).append(row)
    for kind, name in found:
        if kind == "slide" and ("patient", name) in found:
            raise DataError(f"{where}: slide {name!r} has no patient and the name of one; say whose it is")
    return PatientBags(
        [name for _, name in found], list(found.values()), [name if kind == "patient" else "" for kind, name in found]
    )


def join_rows(
    table: LabelTable, rows: Sequence[int | None], bags: PatientBags, kinds: KindOverrides | None, asked: Sequence[str]
) -> tuple[LabelTable, list[int | None]]:
    """The table with a row for each bag, and for every bag its row, None where the table has none of its slides.

    What is known of one slide of a patient is known of him. A column that is no task for the slides, and differs
    between those of a patient, is left out.

    Args:
        rows: of every slide its row or None.
        kinds, asked: as of `read_tasks`.

    Raises:
        DataError: a task or metadata that differs between slides of one patient, naming both and the column.
    """
    columns = {name: _joined(texts, rows, bags) for name, texts in table.columns.items()}
    metadata = {name: _joined(texts, rows, bags) for name, texts in table.metadata.items()}
    uses = list(table.uses)
    dropped: dict[str, str] = {}
    if any(clash for _, clash in columns.values()):
        slides = read_tasks(table, rows, kinds, asked)
        dropped = {use.name: use.why for use in slides.uses if use.use == "left out"}
    kept = {}
    for name, (texts, clash) in columns.items():
        if clash and name in dropped:
            uses.append(ColumnUse(name, "left out", dropped[name]))
            continue
        if clash:
            ignore_label(kinds, DataError(_differs(table, name, *clash, "leave it out with data.options.ignore")))
        kept[name] = texts
    for name, (_, clash) in metadata.items():
        if clash:
            raise DataError(_differs(table, name, *clash, "leave it out of data.options.metadata"))
    joined = replace(
        table,
        names=bags.names,
        columns=kept,
        metadata={name: texts for name, (texts, _) in metadata.items()},
        patients=bags.patients,
        splits=None,
        pixel_sizes=None,
        uses=uses,
    )
    there = [any(rows[slide] is not None for slide in members) for members in bags.members]
    return joined, [bag if known else None for bag, known in enumerate(there)]


def _joined(
    texts: Sequence[str], rows: Sequence[int | None], bags: PatientBags
) -> tuple[list[str], tuple[str, str, str] | None]:
    """The text of every bag, blank where its slides differ, and the first bag and two texts where they do."""
    found, clash = [], None
    for name, members in zip(bags.names, bags.members, strict=True):
        said = [texts[row] for slide in members if (row := rows[slide]) is not None and texts[row]]
        other = next((text for text in said if not _same(text, said[0])), None)
        if other is not None and clash is None:
            clash = name, said[0], other
        found.append(said[0] if said and other is None else "")
    return found, clash


def _same(one: str, other: str) -> bool:
    numbers = parse_number(one), parse_number(other)
    return one == other or (None not in numbers and numbers[0] == numbers[1])


def _differs(table: LabelTable, name: str, patient: str, one: str, other: str, else_: str) -> str:
    return (
        f"{table.where}: column {name!r}: expected one value for all slides of patient {patient!r} (bag=patient), got "
        f"{one!r} and {other!r}; {else_}, or take slides as bags: --set data.options.bag=slide"
    )
