"""Proportional hazards with the partial likelihood of Cox.

A bag's hazard is that of a baseline times e^s, with s from the head. Of the bags at risk at an event time t, R(t), d
have the event there, D(t); the loss of one of these is

    -s_i + 1/d sum_{r < d} log( sum_{j in R(t)} e^{s_j} - r/d sum_{j in D(t)} e^{s_j} ),

and 0 of a bag that was censored, which counts where it is at risk. So a bag's loss depends on the bags beside it, and
no loss on what is added to all s. A prediction needs the baseline, which training leaves open; it is found in the end,
from the training bags, at the cuts c_1 < ... < c_K of the task:

    S(c_j) = exp(-H_j e^s),   H_j = sum over event times t <= c_j of d / sum_{i in R(t)} e^{s_i}.

Sources: Cox, "Regression models and life-tables", 1972; ties: Efron, "The efficiency of Cox's likelihood function for
censored data", 1977; baseline: Breslow, in the discussion of Cox 1972.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from umda_fast.tasks.hazards import martingale_residuals
from umda_fast.tasks.intervals import lived
from umda_fast.tasks.kind import Array, FloatArray, TaskSpec
from umda_fast.tasks.likelihood import Likelihood, cuts_of

__all__ = ["Cox", "breslow", "efron_losses"]

_LEVELS = 60  # halvings of an interval, after which nothing of it is left in float64
_WIDEST = 50.0


class Cox(Likelihood):
    """One number for a bag, the logarithm of its hazard relative to the baseline."""

    joint = True

    def outputs(self, task: TaskSpec) -> int:
        return 1

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        time, event = target.unbind(1)
        return efron_losses(logits[:, 0], time, event)

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """As if every bag were as likely as any other to have the first event."""
        return logits[:, 0].logsumexp(0) - logits[:, 0].mean()

    def log_survival(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return -logits.exp() * logits.new_tensor(_cumulative(task))

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        """With the risk, which is 1 less the mean of S over the cuts, that is the mean of all risks. (The mean of
        proportional models is none.)"""
        first, parts = tasks[0], []
        for task, own in zip(tasks, logits, strict=True):
            baseline = own.new_tensor(_cumulative(task))
            rises = baseline.diff(prepend=baseline.new_zeros(1))
            shares = lived(cuts_of(task, own), cuts_of(first, own), beyond=True)
            parts.append((-own.exp() * (shares @ rises)).exp().mean(1, keepdim=True))
        wanted, baseline = torch.stack(parts).mean(0), parts[0].new_tensor(_cumulative(first))
        low, high = torch.full_like(wanted, -_WIDEST), torch.full_like(wanted, _WIDEST)
        for _ in range(_LEVELS):
            middle = (low + high) / 2
            above = (-middle.exp() * baseline).exp().mean(1, keepdim=True) > wanted  # still too safe
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        return martingale_residuals(task, target)[:, None]

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """Any is as good as any other; 0 is what all training bags together had."""
        return np.zeros(1)


def _cumulative(task: TaskSpec) -> list[float]:
    """H_1..H_K; before a baseline was found, of the hazards of all training bags together."""
    if task.baseline is not None:
        return list(task.baseline)
    rises = [-math.log1p(-hazard) for hazard in task.hazards or [0.5] * task.classes]
    found: list[float] = np.cumsum(rises).tolist()
    return found


def efron_losses(log_risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """The loss of every bag among all, [B]; its sum is the negative log partial likelihood.

    Args:
        log_risk: float32 or float64 [B]. time: [B]; a negative one is at no risk. event: 1 or 0, [B].
    """
    if not len(log_risk):
        return log_risk
    order = time.argsort(descending=True, stable=True)
    s, t, had = log_risk[order], time[order], event[order] == 1
    # Bags of one time are neighbours: `last` is the last of them, up to which all are at risk.
    differs = t[1:] != t[:-1]
    group = torch.cat([differs.new_zeros(1), differs]).cumsum(0)
    place = torch.arange(len(t), device=t.device)
    last = torch.zeros_like(place).scatter_reduce(0, group, place, "amax", include_self=False)[group]
    at_risk = s.logcumsumexp(0)[last]
    # sum over D / sum over R, of terms at most 1 each.
    zero = s.new_zeros(len(s))
    shares = zero.index_add(0, group, torch.where(had, (s - at_risk).exp(), 0.0))[group]
    ties = zero.index_add(0, group, had.to(s.dtype))[group]
    before = had.long().cumsum(0) - had.long()  # whole numbers, whose sum is the same on every device
    rank = (before - before[torch.searchsorted(group, group)]).where(had, 0).to(s.dtype)
    fewer = torch.where(had, torch.log1p(-(rank / ties.clamp_min(1.0)) * shares), 0.0)
    fewer = zero.index_add(0, group, fewer)[group] / ties.clamp_min(1.0)
    losses = torch.where(had, at_risk - s + fewer, 0.0)
    return torch.empty_like(losses).scatter(0, order, losses)


def breslow(log_risk: Array, time: Array, event: Array, at: Array) -> FloatArray:
    """The cumulative baseline hazard at `at`, [M], from float64 [B] each."""
    times, place = np.unique(time, return_inverse=True)
    deaths = np.bincount(place, weights=event, minlength=len(times))
    most = log_risk.max()
    risk = np.bincount(place, weights=np.exp(log_risk - most), minlength=len(times))
    at_risk = risk[::-1].cumsum()[::-1]
    rises = np.divide(deaths, at_risk, out=np.zeros(len(times)), where=deaths > 0) * np.exp(-most)
    found: FloatArray = np.concatenate([[0.0], rises.cumsum()])[np.searchsorted(times, at, side="right")]
    return found
