"""Which class of a binary task is label 1, the one whose probability is predicted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from umda_fast.data.arrays import FloatArray
from umda_fast.data.labels import KindOverrides
from umda_fast.errors import DataError
from umda_fast.tasks import TaskSpec, kind_of

__all__ = ["Positive", "choose_positive"]

Class: TypeAlias = str | int | float | bool
Positive: TypeAlias = Class | Mapping[str, Class]
"""One class, of all binary tasks that have it, or task: class."""

# What YAML makes of a class that is called so.
_TRUTH = {True: ("yes", "true", "on", "y"), False: ("no", "false", "off", "n")}


def choose_positive(
    tasks: Sequence[TaskSpec],
    labels: Mapping[str, FloatArray],
    positive: Positive | None,
    kinds: KindOverrides | None,
    *,
    where: str,
) -> tuple[tuple[TaskSpec, ...], dict[str, FloatArray]]:
    """The tasks and their columns, with the classes that were chosen as label 1.

    Args:
        positive: None leaves all as they are: the later of the two classes, in numerical or else alphabetical order.
        kinds: the option of that name. A sequence is the tasks of a model, whose classes are settled.
        where: what messages start with.

    Raises:
        DataError: naming the task and its classes, for another class, another task, or one that is not binary.
    """
    columns = dict(labels)
    if positive is None or (kinds is not None and not isinstance(kinds, Mapping)):
        return tuple(tasks), columns
    chosen = _by_task(tasks, positive, where)
    specs = []
    for task in tasks:
        if task.name in chosen and _place(task, chosen[task.name], where) == 0:
            weights = task.class_weights
            columns[task.name] = 1.0 - columns[task.name]
            task = replace(task, labels=task.class_names[::-1], class_weights=weights and weights[::-1])
        specs.append(task)
    return tuple(specs), columns


def _by_task(tasks: Sequence[TaskSpec], positive: Positive, where: str) -> Mapping[str, Class]:
    binary = [task for task in tasks if kind_of(task).positive(task) is not None]
    if isinstance(positive, Mapping):
        for name in positive:
            if name not in [task.name for task in binary]:
                known = ", ".join(task.name for task in binary) or "of which there is none"
                raise DataError(f"{where}: positive: expected binary tasks, {known}; got {name!r}")
        return positive
    found = {task.name: positive for task in binary if _named(task, positive) is not None}
    if not found:
        known = "; ".join(f"{task.name}: {', '.join(task.class_names)}" for task in binary) or "of which there is none"
        raise DataError(f"{where}: positive: expected a class of a binary task, {known}; got {positive!r}")
    return found


def _place(task: TaskSpec, wanted: Class, where: str) -> int:
    name = _named(task, wanted)
    if name is None:
        raise DataError(f"{where}: positive: expected {' or '.join(task.class_names)} for {task.name}, got {wanted!r}")
    return task.class_names.index(name)


def _named(task: TaskSpec, wanted: Class) -> str | None:
    """The class that is meant, None if there is none."""
    if isinstance(wanted, bool):
        return next((name for name in task.class_names if name.lower() in _TRUTH[wanted]), None)
    text = f"{wanted:g}" if isinstance(wanted, int | float) else str(wanted)
    return text if text in task.class_names else None
