"""Datasets of bags: a sequence that reads its bags through a store, parts of it, several as one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from umda_fast.data.arrays import (
    ArrayInput,
    FloatArray,
    IntArray,
    common_rows,
    coords_tensor,
    features_tensor,
    mask_tensor,
    offsets_array,
)
from umda_fast.data.bag import Bag
from umda_fast.data.batch import BagBatch, pack
from umda_fast.data.joined import JoinedSlides
from umda_fast.data.labels import KindOverrides, label_columns
from umda_fast.data.metadata import Metadata, Positions, concat_positions, metadata_columns
from umda_fast.data.positive import Positive, choose_positive
from umda_fast.data.stores import ArrayStore, BagStore, ListStore
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec, check_distinct


class BagDataset(Dataset[Bag]):
    """A map-style sequence of bags that share views and tasks.

    Args:
        bags: bags in memory, or a `BagStore` that loads them one at a time.
        views: name and width of every view; their order is the order of the masks' columns.
        tasks: what is predicted. A bag need not have a label for each.
        name: for messages.

    Raises:
        DataError: a bag does not fit, naming bag, view or task (bags in memory: here; a store's bags: when
            loaded); two bags share a name.
        ValueError: two views or two tasks share a name, or there is no view.
    """

    def __init__(
        self,
        bags: Sequence[Bag] | BagStore,
        views: Sequence[ViewSpec],
        tasks: Sequence[TaskSpec],
        name: str = "bags",
    ) -> None:
        self.name = name
        self.views = tuple(views)
        self.tasks = tuple(tasks)
        if not self.views:
            raise ValueError("views: expected at least one view, got none")
        check_distinct("views", self.views)
        check_distinct("tasks", self.tasks)
        if isinstance(bags, Sequence):
            for bag in bags:
                bag.check(self.views, self.tasks)
            self._store: BagStore = ListStore(bags, self.tasks)
        else:
            self._store = bags
        self._rows: IntArray = np.arange(len(self._store.names), dtype=np.int64)
        self._metadata: Metadata | None = None
        self._groups: Sequence[str] | None = None  # by row of the store
        self._contents: dict[int, str] = {}  # by row of the store, shared by all parts of it
        _check_distinct_names(name, self._store.names)

    @classmethod
    def from_arrays(
        cls,
        views: Mapping[str, ArrayInput],
        ptr: ArrayInput | None = None,
        labels: Mapping[str, ArrayInput] | None = None,
        *,
        mask: ArrayInput | None = None,
        coords: ArrayInput | None = None,
        metadata: Mapping[str, ArrayInput] | None = None,
        kinds: KindOverrides | None = None,
        positive: Positive | None = None,
        names: Sequence[str] | None = None,
        name: str = "arrays",
        dtype: torch.dtype = torch.float32,
    ) -> BagDataset:
        """A dataset from packed arrays; nothing is copied that has the right dtype already.

        Args:
            views: view name -> features [N, d_v].
            ptr: integers [B+1], bag b owns rows ptr[b]:ptr[b+1]; None makes every row a bag of one instance.
            labels: task name -> [B], or [B, C] for a multilabel task, [B, 2] for one of kind survival. NaN or a blank
                string: missing.
            mask: bool [N, V], which views an instance has, columns in the order of `views`; None: all.
            coords: [N, 2].
            metadata: name -> numbers [B] known of the bags beside their instances, NaN where missing.
            kinds: task name -> kind, or fields of a TaskSpec, or a TaskSpec; or a sequence of TaskSpec, such
                as another dataset's `tasks`, which also fixes classes and standardisation. Kinds not given
                are inferred: two distinct values make a binary task, few integers or strings a multiclass
                one, a matrix a multilabel one, anything else a regression, whose mean and std are those of
                the labels given. Times and events, such as os_months and os_event, are one task of kind survival;
                those of other names: {kind: survival, time: <name>, event: <name>}.
            positive: the class of a binary task that is label 1, or task -> class; None: the later of the two.
            names: [B], the bags' names; None counts them.
            name: of the dataset, for messages.
            dtype: of the features.

        Raises:
            DataError: naming the array, what was expected and what came.
        """
        if not views:
            raise DataError(f"{name}: views: expected at least one array, got none")
        features = {view: features_tensor(f"{name}: view {view!r}", array, dtype) for view, array in views.items()}
        rows = common_rows(name, features)
        offsets = offsets_array(f"{name}: ptr", ptr, rows)
        bags = len(offsets) - 1
        if names is None:
            names = [f"bag {index}" for index in range(bags)]
        elif len(names) != bags:
            raise DataError(f"{name}: names: expected {bags}, one for each bag, got {len(names)}")
        tasks, columns = label_columns(labels or {}, bags, kinds, where=name)
        tasks, columns = choose_positive(tasks, columns, positive, kinds, where=name)
        store = ArrayStore(
            features,
            offsets,
            None if mask is None else mask_tensor(name, mask, rows, features, offsets, names),
            None if coords is None else coords_tensor(f"{name}: coords", coords, rows),
            [str(bag) for bag in names],
            tasks,
            columns,
        )
        specs = [ViewSpec(view, array.shape[1]) for view, array in features.items()]
        dataset = cls(store, specs, tasks, name)
        return dataset.with_metadata(metadata_columns(name, metadata, bags)) if metadata else dataset

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Bag:
        bag = self._store.load(int(self._rows[index]))
        bag.check(self.views, self.tasks)
        if self._metadata is not None:
            bag = copy.copy(bag)  # a store in memory hands out its own
            bag.metadata = torch.from_numpy(self._metadata.values[self._rows[index]]).float()
        return bag

    @property
    def sizes(self) -> IntArray:
        """Instances of every bag, int64 [B], without loading one."""
        return self._store.sizes[self._rows]

    @property
    def names(self) -> list[str]:
        """The bags' names, without loading one."""
        return [self._store.names[row] for row in self._rows]

    @property
    def labels(self) -> dict[str, FloatArray]:
        """Task name -> float64 [B] or, multilabel, [B, C], NaN where missing; without loading a bag."""
        return {task.name: self._store.labels[task.name][self._rows] for task in self.tasks}

    @property
    def positions(self) -> Positions | None:
        """What the bags' coordinates mean, without loading one; None if that is not known."""
        positions: Positions | None = getattr(self._store, "positions", None)
        return None if positions is None else positions.take(self._rows)

    @property
    def slides(self) -> JoinedSlides | None:
        """The slides of which the bags are made, where bags are of several, without loading one; else None."""
        slides: JoinedSlides | None = getattr(self._store, "slides", None)
        return None if slides is None else slides.take(self._rows)

    @property
    def skipped(self) -> tuple[str, ...]:
        """What of the source could not be used and was left out, one line each with its file in it."""
        return tuple(getattr(self._store, "skipped", ()))

    @property
    def contents(self) -> list[str | None]:
        """What is known of the bags' contents (`umda_fast.data.content`), None where nobody looked yet."""
        return [self._contents.get(row) for row in self._rows.tolist()]

    def note_contents(self, contents: Mapping[str, str]) -> None:
        """Keep the contents of bags, by name, for all datasets that read them from the same place."""
        for row, name in zip(self._rows.tolist(), self.names, strict=True):
            if name in contents:
                self._contents[row] = contents[name]

    @property
    def groups(self) -> list[str] | None:
        """Whose the bags are, as `Splits.groups` has it, without loading one; None where nothing says so."""
        groups = self._groups
        return None if groups is None else [groups[row] for row in self._rows.tolist()]

    def with_groups(self, groups: Sequence[str] | None) -> BagDataset:
        """The same bags of these groups, [B]; None: nothing says whose they are.

        Raises:
            ValueError: for another number of bags.
        """
        other = self._copy()
        other._groups = None
        if groups is not None:
            if len(groups) != len(self):
                raise ValueError(f"groups: expected {len(self)}, one per bag, got {len(groups)}")
            all_rows = [""] * len(self._store.names)
            for row, group in zip(self._rows.tolist(), groups, strict=True):
                all_rows[row] = str(group)
            other._groups = all_rows
        return other

    @property
    def metadata(self) -> Metadata | None:
        """Numbers known of the bags beside their instances, if there are any."""
        return None if self._metadata is None else self._metadata.take(self._rows)

    def with_metadata(self, metadata: Metadata | None) -> BagDataset:
        """The same bags with other metadata, in the order of this dataset; None for none.

        Raises:
            ValueError: for another number of bags.
        """
        other = self._copy()
        other._metadata = None
        if metadata is not None:
            if len(metadata.values) != len(self):
                raise ValueError(f"metadata: expected {len(self)} rows, one per bag, got {len(metadata.values)}")
            values = np.full((len(self._store.names), len(metadata.names)), np.nan)
            values[self._rows] = metadata.values
            other._metadata = Metadata(metadata.names, values)
        return other

    def subset(self, indices: Iterable[int] | IntArray, name: str | None = None) -> BagDataset:
        """The bags at `indices`, in that order, reading from the same store."""
        rows = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        part = self._copy()
        part._rows = self._rows[rows]
        part.name = self.name if name is None else name
        return part

    def with_tasks(self, tasks: Sequence[TaskSpec]) -> BagDataset:
        """The same bags under other specs of the same tasks, standardised as a training split for example.

        Raises:
            ValueError: names, kinds or classes differ.
        """
        before, after = ([(task.name, task.kind, task.classes) for task in own] for own in (self.tasks, tasks))
        if [task.identity for task in self.tasks] != [task.identity for task in tasks]:
            raise ValueError(f"tasks: expected the names, kinds and classes {before}, got {after}")
        other = self._copy()
        other.tasks = tuple(tasks)
        return other

    def collate(self, bags: Sequence[Bag]) -> BagBatch:
        """Pack bags of this dataset, which has checked them already, into one batch."""
        return pack(bags, self.views, self.tasks)

    def _copy(self) -> BagDataset:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other


class _ConcatStore:
    """Several datasets behind one another."""

    def __init__(self, parts: Sequence[BagDataset]) -> None:
        self._parts = list(parts)
        self._starts = np.cumsum([0, *(len(part) for part in parts)])
        self.names: Sequence[str] = [name for part in parts for name in part.names]
        self.sizes: IntArray = np.concatenate([part.sizes for part in parts])
        self.labels: Mapping[str, FloatArray] = {
            task.name: np.concatenate([part.labels[task.name] for part in parts]) for task in parts[0].tasks
        }
        self.positions = concat_positions([part.positions for part in parts])
        self.skipped = tuple(dict.fromkeys(line for part in parts for line in part.skipped))

    def load(self, index: int) -> Bag:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


def concat(parts: Sequence[BagDataset], name: str) -> BagDataset:
    """One dataset of all bags of several, which must agree in views and tasks.

    Raises:
        ValueError: no dataset, or views or tasks differ.
    """
    if not parts:
        raise ValueError("parts: expected at least one dataset, got none")
    for part in parts[1:]:
        if (part.views, part.tasks) != (parts[0].views, parts[0].tasks):
            raise ValueError(
                f"parts: expected the views and tasks of {parts[0].name!r}, {part.name!r} differs"
            )
    whole = BagDataset(_ConcatStore(parts), parts[0].views, parts[0].tasks, name)
    groups = [part.groups for part in parts]
    if all(own is not None for own in groups):
        whole = whole.with_groups([group for own in groups if own is not None for group in own])
    known = [part.metadata for part in parts if part.metadata is not None]
    if len(known) < len(parts) or len({metadata.names for metadata in known}) > 1:
        return whole
    return whole.with_metadata(Metadata(known[0].names, np.concatenate([metadata.values for metadata in known])))


def _check_distinct_names(where: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for bag in names:
        if bag in seen:
            raise DataError(f"{where}: bag {bag!r}: expected distinct names, got this one more than once")
        seen.add(bag)
