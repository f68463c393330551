"""Time in intervals: where a time lies, and the hazard that all bags together have in each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from umda_fast.tasks.kind import FloatArray

__all__ = ["choose_cuts", "happened", "lived", "marginal_hazards", "survival_at"]

_FEWEST, _MOST, _EVENTS = 4, 10, 10


def lived(cuts: Tensor, time: Tensor, *, beyond: bool = False) -> Tensor:
    """The share of every interval that has passed by `time` [B], [B, K]: 1 before, 0 after.

    Args:
        cuts: ends of the K intervals, rising; the first begins at 0.
        beyond: the last interval goes on: its share may be above 1.
    """
    starts = torch.cat([cuts.new_zeros(1), cuts[:-1]])
    share = ((time[:, None] - starts) / (cuts - starts)).clamp_min(0.0)
    if not beyond:
        return share.clamp_max(1.0)
    return torch.cat([share[:, :-1].clamp_max(1.0), share[:, -1:]], 1)


def happened(cuts: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """1 for the interval, (start, end], in which a bag had its event, [B, K]; none after the last cut."""
    place = torch.searchsorted(cuts.contiguous(), time.contiguous())
    inside = (place[:, None] == torch.arange(len(cuts), device=cuts.device)) & (event[:, None] == 1)
    return inside.to(time.dtype)


def survival_at(cuts: Tensor, survival: Tensor, times: Tensor) -> Tensor:
    """Survival at `times` [M] of survival at `cuts`, [B, K]: under a constant hazard in each interval, [B, M]; after
    the last cut as there."""
    logs = survival.clamp_min(torch.finfo(survival.dtype).tiny).log()
    falls = logs.diff(dim=1, prepend=logs.new_zeros(len(logs), 1))
    return (falls @ lived(cuts, times).T).exp()


def choose_cuts(column: FloatArray, wanted: int | None) -> tuple[float, ...]:
    """Ends of intervals with as many events each, at most `wanted` of them; the last is that of the last event.

    Args:
        column: times and events [B, 2], of which some have the label; NaN elsewhere.
        wanted: None: one for every 10 events, 4 at least and 10 at most.
    """
    known = column[~np.isnan(column).any(axis=1)]
    times = known[(known[:, 1] == 1) & (known[:, 0] > 0), 0]
    if not len(times):
        return (max(float(known[:, 0].max(initial=0.0)), 1.0),)
    count = min(max(len(times) // _EVENTS, _FEWEST), _MOST) if wanted is None else wanted
    # Some event's own time, so that nothing depends on how machines round.
    quantiles = np.quantile(times, np.arange(1, count + 1) / count, method="inverted_cdf")
    return tuple(np.unique(quantiles).tolist())


def marginal_hazards(cuts: tuple[float, ...], column: FloatArray) -> tuple[float, ...]:
    """The probability of the event in each interval, of those that come to it, in which the likelihood of all labels is
    highest; every interval has half an event and half a bag that lives through it more than there are."""
    known = torch.from_numpy(column[~np.isnan(column).any(axis=1)])
    ends = torch.tensor(cuts, dtype=torch.float64)
    events = happened(ends, known[:, 0], known[:, 1])
    passed = lived(ends, known[:, 0]) * (1.0 - events)
    hazards: list[float] = ((events.sum(0) + 0.5) / (events.sum(0) + passed.sum(0) + 1.0)).tolist()
    return tuple(hazards)
