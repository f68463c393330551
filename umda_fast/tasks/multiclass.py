"""One of several classes: cross entropy of the softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.tasks import class_scores as of
from umda_fast.tasks.classes import OneClass
from umda_fast.tasks.kind import Array, FloatArray, TaskSpec

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Multiclass"]


class Multiclass(OneClass):
    name = "multiclass"
    primary = "accuracy"
    loss_name = "cross-entropy (nats)"
    least_classes = 2
    any_classes = True
    label_dtype = torch.int64

    def outputs(self, task: TaskSpec) -> int:
        return task.classes

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target.long(), reduction="none")

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return -logits.log_softmax(-1).mean()

    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def centred(self, logits: Tensor) -> Tensor:
        """Without the mean over classes."""
        return logits - logits.mean(-1, keepdim=True)

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        return F.log_softmax(torch.stack(list(logits)), -1).logsumexp(0) - math.log(len(logits))

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        """1 for the class, -1 for the others."""
        return 2.0 * np.eye(task.classes)[target.astype(np.int64)] - 1.0

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """Log-probabilities of the classes."""
        counts = (np.array(self.counts(task, column)) + 0.5) * (task.class_weights or 1.0)
        logits: FloatArray = np.log(counts / counts.sum())
        return logits

    def chance(self, task: TaskSpec, column: FloatArray) -> float:
        """Accuracy of naming the most frequent class."""
        counts = self.counts(task, column)
        return min(max(counts), sum(counts) - 1) / sum(counts) if sum(counts) else 0.0

    def predicted(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        return prediction.argmax(1)

    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        from torchmetrics import classification

        # Per class, because a class without a single positive (or negative) has no AUROC; torchmetrics would
        # count it as 0.
        return {
            "auroc": classification.MulticlassAUROC(task.classes, average=None),
            "accuracy": classification.MulticlassAccuracy(task.classes, average="micro"),
            "balanced_accuracy": classification.MulticlassAccuracy(task.classes, average=None),
            "f1_macro": classification.MulticlassF1Score(task.classes, average=None),
            "auprc": classification.MulticlassAveragePrecision(task.classes, average=None),
            "cohen_kappa": classification.MulticlassCohenKappa(task.classes),
        }

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return prediction, target.long()

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        if metric == "accuracy":
            return None
        counts = torch.bincount(target, minlength=task.classes)
        if metric == "cohen_kappa":
            return (counts > 0).sum() > 1
        return (counts > 0) & (counts < len(target)) if metric == "auroc" else counts > 0

    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        return float((prediction.argmax(axis=1) == target).mean())

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        cells, classes = of.confusion(target, prediction.argmax(axis=1), task.classes), range(task.classes)
        return {
            "auroc": of.mean_of(of.auroc(prediction[:, index], target == index) for index in classes),
            "accuracy": float(cells.diagonal().sum() / cells.sum()),
            "balanced_accuracy": of.balanced_accuracy(cells),
            "f1_macro": of.macro_f1(cells),
            "auprc": of.mean_of(of.average_precision(prediction[:, index], target == index) for index in classes),
            "cohen_kappa": of.cohen_kappa(cells) if (cells.sum(1) > 0).sum() > 1 else float("nan"),
        }

    def confidence(self, task: TaskSpec, probabilities: Tensor) -> Tensor:
        return probabilities.amax(1)

    def reliability(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return probabilities.amax(1), self.correct(task, probabilities, target)
