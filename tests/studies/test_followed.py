"""Curves of groups, and the test of their difference."""

import numpy as np
import pytest
import torch
from scipy.stats import chi2

from umda_fast.studies.followed import logrank_p, plot_followed
from umda_fast.tasks.shown import Followed, Rows


def _shown(time: list[float], event: list[int], group: list[int], names: tuple[str, ...] = ("low", "high")) -> Followed:
    table = Rows(["risk"], [["low"]])
    return Followed(torch.tensor(time), torch.tensor(event).float(), torch.tensor(group), names, table)


def test_the_log_rank_test_by_hand() -> None:
    rng = np.random.default_rng(0)
    time, event, group = rng.integers(1, 12, 40), rng.integers(0, 2, 40), rng.integers(0, 2, 40)
    more = variance = 0.0
    for moment in np.unique(time[event == 1]):
        at_risk, dead = time >= moment, (time == moment) & (event == 1)
        n, first, d = at_risk.sum(), (at_risk & (group == 0)).sum(), dead.sum()
        more += (dead & (group == 0)).sum() - d * first / n
        if n > 1:
            variance += d * first / n * (1 - first / n) * (n - d) / (n - 1)
    shown = _shown(time.astype(float).tolist(), event.tolist(), group.tolist())
    assert logrank_p(shown, 0, 1) == pytest.approx(chi2.sf(more**2 / variance, 1), rel=1e-9)


def test_nothing_to_compare() -> None:
    assert np.isnan(logrank_p(_shown([1.0, 2.0], [0, 0], [0, 1]), 0, 1))
    assert np.isnan(logrank_p(_shown([1.0, 2.0], [1, 0], [0, 0]), 0, 1))


def test_curves_and_the_numbers_at_risk() -> None:
    shown = _shown([1.0, 2.0, 3.0, 10.0], [1, 0, 1, 0], [0, 0, 2, 2], ("low", "middle", "high"))
    axis, below = plot_followed("os", shown).axes
    curves = {line.get_label(): line.get_xydata() for line in axis.lines if "risk" in str(line.get_label())}
    assert list(curves) == ["low risk (2)", "high risk (2)"]
    np.testing.assert_allclose(curves["high risk (2)"], [[0, 1], [3, 0.5], [10, 0.5]])
    counts = [text.get_text() for text in below.texts]
    half = len(counts) // 2
    assert (counts[0], counts[half - 1]) == ("2", "0")
    assert (counts[half], counts[-1]) == ("2", "1")
