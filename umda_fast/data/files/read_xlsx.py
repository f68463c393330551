"""Cells of a spreadsheet (.xlsx), as the texts that its owner sees."""

from __future__ import annotations

import datetime
import re
from pathlib import Path
from typing import Any

from umda_fast.data.files.header_fields import one_line
from umda_fast.errors import DataError
from umda_fast.extras import require


def sheet_rows(path: Path, notes: list[str]) -> list[tuple[int, list[str]]]:
    """Number and cells of every row of the sheet `labels`, or else of the first that is not empty.

    `notes` is told of other sheets.

    Raises:
        MissingExtraError: openpyxl is not installed.
        DataError: not a spreadsheet; a formula whose value was never computed.
    """
    require(f"{path}: reading it (not so a .csv)", "openpyxl")
    import openpyxl

    try:
        values, formulas = (openpyxl.load_workbook(path, data_only=only) for only in (True, False))
    except Exception as error:  # openpyxl raises what zipfile and its parsers of XML do
        raise DataError(f"{path}: expected a readable .xlsx table, got: {one_line(error)}") from error
    filled = [sheet for sheet in values.worksheets if any(_cells(sheet))]
    if not filled:
        return []
    sheet = next((sheet for sheet in filled if sheet.title.lower() == "labels"), filled[0])
    others = [other.title for other in filled if other is not sheet]
    if others:
        notes.append(f"sheet {sheet.title!r} of {path.name}, not {', '.join(map(repr, others))}")
    for row in formulas[sheet.title].iter_rows():
        for cell in row:
            if cell.data_type == "f" and sheet[cell.coordinate].value is None:
                raise DataError(
                    f"{path}: cell {cell.coordinate}: a formula without a value; open the file in a spreadsheet "
                    "program and save it"
                )
    return list(enumerate(_cells(sheet), start=1))


def _cells(sheet: Any) -> list[list[str]]:
    return [[_text(cell) for cell in row] for row in sheet.iter_rows()]


def _text(cell: Any) -> str:
    value = cell.value
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and re.fullmatch(r"0{2,}", cell.number_format or ""):
        return f"{value:0{len(cell.number_format)}d}"  # 5 shown as 00005
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        value = value.date()
    return str(value).strip()
