"""Columns that are no labels: names of things, counts of rows, one value everywhere; and values that need a word."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from umda_fast.data.labels import MAX_CLASSES
from umda_fast.tasks.columns import parse_number

_CALLED_ID = re.compile(
    r"(?:^|.*[\s_.-])(?:id|ids|idx|uuid|guid|barcode|identifier|mrn|accession)|.*[a-z](?:Id|ID|Barcode)", re.DOTALL
)
# Texts that people write where they do not know, and that others mean.
_PERHAPS_MISSING = frozenset(
    (
        *("null", "none", "nil", "unknown", "unk", "missing", "not available", "not reported", "not applicable"),
        *("n.a.", "nd", "n.d.", "?", "??", "-", "--", "\N{EN DASH}", "\N{EM DASH}", ".", ".."),
    )
)
_PERHAPS_NO_NUMBER = frozenset((-1.0, -9.0, -99.0, -999.0, -9999.0))
_NEARLY_ALL = 0.9
_A_GROUP = 5  # bags of one value, of which a class would have more
_SOME_GROUPS = 6


@dataclass(frozen=True)
class Reason:
    """Why a column is no task; `groups`: its values put bags together, as those of patients do."""

    why: str
    groups: bool = False


def no_labels(name: str, texts: Sequence[str]) -> Reason | None:
    """Why a column cannot be labels unless someone says so, or None.

    Args:
        name: of the column.
        texts: its cells of the rows that name a bag, in their order, blank where missing.
    """
    present = [text for text in texts if text]
    if not present:
        return Reason("no value for any bag")
    counts = Counter(present)
    bags, distinct = len(present), len(counts)
    if distinct == 1:
        return Reason(f"the same value everywhere: {present[0]!r}")
    if distinct == 2:
        return None
    many = f"{distinct} different values for {bags} rows, such as {present[0]!r}"
    grouped = distinct < bags
    few = bags < _A_GROUP * distinct  # bags of each
    if _CALLED_ID.fullmatch(name) and few and not _has_fractions(present):
        return Reason(f"called an identifier; {many}", grouped)
    numbers = [parse_number(text) for text in present]
    if None not in numbers:
        if _counts_rows(np.array(numbers, dtype=np.float64)) and few:
            return Reason(f"counts the rows; {many}", grouped)
        codes = all(re.fullmatch("[1-9][0-9]{5,}", text) for text in present) and len(set(map(len, present))) == 1
        if codes and few and distinct >= _SOME_GROUPS:
            return Reason(f"looks like an identifier; {many}", grouped)
        return None
    if distinct > _NEARLY_ALL * bags and not strays(present):
        return Reason(f"looks like an identifier; {many}", grouped)
    forms = {re.sub("[0-9]+", "0", text) for text in counts}
    alike = len(forms) == 1 and "0" in next(iter(forms))
    if (alike and few and distinct >= _SOME_GROUPS) or (2 * bags < _A_GROUP * distinct and distinct > _SOME_GROUPS):
        return None if strays(present) else Reason(f"looks like an identifier; {many}", grouped)
    return None


def are_measured(texts: Sequence[str]) -> bool:
    """Whether the numbers among texts are more than classes would be."""
    numbers = [number for text in texts if (number := parse_number(text)) is not None]
    whole = all(number % 1 == 0 for number in numbers)
    return not whole or len(set(numbers)) > max(2, min(MAX_CLASSES, len(numbers) // 3))


def alike_in_all_but_writing(texts: Iterable[str]) -> list[list[str]]:
    """Groups of different texts that only differ in capitals, blanks or a `.0`."""
    forms: dict[str, list[str]] = {}
    for text in dict.fromkeys(texts):
        if text:
            forms.setdefault(re.sub(r"\s|(?<=\d)\.0+$", "", text.casefold()), []).append(text)
    return [group for group in forms.values() if len(group) > 1]


def strays(texts: Sequence[str]) -> list[str]:
    """The distinct texts among numbers: [] where less than half are numbers, and among codes with leading zeros."""
    present = [text for text in texts if text]
    others = [text for text in present if parse_number(text.replace(",", "."), said=True) is None]
    if 2 * len(others) >= len(present) or any(re.fullmatch("0[0-9]+", text) for text in present):
        return []
    return list(dict.fromkeys(others))


def too_many_classes(texts: Sequence[str]) -> bool:
    """Whether texts are more different ones than classes would be."""
    present = [text for text in texts if text]
    return len(set(present)) > max(2, min(MAX_CLASSES, len(present) // 2))


def perhaps_missing(texts: Sequence[str]) -> list[str]:
    """Those of the texts of a task that may mean that nothing is known: words, one of several, and the one number
    below zero among numbers that are not."""
    distinct = list(dict.fromkeys(text for text in texts if text))
    numbers = {text: number for text in distinct if (number := parse_number(text)) is not None}
    below = [text for text, number in numbers.items() if number < 0]
    one = len(below) == 1 and len(numbers) > 2 and numbers[below[0]] in _PERHAPS_NO_NUMBER
    return [*(text for text in distinct if text.lower() in _PERHAPS_MISSING), *(below if one else [])]


def _has_fractions(texts: Sequence[str]) -> bool:
    return any((number := parse_number(text)) is not None and number % 1 != 0 for text in texts)


def _counts_rows(numbers: np.ndarray[tuple[int], np.dtype[np.float64]]) -> bool:
    """Whether numbers go up one by one along the rows, each standing once or several times."""
    steps = np.diff(numbers)
    return bool(len(np.unique(numbers)) >= _SOME_GROUPS and np.isin(steps, (0.0, 1.0)).all() and numbers[0] in (0, 1))
