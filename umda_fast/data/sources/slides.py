"""A directory of bags, one file each, as CLAM, TRIDENT and STAMP leave it, or made by hand, or packed.

Which files are looked for is at the head of `umda_fast.data.files.layouts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.dataset import BagDataset
from umda_fast.data.files.directory import OpenedSlides, open_slides
from umda_fast.data.files.index import READ_TIMEOUT, Matching, SlideIndex
from umda_fast.data.files.table_columns import read_metadata, read_tasks
from umda_fast.data.labels import ClassWeights, KindOverrides, fixed_tasks, label_columns
from umda_fast.data.splits import SPLITS, Splits, held_out, k_fold, split_bags
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec


class SlideStore:
    """Bags of an index with their labels; `skipped` grows as long as its source is being opened."""

    def __init__(
        self, index: SlideIndex, tasks: Sequence[TaskSpec], labels: Mapping[str, FloatArray], skipped: list[str]
    ) -> None:
        self._index = index
        self._tasks = tuple(tasks)
        self.names: Sequence[str] = index.names
        self.sizes = index.sizes
        self.labels = labels
        self.positions = index.positions
        self.skipped = skipped

    def load(self, index: int) -> Bag:
        views, mask, coords = self._index.read(index)
        return Bag(self.names[index], views, mask, bag_labels(self._tasks, self.labels, index), coords)


@dataclass(frozen=True)
class _Source:
    """A source opened and labelled: all bags, and what decides on its splits."""

    opened: OpenedSlides
    dataset: BagDataset
    groups: list[str] | None
    notes: list[str]
    kinds: KindOverrides | None
    class_weights: ClassWeights

    def splits(self, parts: Mapping[str, IntArray], how: str) -> Splits:
        whole, path = self.dataset, self.opened.path
        datasets = {split: whole.subset(rows, f"{path} ({split})") for split, rows in parts.items()}
        unit = whole.positions.unit if whole.positions is not None else None
        positions = {"um": "positions in micrometres", "px": "positions in level-0 pixels", None: "no positions"}[unit]
        description = (
            f"{len(whole)} bags ({self.opened.index.tool}), {int(whole.sizes.sum())} instances, "
            f"{len(whole.views)} view(s), {len(whole.tasks)} task(s); {'; '.join([positions, *self.notes, how])}"
        )
        name = Path(path).resolve().name
        splits = Splits(
            name,
            description,
            train=datasets["train"],
            val=datasets["val"],
            test=datasets["test"],
            whole=whole,
        )
        return splits.fitted(self.class_weights, keep=fixed_tasks(self.kinds))

    def with_val(self, parts: dict[str, IntArray], val_share: float, seed: int) -> dict[str, IntArray]:
        """`parts`, with bags for validation taken out of train where there are none."""
        if len(parts["val"]):
            return parts
        return parts | held_out(self.dataset, parts["train"], val_share, seed, self.groups)


def _label(opened: OpenedSlides, kinds: KindOverrides | None, class_weights: ClassWeights) -> _Source:
    index, table, rows = opened.index, opened.table, opened.rows
    notes = list(index.notes)
    groups = None
    if table is not None:
        specs, columns = read_tasks(table, rows, kinds)
        bare = sum(row is None for row in rows)
        notes += [f"labels from {table.path.name}", *([f"{bare} bags not in it"] if bare else [])]
        if table.patients is not None:
            groups = [
                f"patient {table.patients[row]}" if row is not None and table.patients[row] else f"slide {bag}"
                for bag, row in zip(index.names, rows, strict=True)
            ]
    else:
        specs, columns = label_columns({}, len(rows), kinds, where=opened.path)
        notes.append("no table of labels (labels.csv)")
    dataset = BagDataset(SlideStore(index, specs, columns, opened.skipped.lines), index.views, specs, opened.path)
    if table is not None:
        dataset = dataset.with_metadata(read_metadata(table, rows))
    return _Source(opened, dataset, groups, notes, kinds, class_weights)


def _split_column(opened: OpenedSlides) -> dict[str, IntArray] | None:
    """The parts that the table's column `split` says, if it has one; bags not in the table are in none."""
    table = opened.table
    if table is None or table.splits is None:
        return None
    for name, text in zip(table.names, table.splits, strict=True):
        if text not in SPLITS:
            raise DataError(f"{table.path}: column split: expected {', '.join(SPLITS)}, got {text!r} for {name!r}")
    said = np.array(["" if row is None else table.splits[row] for row in opened.rows])
    return {split: np.flatnonzero(said == split) for split in SPLITS}


def load_slides_source(
    path: str,
    *,
    seed: int = 0,
    kinds: KindOverrides | None = None,
    labels: str | None = None,
    tasks: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    metadata: Sequence[str] = (),
    splits: str | None = None,
    fold: int = 0,
    val_share: float = 0.15,
    test_share: float = 0.2,
    class_weights: ClassWeights = None,
    views: Sequence[str] | None = None,
    mpp: float | None = None,
    match: Matching = "coords",
    tolerance: float = 1.0,
    skip_bad: bool = False,
    read_timeout: float = READ_TIMEOUT,
) -> Splits:
    """A directory of bags with a table of labels.

    The split is that of CLAM's split files, or else of the table's column `split`, or else at random, stratified,
    with all bags of a patient on one side.

    Args:
        path: the directory, or one that `umda-fast pack` made.
        seed: of the split.
        kinds: as in `BagDataset.from_arrays`.
        labels: the table, .csv or .tsv; None looks for labels.csv or labels.tsv in the directory, then beside it.
        tasks, ignore: columns of the table that are tasks, or that are not.
        metadata: columns of numbers that are known of a bag (an age, a magnification) and condition the model.
        splits: a directory with CLAM's splits_0.csv, ..., or one such file; None looks for `splits_0.csv` in the
            directory, in its `splits`, then in `splits` beside it.
        fold: which of the split files.
        val_share, test_share: of the bags.
        class_weights: "balanced" or None.
        views: which views, in this order; None: all, by name.
        mpp: micrometres per level-0 pixel of all slides; None takes the files' or the table's column mpp.
        match: how rows of several views are brought together: by coords, or by position in the file.
        tolerance: in micrometres, of coordinates that are not whole pixels.
        skip_bad: leave out what is bad and list it in `Splits.skipped`, instead of stopping. Reads every file once.
        read_timeout: seconds of processor time that the first reading of one file may take before it counts as bad:
            the library does not come back from some corrupt HDF5 files. (On Linux; not of a packed directory.)

    Raises:
        DataError: naming the file, what was expected and what came.
    """
    opened = open_slides(
        path,
        labels=labels,
        tasks=tasks,
        ignore=ignore,
        metadata=metadata,
        splits=splits,
        views=views,
        mpp=mpp,
        match=match,
        tolerance=tolerance,
        skip_bad=skip_bad,
        read_timeout=read_timeout,
    )
    files = opened.split_files
    if files and not 0 <= fold < len(files):
        raise DataError(f"{files[0].parent}: fold: expected 0 to {len(files) - 1}, got {fold}")
    source = _label(opened, kinds, class_weights)
    said = _split_column(opened)
    if files:
        parts = source.with_val(opened.read_splits(fold)[0], val_share, seed)
        how = f"split by {files[fold].name}"
    elif said is not None:
        parts, how = source.with_val(said, val_share, seed), "split by the column split"
    else:
        shares = {"train": 1.0 - val_share - test_share, "val": val_share, "test": test_share}
        parts = split_bags(source.dataset, shares, seed, source.groups)
        how = "split at random" + (" by patient" if source.groups is not None else "")
    return source.splits(parts, how)


def fold_slides_source(
    path: str,
    *,
    folds: int,
    repeats: int = 1,
    seed: int = 0,
    kinds: KindOverrides | None = None,
    labels: str | None = None,
    tasks: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    metadata: Sequence[str] = (),
    splits: str | None = None,
    val_share: float = 0.15,
    class_weights: ClassWeights = None,
    views: Sequence[str] | None = None,
    mpp: float | None = None,
    match: Matching = "coords",
    tolerance: float = 1.0,
    skip_bad: bool = False,
    read_timeout: float = READ_TIMEOUT,
) -> Iterator[Splits]:
    """Cross-validation: CLAM's split files as they are, or else stratified folds, bags of a patient together.

    `val_share` of every fold's other bags validate. Arguments and errors as of `load_slides_source`.
    """
    opened = open_slides(
        path,
        labels=labels,
        tasks=tasks,
        ignore=ignore,
        metadata=metadata,
        splits=splits,
        views=views,
        mpp=mpp,
        match=match,
        tolerance=tolerance,
        skip_bad=skip_bad,
        read_timeout=read_timeout,
    )
    files = opened.split_files
    if files and (folds, repeats) != (len(files), 1):
        raise DataError(
            f"{files[0].parent}: expected {len(files)} folds and 1 repeat, one for each split file, "
            f"got {folds} and {repeats}"
        )
    source = _label(opened, kinds, class_weights)
    if files:
        for fold, parts in enumerate(opened.read_splits()):
            yield source.splits(source.with_val(parts, val_share, seed + fold), f"split by {files[fold].name}")
        return
    for cut in k_fold(source.dataset, folds, repeats, seed, source.groups):
        # Its own stream for every fold, or all folds would break ties alike.
        inner = held_out(source.dataset, cut.train, val_share, seed + folds * cut.repeat + cut.fold, source.groups)
        how = f"fold {cut.fold} of {folds}, repeat {cut.repeat}" + (" by patient" if source.groups else "")
        yield source.splits({**inner, "test": cut.test}, how)
