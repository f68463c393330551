"""Kinds that predict probabilities of classes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.tasks.columns import as_numbers, as_texts, by_name, distinct_texts, number_texts, some_text
from umda_fast.tasks.few_units import wilson_interval
from umda_fast.tasks.kind import Array, ClassWeights, FloatArray, TaskKind, TaskSpec
from umda_fast.tasks.shown import Confusion, Shown

__all__ = ["THRESHOLD", "Classes", "OneClass", "predicted_labels"]

# Probability from which a label of a multilabel task, or class 1 of a binary one, is predicted.
THRESHOLD = 0.5


def predicted_labels(task: TaskSpec, probabilities: Tensor) -> Tensor:
    """Which labels are predicted, bool: of a binary task from `THRESHOLD` on, of a multilabel one [..., C] from its
    thresholds on if it has any."""
    if task.thresholds is None:
        return probabilities >= THRESHOLD
    return probabilities >= torch.tensor(task.thresholds, dtype=probabilities.dtype, device=probabilities.device)


class Classes(TaskKind):
    """Classes with names, weights and probabilities, which are sigmoids of the logits unless a kind says otherwise."""

    calibration = "temperature"

    def class_count(self, task: TaskSpec) -> int:
        return task.classes

    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return logits.sigmoid()

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack(list(logits))
        # log p - log(1 - p), the sharing out cancelling
        return F.logsigmoid(stacked).logsumexp(0) - F.logsigmoid(-stacked).logsumexp(0)

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        """-1 and 1, so that logits above 0 predict the label."""
        targets: FloatArray = 2.0 * target.reshape(len(target), -1) - 1.0
        return targets

    @abstractmethod
    def balanced(self, task: TaskSpec, column: FloatArray) -> tuple[float, ...]:
        """Class weights by which every class has the same say; 1 for a class that never occurs."""

    def fit(self, task: TaskSpec, column: FloatArray, class_weights: ClassWeights = None) -> TaskSpec:
        return replace(task, class_weights=self.balanced(task, column)) if class_weights == "balanced" else task

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return self.losses(task, logits, logits.new_full((len(logits), *self.label_shape(task)), 0.5)).mean()

    def few_units(self, task: TaskSpec, score: float, target: Array, level: float) -> tuple[float, float] | None:
        """Wilson's interval: exact in kind for an accuracy, and wide enough for other means of values in 0..1."""
        return wilson_interval(score, len(target), level)

    def few_units_of(
        self, task: TaskSpec, metric: str, score: float, target: Array, level: float
    ) -> tuple[float, float] | None:
        """Wilson's interval of the others too, for as many units as they rest on; none below 0, where no share is."""
        if metric == self.primary:
            return self.few_units(task, score, target, level)
        count = self.units_of(task, metric, target)
        return wilson_interval(score, count, level) if score >= 0.0 and count > 0 else None

    def units_of(self, task: TaskSpec, metric: str, target: Array) -> float:
        """Independent units with which a share is as uncertain as a metric."""
        return float(len(target))

    def confidence(self, task: TaskSpec, probabilities: Tensor) -> Tensor:
        """That of the least certain label."""
        return torch.maximum(probabilities, 1 - probabilities).amin(1)

    def reliability(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return probabilities.reshape(-1), target.reshape(-1) == 1

    def columns(self, task: TaskSpec) -> list[str]:
        return [*(f"{task.name}_probability_{name}" for name in task.class_names), f"{task.name}_predicted"]


class OneClass(Classes):
    """A bag is of one class; `classes` of 2 or more, or, if not `any_classes`, two."""

    @abstractmethod
    def predicted(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        """The class predicted, int64 [B]."""

    def weights(self, task: TaskSpec, target: Tensor, like: Tensor) -> Tensor | None:
        return None if task.class_weights is None else like.new_tensor(task.class_weights)[target.long()]

    # ---- labels

    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        numbers = as_numbers(where, array)
        if numbers is None:
            return self._by_value(where, name, as_texts(array))
        present = numbers[~np.isnan(numbers)]
        if not (present == np.floor(present)).all():
            raise DataError(
                f"{where}: expected whole numbers for {self.name}, got {present[present % 1 != 0][0]:g}"
            )
        return self._by_value(where, name, number_texts(numbers))

    def _by_value(self, where: str, name: str, texts: list[str]) -> tuple[TaskSpec, FloatArray]:
        """Distinct values become the classes 0, 1, ..."""
        distinct = distinct_texts(texts)
        if len(distinct) < 2 or (not self.any_classes and len(distinct) > 2):
            some = ", ".join(distinct[:5]) or "none"
            expected = "at least two" if self.any_classes else "two"
            raise DataError(
                f"{where}: expected {expected} distinct values for {self.name}, got {len(distinct)} ({some})"
            )
        classes = len(distinct) if self.any_classes else 1
        return TaskSpec(name, self.name, classes, labels=tuple(distinct)), by_name(distinct, texts)

    def read_as(self, where: str, task: TaskSpec, array: Array) -> FloatArray:
        """Class names where all labels are among them, as written or as whole numbers, else class numbers."""
        numbers = as_numbers(where, array, said=True)
        if numbers is None or task.labels is not None:
            if task.labels is None:
                raise DataError(f"{where}: expected class numbers, got text such as {some_text(array)!r}")
            whole = numbers is not None and (np.isnan(numbers) | (numbers == np.floor(numbers))).all()
            forms = [as_texts(array), *([number_texts(numbers)] if numbers is not None and whole else [])]
            for texts in forms:
                if all(text in task.labels for text in texts if text):
                    return by_name(task.labels, texts)
            if numbers is None:
                strange = next(text for text in forms[0] if text and text not in task.labels)
                raise DataError(f"{where}: expected one of {', '.join(task.labels)}, got {strange!r}")
        top = self.class_count(task) - 1
        wrong = ~np.isnan(numbers) & ~((numbers >= 0) & (numbers <= top) & (numbers == np.floor(numbers)))
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise DataError(f"{where}: expected a class in 0..{top}, got {numbers[row]:g} in row {row}")
        return numbers

    def check_label(self, where: str, task: TaskSpec, label: Tensor) -> None:
        if label.dim() != 0:
            raise DataError(f"{where}: expected one value, got shape {list(label.shape)}")
        value, count = float(label), self.class_count(task)
        if not (value.is_integer() and 0 <= value < count):
            expected = f"a class in 0..{count - 1}" if self.any_classes else "0 or 1"
            raise DataError(f"{where}: expected {expected}, got {value:g}")

    def counts(self, task: TaskSpec, column: FloatArray) -> list[int]:
        present = column[~np.isnan(column)].astype(np.int64)
        counts: list[int] = np.bincount(present, minlength=self.class_count(task)).tolist()
        return counts

    def balanced(self, task: TaskSpec, column: FloatArray) -> tuple[float, ...]:
        """n / (classes * n_c)."""
        counts = self.counts(task, column)
        present = int((~np.isnan(column)).sum())
        return tuple(present / (len(counts) * n) if n else 1.0 for n in counts)

    def strata(self, task: TaskSpec, column: FloatArray) -> list[npt.NDArray[np.bool_]]:
        return [column == index for index in range(self.class_count(task))]

    def rename(self, task: TaskSpec, column: FloatArray, positions: Sequence[int]) -> FloatArray:
        renamed = np.full(len(column), np.nan)
        known = ~np.isnan(column)
        renamed[known] = np.asarray(positions, dtype=np.float64)[column[known].astype(np.int64)]
        return renamed

    def problem(self, task: TaskSpec, column: FloatArray, everywhere: FloatArray) -> str | None:
        counted = zip(task.class_names, self.counts(task, column), self.counts(task, everywhere), strict=True)
        # A class that no split has may be impossible, like a largest digit 0 among two digits or more.
        absent = [name for name, n, total in counted if n == 0 and (total > 0 or not self.any_classes)]
        return f"no bag of class {', '.join(absent)}" if absent else None

    # ---- scores

    def units_of(self, task: TaskSpec, metric: str, target: Array) -> float:
        """Of means over k classes `k^2 / sum(1 / n_c)`, with which the variance is that of shares of n_c each."""
        if metric not in ("balanced_accuracy", "f1_macro", "auprc"):
            return super().units_of(task, metric, target)
        _, counts = np.unique(target, return_counts=True)
        return float(len(counts) ** 2 / (1.0 / counts).sum()) if len(counts) else 0.0

    def correct(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> Tensor:
        return self.predicted(task, probabilities) == target

    def cells(self, task: TaskSpec, prediction: Tensor) -> list[list[str]]:
        names = task.class_names
        chosen = self.predicted(task, prediction).tolist()
        return [
            [*(f"{value:.6g}" for value in values), names[own]]
            for values, own in zip(prediction.tolist(), chosen, strict=True)
        ]

    def shown_errors(self, task: TaskSpec, prediction: Tensor, target: Tensor) -> Shown:
        return Confusion(self.predicted(task, prediction), target.long(), task.class_names)
