"""Hazards of intervals of time as the likelihood of survival.

Time is cut at quantiles of the training bags' event times, c_1 < ... < c_K, c_0 = 0. Of those that come to interval j a
share h_j has its event in it:

    logit h_j = b_j + s + l_j,   S(c_j) = prod_{i <= j} (1 - h_i),

with s and l_1..l_K from the head and b_j that of all training bags together, so that a head of zeros predicts what all
of them had. s alone is a proportional model; what l_j says of one interval costs a head more than what s says of all.
The loss is the negative log likelihood of a bag's interval, or, where it was censored, of having lived so long: of the
interval in which it was censored, the part that it lived through counts, as under a constant hazard.

Method: Brown, "On the use of indicator variables for studying the time-dependence of parameters in a response-time
model", 1975; Gensheimer and Narasimhan, "A scalable discrete-time survival model for neural networks", 2019.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.tasks.intervals import happened, lived, marginal_hazards
from umda_fast.tasks.kind import Array, FloatArray, TaskSpec
from umda_fast.tasks.likelihood import Likelihood, cuts_of

__all__ = ["Hazards", "martingale_residuals"]


class Hazards(Likelihood):
    """Each bag has its own loss."""

    joint = False

    def outputs(self, task: TaskSpec) -> int:
        return 1 if task.classes == 1 else 1 + task.classes

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        cuts, hazard = cuts_of(task, logits), self._hazard_logits(task, logits)
        time, event = target.to(logits.dtype).unbind(1)
        events = happened(cuts, time, event)
        # Of an interval with an event it is not known when in it: it tells of the event alone.
        passed = lived(cuts, time) * (1.0 - events)
        return (passed * F.softplus(hazard) + events * F.softplus(-hazard)).sum(1)

    def undecided_loss(self, task: TaskSpec, logits: Tensor) -> Tensor:
        """Against the event times of all training bags together."""
        base = logits.new_tensor(_baseline(task))
        hazard, usual = self._hazard_logits(task, logits), base.sigmoid()
        coming = torch.cat([usual.new_ones(1), (1.0 - usual).cumprod(0)[:-1]])
        return (coming * (usual * F.softplus(-hazard) + (1.0 - usual) * F.softplus(hazard))).sum(1).mean()

    def log_survival(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return -F.softplus(self._hazard_logits(task, logits)).cumsum(1)

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        """At the cuts of the first, those of the others under constant hazards between theirs."""
        first, parts = tasks[0], []
        for task, own in zip(tasks, logits, strict=True):
            shares = lived(cuts_of(task, own), cuts_of(first, own), beyond=True)
            parts.append(-F.softplus(self._hazard_logits(task, own)) @ shares.T)
        log_survival = torch.stack(parts).logsumexp(0) - math.log(len(parts))
        fall = -log_survival.diff(dim=1, prepend=log_survival.new_zeros(len(log_survival), 1))
        fall = fall.clamp_min(torch.finfo(fall.dtype).tiny)
        hazard = torch.expm1(fall).log() - fall.new_tensor(_baseline(first))
        common = hazard.mean(1, keepdim=True)
        return common if first.classes == 1 else torch.cat([common, hazard - common], 1)

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        """Martingale residuals for s; nothing for the others."""
        targets = np.zeros((len(target), self.outputs(task)))
        targets[:, 0] = martingale_residuals(task, target)
        return targets

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """Those of the hazards of all together."""
        assert task.cuts is not None
        hazards = np.array(marginal_hazards(task.cuts, column))
        found = np.log(hazards / (1.0 - hazards)) - _baseline(task)
        return found if task.classes == 1 else np.concatenate([[0.0], found])

    def _hazard_logits(self, task: TaskSpec, logits: Tensor) -> Tensor:
        base = logits.new_tensor(_baseline(task))
        return logits + base if task.classes == 1 else logits[:, :1] + logits[:, 1:] + base


def _baseline(task: TaskSpec) -> list[float]:
    """b_1..b_K."""
    return [math.log(hazard / (1.0 - hazard)) for hazard in task.hazards or [0.5] * task.classes]


def martingale_residuals(task: TaskSpec, target: Array) -> FloatArray:
    """Events less those that all training bags together would have had by then, [B] (Therneau, Grambsch and Fleming,
    "Martingale-based residuals for survival models", 1990)."""
    cuts, found = torch.tensor(task.cuts, dtype=torch.float64), torch.from_numpy(target)
    expected = lived(cuts, found[:, 0]) @ F.softplus(found.new_tensor(_baseline(task)))
    residuals: FloatArray = target[:, 1] - expected.numpy()
    return residuals
