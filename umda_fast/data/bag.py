"""One bag of instances, and its labels as tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray, dtype_and_shape
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec
from umda_fast.tasks import kind_of


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
            multiclass and ordinal: int64 []; multilabel: 0 or 1, float32 [C]; regression: float32 [] in original units;
            survival: time and event, float32 [2].
        coords: [n, 2], NaN for an instance without a place, or None.
        slides: int64 [n], ascending: which of its slides each instance is of, in a bag of several, each with
            coordinates of its own; the instance of a whole slide, whose coordinates are NaN, has a number of its own.
            None: the bag is one.
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
    slides: Tensor | None = None

    def __post_init__(self) -> None:
        where = f"bag {self.name!r}"
        if not self.views:
            raise DataError(f"{where}: views: expected at least one view, got none")
        n = -1
        for view, features in self.views.items():
            if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
                got = dtype_and_shape(features) if isinstance(features, Tensor) else type(features).__name__
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
                raise DataError(f"{where}: mask: expected bool [{n}, V], got {dtype_and_shape(self.mask)}")
            bare = (~self.mask.any(dim=1)).nonzero()
            if len(bare):
                raise DataError(
                    f"{where}: mask: expected at least one view for every instance, "
                    f"got none for instance {int(bare[0])}"
                )
        if self.coords is not None and self.coords.shape != (n, 2):
            raise DataError(f"{where}: coords: expected [{n}, 2], got {dtype_and_shape(self.coords)}")

        if self.slides is not None and (
            self.slides.dtype != torch.int64 or self.slides.shape != (n,) or bool((self.slides.diff() < 0).any())
        ):
            raise DataError(f"{where}: slides: expected int64 [{n}], ascending, got {dtype_and_shape(self.slides)}")

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
    kind_of(task).check_label(where, task, label)


def label_tensor(task: TaskSpec, value: npt.ArrayLike) -> Tensor:
    """One label, or a column of labels, in the dtype of its kind: int64 for multiclass and ordinal, else float32."""
    return torch.as_tensor(np.asarray(value), dtype=kind_of(task).label_dtype)


def bag_labels(tasks: Sequence[TaskSpec], columns: Mapping[str, FloatArray], index: int) -> dict[str, Tensor]:
    """The labels of bag `index` out of columns as `BagDataset.labels` has them; a missing one is absent."""
    labels = {}
    for task in tasks:
        value = columns[task.name][index]
        if not np.isnan(value).any():
            labels[task.name] = label_tensor(task, value)
    return labels
