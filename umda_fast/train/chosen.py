"""Which bags of some data a trained model is used on, or may be measured on, by what its run recorded."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from umda_fast.data import SPLITS, BagDataset, Splits
from umda_fast.data.arrays import IntArray
from umda_fast.data.content import same_content
from umda_fast.data.files.names import some_names
from umda_fast.errors import DataError
from umda_fast.runtime.config import RunConfig
from umda_fast.train.loading import Run
from umda_fast.train.split_record import NEW, SEEN, UNUSED, MatchedBags, SplitRecord, patients_of

__all__ = ["ALL", "check_same_split", "chosen_rows", "data_seed", "tell", "tell_excluded"]

ALL = "all"
"""The split that is no split: all bags; of those that are measured, all but those that decided on the weights."""


def tell(run: Run, text: str) -> None:
    """A line on standard error, once for a run that was read back; none for an empty text."""
    if text and text not in run.told:
        run.told.append(text)
        print(f"{run.directory}: {text}", file=sys.stderr)


def data_seed(config: RunConfig) -> int:
    """The seed of splits and generated bags."""
    return config.seed if config.data.seed is None else config.data.seed


def check_same_split(run: Run, split: str | None = "test") -> None:
    """Bags that one member is measured on must not be among those that another was trained on.

    Raises:
        DataError: the bags that the members recorded for `split` differ; or, where one recorded none, their data, or
            how it is split.
    """
    records = [(member, member.record) for member in run.members]
    if all(record is not None for _, record in records):
        if split in SPLITS:
            for member, record in records[1:]:
                _check_same_bags(split, *records[0], member, record)
        return

    def how(config: RunConfig) -> dict[str, Any]:
        data = config.data
        return {"source": data.source, "options": dict(data.options), "format": data.format, "seed": data_seed(config)}

    expected = how(run.config)
    for member in run.members:
        for name, found in how(member.config).items():
            if found != expected[name]:
                raise DataError(
                    f"{member.directory}: data.{name}: expected {expected[name]!r} as in {run.directory}, for one "
                    f"split of the data (train every member with the same --set data.seed=N), got {found!r}"
                )


def _check_same_bags(
    split: str, first: Run, expected: SplitRecord | None, member: Run, found: SplitRecord | None
) -> None:
    assert expected is not None
    assert found is not None
    ours, theirs = (
        {bag.name: bag.content for bag in record.bags if bag.split == split} for record in (expected, found)
    )
    both = ours.keys() & theirs.keys()
    other = {name for name in both if ours[name] != theirs[name] and not same_content(ours[name], theirs[name])}
    strange = sorted((ours.keys() ^ theirs.keys()) | other)
    if strange:
        raise DataError(
            f"{member.directory}: {split} bags: expected those of {first.directory}, for one split of the data (train "
            f"every member with the same --set data.seed=N); {len(strange)} differ: {some_names(strange)}"
        )


def chosen_rows(
    run: Run, loaded: Splits, whole: BagDataset, split: str | None, *, own: bool, measured: bool
) -> IntArray:
    """Rows of the bags that are meant by `split`.

    Args:
        loaded: the data, divided as it would be today.
        whole: all of it as the model takes it.
        split: train, val or test: as the run recorded them, or, of other data, as that data says itself; `new`: bags
            that the run did not have; `all` or None: all.
        own: whether the data is what the run was trained on, as it is today.
        measured: whether a figure comes of it: then no bag that decided on the weights is in it, but where its split
            is asked for.

    Raises:
        DataError: there is no such split; the bags of the run cannot be had again.
    """
    if split not in (None, ALL, NEW, *SPLITS):
        raise DataError(f"{loaded.name}: expected a split among {', '.join((*SPLITS, ALL, NEW))}, got {split!r}")
    if split in (None, ALL) and not measured:
        return np.arange(len(whole))
    records = [member.record for member in run.each if member.record is not None]
    if len(records) < len(run.each):
        return _recomputed(run, loaded, split, own)
    wanted = ("test", UNUSED, NEW) if split in (None, ALL) else (str(split),)
    found = [record.match_bags(whole, run.config.data, own=own, wanted=wanted) for record in records]
    _check_drawn(run, loaded, own, found)
    _tell_changes(run, whole, own, records, found)
    overlap = any(place is not None for matched in found for place in matched.record)
    if not own and split in SPLITS and (loaded.given or not overlap):
        rows = _own_part(run, loaded, whole, str(split), found)
    else:
        rows = found[0].rows(*wanted)
        agreed = [all(other.splits[row] in wanted for other in found) for row in rows.tolist()]
        rows = rows[np.array(agreed, dtype=np.bool_)]
        if split in (None, ALL):
            _tell_seen(run, whole, found)
    if measured and (own or overlap):
        rows = _without_seen_patients(run, loaded, whole, rows, records, found)
    return rows


def _recomputed(run: Run, loaded: Splits, split: str | None, own: bool) -> IntArray:
    """What a run of before, which has no record, is used on: the split as it would be made today."""
    if split == NEW:
        raise DataError(f"{run.directory}: has no splits.csv, so it is not known which bags are new")
    if own:
        tell(run, "has no splits.csv (an earlier version made it): the split is computed again from the data of today")
    if split not in (None, ALL):
        return _rows_of(loaded, loaded[str(split)])
    if not own:
        tell(run, "has no splits.csv: whether bags of this data were trained on cannot be told")
        return np.arange(len(loaded.whole))
    return _rows_of(loaded, loaded["test"])


def _rows_of(loaded: Splits, part: BagDataset) -> IntArray:
    rows = {name: row for row, name in enumerate(loaded.whole.names)}
    return np.array([rows[name] for name in part.names], dtype=np.int64)


def _without_seen_patients(
    run: Run,
    loaded: Splits,
    whole: BagDataset,
    rows: IntArray,
    records: Sequence[SplitRecord],
    found: Sequence[MatchedBags],
) -> IntArray:
    """`rows` less bags in no split of the run whose patients have bags that it was trained or validated on."""
    seen = {bag.patient for record in records for bag in record.bags if bag.split in SEEN and bag.patient}
    patients = patients_of(loaded)
    left_out = np.array(
        [
            found[0].splits[row] in (NEW, UNUSED) and patients.get(whole.names[row]) in seen
            for row in rows.tolist()
        ],
        dtype=np.bool_,
    )
    names = [whole.names[row] for row in rows[left_out].tolist()]
    if names:
        why = "left out, as it was trained or validated on other bags of their patients"
        tell(run, f"{why}: {len(names)} bags: {some_names(names)}")
    return rows[~left_out]


def _own_part(
    run: Run, loaded: Splits, whole: BagDataset, split: str, found: Sequence[MatchedBags]
) -> IntArray:
    """The part that other data than the run's own calls `split`, without bags that the run has seen."""
    if not loaded.given:
        tell(run, f"{loaded.name} does not say how it is split: {split} is drawn at random; --split all takes all")
    rows = _rows_of(loaded, loaded[split])
    seen = [row for row in rows.tolist() if any(matched.splits[row] in SEEN for matched in found)]
    tell_excluded(run, [whole.names[row] for row in seen])
    return np.setdiff1d(rows, np.array(seen, dtype=np.int64))


def _check_drawn(run: Run, loaded: Splits, own: bool, found: Sequence[MatchedBags]) -> None:
    changed = [name for matched in found for name in matched.changed]
    if own and loaded.drawn and changed:
        raise DataError(
            f"{run.directory}: the bags of {loaded.name} that it recorded are not drawn again from its configuration "
            f"(is it a fold?): {some_names(changed)}; its test figures are in metrics.json"
        )


def _tell_changes(
    run: Run, whole: BagDataset, own: bool, records: Sequence[SplitRecord], found: Sequence[MatchedBags]
) -> None:
    if own:
        for member, matched in zip(run.each, found, strict=True):
            changes = matched.describe()
            if changes:
                tell(member, f"since it was trained, of its bags: {changes}")
        return
    seen = {name for record in records for name in record.names(*SEEN)}
    alike = [name for name, place in zip(whole.names, found[0].record, strict=True) if place is None and name in seen]
    if alike:
        tell(
            run,
            f"{len(alike)} bags have names of bags that it was trained or validated on and other features, so they are "
            f"taken for other bags: {some_names(alike)}",
        )


def _tell_seen(run: Run, whole: BagDataset, found: Sequence[MatchedBags]) -> None:
    names = [
        name for row, name in enumerate(whole.names) if any(matched.splits[row] in SEEN for matched in found)
    ]
    tell_excluded(run, names)


def tell_excluded(run: Run, names: Sequence[str]) -> None:
    """Say which bags are in no figure."""
    if names:
        tell(run, f"left out, as it was trained or validated on them: {len(names)} bags: {some_names(names)}")


