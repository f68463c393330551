"""Split files of CLAM: `splits_0.csv`, `splits_1.csv`, ..., each with columns train, val and test of names; and the
splits.csv of a run, with columns bag and split."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from umda_fast.data.arrays import IntArray
from umda_fast.data.files.names import Bags, NameIndex
from umda_fast.data.files.skipped import Report
from umda_fast.data.files.tables import known_text, read_table
from umda_fast.data.splits import SPLITS
from umda_fast.errors import DataError


def split_files(directory: Path) -> list[Path]:
    """CLAM's splits_0.csv, splits_1.csv, ... of a directory, by number."""
    found = {
        int(match.group(1)): path
        for path in directory.glob("splits_*.csv")
        if (match := re.fullmatch(r"splits_(\d+)\.csv", path.name))
    }
    if sorted(found) != list(range(len(found))):
        raise DataError(f"{directory}: expected splits_0.csv, splits_1.csv, ... without a gap, got {sorted(found)}")
    return [found[number] for number in sorted(found)]


def named_in(path: Path) -> list[tuple[str, str]]:
    """Split and slide of every entry of one of CLAM's split files, columns train, val and test, each with names of
    slides; or of a run's, a line a slide.

    Raises:
        DataError: columns missing.
    """
    table = read_table(path)
    header, rows = table.header, table.rows
    if {"bag", "split"} <= set(header):
        bag_column, split_column = header.index("bag"), header.index("split")
        named = [(row[split_column], row[bag_column]) for row in rows if row[split_column] in SPLITS]
    elif {"train", "test"} <= set(header):
        named = [(split, row[header.index(split)]) for split in SPLITS if split in header for row in rows]
    else:
        raise DataError(f"{path}: expected columns train, val and test, got {', '.join(map(repr, header))}")
    return [(split, text) for split, text in named if known_text(text)]


def read_split(path: Path, bags: Bags, report: Report) -> dict[str, IntArray]:
    """The parts of one of CLAM's split files, or of a run's.

    Returns:
        Split -> int64 indices into the bags' names, in ascending order. A slide that the file does not name is in none.

    Raises:
        DataError: naming the file: columns missing, a slide in two splits, names that are written in another way than
            those of the bags; unless `report` skips it, a missing slide.
    """
    index = NameIndex(bags)
    part: dict[int, str] = {}
    missing: list[str] = []
    for split, text in named_in(path):
        bag = index.find(text, missing)
        if bag is not None and part.setdefault(bag, split) != split:
            raise DataError(f"{path}: slide {text!r}: expected in one split, got {part[bag]} and {split}")
    if missing:
        index.check_writing(str(path), missing, {bags.names[bag] for bag in part})
        report(index.missing_line(f"{path}: missing slides", missing))
    return {
        split: np.array(sorted(bag for bag, where in part.items() if where == split), dtype=np.int64)
        for split in SPLITS
    }
