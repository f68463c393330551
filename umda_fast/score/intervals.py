"""Confidence intervals of scores.

By resampling bags, or patients (percentile bootstrap, Efron and Tibshirani 1993, chapter 13), beside the intervals of
`umda_fast.tasks.few_units`, which are right for few bags too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from umda_fast.model import TaskSpec, decode
from umda_fast.tasks import kind_of

__all__ = ["bootstrap_interval", "bootstrap_intervals", "primary_score"]

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
    task: TaskSpec,
    logits: Tensor,
    target: Tensor,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """An interval for `primary_score`: from `samples` draws of bags with replacement, and never narrower than what as
    many independent units can say.

    Draws of few bags are too much alike: of ten bags that are all predicted rightly every draw scores 1, which would
    read as certainty. So the interval also holds all values with which so few units would have given the score
    (`TaskKind.few_units`: Wilson's interval for a share, Newcombe's for an AUROC).

    Args:
        logits: [B, outputs]. target: [B] or, multilabel, [B, classes]; every bag has its label.
        groups: [B], the patient of every bag: patients are drawn, with all their bags; None: each bag is one of its
            own.
        level: share of the draws inside.

    Returns:
        Its ends; NaN where the score is undefined in more than a tenth of the draws.
    """
    prediction, truth = decode(task, logits.double()).numpy(), target.double().numpy()
    kind = kind_of(task)

    def of_rows(rows: npt.NDArray[np.intp]) -> dict[str, float]:
        return {kind.primary: primary_score(task, prediction[rows], truth[rows])}

    found = _intervals(task, of_rows, truth, groups, level, samples, seed)
    return found.get(kind.primary, (float("nan"), float("nan")))


def bootstrap_intervals(
    task: TaskSpec,
    logits: Tensor,
    target: Tensor,
    *,
    groups: Sequence[str] | None = None,
    level: float = 0.95,
    samples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """As `bootstrap_interval`, of every metric of the task, by name, on the same draws; {} without bags. How wide few
    units make it: `TaskKind.few_units_of`."""
    prediction, truth = decode(task, logits.double()).numpy(), target.double().numpy()
    kind = kind_of(task)
    return _intervals(
        task, lambda rows: kind.scores(task, prediction[rows], truth[rows]), truth, groups, level, samples, seed
    )


def _intervals(
    task: TaskSpec,
    scores: Callable[[npt.NDArray[np.intp]], dict[str, float]],
    truth: Array,
    groups: Sequence[str] | None,
    level: float,
    samples: int,
    seed: int,
) -> dict[str, tuple[float, float]]:
    if not len(truth):
        return {}
    members = _members(len(truth), groups)
    draws = np.random.default_rng(seed).integers(0, len(members), (samples, len(members)))
    drawn = [scores(np.concatenate([members[unit] for unit in units])) for units in draws]
    firsts = truth[[rows[0] for rows in members]]
    found = {}
    for metric, score in scores(np.arange(len(truth))).items():
        each = np.array([draw[metric] for draw in drawn])
        defined = each[~np.isnan(each)]
        if len(defined) < 0.9 * samples:
            found[metric] = (float("nan"), float("nan"))
            continue
        low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2]).tolist()
        few = kind_of(task).few_units_of(task, metric, score, firsts, level)
        found[metric] = (low, high) if few is None else (min(low, few[0]), max(high, few[1]))
    return found


def _members(bags: int, groups: Sequence[str] | None) -> list[npt.NDArray[np.intp]]:
    """Rows of every unit that is drawn."""
    if groups is None:
        return list(np.arange(bags)[:, None])
    _, group = np.unique(np.asarray(groups), return_inverse=True)
    return [np.flatnonzero(group == unit) for unit in range(int(group.max()) + 1)]
