"""How well survival is predicted: concordance and Brier scores, with NumPy alone.

A bag that is censored at t is known to have had no event up to t. Where an event and a censoring fall on the same time,
the event came first.
"""

from __future__ import annotations

import numpy as np

from umda_fast.tasks.kind import Array, FloatArray

__all__ = ["auc_at", "censored_later", "harrell", "integrated_brier", "kaplan_meier", "mean_auc", "uno"]

_ROWS = 4_000_000
"""Pairs that are compared at once."""


def kaplan_meier(time: Array, event: Array) -> tuple[FloatArray, FloatArray]:
    """Distinct times and the probability to live longer than each (Kaplan and Meier, 1958).

    Args:
        time, event: [B]; event is 1 or 0, censored.
    """
    distinct, place = np.unique(time, return_inverse=True)
    deaths = np.bincount(place, weights=event, minlength=len(distinct))
    at_risk = len(time) - np.concatenate([[0], np.bincount(place, minlength=len(distinct)).cumsum()[:-1]])
    return distinct, np.cumprod(1.0 - deaths / at_risk)


def censored_later(time: Array, event: Array, at: Array) -> FloatArray:
    """The probability to be censored later than `at`, by Kaplan and Meier's estimate from these bags."""
    distinct, place = np.unique(time, return_inverse=True)
    gone = np.bincount(place, weights=1.0 - event, minlength=len(distinct))
    deaths = np.bincount(place, weights=event, minlength=len(distinct))
    at_risk = len(time) - np.concatenate([[0], (gone + deaths).cumsum()[:-1]]) - deaths
    kept = np.cumprod(1.0 - np.divide(gone, at_risk, out=np.zeros(len(distinct)), where=gone > 0))
    later: FloatArray = np.concatenate([[1.0], kept])[np.searchsorted(distinct, at, side="right")]
    return later


def _concordance(risk: Array, time: Array, event: Array, weight: Array) -> float:
    """Weighted share of the pairs, of an event and who lived longer, in which the former has the higher risk; pairs of
    equal risk count half. NaN where there is none."""
    rows = np.flatnonzero((event == 1) & (weight > 0.0))
    right = pairs = 0.0
    step = max(_ROWS // max(len(time), 1), 1)
    for start in range(0, len(rows), step):
        own = rows[start : start + step, None]
        longer = (time[own] < time) | ((time[own] == time) & (event == 0))
        higher = (risk[own] > risk) + 0.5 * (risk[own] == risk)
        right += float(((higher * longer).sum(1) * weight[own[:, 0]]).sum())
        pairs += float((longer.sum(1) * weight[own[:, 0]]).sum())
    return right / pairs if pairs > 0.0 else float("nan")


def harrell(risk: Array, time: Array, event: Array) -> float:
    """Harrell's C (Harrell, Lee and Mark, "Multivariable prognostic models", Statistics in Medicine 1996)."""
    return _concordance(risk, time, event, np.ones(len(time)))


def uno(risk: Array, time: Array, event: Array) -> float:
    """Uno's C, which does not depend on how many are censored: pairs count by 1 / G(t)^2, G the probability to be
    censored later (Uno et al., "On the C-statistics for evaluating overall adequacy of risk prediction procedures with
    censored survival data", Statistics in Medicine 2011). Events after which nobody is left count 0."""
    later = censored_later(time, event, time)
    return _concordance(risk, time, event, np.divide(1.0, later**2, out=np.zeros(len(later)), where=later > 0.0))


def integrated_brier(survival: Array, time: Array, event: Array, times: Array) -> float:
    """The mean over `times`, by trapezoids, of the squared distance between the probability to live longer and whether
    one did, weighted by the inverse probability of not being censored (Graf et al., "Assessment and comparison of
    prognostic classification schemes for survival data", Statistics in Medicine 1999).

    Args:
        survival: [B, M], predicted. time, event: [B]. times: [M], rising; those at which nobody is followed any longer
            are left out.

    Returns:
        NaN with fewer than two times.
    """
    kept = times < time.max(initial=0.0)
    times, survival = times[kept], survival[:, kept]
    if len(times) < 2:
        return float("nan")
    own, then = censored_later(time, event, time)[:, None], censored_later(time, event, times)
    dead = (time[:, None] <= times) & (event[:, None] == 1)
    alive = time[:, None] > times
    scores = np.divide(survival**2, own, out=np.zeros_like(survival), where=dead & (own > 0.0))
    scores += np.divide((1.0 - survival) ** 2, then, out=np.zeros_like(survival), where=alive & (then > 0.0))
    mean = scores.mean(0)
    return float(((mean[1:] + mean[:-1]) / 2.0 * np.diff(times)).sum() / (times[-1] - times[0]))


def auc_at(risk: Array, time: Array, event: Array, times: Array) -> FloatArray:
    """The cumulative/dynamic AUC at each of `times`, [M]: of who has had the event by then and who lives longer, the
    share of pairs in which the former has the higher risk, pairs of equal risk counting half. Who was censored before
    is left out, for which the former count by the inverse probability of not being censored before their event (Uno et
    al., "Evaluating prediction rules for t-year survivors with censored regression models", JASA 2007).

    Args:
        risk: at each of the times, [B, M]. time, event: [B].

    Returns:
        NaN where nobody had the event, or nobody lives longer.
    """
    own = censored_later(time, event, time)
    weight = np.divide(1.0, own, out=np.zeros(len(own)), where=(event == 1) & (own > 0.0))
    found = np.full(len(times), np.nan)
    for number, moment in enumerate(times):
        case, longer = (time <= moment) & (weight > 0.0), time > moment
        if case.any() and longer.any():
            others = np.sort(risk[longer, number])
            below = np.searchsorted(others, risk[case, number], side="left")
            up_to = np.searchsorted(others, risk[case, number], side="right")
            found[number] = (weight[case] @ ((below + up_to) / 2.0)) / (weight[case].sum() * len(others))
    return found


def mean_auc(survival: Array, time: Array, event: Array, times: Array) -> float:
    """The mean of `auc_at` over `times`, of the risk that each survival [B, M] leaves, as far as it is defined."""
    found = auc_at(1.0 - survival, time, event, times)
    known = found[~np.isnan(found)]
    return float(known.mean()) if len(known) else float("nan")
