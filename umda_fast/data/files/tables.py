"""Tables as files hold them: a header and rows of texts, and which texts mean that nothing is known."""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from umda_fast.data.files.read_xlsx import sheet_rows
from umda_fast.errors import DataError

SUFFIXES = (".csv", ".tsv", ".xlsx")

# Without case; docs/data.md lists them. What else may mean "not known" (null, None, unknown, -, ?) is also a name.
_MISSING = frozenset(("", "na", "n/a", "nan", "<na>", "#n/a", "'--"))
_ERRORS = frozenset(("#DIV/0!", "#REF!", "#VALUE!", "#NAME?", "#NUM!", "#NULL!"))  # of a spreadsheet's formulas

_DECIMAL = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:\.[0-9]{3})+),[0-9]+")  # 12,5 and 1.234,5
_NO_COMMA = re.compile(r"[+-]?(?:[0-9]+|[0-9]{1,3}(?:\.[0-9]{3})+)(?:[eE][+-]?[0-9]+)?")
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3},[0-9]{3}")


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
        path: of the file.
        header: names of the columns, as many as there are cells in a row; blank: nameless.
        rows: cells without surrounding blanks.
        lines: number of every row in the file, for messages.
        delimiter: between cells; "" in a spreadsheet.
        notes: what had to be chosen to read it, one line each.
    """

    path: Path
    header: list[str]
    rows: list[list[str]]
    lines: list[int]
    delimiter: str = ""
    notes: list[str] = field(default_factory=list)


def known_text(cell: str, missing: Collection[str] = ()) -> str:
    """A cell's text, blank where it says that nothing is known; `missing`: further texts that say so."""
    return "" if cell.lower() in _MISSING or cell in missing else cell


def with_points(table: Table, column: str, texts: Sequence[str]) -> tuple[list[str], str | None]:
    """A column's texts with a decimal point where all are numbers with a decimal comma, and a line that says so.

    Raises:
        DataError: one comma might be that of thousands: 1,234 in a table whose cells commas separate.
    """
    present = [text for text in texts if text]
    decimal = [text for text in present if _DECIMAL.fullmatch(text)]
    if not decimal or not all(_DECIMAL.fullmatch(text) or _NO_COMMA.fullmatch(text) for text in present):
        return list(texts), None
    if table.delimiter == "," and all(_THOUSANDS.fullmatch(text) for text in decimal):
        raise DataError(
            f"{table.path}: column {column!r}: expected numbers as 1234 or 1.234, got {decimal[0]!r}, "
            "which may be either"
        )
    points = [text.replace(".", "").replace(",", ".") if text else "" for text in texts]
    return points, f"column {column!r}: decimal commas, {decimal[0]!r} is {points[list(texts).index(decimal[0])]}"


def read_table(path: Path) -> Table:
    """A .csv, .tsv or .xlsx file. Blank lines, and blank cells to the right of the header, are left out.

    Raises:
        DataError: naming the file and the row. MissingExtraError: a spreadsheet where openpyxl is not installed.
    """
    notes: list[str] = []
    if path.suffix.lower() == ".xlsx":
        delimiter, rows = "", sheet_rows(path, notes)
    else:
        delimiter, rows = _text_rows(path)
    lines = _without_title(rows, notes)
    if not lines:
        raise DataError(f"{path}: expected a header and rows, got an empty file")
    header, width = lines[0][1], len(lines[0][1])
    for number, row in lines[1:]:
        if len(row) < width or any(row[width:]):
            raise DataError(f"{path}: row {number}: expected {width} cells as in the header, got {len(row)}")
        wrong = next((cell for cell in row if cell in _ERRORS), None)
        if wrong is not None:
            name = header[row.index(wrong)]
            raise DataError(f"{path}: row {number}: column {name!r}: expected a value, got {wrong}, a formula's error")
    twice = [name for index, name in enumerate(header) if name and name in header[:index]]
    if twice:
        raise DataError(f"{path}: expected distinct columns, got {twice[0]!r} more than once")
    return Table(
        path,
        header=header,
        rows=[row[:width] for _, row in lines[1:]],
        lines=[number for number, _ in lines[1:]],
        delimiter=delimiter,
        notes=notes,
    )


def _without_title(rows: Sequence[tuple[int, list[str]]], notes: list[str]) -> list[tuple[int, list[str]]]:
    """The rows that are not blank, from the header on: without lines of comments (`# ...`) or a title above it, that is
    a cell by itself before a blank line or a longer one. One line with `#` before as many names is a header."""
    lines = [(number, row) for number, row in rows if any(row)]
    start = 0
    while start + 1 < len(lines) and lines[start][1][0].startswith("#"):
        start += 1
    if start == 1 and len(lines[0][1]) == len(lines[1][1]) and any(lines[0][1][1:]):
        number, (first, *rest) = lines[0]
        return [(number, [first.removeprefix("#").strip(), *rest]), *lines[1:]]
    while start + 1 < len(lines):
        (number, row), (following, longer) = lines[start : start + 2]
        alone = bool(row[0]) and not any(row[1:]) and any(longer[1:])
        if not alone or (following == number + 1 and len(row) > 1):
            break
        start += 1
    if start:
        notes.append(f"the table begins with its row {lines[start][0]}, below a title or comments")
    return lines[start:]


def _text_rows(path: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    try:
        content = path.read_bytes()
        wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if wide else "utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: expected a readable table in UTF-8, got: {error}") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: expected a readable table in UTF-8, got another encoding in row {line}; in a spreadsheet "
            "program: save as CSV UTF-8"
        ) from error
    head = text.lstrip().partition("\n")[0].rstrip("\r")
    said = re.fullmatch(r"sep=(.)", head)  # a line that spreadsheets write for each other
    if said:
        delimiter, text = said[1], text.lstrip()[len(head) :]
    elif path.suffix.lower() == ".tsv" and "\t" in head:
        delimiter = "\t"
    else:
        delimiter = max(",;\t|", key=head.count)
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter, strict=True)
    rows: list[tuple[int, list[str]]] = []
    try:
        for row in reader:
            rows.append((reader.line_num, [cell.strip() for cell in row]))  # noqa: PERF401 - line_num moves
    except csv.Error as error:
        raise DataError(f"{path}: expected a table of comma- or tab-separated values, got: {error}") from error
    return delimiter, rows
