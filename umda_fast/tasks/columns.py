"""Labels as people write them: numbers, texts, classes by name; missing as NaN or blank."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.errors import DataError

__all__ = [
    "as_numbers",
    "as_texts",
    "by_name",
    "distinct_texts",
    "expect_numbers",
    "number_texts",
    "parse_number",
    "some_text",
]

FloatArray = npt.NDArray[np.float64]

# As a person or a program writes a number: no leading zero (0140 is a name), no `_`, no more digits than a float64
# holds. Programs write exponents with a sign or after a point (1e-05, 2.5e6); 1e1 is a name.
_WHOLE = r"(?:0|[1-9][0-9]{0,14})"
_PLAIN = re.compile(
    rf"[+-]?(?:{_WHOLE}(?:[eE][+-][0-9]+)?|(?:{_WHOLE}\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf|infinity)",
    re.IGNORECASE,
)
_ANY = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?inf|[+-]?infinity", re.IGNORECASE)


def parse_number(text: str, *, said: bool = False) -> float | None:
    """The number that a text is, or None.

    Args:
        said: whether someone says that it is one: then leading zeros and 1e1 are numbers too.
    """
    return float(text) if (_ANY if said else _PLAIN).fullmatch(text) else None


def as_numbers(where: str, array: npt.NDArray[Any], *, said: bool = False) -> FloatArray | None:
    """The labels as numbers, NaN where missing; None if they are text. `said` as of `parse_number`.

    Raises:
        DataError: an infinite number, or a dtype that is neither.
    """
    if array.dtype.kind in "fiub":
        numbers = array.astype(np.float64)
    elif array.dtype.kind in "OUS":
        parsed = [parse_number(text, said=said) if text else np.nan for text in as_texts(array)]
        if None in parsed:
            return None
        numbers = np.array(parsed, dtype=np.float64)
    else:
        raise DataError(f"{where}: expected numbers or text, got dtype {array.dtype}")
    if np.isinf(numbers).any():
        raise DataError(f"{where}: expected finite numbers, got {numbers[np.isinf(numbers)][0]}")
    return numbers


def expect_numbers(where: str, array: npt.NDArray[Any], what: str) -> FloatArray:
    """The labels as numbers, NaN where missing.

    Raises:
        DataError: text; says that numbers are expected for `what`.
    """
    numbers = as_numbers(where, array, said=True)
    if numbers is None:
        raise DataError(f"{where}: expected numbers for {what}, got text such as {some_text(array)!r}")
    return numbers


def as_texts(array: npt.NDArray[Any]) -> list[str]:
    """The labels as text, blank where missing."""

    def text(value: object) -> str:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ""
        return (value.decode() if isinstance(value, bytes) else str(value)).strip()

    return [text(value) for value in array.tolist()]


def some_text(array: npt.NDArray[Any]) -> str:
    """The first label that is no number."""
    return next(text for text in as_texts(array) if text and parse_number(text, said=True) is None)


def number_texts(numbers: FloatArray) -> list[str]:
    """Whole numbers as text, blank where missing."""
    return ["" if np.isnan(number) else f"{number:.0f}" for number in numbers]


def distinct_texts(texts: Sequence[str]) -> list[str]:
    """The distinct values, in numerical or else alphabetical order."""
    distinct = sorted({text for text in texts if text})
    numbers = {text: parse_number(text) for text in distinct}
    return distinct if None in numbers.values() else sorted(distinct, key=lambda text: numbers[text] or 0.0)


def by_name(classes: Sequence[str], texts: Sequence[str]) -> FloatArray:
    """Position of every label among the classes, NaN where missing."""
    index = {text: float(position) for position, text in enumerate(classes)}
    return np.array([index[text] if text else np.nan for text in texts], dtype=np.float64)
