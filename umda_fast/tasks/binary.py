"""Yes or no: cross entropy of the sigmoid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from umda_fast.tasks import class_scores as of
from umda_fast.tasks.classes import THRESHOLD, OneClass, predicted_labels
from umda_fast.tasks.columns import as_numbers
from umda_fast.tasks.few_units import auroc_interval
from umda_fast.tasks.kind import Array, FloatArray, TaskSpec

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Binary"]


class Binary(OneClass):
    name = "binary"
    primary = "auroc"
    loss_name = "binary cross-entropy (nats)"

    def class_count(self, task: TaskSpec) -> int:
        return 2

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits[:, 0], target.to(logits.dtype), reduction="none")

    def predicted(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        return predicted_labels(task, prediction[:, 0]).long()

    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        """0 and 1 are what they say, even where one of them is not there."""
        numbers = as_numbers(where, array)
        if numbers is not None and np.isin(numbers[~np.isnan(numbers)], (0, 1)).all():
            return TaskSpec(name, self.name, labels=("0", "1")), numbers
        return super().read(where, name, array)

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """The log-odds of label 1."""
        absent, present = (np.array(self.counts(task, column)) + 0.5) * (task.class_weights or (1.0, 1.0))
        return np.array([np.log(present / absent)])

    def chance(self, task: TaskSpec, column: FloatArray) -> float:
        """AUROC of any constant."""
        return 0.5

    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        from torchmetrics import classification

        from umda_fast.tasks.sensitivity import SensitivityAtSpecificity

        return {
            "auroc": classification.BinaryAUROC(),
            "accuracy": classification.BinaryAccuracy(threshold=THRESHOLD),
            "balanced_accuracy": classification.MulticlassAccuracy(2, average="macro"),
            "f1": classification.BinaryF1Score(threshold=THRESHOLD),
            "auprc": classification.BinaryAveragePrecision(),
            "sensitivity_90": SensitivityAtSpecificity(0.9),
            "cohen_kappa": classification.BinaryCohenKappa(threshold=THRESHOLD),
        }

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        chosen = self.predicted(task, prediction) if metric == "balanced_accuracy" else prediction.reshape(-1)
        return chosen, target.reshape(-1).long()

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        """All but the accuracy with both classes alone."""
        return None if metric == "accuracy" else (target == 0).any() & (target == 1).any()

    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(target, prediction[:, 0])) if 0 < target.sum() < len(target) else float("nan")

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        score, positive = prediction[:, 0], target == 1
        cells = of.confusion(target, score >= THRESHOLD, 2)
        found = {
            "auroc": of.auroc(score, positive),
            "accuracy": float(cells.diagonal().sum() / cells.sum()),
            "balanced_accuracy": of.balanced_accuracy(cells),
            "f1": of.f1(cells, 1),
            "auprc": of.average_precision(score, positive),
            "sensitivity_90": of.sensitivity_at(0.9, score, positive),
            "cohen_kappa": of.cohen_kappa(cells),
        }
        both = positive.any() and not positive.all()
        return {name: value if both or name == "accuracy" else float("nan") for name, value in found.items()}

    def units_of(self, task: TaskSpec, metric: str, target: Array) -> float:
        """Of what is said of class 1 alone its bags."""
        alone = metric in ("f1", "auprc", "sensitivity_90")
        return float((target == 1).sum()) if alone else super().units_of(task, metric, target)

    def few_units(self, task: TaskSpec, score: float, target: Array, level: float) -> tuple[float, float] | None:
        positives = int(target.sum())
        if not 0 < positives < len(target):
            return None
        return auroc_interval(score, len(target) - positives, positives, level)

    def positive(self, task: TaskSpec) -> str:
        return task.class_names[1]

    def columns(self, task: TaskSpec) -> list[str]:
        return [f"{task.name}_probability_{self.positive(task)}", f"{task.name}_predicted"]
