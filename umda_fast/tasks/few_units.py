"""Intervals of a share and of an AUROC that stay honest for a handful of bags.

The bootstrap has nothing to say where every draw gives the same score: ten bags out of ten right is no proof of a score
of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist

__all__ = ["auroc_interval", "wilson_interval"]


def wilson_interval(share: float, count: float, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share of `count` independent units.

    Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    z2 = _z(level) ** 2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count**2))) / (1 + z2 / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def auroc_interval(auroc: float, negatives: int, positives: int, level: float = 0.95) -> tuple[float, float]:
    """The values of an AUROC that are no further from the one found than `z` of their own standard errors.

    Method 5 of Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2",
    Statistics in Medicine 2006; the variance is that of Hanley and McNeil with equal numbers in its middle.
    """
    z, mean = _z(level), (negatives + positives) / 2 - 1

    def away(value: float) -> float:
        inner = 1 + mean * ((1 - value) / (2 - value) + value / (1 + value))
        return abs(value - auroc) - z * math.sqrt(value * (1 - value) * inner / (negatives * positives))

    return _root(away, 0.0, auroc), _root(away, 1.0, auroc)


def _root(function: Callable[[float], float], outside: float, inside: float) -> float:
    """Where `function`, positive at `outside` and negative at `inside`, is 0; `outside` itself if it is 0 there."""
    if function(outside) <= 0.0:
        return outside
    for _ in range(60):
        middle = (outside + inside) / 2
        outside, inside = (middle, inside) if function(middle) > 0.0 else (outside, middle)
    return (outside + inside) / 2


def _z(level: float) -> float:
    return NormalDist().inv_cdf((1 + level) / 2)
