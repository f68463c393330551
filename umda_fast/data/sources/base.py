"""What a kind of source is: options, and the splits and folds made with them.

A source whose bags are all there derives from `BagSource` and only says which bags those are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from umda_fast.data.arrays import IntArray
from umda_fast.data.dataset import BagDataset
from umda_fast.data.labels import ClassWeights
from umda_fast.data.splits import Splits, held_out, k_fold, split_bags


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
    """A split that the source itself has: split -> rows of its dataset, and which one it is, for the description."""

    parts: Mapping[str, IntArray]
    how: str


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
    """

    dataset: BagDataset
    name: str
    summary: str
    groups: Sequence[str] | None = None
    given: Sequence[GivenSplit] = ()
    keep: Sequence[str] = ()
    fixed: Mapping[str, Any] = field(default_factory=dict)


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
            parts, how = opened.given[0]
            return self._splits(opened, self._with_val(opened, parts, seed), how)
        shares = {"train": 1.0 - self.val_share - self.test_share, "val": self.val_share, "test": self.test_share}
        return self._splits(opened, split_bags(opened.dataset, shares, seed, opened.groups), self._at_random(opened))

    def load_folds(self, path: str, folds: int, repeats: int, seed: int) -> Iterator[Splits]:
        opened = self.open(path, Folds(folds, repeats))
        for number, (parts, how) in enumerate(opened.given):
            yield self._splits(opened, self._with_val(opened, parts, seed + number), how)
        for cut in [] if opened.given else k_fold(opened.dataset, folds, repeats, seed, opened.groups):
            # Its own stream for every fold, or all folds would break ties alike.
            stream = seed + folds * cut.repeat + cut.fold
            inner = held_out(opened.dataset, cut.train, self.val_share, stream, opened.groups)
            how = self._at_random(opened, f"fold {cut.fold} of {folds}, repeat {cut.repeat}")
            yield self._splits(opened, {**inner, "test": cut.test}, how)

    def _at_random(self, opened: OpenedSource, how: str = "split at random") -> str:
        return how if opened.groups is None else f"{how} by patient"

    def _with_val(self, opened: OpenedSource, parts: Mapping[str, IntArray], seed: int) -> Mapping[str, IntArray]:
        """`parts`, with bags for validation taken out of train where there are none."""
        if len(parts["val"]):
            return parts
        return {**parts, **held_out(opened.dataset, parts["train"], self.val_share, seed, opened.groups)}

    def _splits(self, opened: OpenedSource, parts: Mapping[str, IntArray], how: str) -> Splits:
        whole = opened.dataset
        datasets = {split: whole.subset(rows, f"{whole.name} ({split})") for split, rows in parts.items()}
        splits = Splits(opened.name, self.describe(opened, how), **datasets, whole=whole, fixed=opened.fixed)
        return splits.fitted(self.class_weights, keep=opened.keep)
