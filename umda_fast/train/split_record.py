"""splits.csv of a run: the bags it was trained, validated and tested on, by name and content, and which bags of today's
data those are."""

from __future__ import annotations

import csv
import io
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from umda_fast.data import BagDataset, Splits
from umda_fast.data.arrays import IntArray
from umda_fast.data.content import batch_contents, same_content
from umda_fast.data.files.names import some_names
from umda_fast.errors import DataError
from umda_fast.files import write_text
from umda_fast.runtime.config import DataConfig
from umda_fast.runtime.progress import ProgressReport
from umda_fast.score.inference import batches_in_order
from umda_fast.sgl.distributed import Processes

__all__ = ["NEW", "SEEN", "TRUNK", "UNUSED", "MatchedBags", "RecordedBag", "SplitRecord", "bag_contents", "patients_of"]

NEW = "new"
"""The part of the bags that the run knew nothing of."""
UNUSED = "none"
"""Bags that were there when the run began, in none of its splits."""
TRUNK = "trunk"
"""In a run made by `adapt`: bags that the trunk was trained or validated on and its heads were not."""
SEEN = ("train", TRUNK, "val")
"""Splits whose bags decided on the weights: never in a test figure."""
_COLUMNS = ("bag", "patient", "split", "content")
_STRICTEST = (*SEEN, "test")


@dataclass(frozen=True)
class RecordedBag:
    """A line of splits.csv; `patient` may be blank, `content` is that of `umda_fast.data.content`."""

    name: str
    split: str
    content: str = ""
    patient: str = ""


@dataclass(frozen=True)
class MatchedBags:
    """Which bags of some data a record's are.

    Attributes:
        record: of every bag the recorded bag that it is, None for a new one.
        extra: rows of bags that are copies of a bag that is there already.
        renamed: (name now, name then). changed: names of bags that hold something else now. gone: recorded bags that
            are no more.
    """

    record: list[int | None]
    splits: list[str]
    extra: frozenset[int] = frozenset()
    renamed: tuple[tuple[str, str], ...] = ()
    changed: tuple[str, ...] = ()
    gone: tuple[RecordedBag, ...] = ()
    new: tuple[str, ...] = ()

    def rows(self, *splits: str) -> IntArray:
        """The bags of these splits, each once: those of the record in its order, then new ones."""
        chosen = [row for row, split in enumerate(self.splits) if split in splits and row not in self.extra]
        known = [(place, row) for row in chosen if (place := self.record[row]) is not None]
        new = [row for row in chosen if self.record[row] is None]
        return np.array([*(row for _, row in sorted(known)), *new], dtype=np.int64)

    def describe(self, what_of_new: str = "in no split") -> str:
        """What came, went or changed, in one line; blank if nothing did."""
        parts = []
        if self.new:
            parts.append(f"{len(self.new)} new, {what_of_new}: {some_names(self.new)}")
        if self.gone:
            parts.append(f"{len(self.gone)} gone: {some_names([f'{bag.name} ({bag.split})' for bag in self.gone])}")
        if self.renamed:
            names = some_names([f"{now} (was {then})" for now, then in self.renamed])
            parts.append(f"{len(self.renamed)} under another name: {names}")
        if self.changed:
            parts.append(f"{len(self.changed)} with other features: {some_names(self.changed)}")
        if self.extra:
            parts.append(f"{len(self.extra)} twice, counted once")
        return "; ".join(parts)


@dataclass(frozen=True)
class SplitRecord:
    """The bags of a run by split, in the order in which it has them."""

    bags: tuple[RecordedBag, ...]
    _named: dict[str, list[int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        named: dict[str, list[int]] = defaultdict(list)
        for place, bag in enumerate(self.bags):
            named[bag.name].append(place)
        object.__setattr__(self, "_named", dict(named))

    @classmethod
    def of(
        cls,
        datasets: Mapping[str, BagDataset],
        data: DataConfig,
        processes: Processes | None = None,
        patients: Mapping[str, str] | None = None,
        progress: bool = False,
    ) -> SplitRecord:
        """Of the bags that a run is about to use; reads every bag whose content is not known yet, of several processes
        each its share. `patients` by bag; None takes those that `datasets` know."""
        patients = patients_of(datasets) if patients is None else patients
        parts = dict(datasets)
        if isinstance(datasets, Splits):
            used = {name for dataset in parts.values() for name in dataset.names}
            whole = datasets.whole
            parts[UNUSED] = whole.subset([row for row, name in enumerate(whole.names) if name not in used])
        return cls(
            tuple(
                RecordedBag(name, split, content, patients.get(name, ""))
                for split, dataset in parts.items()
                for name, content in zip(dataset.names, bag_contents(dataset, data, processes, progress), strict=True)
            )
        )

    def names(self, *splits: str) -> list[str]:
        """Names of the bags of these splits."""
        return [bag.name for bag in self.bags if bag.split in splits]

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all; without the column `patient` if no bag has one."""
        columns = [name for name in _COLUMNS if name != "patient" or any(bag.patient for bag in self.bags)]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for bag in self.bags:
            cells = {"bag": bag.name, "patient": bag.patient, "split": bag.split, "content": bag.content}
            writer.writerow([cells[name] for name in columns])
        write_text(path, text.getvalue())

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> SplitRecord:
        """Read what `write` wrote, or a table by hand with the columns bag and split.

        Raises:
            DataError: naming the file and the line.
        """
        try:
            with open(path, newline="", encoding="utf-8-sig") as stream:
                rows = list(csv.DictReader(stream))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: expected a readable table in UTF-8, got: {error}") from None
        bags = []
        for number, row in enumerate(rows, start=2):
            name, split = row.get("bag"), row.get("split")
            if not name or not split:
                raise DataError(f"{path}: line {number}: expected a bag and its split, got {name!r}, {split!r}")
            bags.append(RecordedBag(name, split, row.get("content") or "", row.get("patient") or ""))
        if not bags:
            raise DataError(f"{path}: expected the columns bag and split and a line for every bag, got none")
        return cls(tuple(bags))

    def match(
        self, names: Sequence[str], contents: Callable[[IntArray], list[str]], *, own: bool, wanted: Iterable[str]
    ) -> MatchedBags:
        """Which of these bags are the record's.

        A bag is known by its content, or else, in the run's own data, by its name. Where it is like several, the one
        that was trained on counts.

        Args:
            names: of the bags, distinct.
            contents: of the bags at some rows; called for those only that matter for `wanted`, unless one of these is
                missing or has changed.
            own: whether this is the data that the run had, as it is today.
            wanted: splits whose bags are to be used.
        """
        wanted = set(wanted)
        rows = np.arange(len(names))
        if own:
            by_name = [self._strictest(self._named.get(name, ())) for name in names]
            first = [row for row, place in enumerate(by_name) if place is None or self.bags[place].split in wanted]
            rows = np.array(first, dtype=np.int64)
        found: list[str | None] = [None] * len(names)

        def look(at: IntArray) -> None:
            for row, content in zip(at.tolist(), contents(at), strict=True):
                found[row] = content

        look(rows)
        matched = self._matched(names, found, own)
        if own and (matched.changed or any(bag.split in wanted for bag in matched.gone)):
            # A bag that is looked for may be under the name of one that is not.
            look(np.array([row for row in range(len(names)) if found[row] is None], dtype=np.int64))
            matched = self._matched(names, found, own)
        return matched

    def match_bags(self, whole: BagDataset, data: DataConfig, *, own: bool, wanted: Iterable[str]) -> MatchedBags:
        """`match` of the bags of a dataset, which are read as far as needed."""

        def contents(rows: IntArray) -> list[str]:
            return bag_contents(whole.subset(rows), data)

        return self.match(whole.names, contents, own=own, wanted=wanted)

    def _exact(self, name: str, content: str | None, own: bool) -> int | None:
        """The recorded bag of that name and content; the name alone where one of the contents is not known."""
        places = self._named.get(name, ())
        if content is None or not content.strip(";"):
            return self._strictest(places)
        exact = next((p for p in places if same_content(self.bags[p].content, content)), None)
        if exact is None and own:
            exact = self._strictest([p for p in places if not self.bags[p].content.strip(";")])
        return exact

    def _strictest(self, places: Sequence[int]) -> int | None:
        order = {split: rank for rank, split in enumerate(_STRICTEST)}
        return min(places, key=lambda place: order.get(self.bags[place].split, len(order)), default=None)

    def _matched(self, names: Sequence[str], found: Sequence[str | None], own: bool) -> MatchedBags:
        by_view: dict[tuple[int, str], list[int]] = defaultdict(list)
        for place, bag in enumerate(self.bags):
            for view, word in enumerate(bag.content.split(";")):
                if word:
                    by_view[view, word].append(place)

        def alike(content: str) -> list[int]:
            near = {place for key in enumerate(content.split(";")) for place in by_view.get(key, ())}
            return sorted(place for place in near if same_content(self.bags[place].content, content))

        record: list[int | None] = [None] * len(names)
        renamed: list[tuple[str, str]] = []
        changed: list[str] = []
        unknown: list[int] = []
        for row, (name, content) in enumerate(zip(names, found, strict=True)):
            empty = content is None or not content.strip(";")
            then = self._exact(name, content, own) if own or not empty else None
            if then is None and not empty:
                then = self._strictest(alike(str(content)))
                if then is None:
                    unknown.append(row)
                elif self.bags[then].name != name:
                    renamed.append((name, self.bags[then].name))
            record[row] = then
        known = {place for place in record if place is not None}
        for row in unknown if own else ():
            # Other features under a name whose bag is nowhere else: the same bag, made anew.
            left = [place for place in self._named.get(names[row], ()) if place not in known]
            record[row] = self._strictest(left)
            changed += [names[row]] if left else []
        # A copy of a bag counts once: the one that has kept its name, else the first.
        taken: set[int] = set()
        extra = set()
        both = [(place, row) for row, place in enumerate(record) if place is not None]
        for place, row in sorted(both, key=lambda pair: self.bags[pair[0]].name != names[pair[1]]):
            if place in taken:
                extra.add(row)
            taken.add(place)
        gone = [bag for place, bag in enumerate(self.bags) if place not in taken and bag.split not in (TRUNK, UNUSED)]
        return MatchedBags(
            record,
            [NEW if place is None else self.bags[place].split for place in record],
            frozenset(extra),
            tuple(renamed),
            tuple(changed),
            tuple(gone) if own else (),
            tuple(name for name, place in zip(names, record, strict=True) if place is None) if own else (),
        )


def patients_of(datasets: Mapping[str, BagDataset]) -> dict[str, str]:
    """The patient of every bag, by the bag's name, as far as is known."""
    if not isinstance(datasets, Splits) or datasets.groups is None:
        return {}
    return dict(zip(datasets.whole.names, map(_patient, datasets.groups), strict=True))


def _patient(group: str) -> str:
    """The patient as the table calls him; a slide that has none is a group of its own."""
    kind, _, name = group.partition(" ")
    return {"patient": name, "slide": ""}.get(kind, group)


def bag_contents(
    dataset: BagDataset, data: DataConfig, processes: Processes | None = None, progress: bool = False
) -> list[str]:
    """The contents of all bags of `dataset`, in its order; those known already are not read again."""
    lacking = np.flatnonzero([content is None for content in dataset.contents])
    if len(lacking):
        part = dataset.subset(lacking)
        found: dict[str, str] = {}
        with ProgressReport("read", enabled=progress) as report:
            for batch in batches_in_order(part, data, processes):
                found.update(zip(batch.names, batch_contents(batch), strict=True))
                report.update(len(found) / len(part), instances=batch.num_instances)
        for other in [] if processes is None else processes.objects(found):
            found.update(other)
        part.note_contents(found)
    return [str(content) for content in dataset.contents]
