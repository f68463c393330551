"""Task metrics over a split: torchmetrics behind one small object, missing labels left out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, Metric, R2Score
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from umda_fast.model import TaskSpec, decode

__all__ = ["PRIMARY", "THRESHOLD", "TaskMetrics", "mean_score", "predicted_labels"]

# The metric of each kind of task that enters `mean_score`.
PRIMARY = {"binary": "auroc", "multiclass": "accuracy", "multilabel": "f1_macro", "regression": "r2"}

# Probability from which a label of a multilabel task, or class 1 of a binary one, is predicted.
THRESHOLD = 0.5


def predicted_labels(task: TaskSpec, probabilities: Tensor) -> Tensor:
    """Which labels are predicted, bool: of a binary task from `THRESHOLD` on, of a multilabel one [..., C] from its
    thresholds on if it has any."""
    if task.thresholds is None:
        return probabilities >= THRESHOLD
    return probabilities >= torch.tensor(task.thresholds, dtype=probabilities.dtype, device=probabilities.device)


def _metrics(task: TaskSpec) -> dict[str, Metric]:
    # Processes share the work before, by bags (evaluation.py); left to itself every process would ask the others.
    alone: dict[str, Any] = {"sync_on_compute": False}
    if task.kind == "binary":
        return {"auroc": BinaryAUROC(**alone), "accuracy": BinaryAccuracy(threshold=THRESHOLD, **alone)}
    if task.kind == "multiclass":
        # Per class, because a class without a single positive (or negative) has no AUROC; torchmetrics would
        # count it as 0.
        return {
            "auroc": MulticlassAUROC(task.classes, average=None, **alone),
            "accuracy": MulticlassAccuracy(task.classes, average="micro", **alone),
        }
    if task.kind == "multilabel":
        return {
            "f1_macro": MultilabelF1Score(task.classes, average="macro", threshold=THRESHOLD, **alone),
            "f1_micro": MultilabelF1Score(task.classes, average="micro", threshold=THRESHOLD, **alone),
            "map": MultilabelAveragePrecision(task.classes, average=None, **alone),
        }
    return {"mae": MeanAbsoluteError(**alone), "r2": R2Score(**alone)}


class TaskMetrics(nn.Module):
    """Metrics of every task over a split.

    `update` takes logits (dict of [B, outputs]), labels and label masks as `BagBatch` holds them; `compute`
    returns `{task: {metric: value}}`. A metric that is not defined on the labels seen (AUROC with one class
    only, R2 of one bag, any metric of a task without labels) is NaN.
    """

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.metrics = nn.ModuleDict(
            {f"task_{i}": nn.ModuleDict(_metrics(t)) for i, t in enumerate(self.tasks)}
        )
        self.seen: list[list[Tensor]] = [[] for _ in self.tasks]

    @torch.no_grad()
    def update(
        self, logits: Mapping[str, Tensor], labels: Mapping[str, Tensor], label_mask: Mapping[str, Tensor]
    ) -> None:
        for index, task in enumerate(self.tasks):
            if task.name not in labels:
                continue
            keep = label_mask[task.name]
            if not bool(keep.any()):
                continue
            prediction = decode(task, logits[task.name].float())[keep]
            target = labels[task.name][keep]
            if task.kind in ("binary", "regression"):
                prediction, target = prediction.reshape(-1), target.reshape(-1)
            if task.kind in ("binary", "multilabel", "multiclass"):
                target = target.long()
            self.seen[index].append(target)
            for name, metric in self._of(index).items():
                tuned = task.thresholds is not None and name.startswith("f1")
                metric.update(predicted_labels(task, prediction).long() if tuned else prediction, target)

    def _of(self, index: int) -> dict[str, Metric]:
        metrics = cast(nn.ModuleDict, self.metrics[f"task_{index}"])
        return cast("dict[str, Metric]", dict(metrics.items()))

    def compute(self) -> dict[str, dict[str, float]]:
        result: dict[str, dict[str, float]] = {}
        for index, task in enumerate(self.tasks):
            metrics = self._of(index)
            if not self.seen[index]:
                result[task.name] = dict.fromkeys(metrics, math.nan)
                continue
            target = torch.cat(self.seen[index])
            values: dict[str, float] = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the cases it warns about are set to NaN here
                for name, metric in metrics.items():
                    if (
                        task.kind == "regression"
                        and name == "r2"
                        and (len(target) < 2 or bool(target.var() == 0))
                    ):
                        values[name] = math.nan
                        continue
                    value = metric.compute()
                    defined = _defined(task, name, target)
                    value = (
                        value
                        if defined is None
                        else value[defined]
                        if value.ndim
                        else value.where(defined, math.nan)
                    )
                    values[name] = float(value.float().mean()) if value.numel() else math.nan
            result[task.name] = values
        return result

    def reset(self) -> None:
        self.seen = [[] for _ in self.tasks]
        for index in range(len(self.tasks)):
            for metric in self._of(index).values():
                metric.reset()


def _defined(task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
    """Bool mask over classes (or a scalar) of where a ranking metric is defined; None where it always is."""
    if task.kind == "binary" and metric == "auroc":
        return (target == 0).any() & (target == 1).any()
    if task.kind == "multiclass" and metric == "auroc":
        counts = torch.bincount(target, minlength=task.classes)
        return (counts > 0) & (counts < len(target))
    if task.kind == "multilabel" and metric == "map":
        return (target == 1).any(dim=0)
    return None


def mean_score(tasks: Sequence[TaskSpec], values: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks of AUROC (binary), accuracy (multiclass), macro F1 (multilabel) and R2 (regression);
    tasks whose metric is undefined are left out, NaN when that leaves none."""
    scores = [values[t.name][PRIMARY[t.kind]] for t in tasks if t.name in values]
    scores = [s for s in scores if math.isfinite(s)]
    return sum(scores) / len(scores) if scores else math.nan
