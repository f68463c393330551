"""Task metrics over a split: torchmetrics behind one small object, missing labels left out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from umda_fast.model import TaskSpec, decode
from umda_fast.tasks import kind_of

__all__ = ["TaskMetrics", "mean_score"]


def _metrics(task: TaskSpec) -> dict[str, Metric]:
    metrics = kind_of(task).metrics(task)
    for metric in metrics.values():
        # Processes share the work before, by bags (evaluation.py); left to itself every process would ask the others.
        # (`sync_on_compute` counts when a metric is made, and is not asked any more.)
        metric.distributed_available_fn = _alone
    return metrics


def _alone() -> bool:
    return False


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
        self,
        logits: Mapping[str, Tensor],
        labels: Mapping[str, Tensor],
        label_mask: Mapping[str, Tensor],
        *,
        tasks: Sequence[TaskSpec] | None = None,
    ) -> None:
        """Take in some bags; `tasks` are the specs of the model whose logits these are, None for `self.tasks`: they may
        differ in standardisation and thresholds."""
        for index, task in enumerate(self.tasks if tasks is None else tasks):
            if task.name not in labels:
                continue
            keep = label_mask[task.name]
            if not bool(keep.any()):
                continue
            prediction = decode(task, logits[task.name].float())[keep]
            target = labels[task.name][keep]
            self.seen[index].append(target)
            for name, metric in self._of(index).items():
                metric.update(*kind_of(task).for_metric(task, name, prediction, target))

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
                    defined = kind_of(task).defined(task, name, target)
                    if defined is not None and not bool(defined.any()):
                        values[name] = math.nan
                        continue
                    value = metric.compute()
                    value = value[defined] if defined is not None and value.ndim else value
                    values[name] = float(value.float().mean())
            result[task.name] = values
        return result

    def reset(self) -> None:
        self.seen = [[] for _ in self.tasks]
        for index in range(len(self.tasks)):
            for metric in self._of(index).values():
                metric.reset()


def mean_score(tasks: Sequence[TaskSpec], values: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over tasks of their primary metric: AUROC (binary), accuracy (multiclass), macro F1 (multilabel), R2
    (regression); tasks whose metric is undefined are left out, NaN when that leaves none."""
    scores = [values[t.name][kind_of(t).primary] for t in tasks if t.name in values]
    scores = [s for s in scores if math.isfinite(s)]
    return sum(scores) / len(scores) if scores else math.nan
