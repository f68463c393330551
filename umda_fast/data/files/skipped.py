"""What becomes of a file that cannot be used: it stops everything, or is left out and listed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from umda_fast.errors import DataError

Report: TypeAlias = Callable[[str], None]
"""Raises DataError with the message, or notes it where bad things are skipped."""


class Skipped:
    """Collects what is skipped; without `skip_bad` the first bad thing is an error."""

    def __init__(self, skip_bad: bool) -> None:
        self.skip_bad = skip_bad
        self.lines: list[str] = []

    def __call__(self, message: str) -> None:
        if not self.skip_bad:
            raise DataError(message)
        self.lines.append(message)
