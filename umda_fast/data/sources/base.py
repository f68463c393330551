"""What a kind of source is: options, and the splits and folds made with them.

A source whose bags are all there derives from `BagSource` and only says which bags those are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from umda_fast.data.arrays import IntArray
from umda_fast.data.dataset import BagDataset
from umda_fast.data.files.skipped import Report
from umda_fast.data.labels import ClassWeights
from umda_fast.data.splits import About, Splits, held_out, k_fold, split_bags


class Source(ABC):
    """One kind of source: a frozen dataclass, its fields being the options (`umda_fast.data.options`)."""

    @abstractmethod
    def load_splits(self, path: str, seed: int) -> Splits:
        """The source at `path`, split into train, val and test. Raises DataError."""

    @abstractmethod
    def load_folds(self, path: str, folds: int, repeats: int, seed: int) -> Iterator[Splits]:
        """The source at `path`, one `Splits` for every fold of every repeat. Raises DataError."""


class Folds(NamedTuple):
    """The cross-validation that was asked for."""

    folds: int
    repeats: int


class GivenSplit(NamedTuple):
    """A split that the source itself has: split -> rows of its dataset, which one it is, for the description, and the
    file that says so, for messages."""

    parts: Mapping[str, IntArray]
    how: str
    where: str = ""


@dataclass(frozen=True)
class OpenedSource:
    """All bags of a source, and what decides on their splits.

    Attributes:
        dataset: all bags, in the source's order.
        name: of the source, for a table or a plot.
        summary: what it holds, for `Splits.description`.
        groups: [B], or None; bags of one group are never in different splits or folds.
        given: the source's own split, or for cross-validation its folds; empty: at random, stratified.
        keep: names of tasks that keep their specs, whatever the training labels are.
        fixed: as of `Splits`.
        about: as of `Splits`, of what is known before the bags are split.
        skipped: is told of bags that are left out of a split; None: they stay, as a fault.
    """

    dataset: BagDataset
    name: str
    summary: str
    groups: Sequence[str] | None = None
    given: Sequence[GivenSplit] = ()
    keep: Sequence[str] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)
    about: About = field(default_factory=About)
    skipped: Report | None = None


class BagSource(Source):
    """A source whose bags are all there. Splits are the source's own, or drawn: stratified, groups together.

    Attributes:
        val_share, test_share, class_weights: options that each such source has.
    """

    val_share: float
    test_share: float
    class_weights: ClassWeights

    @abstractmethod
    def open(self, path: str, folds: Folds | None) -> OpenedSource:
        """The bags at `path`, to be split once (`folds` None) or for a cross-validation. Raises DataError."""

    def describe(self, opened: OpenedSource, how: str) -> str:
        """`Splits.description`: what the source holds and how it was split."""
        return f"{opened.summary}; {how}"

    def load_splits(self, path: str, seed: int) -> Splits:
        opened = self.open(path, None)
        if opened.given:
            return self._as_given(opened, opened.given[0], seed)
        shares = {"train": 1.0 - self.val_share - self.test_share, "val": self.val_share, "test": self.test_share}
        return self._splits(opened, split_bags(opened.dataset, shares, seed, opened.groups), self._at_random(opened))

    def load_folds(self, path: str, folds: int, repeats: int, seed: int) -> Iterator[Splits]:
        opened = self.open(path, Folds(folds, repeats))
        for number, given in enumerate(opened.given):
            yield self._as_given(opened, given, seed + number)
        for cut in [] if opened.given else k_fold(opened.dataset, folds, repeats, seed, opened.groups):
            # Its own stream for every fold, or all folds would break ties alike.
            stream = seed + folds * cut.repeat + cut.fold
            inner = held_out(opened.dataset, cut.train, self.val_share, stream, opened.groups)
            how = self._at_random(opened, f"fold {cut.fold} of {folds}, repeat {cut.repeat}")
            yield self._splits(opened, {**inner, "test": cut.test}, how)

    def _at_random(self, opened: OpenedSource, how: str = "split at random") -> str:
        return how if opened.groups is None else f"{how} by patient"

    def _as_given(self, opened: OpenedSource, given: GivenSplit, seed: int) -> Splits:
        """Split as the source says, with bags for validation taken out of train where there are none."""
        parts, faults = _apart(opened, given)
        if not len(parts["val"]) and len(parts["train"]):
            parts = {**parts, **held_out(opened.dataset, parts["train"], self.val_share, seed, opened.groups)}
        return self._splits(opened, parts, given.how, faults)

    def _splits(
        self, opened: OpenedSource, parts: Mapping[str, IntArray], how: str, faults: Sequence[str] = ()
    ) -> Splits:
        whole = opened.dataset.with_groups(opened.groups)
        return Splits(
            opened.name,
            self.describe(opened, how),
            train=whole,
            val=whole,
            test=whole,
            whole=whole,
            fixed=opened.fixed,
            about=replace(opened.about, faults=[*faults, *opened.about.faults]),
            groups=opened.groups,
            given=bool(opened.given),
            class_weights=self.class_weights,
            keep=opened.keep,
        ).divided(parts)


def _apart(opened: OpenedSource, given: GivenSplit) -> tuple[Mapping[str, IntArray], list[str]]:
    """Faults of a split that has bags of one patient on both sides; or, where such bags are left out, the parts
    without those that would be trained or chosen on: a patient of the test split is in no other."""
    parts, groups = given.parts, opened.groups
    if groups is None:
        return parts, []
    found: dict[str, list[str]] = {}
    for split in ("test", "val", "train"):
        for group in dict.fromkeys(groups[row] for row in parts[split]):
            found.setdefault(group, []).append(split)
    shared = [(group, splits) for group, splits in found.items() if len(splits) > 1]
    more = f" ({len(shared)} of {len(found)} are in several)" if len(shared) > 1 else ""
    lines = [
        f"{given.where or opened.dataset.name}: {group}: expected in one split, got {' and '.join(splits[::-1])}{more}"
        for group, splits in shared
    ]
    if opened.skipped is None:
        return parts, lines
    for line in lines:
        opened.skipped(f"{line}; left out of all but the last")
    kept = {
        split: np.array([row for row in rows if found[groups[row]][0] == split], dtype=np.int64)
        for split, rows in parts.items()
    }
    return kept, []
