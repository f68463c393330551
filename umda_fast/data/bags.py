"""Bags, batches of bags and datasets of bags: ragged and packed, never padded.

A dataset reads its bags through a `BagStore`, which knows sizes, names and labels up front and loads features
one bag at a time. Samplers, splits and statistics ask for the former only, so a store may keep its features
on disk.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from umda_fast.data._random import IntArray
from umda_fast.data.labels import ArrayInput, FloatArray, KindOverrides, as_numpy, label_columns
from umda_fast.errors import DataError
from umda_fast.model.specs import MetadataSpec, TaskSpec, ViewSpec, check_distinct
from umda_fast.ops import check_batch, share_checks


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@dataclass
class Bag:
    """One bag of instances.

    Attributes:
        name: unique within a dataset.
        views: view name -> features [n, d_v], floating point, all views with the same n. A view that the
            whole bag lacks may be left out. Rows of missing views may hold anything, NaN included.
        mask: bool [n, V], which views each instance has, columns in the order of the dataset's views; None:
            every view in `views` is there for every instance.
        labels: task name -> label; a missing label is absent. Binary: 0 or 1, float32 [];
            multiclass: int64 []; multilabel: 0 or 1, float32 [C]; regression: float32 [] in original units.
        coords: [n, 2], or None.
        metadata: float32 [M], the dataset's metadata of this bag, NaN where missing; a dataset fills it in.

    Raises:
        DataError: naming the bag and the view, when sizes disagree or an instance has no view.
    """

    name: str
    views: dict[str, Tensor]
    mask: Tensor | None = None
    labels: dict[str, Tensor] = field(default_factory=dict)
    coords: Tensor | None = None
    metadata: Tensor | None = None

    def __post_init__(self) -> None:
        where = f"bag {self.name!r}"
        if not self.views:
            raise DataError(f"{where}: views: expected at least one view, got none")
        n = -1
        for view, features in self.views.items():
            if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
                got = _shape(features) if isinstance(features, Tensor) else type(features).__name__
                raise DataError(f"{where}: view {view!r}: expected a floating-point tensor [n, d], got {got}")
            if n not in (-1, features.shape[0]):
                first = next(iter(self.views))
                raise DataError(
                    f"{where}: view {view!r}: expected {n} instances as in view {first!r}, "
                    f"got {features.shape[0]}"
                )
            n = features.shape[0]
        if self.mask is not None:
            if self.mask.dtype != torch.bool or self.mask.dim() != 2 or self.mask.shape[0] != n:
                raise DataError(f"{where}: mask: expected bool [{n}, V], got {_shape(self.mask)}")
            bare = (~self.mask.any(dim=1)).nonzero()
            if len(bare):
                raise DataError(
                    f"{where}: mask: expected at least one view for every instance, "
                    f"got none for instance {int(bare[0])}"
                )
        if self.coords is not None and self.coords.shape != (n, 2):
            raise DataError(f"{where}: coords: expected [{n}, 2], got {_shape(self.coords)}")

    def __len__(self) -> int:
        return next(iter(self.views.values())).shape[0]

    def check(self, views: Sequence[ViewSpec], tasks: Sequence[TaskSpec]) -> None:
        """Raise DataError naming the bag and the view or task if the bag does not fit the specs."""
        where = f"bag {self.name!r}"
        widths = {view.name: view.width for view in views}
        for name, features in self.views.items():
            if name not in widths:
                raise DataError(f"{where}: view {name!r}: expected one of {', '.join(widths)}")
            if features.shape[1] != widths[name]:
                raise DataError(
                    f"{where}: view {name!r}: expected width {widths[name]}, got {features.shape[1]}"
                )
        if self.mask is not None:
            if self.mask.shape[1] != len(views):
                raise DataError(
                    f"{where}: mask: expected {len(views)} columns, one for each view, "
                    f"got {self.mask.shape[1]}"
                )
            for column, view in enumerate(views):
                if view.name not in self.views and bool(self.mask[:, column].any()):
                    raise DataError(
                        f"{where}: view {view.name!r}: the mask says it is there, but it is not given"
                    )
        kinds = {task.name: task for task in tasks}
        for name, label in self.labels.items():
            if name not in kinds:
                raise DataError(
                    f"{where}: label {name!r}: expected a task among {', '.join(kinds) or 'none'}"
                )
            _check_label(f"{where}: label of task {name!r}", kinds[name], label)


def _check_label(where: str, task: TaskSpec, label: Tensor) -> None:
    if not isinstance(label, Tensor):
        raise DataError(f"{where}: expected a tensor, got {type(label).__name__}")
    if task.kind == "multilabel":
        if label.shape != (task.classes,):
            raise DataError(
                f"{where}: expected {task.classes} values of 0 or 1, got shape {list(label.shape)}"
            )
        if bool(((label != 0) & (label != 1)).any()):
            raise DataError(f"{where}: expected values of 0 or 1, got {label.tolist()}")
        return
    if label.dim() != 0:
        raise DataError(f"{where}: expected one value, got shape {list(label.shape)}")
    value = float(label)
    if task.kind == "binary" and value not in (0.0, 1.0):
        raise DataError(f"{where}: expected 0 or 1, got {value:g}")
    if task.kind == "multiclass" and not (value.is_integer() and 0 <= value < task.classes):
        raise DataError(f"{where}: expected a class in 0..{task.classes - 1}, got {value:g}")
    if task.kind == "regression" and not np.isfinite(value):
        raise DataError(f"{where}: expected a finite number, got {value}")


def all_finite(values: Tensor) -> bool:
    """Whether a tensor on the CPU holds neither NaN nor infinity.

    By the least and the greatest value, which NaN passes through: one vectorised read, where `isfinite` and a sum in
    float64 each take many times as long.
    """
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def label_tensor(task: TaskSpec, value: npt.ArrayLike) -> Tensor:
    """One label, or a column of labels, in the dtype of its kind: int64 for multiclass, else float32."""
    dtype = torch.int64 if task.kind == "multiclass" else torch.float32
    return torch.as_tensor(np.asarray(value), dtype=dtype)


@dataclass
class BagBatch:
    """Bags packed one behind the other, N instances in all.

    Attributes:
        views: view name -> [N, d_v]; rows of missing views are zeros.
        mask: bool [N, V], columns in the order of `views`.
        ptr: int64 [B+1]; bag b owns rows ptr[b]:ptr[b+1].
        labels: task name -> binary float32 [B], multiclass int64 [B], multilabel float32 [B, C], regression
            float32 [B] in original units; zero where missing.
        label_mask: task name -> bool [B], whether the label is there.
        names: the bags' names.
        coords: [N, 2], or None.
        metadata: float32 [B, M], NaN where missing, or None.
    """

    views: dict[str, Tensor]
    mask: Tensor
    ptr: Tensor
    labels: dict[str, Tensor]
    label_mask: dict[str, Tensor]
    names: list[str]
    coords: Tensor | None = None
    metadata: Tensor | None = None

    def __len__(self) -> int:
        """The number of bags."""
        return len(self.names)

    @property
    def num_instances(self) -> int:
        return self.mask.shape[0]

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model's forward."""
        inputs = {"views": self.views, "ptr": self.ptr, "mask": self.mask, "coords": self.coords}
        return inputs if self.metadata is None else {**inputs, "metadata": self.metadata}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BagBatch:
        """The batch on another device; tensors already there are shared."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        return self._map(move)

    def pin_memory(self) -> BagBatch:
        """The batch in page-locked memory. Needs an accelerator, like `torch.Tensor.pin_memory`."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> BagBatch:
        if self.ptr.device.type == "cpu":
            check_batch(self.ptr, self.mask)  # here, where it costs no synchronisation
        return BagBatch(
            views={name: move(features) for name, features in self.views.items()},
            mask=share_checks(self.mask, move(self.mask)),
            ptr=share_checks(self.ptr, move(self.ptr)),
            labels={name: move(label) for name, label in self.labels.items()},
            label_mask={name: move(present) for name, present in self.label_mask.items()},
            names=self.names,
            coords=None if self.coords is None else move(self.coords),
            metadata=None if self.metadata is None else move(self.metadata),
        )


def collate(bags: Sequence[Bag], views: Sequence[ViewSpec], tasks: Sequence[TaskSpec]) -> BagBatch:
    """Pack bags into one batch, in the order given. A batch of one bag shares the bag's features.

    Raises:
        DataError: a bag does not fit the specs; dtypes of a view differ between bags; only some bags have
            coords.
    """
    for bag in bags:
        bag.check(views, tasks)
    return _pack(bags, views, tasks)


def _pack(bags: Sequence[Bag], views: Sequence[ViewSpec], tasks: Sequence[TaskSpec]) -> BagBatch:
    sizes = torch.tensor([0, *(len(bag) for bag in bags)], dtype=torch.int64)
    mask = torch.cat([torch.zeros(0, len(views), dtype=torch.bool), *(_mask(bag, views) for bag in bags)])
    ptr = sizes.cumsum(0)
    check_batch(ptr, mask)
    labels, label_mask = _collate_labels(bags, tasks)
    return BagBatch(
        views={view.name: _collate_view(bags, view, mask[:, column]) for column, view in enumerate(views)},
        mask=mask,
        ptr=ptr,
        labels=labels,
        label_mask=label_mask,
        names=[bag.name for bag in bags],
        coords=_collate_coords(bags),
        metadata=_collate_metadata(bags),
    )


def _mask(bag: Bag, views: Sequence[ViewSpec]) -> Tensor:
    if bag.mask is not None:
        return bag.mask
    return torch.tensor([[view.name in bag.views for view in views]]).expand(len(bag), -1)


def _collate_view(bags: Sequence[Bag], view: ViewSpec, present: Tensor) -> Tensor:
    given = [bag for bag in bags if view.name in bag.views]
    if not given:
        other = next(iter(bags[0].views.values())) if bags else torch.empty(0)
        return other.new_zeros(present.shape[0], view.width)
    first = given[0].views[view.name]
    for bag in given:
        if bag.views[view.name].dtype != first.dtype:
            raise DataError(
                f"bag {bag.name!r}: view {view.name!r}: expected dtype {first.dtype} as in bag "
                f"{given[0].name!r}, got {bag.views[view.name].dtype}"
            )
    parts = [
        bag.views[view.name] if view.name in bag.views else first.new_zeros(len(bag), view.width)
        for bag in bags
    ]
    # A bag too large to copy without need is a batch of its own.
    packed = torch.cat(parts) if len(parts) > 1 else parts[0]
    # Not a product with the mask: missing rows may hold NaN.
    return packed if bool(present.all()) else packed.masked_fill(~present[:, None], 0.0)


def _collate_labels(
    bags: Sequence[Bag], tasks: Sequence[TaskSpec]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    labels, label_mask = {}, {}
    for task in tasks:
        shape = (len(bags), task.classes) if task.kind == "multilabel" else (len(bags),)
        column = label_tensor(task, np.zeros(shape))
        present = torch.zeros(len(bags), dtype=torch.bool)
        for row, bag in enumerate(bags):
            if task.name in bag.labels:
                column[row] = bag.labels[task.name]
                present[row] = True
        labels[task.name], label_mask[task.name] = column, present
    return labels, label_mask


def _collate_coords(bags: Sequence[Bag]) -> Tensor | None:
    without = [bag.name for bag in bags if bag.coords is None]
    if len(without) == len(bags):
        return None
    if without:
        raise DataError(f"bag {without[0]!r}: coords: expected [n, 2] as other bags have, got none")
    return torch.cat([bag.coords for bag in bags if bag.coords is not None])


def _collate_metadata(bags: Sequence[Bag]) -> Tensor | None:
    given = [bag.metadata for bag in bags if bag.metadata is not None]
    if given and (len(given) < len(bags) or len({len(values) for values in given}) > 1):
        raise DataError(f"bag {bags[0].name!r}: metadata: expected as many numbers in every bag of a batch")
    return torch.stack(given) if given else None


@dataclass(frozen=True)
class Metadata:
    """Numbers known of bags beside their instances.

    Attributes:
        names: of the M numbers, distinct.
        values: float64 [B, M], NaN where missing.
    """

    names: tuple[str, ...]
    values: FloatArray

    def take(self, rows: IntArray) -> Metadata:
        """Those of the bags at `rows`."""
        return Metadata(self.names, self.values[rows])

    def select(self, names: Sequence[str]) -> Metadata:
        """Those of `names`, missing everywhere where there is no such number."""
        columns = {name: self.values[:, column] for column, name in enumerate(self.names)}
        missing = np.full(len(self.values), np.nan)
        return Metadata(tuple(names), np.stack([columns.get(name, missing) for name in names], axis=1))

    def specs(self) -> tuple[MetadataSpec, ...]:
        """Names, and mean and deviation of the known values (1 where that is 0 or nothing is known)."""
        specs = []
        for name, column in zip(self.names, self.values.T, strict=True):
            known = column[~np.isnan(column)]
            mean, std = (float(known.mean()), float(known.std())) if len(known) else (0.0, 1.0)
            specs.append(MetadataSpec(name, mean, std if std > 0 else 1.0))
        return tuple(specs)


@dataclass(frozen=True)
class Positions:
    """What the coordinates of bags mean.

    Attributes:
        unit: "um", micrometres from the slide's corner, or "px", pixels of level 0.
        patch_size: edge of a patch in `unit`, float64 [B], NaN where not known.
        pixel_size: micrometres per level-0 pixel, float64 [B], NaN where not known.
    """

    unit: Literal["um", "px"]
    patch_size: FloatArray
    pixel_size: FloatArray

    def take(self, rows: IntArray) -> Positions:
        """Those of the bags at `rows`."""
        return Positions(self.unit, self.patch_size[rows], self.pixel_size[rows])


class BagStore(Protocol):
    """Where bags come from. Sizes, names and labels are known up front; features are read by `load` only.

    A store may have attributes `positions` and `skipped`, see those of `BagDataset`.
    """

    @property
    def names(self) -> Sequence[str]: ...

    @property
    def sizes(self) -> IntArray:
        """Instances of every bag, int64 [B]."""
        ...

    @property
    def labels(self) -> Mapping[str, FloatArray]:
        """Task name -> float64 [B] or, multilabel, [B, C]; NaN where missing."""
        ...

    def load(self, index: int) -> Bag: ...


class _ListStore:
    """Bags held as they are."""

    def __init__(self, bags: Sequence[Bag], tasks: Sequence[TaskSpec]) -> None:
        self._bags = list(bags)
        self.names: Sequence[str] = [bag.name for bag in bags]
        self.sizes: IntArray = np.array([len(bag) for bag in bags], dtype=np.int64)
        self.labels: Mapping[str, FloatArray] = {
            task.name: np.stack([self._label(bag, task) for bag in bags]) if bags else self._none(task)
            for task in tasks
        }

    @staticmethod
    def _label(bag: Bag, task: TaskSpec) -> FloatArray:
        if task.name in bag.labels:
            return bag.labels[task.name].numpy().astype(np.float64)
        return np.full((task.classes,) if task.kind == "multilabel" else (), np.nan)

    @staticmethod
    def _none(task: TaskSpec) -> FloatArray:
        return np.empty((0, task.classes) if task.kind == "multilabel" else (0,))

    def load(self, index: int) -> Bag:
        return self._bags[index]


class _PackedStore:
    """Bags as slices, without a copy, of packed tensors."""

    def __init__(
        self,
        views: Mapping[str, Tensor],
        ptr: IntArray,
        mask: Tensor | None,
        coords: Tensor | None,
        names: Sequence[str],
        tasks: Sequence[TaskSpec],
        labels: Mapping[str, FloatArray],
    ) -> None:
        self._views = views
        self._ptr = ptr
        self._mask = mask
        self._coords = coords
        self._tasks = tuple(tasks)
        self.names = names
        self.sizes: IntArray = np.diff(ptr)
        self.labels = labels

    def load(self, index: int) -> Bag:
        rows = slice(int(self._ptr[index]), int(self._ptr[index + 1]))
        labels = {}
        for task in self._tasks:
            value = self.labels[task.name][index]
            if not np.isnan(value).any():
                labels[task.name] = label_tensor(task, value)
        return Bag(
            name=self.names[index],
            views={name: features[rows] for name, features in self._views.items()},
            mask=None if self._mask is None else self._mask[rows],
            labels=labels,
            coords=None if self._coords is None else self._coords[rows],
        )


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
            self._store: BagStore = _ListStore(bags, self.tasks)
        else:
            self._store = bags
        self._rows: IntArray = np.arange(len(self._store.names), dtype=np.int64)
        self._metadata: Metadata | None = None
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
        names: Sequence[str] | None = None,
        name: str = "arrays",
        dtype: torch.dtype = torch.float32,
    ) -> BagDataset:
        """A dataset from packed arrays; nothing is copied that has the right dtype already.

        Args:
            views: view name -> features [N, d_v].
            ptr: integers [B+1], bag b owns rows ptr[b]:ptr[b+1]; None makes every row a bag of one instance.
            labels: task name -> [B], or [B, C] for a multilabel task. NaN or a blank string: missing.
            mask: bool [N, V], which views an instance has, columns in the order of `views`; None: all.
            coords: [N, 2].
            metadata: name -> numbers [B] known of the bags beside their instances, NaN where missing.
            kinds: task name -> kind, or fields of a TaskSpec, or a TaskSpec; or a sequence of TaskSpec, such
                as another dataset's `tasks`, which also fixes classes and standardisation. Kinds not given
                are inferred: two distinct values make a binary task, few integers or strings a multiclass
                one, a matrix a multilabel one, anything else a regression, whose mean and std are those of
                the labels given.
            names: [B], the bags' names; None counts them.
            name: of the dataset, for messages.
            dtype: of the features.

        Raises:
            DataError: naming the array, what was expected and what came.
        """
        if not views:
            raise DataError(f"{name}: views: expected at least one array, got none")
        features = {view: _features(f"{name}: view {view!r}", array, dtype) for view, array in views.items()}
        rows = _common_rows(name, features)
        offsets = _offsets(f"{name}: ptr", ptr, rows)
        bags = len(offsets) - 1
        if names is None:
            names = [f"bag {index}" for index in range(bags)]
        elif len(names) != bags:
            raise DataError(f"{name}: names: expected {bags}, one for each bag, got {len(names)}")
        tasks, columns = label_columns(labels or {}, bags, kinds, where=name)
        store = _PackedStore(
            features,
            offsets,
            None if mask is None else _mask_array(name, mask, rows, features, offsets, names),
            None if coords is None else _coords_array(f"{name}: coords", coords, rows),
            [str(bag) for bag in names],
            tasks,
            columns,
        )
        specs = [ViewSpec(view, array.shape[1]) for view, array in features.items()]
        dataset = cls(store, specs, tasks, name)
        return dataset.with_metadata(_metadata_columns(name, metadata, bags)) if metadata else dataset

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
    def skipped(self) -> tuple[str, ...]:
        """What of the source could not be used and was left out, one line each with its file in it."""
        return tuple(getattr(self._store, "skipped", ()))

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
        before = [(task.name, task.kind, task.classes) for task in self.tasks]
        after = [(task.name, task.kind, task.classes) for task in tasks]
        if before != after:
            raise ValueError(f"tasks: expected the names, kinds and classes {before}, got {after}")
        other = self._copy()
        other.tasks = tuple(tasks)
        return other

    def collate(self, bags: Sequence[Bag]) -> BagBatch:
        """Pack bags of this dataset, which has checked them already, into one batch."""
        return _pack(bags, self.views, self.tasks)

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
        self.positions = _concat_positions([part.positions for part in parts])
        self.skipped = tuple(dict.fromkeys(line for part in parts for line in part.skipped))

    def load(self, index: int) -> Bag:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._parts[part][index - int(self._starts[part])]


def _concat_positions(parts: Sequence[Positions | None]) -> Positions | None:
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.unit for part in known}) > 1:
        return None
    sizes = np.concatenate([part.patch_size for part in known])
    return Positions(known[0].unit, sizes, np.concatenate([part.pixel_size for part in known]))


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
    known = [part.metadata for part in parts if part.metadata is not None]
    if len(known) < len(parts) or len({metadata.names for metadata in known}) > 1:
        return whole
    return whole.with_metadata(Metadata(known[0].names, np.concatenate([metadata.values for metadata in known])))


def _features(where: str, value: ArrayInput, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        array = as_numpy(where, value)
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: expected numbers [N, d], got dtype {array.dtype}")
        # torch.from_numpy warns about arrays that must not be written to; nothing here writes to them.
        value = torch.from_numpy(array if array.flags.writeable and array.dtype.isnative else array.copy())
    if value.dim() != 2 or value.shape[1] == 0:
        raise DataError(f"{where}: expected [N, d] with d at least 1, got {_shape(value)}")
    return value.to(dtype)


def _common_rows(name: str, features: Mapping[str, Tensor]) -> int:
    first, reference = next(iter(features.items()))
    for view, array in features.items():
        if array.shape[0] != reference.shape[0]:
            raise DataError(
                f"{name}: view {view!r}: expected {reference.shape[0]} rows as in view {first!r}, "
                f"got {array.shape[0]}"
            )
    return reference.shape[0]


def _offsets(where: str, ptr: ArrayInput | None, rows: int) -> IntArray:
    if ptr is None:
        return np.arange(rows + 1, dtype=np.int64)
    array = as_numpy(where, ptr)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise DataError(f"{where}: expected integers [B+1], got {array.dtype} {list(array.shape)}")
    offsets = array.astype(np.int64)
    if offsets[0] != 0:
        raise DataError(f"{where}: expected to start at 0, got {offsets[0]}")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if len(falls):
        at = int(falls[0])
        raise DataError(
            f"{where}: expected never to decrease, got {offsets[at]} then {offsets[at + 1]} "
            f"at position {at + 1}"
        )
    if offsets[-1] != rows:
        raise DataError(f"{where}: expected to end at the number of instances {rows}, got {offsets[-1]}")
    return offsets


def _mask_array(
    name: str,
    mask: ArrayInput,
    rows: int,
    features: Mapping[str, Tensor],
    offsets: IntArray,
    names: Sequence[str],
) -> Tensor | None:
    array = as_numpy(f"{name}: mask", mask)
    if array.shape != (rows, len(features)):
        raise DataError(
            f"{name}: mask: expected [{rows}, {len(features)}], one column for each of the views "
            f"{', '.join(features)}, got {list(array.shape)}"
        )
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise DataError(
            f"{name}: mask: expected true and false, or 1 and 0, got other values ({array.dtype})"
        )
    present = array.astype(np.bool_)
    bare = np.flatnonzero(~present.any(axis=1))
    if len(bare):
        bag = int(np.searchsorted(offsets, bare[0], side="right")) - 1
        raise DataError(
            f"{name}: mask: expected at least one view for every instance, got none for row {bare[0]} "
            f"(bag {names[bag]!r}, instance {bare[0] - offsets[bag]})"
        )
    return None if present.all() else torch.from_numpy(present)


def _coords_array(where: str, coords: ArrayInput, rows: int) -> Tensor:
    array = as_numpy(where, coords)
    if array.shape != (rows, 2) or array.dtype.kind not in "fiu":
        raise DataError(f"{where}: expected numbers [{rows}, 2], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.float32))


def _metadata_columns(where: str, metadata: Mapping[str, ArrayInput], bags: int) -> Metadata:
    columns = []
    for name, value in metadata.items():
        array = as_numpy(f"{where}: metadata {name!r}", value)
        if array.shape != (bags,) or array.dtype.kind not in "fiub":
            raise DataError(
                f"{where}: metadata {name!r}: expected numbers [{bags}], one per bag, got {array.dtype} "
                f"{list(array.shape)}"
            )
        columns.append(array.astype(np.float64))
        if np.isinf(columns[-1]).any():
            raise DataError(f"{where}: metadata {name!r}: expected finite numbers, or NaN where missing, got inf")
    return Metadata(tuple(metadata), np.stack(columns, axis=1))


def _check_distinct_names(where: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for bag in names:
        if bag in seen:
            raise DataError(f"{where}: bag {bag!r}: expected distinct names, got this one more than once")
        seen.add(bag)
