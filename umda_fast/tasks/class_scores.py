"""Scores of classes by NumPy alone, many times as fast on few bags as metrics that see them batch by batch.

Means over classes are over those that occur among the labels; what is not defined is NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from umda_fast.tasks.kind import Array, FloatArray

__all__ = [
    "auroc",
    "average_precision",
    "balanced_accuracy",
    "cohen_kappa",
    "confusion",
    "f1",
    "macro_f1",
    "mean_of",
    "sensitivity_at",
]


def auroc(score: Array, positive: Array) -> float:
    """Share of the pairs of a positive and a negative bag in which the former has the higher score; ties count half.

    Args:
        score: [B]. positive: bool [B].
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum() - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _above(score: Array, positive: Array) -> tuple[FloatArray, FloatArray]:
    """How many positive and how many negative bags have at least each of the distinct scores, highest score first."""
    distinct, place = np.unique(-score, return_inverse=True)
    hits = np.bincount(place, weights=positive, minlength=len(distinct)).cumsum()
    all_above = np.bincount(place, minlength=len(distinct)).cumsum()
    return hits, all_above - hits


def average_precision(score: Array, positive: Array) -> float:
    """The mean precision at the positive bags, those of one score together. Arguments as of `auroc`."""
    if not positive.any():
        return float("nan")
    hits, false = _above(score, positive)
    return float((np.diff(hits, prepend=0.0) * hits / (hits + false)).sum() / hits[-1])


def sensitivity_at(specificity: float, score: Array, positive: Array) -> float:
    """The highest sensitivity of the thresholds with at least this specificity. Arguments as of `auroc`."""
    if positive.all() or not positive.any():
        return float("nan")
    hits, false = _above(score, positive)
    allowed = false <= (1.0 - specificity) * false[-1] * (1.0 + 1e-6)  # 1 - .9 is not quite .1
    return float(hits[allowed].max(initial=0.0) / hits[-1])


def confusion(target: Array, chosen: Array, classes: int) -> FloatArray:
    """Bags of every class (row) that are taken for every class (column)."""
    cells = target.astype(np.int64) * classes + chosen.astype(np.int64)
    counted: FloatArray = np.bincount(cells, minlength=classes**2).reshape(classes, classes).astype(np.float64)
    return counted


def balanced_accuracy(cells: FloatArray) -> float:
    """The mean over classes of the share that is taken for what it is; `cells` as of `confusion`."""
    counts = cells.sum(1)
    return mean_of(hit / count for hit, count in zip(cells.diagonal(), counts, strict=True) if count)


def f1(cells: FloatArray, label: int) -> float:
    """`2 hits / (labelled so + taken for it)` of one class; 0 where it is neither."""
    total = cells[label].sum() + cells[:, label].sum()
    return float(2.0 * cells[label, label] / total) if total else 0.0


def macro_f1(cells: FloatArray) -> float:
    """The mean over classes."""
    return mean_of(f1(cells, label) for label, count in enumerate(cells.sum(1)) if count)


def cohen_kappa(cells: FloatArray) -> float:
    """How much of the agreement that chance would leave out is there: (p - p_e) / (1 - p_e)."""
    total = cells.sum()
    by_chance = float(cells.sum(0) @ cells.sum(1)) / total**2
    return float(cells.diagonal().sum() / total - by_chance) / (1.0 - by_chance) if by_chance < 1.0 else float("nan")


def mean_of(values: Iterable[float]) -> float:
    """Of those that are defined; NaN if none is."""
    known = [value for value in values if value == value]
    return float(sum(known) / len(known)) if known else float("nan")
