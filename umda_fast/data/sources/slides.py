"""A directory of bags, one file each, as CLAM, TRIDENT and STAMP leave it, or made by hand, or packed.

Which files are looked for is at the head of `umda_fast.data.files.layouts`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.columns import ColumnUse
from umda_fast.data.dataset import BagDataset
from umda_fast.data.files.directory import OpenedSlides, open_slides
from umda_fast.data.files.file_options import FileOptions
from umda_fast.data.files.identifiers import alike_in_all_but_writing
from umda_fast.data.files.index import SlideIndex
from umda_fast.data.files.joined_rows import PatientBags, bags_of_patients, join_rows
from umda_fast.data.files.label_files import LabelOptions
from umda_fast.data.files.labels_table import LabelTable
from umda_fast.data.files.table_columns import read_metadata, read_tasks
from umda_fast.data.joined import JoinedSlides, JoinedStore
from umda_fast.data.labels import ClassWeights, fixed_tasks, label_columns
from umda_fast.data.options import as_names, option
from umda_fast.data.positive import choose_positive
from umda_fast.data.sources.base import BagSource, Folds, GivenSplit, OpenedSource
from umda_fast.data.splits import About, parts_of
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
        labels = bag_labels(self._tasks, self.labels, index)
        return Bag(self.names[index], views, mask, labels, coords, slides=_frames(coords))


def _frames(coords: Tensor | None) -> Tensor | None:
    """`Bag.slides` of one slide: the instance that is of all of it, the last, has no place among the patches."""
    if coords is None:
        return None
    nowhere = coords.isnan().any(dim=1)
    return nowhere.long() if bool(nowhere.any()) else None


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """How slides are split.

    Attributes:
        splits: CLAM's split files, or the directory of a run, as of `open_slides`.
        fold: which of the split files.
        val_share, test_share: of the bags.
        class_weights: "balanced" or None.
    """

    splits: str | None = option(None, local=True, path=True)
    fold: int = option(0, folds=False, local=True)
    val_share: float = 0.15
    test_share: float = option(0.2, folds=False)
    class_weights: ClassWeights = None


@dataclass(frozen=True, kw_only=True)
class SlidesSource(FileOptions, SplitOptions, LabelOptions, BagSource):
    """A directory of bags with a table of labels.

    The split is that of CLAM's split files, or else of the table's column `split`, or else at random, stratified,
    with all bags of a patient on one side. Cross-validation takes CLAM's split files as its folds, or makes folds.

    Attributes:
        bag: "slide", or "patient": all slides of a patient are one bag, whose slides keep coordinates of their own.
        Others: of `LabelOptions`, `SplitOptions` and `FileOptions`, in that order.
    """

    bag: Literal["slide", "patient"] = "slide"

    def open(self, path: str, folds: Folds | None) -> OpenedSource:
        """Raises DataError naming the file, what was expected and what came."""
        opened = open_slides(path, self, self.splits, self)
        files = opened.split_files
        if files and folds is None and not 0 <= self.fold < len(files):
            raise DataError(f"{files[0].parent}: fold: expected 0 to {len(files) - 1}, got {self.fold}")
        if files and folds is not None and folds != (len(files), 1):
            raise DataError(
                f"{files[0].parent}: expected {len(files)} folds and 1 repeat, one for each split file, "
                f"got {folds.folds} and {folds.repeats}"
            )
        bags = self._bags(opened)
        dataset, about, notes = self._labelled(opened, bags)
        given = [] if folds is not None else _split_column(opened)
        if files:
            chosen = files if folds is not None else [files[self.fold]]
            given = [GivenSplit(opened.read_split(file), f"split by {file.name}", str(file)) for file in chosen]
        if bags is not None:
            given = [split._replace(parts=_parts_of_bags(bags, split.parts)) for split in given]
        unit = dataset.positions.unit if dataset.positions is not None else None
        positions = {"um": "positions in micrometres", "px": "positions in level-0 pixels", None: "no positions"}[unit]
        return OpenedSource(
            dataset,
            name=Path(path).resolve().name,
            summary=(
                f"{len(dataset)} bags{f' of {len(opened.rows)} slides' if bags else ''} ({opened.index.tool}), "
                f"{int(dataset.sizes.sum())} instances, "
                f"{len(dataset.views)} view(s), {len(dataset.tasks)} task(s); {'; '.join([positions, *notes])}"
            ),
            groups=_groups(dataset.names, bags.patients) if bags is not None else _patients(opened),
            given=given,
            keep=fixed_tasks(self.kinds),
            about=about,
            skipped=opened.skipped if opened.skipped.skip_bad else None,
        )

    def _bags(self, opened: OpenedSlides) -> PatientBags | None:
        """Which slides are one bag; None where each is one."""
        if self.bag not in ("slide", "patient"):
            raise DataError(f"bag: expected slide or patient, got {self.bag!r}")
        if self.bag == "slide":
            return None
        table, index = opened.table, opened.index
        if table is None or table.patients is None:
            lacks = f"{opened.path}: there is no table" if table is None else f"{table.where}: there is no column"
            raise DataError(
                f"{lacks} that says whose the slides are, which bag=patient needs; name the column with --set "
                "data.options.patient=COLUMN, or take slides as bags: --set data.options.bag=slide"
            )
        said = ["" if row is None else table.patients[row] for row in opened.rows]
        return bags_of_patients(table.where, index.names, said)

    def _dataset(
        self,
        opened: OpenedSlides,
        bags: PatientBags | None,
        specs: Sequence[TaskSpec],
        columns: Mapping[str, FloatArray],
    ) -> BagDataset:
        index, skipped = opened.index, opened.skipped.lines
        if bags is None:
            return BagDataset(SlideStore(index, specs, columns, skipped), index.views, specs, opened.path)
        slides = JoinedSlides(
            SlideStore(index, (), {}, skipped), index.views, tuple(np.array(rows, np.int64) for rows in bags.members)
        )
        return BagDataset(JoinedStore(slides, bags.names, specs, columns, skipped), index.views, specs, opened.path)

    def _labelled(self, opened: OpenedSlides, bags: PatientBags | None) -> tuple[BagDataset, About, list[str]]:
        """All bags with their labels and metadata, how their table was understood, and what is worth knowing."""
        index, table, rows = opened.index, opened.table, opened.rows
        if table is None:
            specs, columns = label_columns({}, len(rows), self.kinds, where=opened.path)
            about = About(faults=[opened.no_table], notes=index.guesses)
            notes = [*index.notes, *index.guesses, "no table of labels"]
            return self._dataset(opened, bags, specs, columns), about, notes
        notes = _notes(table, rows)
        asked = as_names(self.tasks or ())
        if bags is not None:
            table, rows = join_rows(table, rows, bags, self.kinds, asked)
        tasks = read_tasks(table, rows, self.kinds, asked)
        specs, columns = choose_positive(tasks.specs, tasks.labels, self.positive, self.kinds, where=table.where)
        dataset = self._dataset(opened, bags, specs, columns)
        doubts = [
            f"{table.where}: {' and '.join(map(repr, group))} are different patients; are they one?"
            for group in alike_in_all_but_writing(table.patients or ())
        ]
        uses = {use.name: use for use in [*table.uses, *tasks.uses]}
        order = [name or f"column {number}" for number, name in enumerate(table.table.header, start=1)]
        guesses = [*index.guesses, *table.notes, *tasks.notes]
        about = About(
            columns=[uses[name] for name in order],
            notes=guesses,
            faults=[] if tasks.specs else [_no_task(table.where, [*table.uses, *tasks.uses])],
            doubts=[*tasks.doubts, *doubts],
        )
        return dataset.with_metadata(read_metadata(table, rows)), about, [*index.notes, *notes, *guesses]


def _notes(table: LabelTable, rows: Sequence[int | None]) -> list[str]:
    """How the table of labels fits the slides."""
    bare = sum(row is None for row in rows)
    notes = [f"labels from {table.table.path.name}", *([f"{bare} bags not in it"] if bare else [])]
    if table.by_patient:
        unused = len(table.names) - len({row for row in rows if row is not None})
        notes += [f"{unused} patients of it without a bag"] if unused else []
    elif table.patients is None:
        notes.append("no column of patients, so each bag is one of its own")
    patients = table.patients or ()
    nobody = sum(not patients[row] for row in rows if row is not None) if patients else 0
    return [*notes, *([f"{nobody} bags without a patient, each one of its own"] if nobody else [])]


def _no_task(where: str, uses: Sequence[ColumnUse]) -> str:
    left = [f"{use.name!r} ({use.why})" for use in uses if use.use == "left out"]
    return f"{where}: expected labels of at least one task, got none; columns left out: {', '.join(left) or 'none'}"


def _patients(opened: OpenedSlides) -> list[str] | None:
    """The patient of every bag, a bag of its own where the table does not say; None without a column of patients."""
    if opened.table is None or opened.table.patients is None:
        return None
    patients = opened.table.patients
    return _groups(opened.index.names, ["" if row is None else patients[row] for row in opened.rows])


def _groups(bags: Sequence[str], patients: Sequence[str]) -> list[str]:
    return [
        f"patient {patient}" if patient else f"slide {bag}" for bag, patient in zip(bags, patients, strict=True)
    ]


def _parts_of_bags(bags: PatientBags, parts: Mapping[str, IntArray]) -> dict[str, IntArray]:
    """Bags of a split that names slides: one bag is in all splits that its slides are in."""
    bag_of = bags.bag_of
    return {
        split: np.array(sorted({bag_of[row] for row in rows.tolist()}), dtype=np.int64)
        for split, rows in parts.items()
    }


def _split_column(opened: OpenedSlides) -> list[GivenSplit]:
    """The split that the table's column `split` says, if it has one; bags not in the table are in no part."""
    if opened.table is None or opened.table.splits is None:
        return []
    splits = opened.table.splits
    parts = parts_of(["" if row is None else splits[row] for row in opened.rows])
    opened.check_parts(opened.table.where, splits, parts)
    return [GivenSplit(parts, "split by the column split", opened.table.where)]
