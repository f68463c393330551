"""From arrays of labels to tasks: kinds inferred or given, missing as NaN, specs fitted to a training set.

Inside a dataset every task's labels are one float64 column, [B] or (multilabel, survival) [B, C], with NaN where
missing. What labels of a kind look like, the kind says (`umda_fast.tasks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from umda_fast.data.arrays import ArrayInput, FloatArray, as_numpy
from umda_fast.data.event_columns import event_columns
from umda_fast.errors import DataError
from umda_fast.tasks import TASK_KINDS, TaskSpec, kind_of
from umda_fast.tasks.columns import as_numbers, as_texts, distinct_texts
from umda_fast.tasks.kind import ClassWeights

__all__ = [
    "MAX_CLASSES",
    "ClassWeights",
    "KindOverride",
    "KindOverrides",
    "UnneededLabels",
    "fit_tasks",
    "fixed_tasks",
    "ignore_label",
    "label_columns",
    "missing_labels",
]

KindOverride: TypeAlias = str | TaskSpec | Mapping[str, Any]
KindOverrides: TypeAlias = Mapping[str, KindOverride] | Sequence[TaskSpec]

MAX_CLASSES = 20
"""Integers with more distinct values than this are taken for a regression, not for classes."""


class UnneededLabels(tuple[TaskSpec, ...]):
    """The tasks of a model that is only to predict: what cannot be read as their labels is missing. As `kinds`, or
    where bags are brought into a model's form.

    Attributes:
        ignored: what was wrong with these labels, one line each.
    """

    ignored: list[str]

    def __new__(cls, tasks: Sequence[TaskSpec]) -> UnneededLabels:
        self = super().__new__(cls, tasks)
        self.ignored = []
        return self


def ignore_label(tasks: object, error: DataError) -> None:
    """Go on without some labels if `tasks` need none, else raise what is wrong with them."""
    if not isinstance(tasks, UnneededLabels):
        raise error
    tasks.ignored.append(str(error))


def label_columns(
    labels: Mapping[str, ArrayInput],
    bags: int,
    kinds: KindOverrides | None = None,
    *,
    where: str,
) -> tuple[tuple[TaskSpec, ...], dict[str, FloatArray]]:
    """Tasks and their label columns.

    Args:
        labels: task name -> [B] or [B, C]; NaN, None or a blank string is a missing label.
        bags: B.
        kinds: as in `BagDataset.from_arrays`. A TaskSpec whose task has no array gives a task without a
            label. Two arrays may be one task (`umda_fast.data.event_columns`).
        where: what messages start with.

    Raises:
        DataError: naming the task, what was expected and what came.
    """
    labels, kinds = _with_events(labels, kinds, where)
    wanted = _by_name(kinds, where)
    specs, columns = [], {}
    if isinstance(kinds, Sequence):
        # Another dataset's tasks: these, in their order, and no others.
        names = list(wanted)
    else:
        names = [*labels, *(name for name in wanted if name not in labels)]
    for name in names:
        kind = wanted.get(name)
        if name in labels:
            try:
                spec, column = _column(f"{where}: labels {name!r}", name, labels[name], bags, kind)
            except DataError as error:
                ignore_label(kinds, error)
                assert isinstance(kind, TaskSpec)
                spec, column = kind, missing_labels(kind, bags)
        elif isinstance(kind, TaskSpec):
            spec, column = kind, missing_labels(kind, bags)
        else:
            raise DataError(
                f"{where}: kinds: expected tasks among {', '.join(labels) or 'none'}, got {name!r}"
            )
        specs.append(spec)
        columns[name] = column
    return tuple(specs), columns


def _with_events(
    labels: Mapping[str, ArrayInput], kinds: KindOverrides | None, where: str
) -> tuple[dict[str, ArrayInput], KindOverrides | None]:
    """Times and events in one array for every task of kind survival, and the kinds that say so."""
    said = dict(kinds) if isinstance(kinds, Mapping) else {}
    found, gone = {}, set()
    for pair in event_columns(list(labels), kinds, where):
        parts = [as_numpy(f"{where}: labels {name!r}", labels[name]) for name in (pair.time, pair.event)]
        if len({part.shape for part in parts}) > 1 or parts[0].ndim != 1:
            shapes = " and ".join(str(list(part.shape)) for part in parts)
            raise DataError(f"{where}: labels {pair.time!r} and {pair.event!r}: expected [B] each, got {shapes}")
        found[pair.time] = pair.task, np.stack([part.astype(object) for part in parts], axis=1)
        gone |= {pair.event, *pair.others}
        said[pair.task] = pair.completes(said.get(pair.task))
    joined = dict(found.get(name, (name, array)) for name, array in labels.items() if name not in gone)
    return joined, said if kinds is None or isinstance(kinds, Mapping) else kinds


def fixed_tasks(kinds: KindOverrides | None) -> list[str]:
    """Tasks whose specs were given whole and are not fitted to a training split."""
    if isinstance(kinds, Mapping):
        return [name for name, kind in kinds.items() if isinstance(kind, TaskSpec)]
    return [spec.name for spec in kinds or ()]


def _by_name(kinds: KindOverrides | None, where: str) -> dict[str, str | TaskSpec]:
    if kinds is None:
        return {}
    if isinstance(kinds, Mapping):
        return {name: _kind(name, kind, where) for name, kind in kinds.items()}
    for spec in kinds:
        if not isinstance(spec, TaskSpec):
            raise DataError(
                f"{where}: kinds: expected a mapping or a sequence of TaskSpec, got {spec!r} in it"
            )
    return {spec.name: spec for spec in kinds}


def _kind(name: str, kind: KindOverride, where: str) -> str | TaskSpec:
    if isinstance(kind, TaskSpec):
        if kind.name != name:
            raise DataError(f"{where}: kinds[{name!r}]: expected a TaskSpec of that name, got {kind.name!r}")
        return kind
    if isinstance(kind, Mapping):
        try:
            return TaskSpec(name=name, **_completed(kind))
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: kinds[{name!r}]: {error}") from error
    if not isinstance(kind, str) or kind not in TASK_KINDS:
        raise DataError(f"{where}: kinds[{name!r}]: expected one of {', '.join(TASK_KINDS)}, got {kind!r}")
    return kind


def _completed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a TaskSpec as people write them: classes are as many as have names, and names may be whole numbers."""
    completed, labels = dict(fields), fields.get("labels")
    if isinstance(labels, Sequence) and not isinstance(labels, str):
        plain = [str(label) if isinstance(label, int) and not isinstance(label, bool) else label for label in labels]
        completed["labels"] = plain
        kind = fields.get("kind")
        if isinstance(kind, str) and kind in TASK_KINDS and TASK_KINDS[kind].any_classes:
            completed.setdefault("classes", len(plain))
    if isinstance(fields.get("cuts"), Sequence):
        completed.setdefault("classes", len(fields["cuts"]))
    return completed


def _column(
    where: str, name: str, value: ArrayInput, bags: int, given: str | TaskSpec | None
) -> tuple[TaskSpec, FloatArray]:
    array = as_numpy(where, value)
    if array.ndim not in (1, 2) or array.shape[0] != bags:
        raise DataError(f"{where}: expected {bags} rows, one for each bag, got shape {list(array.shape)}")
    if given is None:
        given = _infer(where, array)
    kind = kind_of(given) if isinstance(given, TaskSpec) else TASK_KINDS[given]
    if (array.ndim == 2) != kind.several:
        expected = "[B, C]" if kind.several else "[B]"
        raise DataError(f"{where}: expected {expected} for {kind.name}, got {list(array.shape)}")
    if isinstance(given, TaskSpec):
        column = kind.read_as(where, given, array)
        return kind.complete(given, column), column
    return kind.read(where, name, array)


def _infer(where: str, array: npt.NDArray[Any]) -> str:
    """The kind of labels of which nothing is said."""
    if array.ndim == 2:
        return "multilabel"
    numbers = as_numbers(where, array)
    if numbers is None:
        return "binary" if len(distinct_texts(as_texts(array))) == 2 else "multiclass"
    present = numbers[~np.isnan(numbers)]
    distinct = np.unique(present)
    if not (distinct == np.floor(distinct)).all():
        return "regression"
    if np.isin(distinct, (0, 1)).all() or len(distinct) == 2:
        return "binary"
    # With fewer than three bags a class on average, whole numbers are more likely counts than classes.
    return "multiclass" if 2 < len(distinct) <= min(MAX_CLASSES, len(present) // 3) else "regression"


def fit_tasks(
    tasks: Sequence[TaskSpec], labels: Mapping[str, FloatArray], class_weights: ClassWeights = None
) -> tuple[TaskSpec, ...]:
    """Specs fitted to a training split: mean and std of regressions; with "balanced", class weights.

    Balanced weights are n / (classes * n_c) for binary and multiclass tasks, so that every class has the same
    say, and (negatives / positives) for each label of a multilabel task; 1 for a class that never occurs.
    """
    if class_weights not in (None, "balanced"):
        raise DataError(f'class_weights: expected "balanced" or None, got {class_weights!r}')
    return tuple(kind_of(task).fit(task, labels[task.name], class_weights) for task in tasks)


def missing_labels(task: TaskSpec, *bags: int) -> FloatArray:
    """NaN for every label: of one bag [*label_shape], or of B bags [B, *label_shape]."""
    return np.full((*bags, *task.label_shape), np.nan)
