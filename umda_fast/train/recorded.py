"""The bags of a run that is gone on with: those that it recorded, whatever the data has become."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from umda_fast.data import SPLITS, BagDataset, Splits
from umda_fast.data.content import same_content
from umda_fast.data.files.names import some_names
from umda_fast.errors import DataError
from umda_fast.runtime.config import DataConfig
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.train.split_record import SplitRecord

__all__ = ["check_recorded", "recorded_splits"]


def check_recorded(run: RunDirectory, datasets: Mapping[str, BagDataset]) -> None:
    """Raise DataError unless `datasets`, which a run is given, have the bags that it recorded, by name or content."""
    if not run.splits.is_file():
        return
    record = SplitRecord.read(run.splits)
    for split, dataset in datasets.items():
        expected = [bag for bag in record.bags if bag.split == split]
        if len(expected) == len(dataset) and all(
            bag.name == name or (content is not None and same_content(bag.content, content))
            for bag, name, content in zip(expected, dataset.names, dataset.contents, strict=True)
        ):
            continue
        strange = sorted({bag.name for bag in expected} ^ {*dataset.names})
        which = f"{len(strange)} differ: {some_names(strange)}" if strange else "they are in another order"
        raise DataError(
            f"{run.path}: {split} bags: expected the {len(expected)} of its splits.csv; {which}; choose another --out"
        )


def recorded_splits(run: RunDirectory, splits: Splits, data: DataConfig) -> Splits:
    """`splits` divided as the run recorded it; what came, went or changed is told on standard error.

    Raises:
        DataError: a bag that it trains or validates on is gone, or holds something else.
    """
    if not run.splits.is_file():
        why = "has no splits.csv (an earlier version began it): its split is computed again"
        print(f"{run.path}: {why}", file=sys.stderr)
        return splits
    record = SplitRecord.read(run.splits)
    found = record.match_bags(splits.whole, data, own=True, wanted=SPLITS)
    deciding = {*record.names("train", "val")}
    _refuse(run, "gone", [bag.name for bag in found.gone if bag.name in deciding])
    _refuse(run, "no longer what they were", [name for name in found.changed if name in deciding])
    changes = found.describe()
    if changes:
        print(f"{run.path}: since it was begun, of its bags: {changes}", file=sys.stderr)
    return splits.divided({split: found.rows(split) for split in SPLITS})


def _refuse(run: RunDirectory, what: str, names: Sequence[str]) -> None:
    if names:
        raise DataError(
            f"{run.path}: cannot be resumed: {len(names)} bags that it trains or validates on are {what}: "
            f"{some_names(names)}"
        )
