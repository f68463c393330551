"""One of several grades in an order: cumulative logits whose ranks are consistent by construction.

With K grades 0..K-1 a head has K - 1 numbers: a location s and, for the grades between the first and the last, their
widths h_1..h_{K-2}. The cumulative logits are

    c_k = logit P(y >= k),   c_k - c_{k+1} = log(1 + exp(h_k + b_k)) > 0,   mean_k c_k = s,

so P(y >= k) falls with k whatever the head says. b_k is such that with all numbers 0 every grade is as likely as any
other, c_k = log((K - k) / k). With widths that depend on no bag it is the proportional odds model (McCullagh,
"Regression models for ordinal data", 1980); ranks that agree with each other are what Cao, Mirjalili and Raschka ask
for ("Rank consistent ordinal regression for neural networks", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.tasks import class_scores as of
from umda_fast.tasks.classes import OneClass
from umda_fast.tasks.columns import as_numbers, as_texts, distinct_texts
from umda_fast.tasks.kind import Array, FloatArray, TaskSpec

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Ordinal"]


class Ordinal(OneClass):
    """The grade predicted is the middle one: as likely as not, the true grade is at least as high, and at most."""

    name = "ordinal"
    primary = "kappa"
    loss_name = "negative log likelihood (nats)"
    least_classes = 2
    any_classes = True
    label_dtype = torch.int64

    def outputs(self, task: TaskSpec) -> int:
        return task.classes - 1

    # ---- the likelihood

    def log_probabilities(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """Of every grade, [B, classes]."""
        at_least, width = self._cumulative(task, logits)
        above, below = F.logsigmoid(at_least), F.logsigmoid(-at_least)
        # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a)), and the last factor is sigma of the width.
        inner = above[:, :-1] + below[:, 1:] + F.logsigmoid(width)
        return torch.cat([below[:, :1], inner, above[:, -1:]], 1)

    def _cumulative(self, task: TaskSpec, logits: Tensor) -> tuple[Tensor, Tensor]:
        """c, [B, classes - 1], and the widths before their softplus, [B, classes - 2]."""
        width = logits[:, 1:] + logits.new_tensor(_even(task.classes)[1])
        fall = F.pad(F.softplus(width).cumsum(1), (1, 0))
        return logits[:, :1] + fall.mean(1, keepdim=True) - fall, width

    def _logits(self, task: TaskSpec, log_probabilities: Tensor) -> Tensor:
        """Those of which the log-probabilities are made."""
        at_least = log_probabilities.flip(1).logcumsumexp(1).flip(1)[:, 1:]
        at_most = log_probabilities.logcumsumexp(1)[:, :-1]
        share = log_probabilities[:, 1:-1] - at_least[:, :-1] - at_most[:, 1:]
        share = share.clamp_max(-torch.finfo(share.dtype).eps)
        width = share - (-torch.expm1(share)).log() - share.new_tensor(_even(task.classes)[1])
        return torch.cat([(at_least - at_most).mean(1, keepdim=True), width], 1)

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(self.log_probabilities(task, logits), target.long(), reduction="none")

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return -self.log_probabilities(task, logits).mean()

    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return self.log_probabilities(task, logits).exp()

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        each = [self.log_probabilities(task, value) for task, value in zip(tasks, logits, strict=True)]
        return self._logits(tasks[0], torch.stack(each).logsumexp(0) - math.log(len(each)))

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        """Locations at which each grade is the middle one, with widths that make all alike likely at 0."""
        start, _ = _even(task.classes)
        ends = [start[0] + 2.0, *start, start[-1] - 2.0]
        targets = np.zeros((len(target), task.classes - 1))
        targets[:, 0] = -(np.array(ends)[:-1] + np.array(ends)[1:])[target.astype(np.int64)] / 2.0
        return targets

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """Those of the shares of the grades."""
        counts = (np.array(self.counts(task, column)) + 0.5) * (task.class_weights or 1.0)
        shares = torch.from_numpy(np.log(counts / counts.sum()))[None]
        logits: FloatArray = self._logits(task, shares)[0].numpy()
        return logits

    # ---- labels

    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        """Whole numbers are grades in their order; texts have no order unless someone says it."""
        if as_numbers(where, array, said=True) is None:
            found = distinct_texts(as_texts(array))
            shown = ", ".join(found[:5]) + (", ..." if len(found) > 5 else "")
            raise DataError(
                f"{where}: expected the order of the grades, lowest first, for their names are text ({shown}): "
                f"--set 'data.options.kinds={{{name}: {{kind: {self.name}, labels: [{shown}]}}}}'"
            )
        return super().read(where, name, array)

    # ---- scores

    def predicted(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        return (prediction.cumsum(1)[:, :-1] < 0.5).sum(1)

    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        from torchmetrics import MeanAbsoluteError
        from torchmetrics.classification import MulticlassAccuracy, MulticlassCohenKappa

        return {
            "kappa": MulticlassCohenKappa(task.classes, weights="quadratic"),
            "mae_grades": MeanAbsoluteError(),
            "accuracy": MulticlassAccuracy(task.classes, average="micro"),
            "balanced_accuracy": MulticlassAccuracy(task.classes, average=None),
        }

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        grade = self.predicted(task, prediction)
        return (grade.float(), target.float()) if metric == "mae_grades" else (grade, target.long())

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        if metric == "balanced_accuracy":
            return torch.bincount(target, minlength=task.classes) > 0
        return (target != target[0]).any() if metric == "kappa" else None

    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        """`1 - mean (y' - y)^2 / mean (y'_i - y_j)^2` over all pairs of bags, which is quadratic kappa."""
        grade = (prediction.cumsum(axis=1)[:, :-1] < 0.5).sum(axis=1)
        if (target == target[0]).all():
            return float("nan")
        apart = (grade**2).mean() + (target**2).mean() - 2.0 * grade.mean() * target.mean()
        return float(1.0 - ((grade - target) ** 2).mean() / apart)

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        grade = (prediction.cumsum(axis=1)[:, :-1] < 0.5).sum(axis=1)
        cells = of.confusion(target, grade, task.classes)
        return {
            "kappa": self.primary_score(task, prediction, target),
            "mae_grades": float(np.abs(grade - target).mean()),
            "accuracy": float(cells.diagonal().sum() / cells.sum()),
            "balanced_accuracy": of.balanced_accuracy(cells),
        }

    def few_units_of(
        self, task: TaskSpec, metric: str, score: float, target: Array, level: float
    ) -> tuple[float, float] | None:
        """None of an error in grades, which is no share."""
        return None if metric == "mae_grades" else super().few_units_of(task, metric, score, target, level)

    def few_units(self, task: TaskSpec, score: float, target: Array, level: float) -> tuple[float, float] | None:
        """None below 0, where no share is like it."""
        return super().few_units(task, score, target, level) if score >= 0.0 else None

    def confidence(self, task: TaskSpec, probabilities: Tensor) -> Tensor:
        """The probability of the grade predicted."""
        return probabilities.gather(1, self.predicted(task, probabilities)[:, None])[:, 0]

    def reliability(self, task: TaskSpec, probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return self.confidence(task, probabilities), self.correct(task, probabilities, target)


def _even(classes: int) -> tuple[list[float], list[float]]:
    """c_1..c_{K-1} of grades that are all alike likely, and b_1..b_{K-2}."""
    start = [math.log((classes - k) / k) for k in range(1, classes)]
    return start, [math.log(math.expm1(left - right)) for left, right in pairwise(start)]
