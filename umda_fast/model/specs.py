"""What a model is told about its views and tasks: names, widths, kinds. Plain data, JSON-able, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

TaskKind: TypeAlias = Literal["binary", "multiclass", "multilabel", "regression"]
TASK_KINDS: tuple[TaskKind, ...] = get_args(TaskKind)


def _check_name(owner: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{owner}.name: expected a string, got {type(name).__name__}")
    if not name or name != name.strip():
        raise ValueError(
            f"{owner}.name: expected a non-empty string without surrounding blanks, got {name!r}"
        )


def _check_int(argument: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{argument}: expected an int, got {value!r} ({type(value).__name__})")
    return value


def _as_float(argument: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{argument}: expected a number, got {value!r} ({type(value).__name__})")
    if not math.isfinite(value):
        raise ValueError(f"{argument}: expected a finite number, got {value!r}")
    return float(value)


def _as_tuple(argument: str, value: object) -> tuple[object, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{argument}: expected a sequence, got {value!r} ({type(value).__name__})")
    return tuple(value)


@dataclass(frozen=True)
class ViewSpec:
    """One view: its name and the width of its features, `[n, width]`.

    Images and other shaped inputs are given flattened; an encoder of one's own unflattens them first.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    name: str
    width: int

    def __post_init__(self) -> None:
        _check_name("ViewSpec", self.name)
        if _check_int(f"ViewSpec({self.name!r}).width", self.width) < 1:
            raise ValueError(f"ViewSpec({self.name!r}).width: expected at least 1, got {self.width}")


@dataclass(frozen=True)
class MetadataSpec:
    """One number that is known of a bag beside its instances (an age, a magnification).

    Attributes:
        name: unique among a model's metadata.
        mean, std: of the training bags; models see `(value - mean) / std`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _check_name("MetadataSpec", self.name)
        where = f"MetadataSpec({self.name!r})"
        object.__setattr__(self, "mean", _as_float(f"{where}.mean", self.mean))
        object.__setattr__(self, "std", _as_float(f"{where}.std", self.std))
        if self.std <= 0.0:
            raise ValueError(f"{where}.std: expected a positive number, got {self.std}")


@dataclass(frozen=True)
class TaskSpec:
    """One task: what is predicted for a bag and how it is scored.

    Attributes:
        name: unique among a model's tasks.
        kind: `binary` (label 0/1), `multiclass` (label 0..classes-1), `multilabel` (classes 0/1 labels) or
            `regression` (a real number).
        classes: 1 for binary and regression, at least 2 for multiclass, at least 1 for multilabel.
        mean, std: regression only, of the training labels in original units; losses see `(y - mean) / std`.
        labels: names of the classes: 2 for binary (of label 0, of label 1), else `classes`.
        class_weights: weights in the loss: 2 for binary (of label 0, of label 1), `classes` for multiclass,
            `classes` for multilabel (of each label's positives); None weighs all alike.
        thresholds: multilabel only, the probability from which each of the `classes` labels is predicted; None: 0.5.

    Sequences are stored as tuples, so `TaskSpec(**json.loads(json.dumps(dataclasses.asdict(spec)))) == spec`.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    name: str
    kind: TaskKind
    classes: int = 1
    mean: float = 0.0
    std: float = 1.0
    labels: tuple[str, ...] | None = None
    class_weights: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_name("TaskSpec", self.name)
        where = f"TaskSpec({self.name!r})"
        if self.kind not in TASK_KINDS:
            raise ValueError(f"{where}.kind: expected one of {', '.join(TASK_KINDS)}, got {self.kind!r}")
        self._check_classes(where)
        self._check_standardisation(where)
        if self.labels is not None:
            self._check_labels(where)
        if self.class_weights is not None:
            self._check_class_weights(where)
        if self.thresholds is not None:
            self._check_thresholds(where)

    def _check_classes(self, where: str) -> None:
        classes = _check_int(f"{where}.classes", self.classes)
        if self.kind in ("binary", "regression"):
            if classes != 1:
                raise ValueError(f"{where}.classes: expected 1 for a {self.kind} task, got {classes}")
        else:
            least = 2 if self.kind == "multiclass" else 1
            if classes < least:
                raise ValueError(
                    f"{where}.classes: expected at least {least} for a {self.kind} task, got {classes}"
                )

    def _check_standardisation(self, where: str) -> None:
        object.__setattr__(self, "mean", _as_float(f"{where}.mean", self.mean))
        object.__setattr__(self, "std", _as_float(f"{where}.std", self.std))
        if self.std <= 0.0:
            raise ValueError(f"{where}.std: expected a positive number, got {self.std}")
        if self.kind != "regression" and (self.mean, self.std) != (0.0, 1.0):
            raise ValueError(
                f"{where}: mean and std belong to regression tasks, got {self.mean}, {self.std} "
                f"for a {self.kind} task"
            )

    def _check_labels(self, where: str) -> None:
        labels = _as_tuple(f"{where}.labels", self.labels)
        if not all(isinstance(label, str) for label in labels):
            raise TypeError(f"{where}.labels: expected strings, got {labels!r}")
        self._check_per_class(f"{where}.labels", labels)
        if len(set(labels)) != len(labels):
            raise ValueError(f"{where}.labels: expected distinct names, got {labels!r}")
        object.__setattr__(self, "labels", labels)

    def _check_class_weights(self, where: str) -> None:
        argument = f"{where}.class_weights"
        weights = tuple(_as_float(argument, weight) for weight in _as_tuple(argument, self.class_weights))
        self._check_per_class(argument, weights)
        if any(weight <= 0.0 for weight in weights):
            raise ValueError(f"{argument}: expected positive numbers, got {weights!r}")
        object.__setattr__(self, "class_weights", weights)

    def _check_thresholds(self, where: str) -> None:
        argument = f"{where}.thresholds"
        thresholds = tuple(_as_float(argument, value) for value in _as_tuple(argument, self.thresholds))
        if self.kind != "multilabel":
            raise ValueError(f"{argument}: belong to multilabel tasks, got {thresholds} for a {self.kind} task")
        self._check_per_class(argument, thresholds)
        if any(not 0.0 <= value <= 1.0 for value in thresholds):
            raise ValueError(f"{argument}: expected numbers in 0..1, got {thresholds!r}")
        object.__setattr__(self, "thresholds", thresholds)

    def _check_per_class(self, argument: str, values: tuple[object, ...]) -> None:
        if self.kind == "regression":
            raise ValueError(f"{argument}: a regression task has no classes, got {values!r}")
        expected = 2 if self.kind == "binary" else self.classes
        if len(values) != expected:
            raise ValueError(
                f"{argument}: expected {expected} values for a {self.kind} task, got {len(values)}"
            )

    @property
    def outputs(self) -> int:
        """Width of the task's head: 1 for binary and regression, else `classes`."""
        return self.classes if self.kind in ("multiclass", "multilabel") else 1


def check_distinct(argument: str, specs: Iterable[ViewSpec | TaskSpec | MetadataSpec]) -> None:
    """Raise ValueError naming `argument` if two specs share a name."""
    names = [spec.name for spec in specs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"{argument}: expected distinct names, got {', '.join(repeated)} more than once")
