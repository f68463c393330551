"""Confidence intervals of scores, by resampling bags (percentile bootstrap, Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from umda_fast.model import TaskSpec, decode
from umda_fast.tasks import kind_of

__all__ = ["bootstrap_interval", "primary_score"]

Array = npt.NDArray[Any]


def primary_score(task: TaskSpec, prediction: Array, target: Array) -> float:
    """The metric of `task` that enters `mean_score`, of predictions as `decode` gives them; NaN where undefined.

    Args:
        prediction: [B, outputs]. target: [B] or, multilabel, [B, classes].
    """
    if not len(target):
        return float("nan")
    return kind_of(task).primary_score(task, prediction, target)


def bootstrap_interval(
    task: TaskSpec, logits: Tensor, target: Tensor, *, level: float = 0.95, samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """An interval for `primary_score` from `samples` draws of B bags with replacement.

    Args:
        logits: [B, outputs]. target: [B] or, multilabel, [B, classes]; every bag has its label.
        level: share of the draws inside.

    Returns:
        Its ends; NaN where the score is undefined in more than a tenth of the draws.
    """
    prediction, truth = decode(task, logits.double()).numpy(), target.double().numpy()
    if not len(truth):
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(0, len(truth), (samples, len(truth)))
    scores = np.array([primary_score(task, prediction[rows], truth[rows]) for rows in draws])
    defined = scores[~np.isnan(scores)]
    if len(defined) < 0.9 * samples:
        return float("nan"), float("nan")
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
