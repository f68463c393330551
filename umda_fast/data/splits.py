"""Stratified splits for several tasks at once, and k-fold cross-validation.

Method: iterative stratification (Sechidis, Tsoumakas, Vlahavas 2011, "On the stratification of multi-label data"): the
rarest label first, every one of its bags to the part that still lacks most of that label. It serves any mixture of
tasks with missing labels; for one binary task it is plain stratification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.columns import ColumnUse
from umda_fast.data.dataset import BagDataset
from umda_fast.data.draws import Stream, generator, permutation
from umda_fast.data.labels import ClassWeights, fit_tasks
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec
from umda_fast.tasks import kind_of

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Fold:
    """One fold of a cross-validation: which bags train and which test, int64 indices in ascending order."""

    repeat: int
    fold: int
    train: IntArray
    test: IntArray


def stratify(
    indicators: npt.NDArray[np.bool_], shares: Sequence[float], rng: np.random.Generator
) -> IntArray:
    """Assign rows to parts so that every part has its share of the rows and of every indicator.

    Args:
        indicators: bool [n, L], which labels a row has.
        shares: of the parts, non-negative, summing to 1; a part with share 0 stays empty.
        rng: breaks ties.

    Returns:
        The part of every row, int64 [n].
    """
    n, labels = indicators.shape
    share = np.asarray(shares, dtype=np.float64)
    part = np.full(n, -1, dtype=np.int64)
    lacking = share * n  # rows every part still lacks, [P]
    lacking_label = share[:, None] * indicators.sum(axis=0)  # and of every label, [P, L]
    order = permutation(rng, n)
    shuffled = indicators[order]

    def assign(rows: IntArray, demand: FloatArray) -> None:
        for row in rows:
            # Most in demand first, then the part that lacks most rows, then at random. Rounded: demands are
            # sums of products, and equal ones may differ in the last bits.
            keys = (rng.random(len(share)), lacking.round(6), demand.round(6), share > 0)
            chosen = int(np.lexsort(keys)[-1])
            part[order[row]] = chosen
            lacking[chosen] -= 1.0
            lacking_label[chosen, shuffled[row]] -= 1.0

    left = np.ones(n, dtype=np.bool_)
    for _ in range(labels):
        counts = shuffled[left].sum(axis=0)
        if not counts.any():
            break
        rarest = int(np.where(counts > 0, counts, n + 1).argmin())
        rows = np.flatnonzero(left & shuffled[:, rarest])
        assign(rows, lacking_label[:, rarest])
        left[rows] = False
    assign(np.flatnonzero(left), lacking)
    return part


def indicators_of(
    tasks: Sequence[TaskSpec], labels: Mapping[str, FloatArray], bags: int
) -> npt.NDArray[np.bool_]:
    """What a split should balance, bool [B, L]: classes, positives, quartiles of a regression.

    A row has none of a task's indicators where its label is missing.
    """
    columns: list[npt.NDArray[np.bool_]] = []
    for task in tasks:
        columns.extend(kind_of(task).strata(task, labels[task.name]))
    return np.stack(columns, axis=1) if columns else np.zeros((bags, 0), dtype=np.bool_)


def _assign(
    dataset: BagDataset, shares: Sequence[float], groups: Sequence[str] | None, rng: np.random.Generator
) -> IntArray:
    """The part of every bag; bags of one group, for example of one patient, go to the same part."""
    indicators = indicators_of(dataset.tasks, dataset.labels, len(dataset))
    if groups is None:
        return _none_empty(stratify(indicators, shares, rng), shares)
    if len(groups) != len(dataset):
        raise DataError(
            f"{dataset.name}: groups: expected {len(dataset)}, one for each bag, got {len(groups)}"
        )
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    together = np.zeros((int(group.max(initial=-1)) + 1, indicators.shape[1]), dtype=np.bool_)
    np.logical_or.at(together, group, indicators)
    return _none_empty(stratify(together, shares, rng), shares)[group]


def _none_empty(part: IntArray, shares: Sequence[float]) -> IntArray:
    """`part` with a row for every part that has a share, where there are as many rows as such parts.

    Stratifying few rows by many labels may leave a small part without any; the largest part gives up its last row.
    """
    wanted = [index for index, share in enumerate(shares) if share > 0.0]
    part = part.copy()
    for index in wanted if len(part) >= len(wanted) else []:
        if not (part == index).any():
            counts = np.bincount(part, minlength=len(shares))
            part[np.flatnonzero(part == counts.argmax())[-1]] = index
    return part


def split_bags(
    dataset: BagDataset,
    shares: Mapping[str, float],
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> dict[str, IntArray]:
    """Split bags at random, stratified by all tasks.

    Args:
        dataset: the bags.
        shares: part -> share of the bags, summing to 1.
        seed: non-negative; the same split on every machine.
        groups: [B]; bags of one group stay together.

    Returns:
        Part -> int64 indices in ascending order.

    Raises:
        DataError: shares that are negative or do not sum to 1, `groups` of another length.
    """
    values = list(shares.values())
    if any(not 0.0 <= value <= 1.0 for value in values) or abs(sum(values) - 1.0) > 1e-9:
        raise DataError(f"{dataset.name}: shares: expected numbers in 0..1 that sum to 1, got {dict(shares)}")
    part = _assign(dataset, values, groups, generator(Stream.SPLIT, seed))
    return {name: np.flatnonzero(part == index) for index, name in enumerate(shares)}


def held_out(
    dataset: BagDataset, rows: IntArray, val_share: float, seed: int, groups: Sequence[str] | None = None
) -> dict[str, IntArray]:
    """Bags for validation taken out of `rows`: {"train": ..., "val": ...}, indices into `dataset`."""
    within = None if groups is None else [groups[row] for row in rows]
    parts = split_bags(dataset.subset(rows), {"train": 1.0 - val_share, "val": val_share}, seed, within)
    return {split: rows[part] for split, part in parts.items()}


def parts_of(said: Sequence[str]) -> dict[str, IntArray]:
    """Split -> indices in ascending order of the bags that say so; [B] names of splits, blank or other: in none."""
    names = np.asarray(said)
    return {split: np.flatnonzero(names == split) for split in SPLITS}


def check_folds(where: str, folds: int, repeats: int, units: int) -> None:
    """Raise DataError unless `units` things can be cut into `folds`."""
    if not 2 <= folds <= units:
        raise DataError(f"{where}: folds: expected 2 to {units}, got {folds}")
    if repeats < 1:
        raise DataError(f"{where}: repeats: expected at least 1, got {repeats}")


def k_fold(
    dataset: BagDataset,
    folds: int = 10,
    repeats: int = 1,
    seed: int = 0,
    groups: Sequence[str] | None = None,
) -> list[Fold]:
    """Stratified k-fold cross-validation, `repeats` times with new folds.

    Every bag is in the test part once in each repeat.

    Args:
        dataset: the bags.
        folds: at least 2, at most as many as bags (or groups).
        repeats: at least 1.
        seed: non-negative; the same folds on every machine.
        groups: [B]; bags of one group are never on both sides.

    Raises:
        DataError: folds or repeats out of range, `groups` of another length.
    """
    check_folds(dataset.name, folds, repeats, len(dataset) if groups is None else len(set(groups)))
    result = []
    for repeat in range(repeats):
        rng = generator(Stream.FOLD, seed, repeat)
        part = _assign(dataset, [1.0 / folds] * folds, groups, rng)
        result += [
            Fold(repeat, fold, train=np.flatnonzero(part != fold), test=np.flatnonzero(part == fold))
            for fold in range(folds)
        ]
    return result


@dataclass(frozen=True)
class About:
    """How a source was understood.

    Attributes:
        columns: of its table of labels.
        patients: split -> how many; None where nothing says whose the bags are.
        faults: what a training must not go on with, worst first, one line each.
        notes: what was guessed, one line each.
        doubts: what may be wrong with that, one line each.
    """

    columns: Sequence[ColumnUse] = ()
    patients: Mapping[str, int] | None = None
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()
    doubts: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class Splits(Mapping[str, BagDataset]):
    """A source, split: `splits.train` or `splits["train"]`, the same for `val` and `test`; any may be empty.

    Attributes:
        name: of the source, for a table or a plot.
        description: one sentence on what it holds.
        train, val, test: share views and tasks; regressions are standardised by the training labels.
        whole: all bags, in the source's order.
        fixed: options that a run keeps beside those it was given, so that its source is read alike later.
        about: how the source was understood.
        groups: the patient (or another group that is never divided) of every bag of `whole`; None: there are none.
        given: whether the source itself says this split.
        drawn: whether the bags are drawn anew for every seed, not read.
        class_weights, keep: how specs are fitted to training labels, arguments of `fitted`.
    """

    name: str
    description: str
    train: BagDataset
    val: BagDataset
    test: BagDataset
    whole: BagDataset
    fixed: Mapping[str, Any] = field(default_factory=dict)
    about: About = field(default_factory=About)
    groups: Sequence[str] | None = None
    given: bool = False
    drawn: bool = False
    class_weights: ClassWeights = None
    keep: Sequence[str] = ()

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        return self.train.views

    @property
    def tasks(self) -> tuple[TaskSpec, ...]:
        return self.train.tasks

    @property
    def skipped(self) -> tuple[str, ...]:
        """As of `BagDataset.skipped`."""
        return self.whole.skipped

    def __getitem__(self, split: str) -> BagDataset:
        if split not in SPLITS:
            raise KeyError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        dataset: BagDataset = getattr(self, split)
        return dataset

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)

    def check(self) -> None:
        """Raise DataError if the source is nothing to train on (`About.faults`)."""
        if self.about.faults:
            raise DataError(self.about.faults[0])

    def divided(self, parts: Mapping[str, IntArray]) -> Splits:
        """The same bags divided otherwise: split -> rows of `whole`, in the order in which they are to be; specs are
        fitted to the new training labels."""
        whole = self.whole
        train, val, test = (
            whole.subset(parts.get(split, np.zeros(0, np.int64)), f"{whole.name} ({split})") for split in SPLITS
        )
        groups = self.groups
        patients = groups and {split: len({groups[row] for row in rows.tolist()}) for split, rows in parts.items()}
        about = replace(self.about, patients=patients or None)
        return replace(self, train=train, val=val, test=test, about=about).fitted(self.class_weights, self.keep)

    def fitted(self, class_weights: ClassWeights = None, keep: Sequence[str] = ()) -> Splits:
        """The same splits with task specs fitted to the training labels, but for the tasks in `keep`."""
        if not len(self.train):  # nothing to fit to: bags that are only predicted, or measured
            return self
        fitted = fit_tasks(self.tasks, self.train.labels, class_weights)
        tasks = [old if old.name in keep else new for old, new in zip(self.tasks, fitted, strict=True)]
        return replace(
            self,
            train=self.train.with_tasks(tasks),
            val=self.val.with_tasks(tasks),
            test=self.test.with_tasks(tasks),
            whole=self.whole.with_tasks(tasks),
        )
