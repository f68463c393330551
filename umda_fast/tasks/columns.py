"""Labels as people write them: numbers, texts, classes by name; missing as NaN or blank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.errors import DataError

__all__ = ["as_numbers", "as_texts", "by_name", "distinct_texts", "expect_numbers", "number_texts", "some_text"]

FloatArray = npt.NDArray[np.float64]


def as_numbers(where: str, array: npt.NDArray[Any]) -> FloatArray | None:
    """The labels as numbers, NaN where missing; None if they are text.

    Raises:
        DataError: an infinite number, or a dtype that is neither.
    """
    if array.dtype.kind in "fiub":
        numbers = array.astype(np.float64)
    elif array.dtype.kind in "OUS":
        try:
            numbers = np.array([float(text) if text else np.nan for text in as_texts(array)], dtype=np.float64)
        except ValueError:
            return None
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
    numbers = as_numbers(where, array)
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

    def is_number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    return next(text for text in as_texts(array) if text and not is_number(text))


def number_texts(numbers: FloatArray) -> list[str]:
    """Whole numbers as text, blank where missing."""
    return ["" if np.isnan(number) else f"{number:.0f}" for number in numbers]


def distinct_texts(texts: Sequence[str]) -> list[str]:
    """The distinct values, in numerical or else alphabetical order."""
    distinct = list({text for text in texts if text})
    try:
        distinct.sort(key=float)
    except ValueError:
        distinct.sort()
    return distinct


def by_name(classes: Sequence[str], texts: Sequence[str]) -> FloatArray:
    """Position of every label among the classes, NaN where missing."""
    index = {text: float(position) for position, text in enumerate(classes)}
    return np.array([index[text] if text else np.nan for text in texts], dtype=np.float64)
