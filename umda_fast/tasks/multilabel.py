"""Any number of labels for a bag: cross entropy of the sigmoids, mean over labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.tasks import class_scores as of
from umda_fast.tasks.classes import THRESHOLD, Classes, predicted_labels
from umda_fast.tasks.kind import Array, FloatArray, TaskSpec
from umda_fast.tasks.shown import Rows, Shown

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Multilabel"]


class Multilabel(Classes):
    """With class weights, the weight of a label multiplies the loss of its positives."""

    name = "multilabel"
    primary = "f1_macro"
    loss_name = "binary cross-entropy (nats)"
    any_classes = True
    several = True
    thresholded = True

    def outputs(self, task: TaskSpec) -> int:
        return task.classes

    def label_shape(self, task: TaskSpec) -> tuple[int, ...]:
        return (task.classes,)

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        given = None if task.class_weights is None else logits.new_tensor(task.class_weights)
        target = target.to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, target, pos_weight=given, reduction="none").mean(1)

    # ---- labels

    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        column = self._matrix(where, array)
        return TaskSpec(name, self.name, classes=array.shape[1]), column

    def read_as(self, where: str, task: TaskSpec, array: Array) -> FloatArray:
        return self._matrix(where, array, task.classes)

    @staticmethod
    def _matrix(where: str, array: Array, classes: int | None = None) -> FloatArray:
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: expected values of 0 or 1 for multilabel, got dtype {array.dtype}")
        column = array.astype(np.float64)
        if classes is not None and array.shape[1] != classes:
            raise DataError(f"{where}: expected {classes} columns, one for each label, got {array.shape[1]}")
        if array.shape[1] == 0:
            raise DataError(f"{where}: expected at least one column, got none")
        missing = np.isnan(column)
        wrong = ~missing & (column != 0) & (column != 1)
        if wrong.any():
            row = int(np.flatnonzero(wrong.any(axis=1))[0])
            raise DataError(f"{where}: expected values of 0 or 1, got {column[row][wrong[row]][0]:g} in row {row}")
        partly = np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1))
        if len(partly):
            raise DataError(
                f"{where}: expected the labels of a bag all there or all missing, got both in row {partly[0]}; "
                "make each column a task of its own instead"
            )
        return column

    def read_cells(self, where: str, cells: Sequence[str], task: Mapping[str, Any]) -> tuple[Array, dict[str, Any]]:
        """Labels in a cell are separated by `;`."""
        parts = [[part.strip() for part in text.split(";") if part.strip()] for text in cells]
        named = task.get("labels")
        labels = list(named) if named else sorted({label for cell in parts for label in cell})
        matrix = np.zeros((len(cells), len(labels)))
        for row, cell in enumerate(parts):
            unknown = [label for label in cell if label not in labels]
            if unknown:
                raise DataError(f"{where}: expected labels among {', '.join(labels)}, got {unknown[0]!r}")
            matrix[row, [labels.index(label) for label in cell]] = 1.0
            if not cells[row]:
                matrix[row] = np.nan
        return matrix, {"classes": len(labels), "labels": labels}

    def check_label(self, where: str, task: TaskSpec, label: Tensor) -> None:
        if label.shape != (task.classes,):
            raise DataError(f"{where}: expected {task.classes} values of 0 or 1, got shape {list(label.shape)}")
        if bool(((label != 0) & (label != 1)).any()):
            raise DataError(f"{where}: expected values of 0 or 1, got {label.tolist()}")

    def counts(self, task: TaskSpec, column: FloatArray) -> list[int]:
        """Positives of every label."""
        return [int(count) for count in np.nansum(column, axis=0)]

    def balanced(self, task: TaskSpec, column: FloatArray) -> tuple[float, ...]:
        """Negatives / positives of each label."""
        present = int((~np.isnan(column[:, 0])).sum())
        return tuple((present - n) / n if 0 < n < present else 1.0 for n in self.counts(task, column))

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """The log-odds of every label."""
        labelled = int((~np.isnan(column[:, 0])).sum())
        counts = np.array(self.counts(task, column))
        logits: FloatArray = np.log((counts + 0.5) * (task.class_weights or 1.0) / (labelled - counts + 0.5))
        return logits

    def chance(self, task: TaskSpec, column: FloatArray) -> float:
        """Macro F1 of giving every label to every bag; less than 1 even where all have them."""
        labelled = int((~np.isnan(column[:, 0])).sum())
        counts = np.array(self.counts(task, column))
        return min(float((2.0 * counts / np.maximum(counts + labelled, 1)).mean()), 0.99)

    def strata(self, task: TaskSpec, column: FloatArray) -> list[npt.NDArray[np.bool_]]:
        return list(column.T == 1.0)

    def rename(self, task: TaskSpec, column: FloatArray, positions: Sequence[int]) -> FloatArray:
        moved = np.zeros((len(column), task.classes))
        moved[:, list(positions)] = column
        moved[np.isnan(column).any(axis=1)] = np.nan
        return moved

    def problem(self, task: TaskSpec, column: FloatArray, everywhere: FloatArray) -> str | None:
        labelled = int((~np.isnan(column).any(axis=1)).sum())
        counted = zip(task.class_names, self.counts(task, column), strict=True)
        same = [name for name, n in counted if n in (0, labelled)]
        return f"the same for all {labelled} bags: {', '.join(same)}" if same else None

    # ---- scores

    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        from torchmetrics.classification import MultilabelAveragePrecision, MultilabelF1Score

        return {
            "f1_macro": MultilabelF1Score(task.classes, average="macro", threshold=THRESHOLD),
            "f1_micro": MultilabelF1Score(task.classes, average="micro", threshold=THRESHOLD),
            "map": MultilabelAveragePrecision(task.classes, average=None),
        }

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        tuned = task.thresholds is not None and metric.startswith("f1")
        return predicted_labels(task, prediction).long() if tuned else prediction, target.long()

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        return (target == 1).any(dim=0) if metric == "map" else None

    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        chosen, true = self._chosen(task, prediction), target == 1
        hits = (chosen & true).sum(axis=0)
        total = chosen.sum(axis=0) + true.sum(axis=0)
        # As torchmetrics has it: a label that is neither predicted nor there scores 0.
        return float(np.divide(2 * hits, total, out=np.zeros(len(hits)), where=total > 0).mean())

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        chosen, true = self._chosen(task, prediction), target == 1
        total = chosen.sum() + true.sum()
        precisions = (of.average_precision(prediction[:, label], true[:, label]) for label in range(task.classes))
        return {
            "f1_macro": self.primary_score(task, prediction, target),
            "f1_micro": float(2 * (chosen & true).sum() / total) if total else 0.0,
            "map": of.mean_of(precisions),
        }

    def _chosen(self, task: TaskSpec, prediction: Array) -> npt.NDArray[np.bool_]:
        chosen: npt.NDArray[np.bool_] = prediction >= np.asarray(task.thresholds or THRESHOLD)
        return chosen

    def correct(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> Tensor:
        return (predicted_labels(task, probabilities) == (target == 1)).all(1)

    # ---- shown

    def cells(self, task: TaskSpec, prediction: Tensor) -> list[list[str]]:
        names = task.class_names
        chosen = predicted_labels(task, prediction).tolist()
        return [
            [*(f"{value:.6g}" for value in values), ";".join(n for n, there in zip(names, own, strict=True) if there)]
            for values, own in zip(prediction.tolist(), chosen, strict=True)
        ]

    def shown_errors(self, task: TaskSpec, prediction: Tensor, target: Tensor) -> Shown:
        chosen, true = predicted_labels(task, prediction), target == 1
        four = (chosen & true, chosen & ~true, ~chosen & true, ~chosen & ~true)
        counts = torch.stack([part.sum(0) for part in four], 1).tolist()
        rows = [[name, *(str(count) for count in row)] for name, row in zip(task.class_names, counts, strict=True)]
        return Rows(["label", "hit", "false alarm", "missed", "rightly not predicted"], rows)
