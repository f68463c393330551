"""Tables as files hold them: a header and rows of texts, and which texts mean that nothing is known."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from umda_fast.errors import DataError

_MISSING = ("", "na", "n/a", "nan", "<na>", "null")


def known_text(cell: str) -> str:
    """A cell's text, blank where it says that nothing is known."""
    return "" if cell.lower() in _MISSING else cell


def read_rows(path: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a .csv or .tsv file; cells without surrounding blanks.

    Raises:
        DataError: naming the file and the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: expected a readable table in UTF-8, got: {error}") from error
    head = text.partition("\n")[0]
    delimiter = "\t" if path.suffix.lower() == ".tsv" else max(",;\t", key=head.count)
    try:
        rows = [
            [cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
        ]
    except csv.Error as error:
        raise DataError(f"{path}: expected a table of comma- or tab-separated values, got: {error}") from error
    lines = [(number, row) for number, row in enumerate(rows, start=1) if any(row)]
    if not lines:
        raise DataError(f"{path}: expected a header and rows, got an empty file")
    header = lines[0][1]
    for number, row in lines[1:]:
        if len(row) != len(header):
            raise DataError(f"{path}: row {number}: expected {len(header)} cells as in the header, got {len(row)}")
    twice = [name for index, name in enumerate(header) if name in header[:index]]
    if twice:
        raise DataError(f"{path}: expected distinct columns, got {twice[0]!r} more than once")
    return header, [row for _, row in lines[1:]]
