"""Bags for a model that was trained on others: its views in its order, its tasks, its classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from umda_fast.data.bag import Bag, bag_labels
from umda_fast.data.dataset import BagDataset
from umda_fast.data.labels import ignore_label, missing_labels
from umda_fast.data.metadata import Metadata
from umda_fast.errors import DataError
from umda_fast.model import MetadataSpec, TaskSpec, ViewSpec
from umda_fast.tasks import kind_of

__all__ = ["adapt_dataset"]


def adapt_dataset(
    dataset: BagDataset, views: Sequence[ViewSpec], tasks: Sequence[TaskSpec], metadata: Sequence[MetadataSpec] = ()
) -> BagDataset:
    """`dataset` as a model with `views`, `tasks` and `metadata` takes it.

    A view that the data lacks is a missing view, a task that it lacks has missing labels. Views and tasks
    that the model does not know are left out. Classes are matched by their names where both sides have names. Labels of
    tasks that are `UnneededLabels` are missing where they are not the model's.

    Raises:
        DataError: no view in common, a width that differs, a task of another kind, or a class the model does
        not know.
    """
    if dataset.views == tuple(views) and dataset.tasks == tuple(tasks):
        return _with_metadata(dataset, dataset.metadata, metadata)
    widths = {view.name: view.width for view in dataset.views}
    if not any(view.name in widths for view in views):
        raise DataError(
            f"{dataset.name}: expected views {', '.join(v.name for v in views)} as the model has, "
            f"got {', '.join(widths)}"
        )
    for view in views:
        if widths.get(view.name, view.width) != view.width:
            raise DataError(
                f"{dataset.name}: view {view.name!r}: expected width {view.width} as the model has, "
                f"got {widths[view.name]}"
            )
    theirs = {task.name: task for task in dataset.tasks}
    classes = {}
    for task in tasks:
        if task.name in theirs:
            try:
                classes[task.name] = _class_map(dataset.name, task, theirs[task.name])
            except DataError as error:
                ignore_label(tasks, error)
    adapted = BagDataset(_AdaptedStore(dataset, views, tasks, classes), views, tasks, dataset.name)
    adapted = adapted.with_groups(dataset.groups)
    return _with_metadata(adapted, dataset.metadata, metadata)


def _with_metadata(dataset: BagDataset, given: Metadata | None, wanted: Sequence[MetadataSpec]) -> BagDataset:
    """`dataset` with the numbers that the model knows, missing where the data does not have them."""
    if not wanted:
        return dataset if dataset.metadata is None else dataset.with_metadata(None)
    given = Metadata((), np.empty((len(dataset), 0))) if given is None else given
    return dataset.with_metadata(given.select([spec.name for spec in wanted]))


def _class_map(where: str, ours: TaskSpec, theirs: TaskSpec) -> list[int] | None:
    """Positions of their classes among ours; None where they are the same."""
    if theirs.kind != ours.kind:
        raise DataError(
            f"{where}: task {ours.name!r}: expected kind {ours.kind} as the model has, got {theirs.kind}"
        )
    if not kind_of(ours).class_count(ours):
        return None
    if ours.labels is not None and theirs.labels is not None:
        unknown = [label for label in theirs.labels if label not in ours.labels]
        if unknown:
            raise DataError(
                f"{where}: task {ours.name!r}: class {unknown[0]!r} is unknown to the model; expected one of "
                f"{', '.join(ours.labels)}"
            )
        positions = [ours.labels.index(label) for label in theirs.labels]
        return None if positions == list(range(len(ours.labels))) else positions
    if theirs.classes > ours.classes or (kind_of(ours).several and theirs.classes != ours.classes):
        raise DataError(
            f"{where}: task {ours.name!r}: expected {ours.classes} classes as the model has, "
            f"got {theirs.classes}"
        )
    return None


class _AdaptedStore:
    """Reads bags of a dataset and hands them on under a model's views and tasks."""

    def __init__(
        self,
        dataset: BagDataset,
        views: Sequence[ViewSpec],
        tasks: Sequence[TaskSpec],
        classes: Mapping[str, list[int] | None],
    ) -> None:
        self._dataset = dataset
        self._views = [view.name for view in views]
        self._tasks = tuple(tasks)
        self._classes = classes
        theirs = [view.name for view in dataset.views]
        self._columns = [theirs.index(name) if name in theirs else -1 for name in self._views]
        self.names: Sequence[str] = dataset.names
        self.sizes = dataset.sizes
        self.positions = dataset.positions
        self.slides = dataset.slides
        self.skipped = dataset.skipped
        columns = dataset.labels
        self.labels = {task.name: self._column(task, columns.get(task.name)) for task in self._tasks}

    def _column(self, task: TaskSpec, column: np.ndarray | None) -> np.ndarray:
        if column is None or task.name not in self._classes:
            return missing_labels(task, len(self.names))
        positions = self._classes[task.name]
        return column if positions is None else kind_of(task).rename(task, column, positions)

    def load(self, index: int) -> Bag:
        bag = self._dataset[index]
        present = bag.mask
        if present is None:
            given = torch.tensor([view.name in bag.views for view in self._dataset.views])
            present = given.expand(len(bag), -1)
        absent = torch.zeros(len(bag), 1, dtype=torch.bool)
        mask = torch.cat([present, absent], dim=1)[:, self._columns]
        bare = (~mask.any(dim=1)).nonzero()
        if len(bare):
            raise DataError(
                f"bag {bag.name!r}: instance {int(bare[0])} has none of the views the model knows"
            )
        views = {name: features for name, features in bag.views.items() if name in self._views}
        return Bag(bag.name, views, mask, bag_labels(self._tasks, self.labels, index), bag.coords, slides=bag.slides)
