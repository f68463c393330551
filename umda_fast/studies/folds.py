"""folds.csv of a cross-validation: which bags each of its runs trains, chooses and is tested on, written before the
first one and used again when it is gone on with."""

from __future__ import annotations

import csv
import io
import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umda_fast.data import SPLITS, BagDataset, Splits
from umda_fast.data.arrays import IntArray
from umda_fast.data.files.names import some_names
from umda_fast.errors import DataError
from umda_fast.files import write_text
from umda_fast.runtime.config import RunConfig
from umda_fast.runtime.together import one_decides
from umda_fast.sgl.distributed import Processes
from umda_fast.train.data import load_configured_folds
from umda_fast.train.split_record import RecordedBag, SplitRecord, patients_of

__all__ = ["kept_folds"]

_BAGS = "bags"


@dataclass(frozen=True)
class _FoldTable:
    """The bags, in a record where all are of one split, and for every run the split of each, blank where in none."""

    bags: SplitRecord
    runs: Mapping[str, Sequence[str]]

    @classmethod
    def of(
        cls, folds: Sequence[Splits], names: Sequence[str], config: RunConfig, processes: Processes | None
    ) -> _FoldTable:
        whole = folds[0].whole
        found = SplitRecord.of({_BAGS: whole}, config.data, processes, patients_of(folds[0]))
        runs = {}
        for name, fold in zip(names, folds, strict=True):
            split_of = {bag: split for split, part in fold.items() for bag in part.names}
            runs[name] = [split_of.get(bag, "") for bag in whole.names]
        return cls(found, runs)

    def write(self, path: Path) -> None:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["bag", "patient", "content", *self.runs])
        for bag, *splits in zip(self.bags.bags, *self.runs.values(), strict=True):
            writer.writerow([bag.name, bag.patient, bag.content, *splits])
        write_text(path, text.getvalue())

    @classmethod
    def read(cls, path: Path) -> _FoldTable:
        try:
            with open(path, newline="", encoding="utf-8-sig") as stream:
                header, *rows = csv.reader(stream)
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{path}: expected a readable table in UTF-8, got: {error}") from None
        if header[:3] != ["bag", "patient", "content"] or any(len(row) != len(header) for row in rows):
            raise DataError(f"{path}: expected the columns bag, patient, content and one for every run")
        bags = tuple(RecordedBag(name, _BAGS, content, patient) for name, patient, content, *_ in rows)
        columns = zip(*(row[3:] for row in rows), strict=True)
        return cls(SplitRecord(bags), dict(zip(header[3:], columns, strict=True)))

    def rows(self, whole: BagDataset, config: RunConfig, place: Path) -> IntArray:
        """Where in `whole` the recorded bags are today.

        Raises:
            DataError: some are gone or hold something else.
        """
        found = self.bags.match_bags(whole, config.data, own=True, wanted=(_BAGS,))
        for what, names in (("gone", [bag.name for bag in found.gone]), ("no longer what they were", found.changed)):
            if names:
                raise DataError(
                    f"{place}: {len(names)} bags of its folds are {what}: {some_names(names)}; put them back, or "
                    "choose another --out"
                )
        changes = found.describe()
        if changes:
            print(f"{place}: since it was begun, of its bags: {changes}", file=sys.stderr)
        return found.rows(_BAGS)


def kept_folds(
    config: RunConfig, directory: Path, folds: int, repeats: int, processes: Processes | None = None
) -> Iterable[Mapping[str, BagDataset]]:
    """The folds of the configured source, repeat by repeat: those of the directory's folds.csv, which is written where
    there is none.

    Raises:
        DataError: from the source, or too many folds; a recorded bag is gone.
    """
    path = directory / "folds.csv"
    there = one_decides(processes, path.is_file)
    found = load_configured_folds(config, folds, repeats)
    first = next(found)
    if first.drawn:  # from what comes with the package, by the seed alone
        return itertools.chain([first], found)
    names = [f"repeat-{repeat}-fold-{fold}" for repeat in range(repeats) for fold in range(folds)]
    if there:
        table = _FoldTable.read(path)
        if list(table.runs) != names:
            raise DataError(f"{path}: expected a column for each of {len(names)} runs, got {len(table.runs)}")
        rows = table.rows(first.whole, config, directory)
        return (first.divided(_parts(rows, splits)) for splits in table.runs.values())
    whole = [first, *found]
    if one_decides(processes, lambda: any(directory.glob("**/config.yaml"))):
        print(f"{directory}: has no folds.csv (an earlier version began it): its folds are made again", file=sys.stderr)
        return whole
    table = _FoldTable.of(whole, names, config, processes)
    if processes is None or processes.rank == 0:
        table.write(path)
    return whole


def _parts(rows: IntArray, splits: Sequence[str]) -> dict[str, IntArray]:
    said = np.asarray(splits)
    return {split: rows[said == split] for split in SPLITS}
