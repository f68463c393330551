"""From arrays of labels to tasks: kinds inferred or given, missing as NaN, specs fitted to a training set.

Inside a dataset every task's labels are one float64 column, [B] or (multilabel) [B, C], with NaN where
missing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from umda_fast.data.arrays import ArrayInput, FloatArray, as_numpy
from umda_fast.errors import DataError
from umda_fast.model.specs import TASK_KINDS, TaskKind, TaskSpec

KindOverride: TypeAlias = TaskKind | TaskSpec | Mapping[str, Any]
KindOverrides: TypeAlias = Mapping[str, KindOverride] | Sequence[TaskSpec]
ClassWeights: TypeAlias = Literal["balanced"] | None

MAX_CLASSES = 20
"""Integers with more distinct values than this are taken for a regression, not for classes."""


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
            label.
        where: what messages start with.

    Raises:
        DataError: naming the task, what was expected and what came.
    """
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
            spec, column = _column(f"{where}: labels {name!r}", name, labels[name], bags, kind)
        elif isinstance(kind, TaskSpec):
            spec, column = kind, np.full((bags, kind.classes) if kind.kind == "multilabel" else bags, np.nan)
        else:
            raise DataError(
                f"{where}: kinds: expected tasks among {', '.join(labels) or 'none'}, got {name!r}"
            )
        specs.append(spec)
        columns[name] = column
    return tuple(specs), columns


def fixed_tasks(kinds: KindOverrides | None) -> list[str]:
    """Tasks whose specs were given whole and are not fitted to a training split."""
    if isinstance(kinds, Mapping):
        return [name for name, kind in kinds.items() if isinstance(kind, TaskSpec)]
    return [spec.name for spec in kinds or ()]


def _by_name(kinds: KindOverrides | None, where: str) -> dict[str, TaskKind | TaskSpec]:
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


def _kind(name: str, kind: KindOverride, where: str) -> TaskKind | TaskSpec:
    if isinstance(kind, TaskSpec):
        if kind.name != name:
            raise DataError(f"{where}: kinds[{name!r}]: expected a TaskSpec of that name, got {kind.name!r}")
        return kind
    if isinstance(kind, Mapping):
        try:
            return TaskSpec(name=name, **kind)
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: kinds[{name!r}]: {error}") from error
    if kind not in TASK_KINDS:
        raise DataError(f"{where}: kinds[{name!r}]: expected one of {', '.join(TASK_KINDS)}, got {kind!r}")
    return kind


def _column(
    where: str, name: str, value: ArrayInput, bags: int, kind: TaskKind | TaskSpec | None
) -> tuple[TaskSpec, FloatArray]:
    array = as_numpy(where, value)
    if array.ndim not in (1, 2) or array.shape[0] != bags:
        raise DataError(f"{where}: expected {bags} rows, one for each bag, got shape {list(array.shape)}")
    wanted = kind.kind if isinstance(kind, TaskSpec) else kind
    if (array.ndim == 2) != (wanted == "multilabel") and not (wanted is None and array.ndim == 2):
        expected = "[B, C]" if wanted == "multilabel" else "[B]"
        raise DataError(
            f"{where}: expected {expected} for {wanted or 'one label a bag'}, got {list(array.shape)}"
        )
    if array.ndim == 2:
        return _multilabel(where, name, array, kind if isinstance(kind, TaskSpec) else None)
    numbers = _numbers(where, array)
    if isinstance(kind, TaskSpec):
        return kind, _given(where, kind, array, numbers)
    if numbers is None:
        if kind == "regression":
            raise DataError(
                f"{where}: expected numbers for regression, got text such as {_some_text(array)!r}"
            )
        return _categories(where, name, _texts(array), kind)
    present = numbers[~np.isnan(numbers)]
    if (kind or _infer(present)) == "regression":
        return fit_regression(TaskSpec(name, "regression"), numbers), numbers
    if not (present == np.floor(present)).all():
        raise DataError(f"{where}: expected whole numbers for {kind}, got {present[present % 1 != 0][0]:g}")
    if kind != "multiclass" and np.isin(present, (0, 1)).all():
        return TaskSpec(name, "binary", labels=("0", "1")), numbers
    return _categories(where, name, _number_texts(numbers), kind)


def _infer(present: FloatArray) -> TaskKind:
    distinct = np.unique(present)
    if not (distinct == np.floor(distinct)).all():
        return "regression"
    if np.isin(distinct, (0, 1)).all() or len(distinct) == 2:
        return "binary"
    # With fewer than three bags a class on average, whole numbers are more likely counts than classes.
    return "multiclass" if 2 < len(distinct) <= min(MAX_CLASSES, len(present) // 3) else "regression"


def _numbers(where: str, array: npt.NDArray[Any]) -> FloatArray | None:
    """The labels as numbers, NaN where missing; None if they are text."""
    if array.dtype.kind in "fiub":
        numbers = array.astype(np.float64)
    elif array.dtype.kind in "OUS":
        try:
            numbers = np.array([float(text) if text else np.nan for text in _texts(array)], dtype=np.float64)
        except ValueError:
            return None
    else:
        raise DataError(f"{where}: expected numbers or text, got dtype {array.dtype}")
    if np.isinf(numbers).any():
        raise DataError(f"{where}: expected finite numbers, got {numbers[np.isinf(numbers)][0]}")
    return numbers


def _texts(array: npt.NDArray[Any]) -> list[str]:
    """The labels as text, blank where missing."""

    def text(value: object) -> str:
        if value is None or (isinstance(value, float) and np.isnan(value)):
            return ""
        return (value.decode() if isinstance(value, bytes) else str(value)).strip()

    return [text(value) for value in array.tolist()]


def _some_text(array: npt.NDArray[Any]) -> str:
    def is_number(text: str) -> bool:
        try:
            float(text)
        except ValueError:
            return False
        return True

    return next(text for text in _texts(array) if text and not is_number(text))


def _number_texts(numbers: FloatArray) -> list[str]:
    return ["" if np.isnan(number) else f"{number:.0f}" for number in numbers]


def _categories(
    where: str, name: str, texts: list[str], kind: TaskKind | None
) -> tuple[TaskSpec, FloatArray]:
    """Distinct values, in numerical or else alphabetical order, become the classes 0, 1, ..."""
    distinct = list({text for text in texts if text})
    try:
        distinct.sort(key=float)
    except ValueError:
        distinct.sort()
    if kind is None:
        kind = "binary" if len(distinct) == 2 else "multiclass"
    if len(distinct) < 2 or (kind == "binary" and len(distinct) > 2):
        some = ", ".join(distinct[:5]) or "none"
        expected = "two" if kind == "binary" else "at least two"
        raise DataError(
            f"{where}: expected {expected} distinct values for {kind}, got {len(distinct)} ({some})"
        )
    spec = TaskSpec(name, kind, classes=1 if kind == "binary" else len(distinct), labels=tuple(distinct))
    return spec, _indices(distinct, texts)


def _indices(classes: Sequence[str], texts: Sequence[str]) -> FloatArray:
    index = {text: float(position) for position, text in enumerate(classes)}
    return np.array([index[text] if text else np.nan for text in texts], dtype=np.float64)


def _multilabel(
    where: str, name: str, array: npt.NDArray[Any], given: TaskSpec | None
) -> tuple[TaskSpec, FloatArray]:
    if array.dtype.kind not in "fiub":
        raise DataError(f"{where}: expected values of 0 or 1 for multilabel, got dtype {array.dtype}")
    column = array.astype(np.float64)
    if given is not None and array.shape[1] != given.classes:
        raise DataError(
            f"{where}: expected {given.classes} columns, one for each label, got {array.shape[1]}"
        )
    if array.shape[1] == 0:
        raise DataError(f"{where}: expected at least one column, got none")
    missing = np.isnan(column)
    wrong = ~missing & (column != 0) & (column != 1)
    if wrong.any():
        row = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise DataError(
            f"{where}: expected values of 0 or 1, got {column[row][wrong[row]][0]:g} in row {row}"
        )
    partly = np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1))
    if len(partly):
        raise DataError(
            f"{where}: expected the labels of a bag all there or all missing, got both in row {partly[0]}; "
            "make each column a task of its own instead"
        )
    return given or TaskSpec(name, "multilabel", classes=array.shape[1]), column


def _given(where: str, spec: TaskSpec, array: npt.NDArray[Any], numbers: FloatArray | None) -> FloatArray:
    """Labels of a task with fixed classes: class names where all labels are among them, else numbers."""
    if spec.kind == "regression":
        if numbers is None:
            raise DataError(
                f"{where}: expected numbers for regression, got text such as {_some_text(array)!r}"
            )
        return numbers
    if numbers is None or spec.labels is not None:
        if spec.labels is None:
            raise DataError(f"{where}: expected class numbers, got text such as {_some_text(array)!r}")
        whole = numbers is not None and (np.isnan(numbers) | (numbers == np.floor(numbers))).all()
        texts = _number_texts(numbers) if numbers is not None and whole else _texts(array)
        strange = [text for text in texts if text and text not in spec.labels]
        if not strange:
            return _indices(spec.labels, texts)
        if numbers is None:
            raise DataError(f"{where}: expected one of {', '.join(spec.labels)}, got {strange[0]!r}")
    top = 1 if spec.kind == "binary" else spec.classes - 1
    wrong = ~np.isnan(numbers) & ~((numbers >= 0) & (numbers <= top) & (numbers == np.floor(numbers)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise DataError(f"{where}: expected a class in 0..{top}, got {numbers[row]:g} in row {row}")
    return numbers


def fit_regression(spec: TaskSpec, column: FloatArray) -> TaskSpec:
    """`spec` with mean and standard deviation of the labels; 0 and 1 where there are too few."""
    present = column[~np.isnan(column)]
    if len(present) == 0:
        return replace(spec, mean=0.0, std=1.0)
    # fsum is exact, so that every machine standardises alike.
    mean = math.fsum(present) / len(present)
    std = math.sqrt(math.fsum((present - mean) ** 2) / len(present))
    return replace(spec, mean=mean, std=std if std > 0.0 else 1.0)


def fit_tasks(
    tasks: Sequence[TaskSpec], labels: Mapping[str, FloatArray], class_weights: ClassWeights = None
) -> tuple[TaskSpec, ...]:
    """Specs fitted to a training split: mean and std of regressions; with "balanced", class weights.

    Balanced weights are n / (classes * n_c) for binary and multiclass tasks, so that every class has the same
    say, and (negatives / positives) for each label of a multilabel task; 1 for a class that never occurs.
    """
    if class_weights not in (None, "balanced"):
        raise DataError(f'class_weights: expected "balanced" or None, got {class_weights!r}')
    fitted = []
    for task in tasks:
        column = labels[task.name]
        if task.kind == "regression":
            fitted.append(fit_regression(task, column))
        elif class_weights == "balanced":
            fitted.append(replace(task, class_weights=_balanced(task, column)))
        else:
            fitted.append(task)
    return tuple(fitted)


def _balanced(task: TaskSpec, column: FloatArray) -> tuple[float, ...]:
    counts = class_counts(task, column)
    present = int((~np.isnan(column.reshape(len(column), -1)[:, :1])).sum())
    if task.kind == "multilabel":
        return tuple((present - n) / n if 0 < n < present else 1.0 for n in counts)
    return tuple(present / (len(counts) * n) if n else 1.0 for n in counts)


def class_counts(task: TaskSpec, column: FloatArray) -> list[int]:
    """Labelled bags of every class (multilabel: positives of every label); empty for a regression."""
    if task.kind == "regression":
        return []
    if task.kind == "multilabel":
        return [int(count) for count in np.nansum(column, axis=0)]
    present = column[~np.isnan(column)].astype(np.int64)
    classes = 2 if task.kind == "binary" else task.classes
    return cast("list[int]", np.bincount(present, minlength=classes).tolist())
