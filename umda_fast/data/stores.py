"""Where a dataset's bags come from: the protocol of a store, and stores in memory.

A store knows sizes, names and labels up front and loads features one bag at a time. Samplers, splits and statistics ask
for the former only, so a store may keep its features on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.labels import missing_labels
from umda_fast.model.specs import TaskSpec


class BagStore(Protocol):
    """Where bags come from. Sizes, names and labels are known up front; features are read by `load` only.

    A store may have attributes `positions`, `slides` and `skipped`, see those of `BagDataset`.
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


class ListStore:
    """Bags held as they are."""

    def __init__(self, bags: Sequence[Bag], tasks: Sequence[TaskSpec]) -> None:
        self._bags = list(bags)
        self.names: Sequence[str] = [bag.name for bag in bags]
        self.sizes: IntArray = np.array([len(bag) for bag in bags], dtype=np.int64)
        self.labels: Mapping[str, FloatArray] = {
            task.name: np.stack([self._label(bag, task) for bag in bags]) if bags else missing_labels(task, 0)
            for task in tasks
        }

    @staticmethod
    def _label(bag: Bag, task: TaskSpec) -> FloatArray:
        if task.name in bag.labels:
            return bag.labels[task.name].numpy().astype(np.float64)
        return missing_labels(task)

    def load(self, index: int) -> Bag:
        return self._bags[index]


class ArrayStore:
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
        return Bag(
            name=self.names[index],
            views={name: features[rows] for name, features in self._views.items()},
            mask=None if self._mask is None else self._mask[rows],
            labels=bag_labels(self._tasks, self.labels, index),
            coords=None if self._coords is None else self._coords[rows],
        )
