"""How much of each of several models a mixture should hold, found on bags that none was trained on.

Source of the idea: Wolpert, "Stacked generalization", 1992; Breiman, "Stacked regressions", 1996.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.optimize import minimize_scalar
from torch import Tensor

from umda_fast.model import TaskSpec
from umda_fast.score.calibration import best_temperature
from umda_fast.tasks import kind_of

__all__ = ["SURE", "Addition", "TaskMixture", "calibrated_losses", "mix_task"]

SURE = 2.0
"""Standard errors that a gain must exceed."""


@dataclass(frozen=True)
class Addition:
    """What came of adding a model to the mixture so far.

    Attributes:
        weight: its share w, 0 if it is left out.
        scale: s, what its logits are multiplied by to be as large as those of the mixture so far; 1 where nothing is
            left of that (w = 1).
        gain: how much less the loss is with it, at the weight at which it is least; NaN where nothing can be said.
        error: the standard error of the gain, over bags.
    """

    weight: float
    scale: float
    gain: float
    error: float


@dataclass(frozen=True)
class TaskMixture:
    """Of one task.

    Attributes:
        coefficients: of the logits of every model, see `umda_fast.model.Mixture`.
        additions: one for every model after the first.
    """

    coefficients: tuple[float, ...]
    additions: tuple[Addition, ...]


def calibrated_losses(task: TaskSpec, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and weight of every bag, float64 [B] each, after the best temperature of a task that has one.

    Args:
        logits: [B, outputs], B > 0. target: [B] or, multilabel, [B, classes]; every bag has its label.
    """
    logits = logits.double()
    return kind_of(task).bag_losses(task, logits / best_temperature(task, logits, target), target, None)


def mix_task(task: TaskSpec, logits: Sequence[Tensor], target: Tensor) -> TaskMixture:
    """The mixture `(1 - w) logits + w s logits'` of models, the second added to the first, the third to both, ...

    s is the ratio of the standard deviations of the logits over bags (of several classes, without what all of them
    share), so that a sure model does not drown another; 1 for a task without temperatures, whose models predict in the
    same units. w, in hundredths from 0 to 1, has the least loss, each mixture at its own best temperature, for how sure
    a mixture is says nothing about its parts. It is 0 unless that is less than the loss without the new model by more
    than `SURE` standard errors of the difference, paired over bags: with few bags a weight that fits them best is an
    accident.

    Args:
        logits: of every model, [B, outputs]. target: [B] or, multilabel, [B, classes]; every bag has its label.
    """
    mixed, coefficients, additions = logits[0].double(), [1.0], []
    for other in logits[1:]:
        added = _add(task, mixed, other.double(), target)
        coefficients = [*((1.0 - added.weight) * c for c in coefficients), added.weight * added.scale]
        if added.weight > 0.0:
            mixed = (1.0 - added.weight) * mixed + added.weight * added.scale * other.double()
        additions.append(added)
    return TaskMixture(tuple(coefficients), tuple(additions))


def _add(task: TaskSpec, first: Tensor, other: Tensor, target: Tensor) -> Addition:
    if len(target) < 2:
        return Addition(0.0, 1.0, math.nan, math.nan)
    scale = _scale(task, first, other)

    def losses(weight: float) -> tuple[Tensor, Tensor]:
        return calibrated_losses(task, (1.0 - weight) * first + weight * scale * other, target)

    def loss(weight: float) -> float:
        each, counts = losses(weight)
        return float((each * counts).sum() / counts.sum())

    # The loss is convex in the logits, so as a function of w it falls to one minimum and rises from it.
    found = round(float(minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded", options={"xatol": 5e-3}).x), 2)
    weight = min((found, 1.0), key=loss)
    (without, counts), (with_it, _) = losses(0.0), losses(weight)
    less, share = without - with_it, counts / counts.sum()
    gain = float((share * less).sum())
    error = math.sqrt(float((share * (less - gain)).square().sum()) * len(less) / (len(less) - 1))
    weight = weight if gain > SURE * error else 0.0
    return Addition(weight, 1.0 if weight == 1.0 else scale, gain, error)


def _scale(task: TaskSpec, first: Tensor, other: Tensor) -> float:
    kind = kind_of(task)
    if kind.calibration != "temperature":
        return 1.0
    sizes = [kind.centred(logits) for logits in (first, other)]
    own, others = (float((x - x.mean(0)).square().mean().sqrt()) for x in sizes)
    scale = own / others if others > 0.0 else 1.0
    return scale if 0.0 < scale < math.inf else 1.0
