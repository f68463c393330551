"""How much of each of several models a mixture should hold, found on bags that none was trained on.

Sources: Wolpert, "Stacked generalization", 1992; Breiman, "Stacked regressions", 1996; resampling, Efron, "Bootstrap
methods: another look at the jackknife", 1979; one standard error towards what is simpler, Breiman, Friedman, Olshen and
Stone, "Classification and Regression Trees", 1984.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.draws import Stream, generator, integers
from umda_fast.model import TaskSpec
from umda_fast.score.calibration import best_temperature
from umda_fast.tasks import kind_of

__all__ = ["Addition", "TaskMixture", "calibrated_losses", "mix_task"]

_DRAWS = 100
_WEIGHTS = tuple(step / 20 for step in range(21))
# A fifth apart, a temperature is a tenth off at most: the loss is then as good as at the best one.
_LOG_TEMPERATURES = tuple(-3.0 + step / 5 for step in range(36))


@dataclass(frozen=True)
class Addition:
    """What came of adding a model to the mixture so far.

    Attributes:
        weight: its share w, 0 if it is left out.
        scale: s, what its logits are multiplied by to be as large as those of the mixture so far; 1 where nothing is
            left of that (w = 1).
        best: the weight of the least loss on all bags.
        deviation: standard deviation of that weight, from bootstrap samples of the bags; this and the next two are NaN
            where nothing can be said.
        gain: how much less the loss is with it, at `weight`.
        error: the standard error of the gain, over bags.
    """

    weight: float
    scale: float
    best: float
    deviation: float
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
    same units.

    The best weight is the one from 0 to 1 with the least loss, each mixture at its own best temperature, for how sure a
    mixture is says nothing about its parts. With few bags it is an accident. So it is found anew for 100 bootstrap
    samples of the bags, and w is the mean of these weights less their standard deviation, between 0 and the best weight
    of all bags: with few bags, or where the new model adds nothing, about 0; with many the best weight. As the loss has
    one minimum in w, it is never greater than without the new model, on these bags.

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
    if len(target) < 2 or not bool(other.isfinite().all()):
        return Addition(0.0, 1.0, 0.0, math.nan, math.nan, math.nan)
    scale = _scale(task, first, other)

    def mixed(weight: float) -> Tensor:
        return (1.0 - weight) * first + weight * scale * other

    found, best = _best_weights(task, [mixed(weight) for weight in _WEIGHTS], target)
    deviation = float(found.std())
    weight = round(min(max(float(found.mean()) - deviation, 0.0), best), 2)
    (without, counts), (with_it, _) = (calibrated_losses(task, mixed(own), target) for own in (0.0, weight))
    less, share = without - with_it, counts / counts.sum()
    gain = float((share * less).sum())
    error = math.sqrt(float((share * (less - gain)).square().sum()) * len(less) / (len(less) - 1))
    return Addition(weight, 1.0 if weight == 1.0 else scale, best, deviation, gain, error)


def _best_weights(
    task: TaskSpec, mixtures: Sequence[Tensor], target: Tensor
) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]:
    """The weight, of `_WEIGHTS`, at which `mixtures` have the least loss: in every bootstrap sample, [_DRAWS], and on
    all bags. The lower of two that are as good. A loss that depends on the bags beside a bag (`TaskKind.joint`) is
    found over all bags, and the samples weigh its terms."""
    bags, rng, kind = len(target), generator(Stream.MIXING, 0), kind_of(task)
    times = np.ones((1 + _DRAWS, bags))  # how often each sample has each bag; the first row is all bags
    for row in times[1:]:
        row[:] = np.bincount(integers(rng, 0, bags - 1, bags), minlength=bags)
    shares, least = torch.from_numpy(times), []
    for logits in mixtures:
        size = float(kind.centred(logits).square().mean().sqrt())
        scaled = [logits]
        if kind.calibration == "temperature" and 0.0 < size < math.inf:
            scaled = [logits / (size * math.exp(log)) for log in _LOG_TEMPERATURES]
        each = [kind.bag_losses(task, own, target, None) for own in scaled]
        counts = each[0][1]
        losses = torch.stack([own for own, _ in each]) * counts  # [temperatures, B]
        least.append(((shares @ losses.T) / (shares @ counts)[:, None]).amin(1))
    index = torch.stack(least).nan_to_num(math.inf).argmin(0).numpy()
    weights = np.array(_WEIGHTS)[index]
    return weights[1:], float(weights[0])


def _scale(task: TaskSpec, first: Tensor, other: Tensor) -> float:
    kind = kind_of(task)
    if kind.calibration != "temperature":
        return 1.0
    sizes = [kind.centred(logits) for logits in (first, other)]
    own, others = (float((x - x.mean(0)).square().mean().sqrt()) for x in sizes)
    scale = own / others if others > 0.0 else 1.0
    return scale if 0.0 < scale < math.inf else 1.0
