"""Probabilities from which the labels of a multilabel task are predicted, chosen for F1 on bags not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from umda_fast.data.draws import Stream, generator, integers
from umda_fast.model import TaskSpec, decode
from umda_fast.score.collect import Predictions
from umda_fast.tasks import kind_of

__all__ = ["best_f1_thresholds", "tune_thresholds"]

_DRAWS = 100
_Matrix = npt.NDArray[np.float64]


def best_f1_thresholds(probability: _Matrix, target: _Matrix) -> _Matrix:
    """For each label the cut with the best F1, float64 [C]: halfway between two probabilities seen, 0.5 for a label
    without positives.

    Args:
        probability: float64 [B, C]. target: 0 or 1, [B, C].
    """
    order = np.argsort(-probability, axis=0, kind="stable")
    falling = np.take_along_axis(probability, order, axis=0)
    found = np.take_along_axis(target, order, axis=0).cumsum(axis=0)
    positives = target.sum(axis=0)
    chosen = np.arange(1, len(target) + 1)[:, None]
    below = np.concatenate([falling[1:], np.zeros((1, falling.shape[1]))])
    # Bags of equal probability are chosen together.
    f1 = np.where(falling > below, 2.0 * found / (chosen + positives), -1.0)
    last = f1.argmax(axis=0)[None]
    cut = (np.take_along_axis(falling, last, axis=0) + np.take_along_axis(below, last, axis=0))[0] / 2.0
    return np.where(positives > 0, cut, 0.5)


def tune_thresholds(tasks: Sequence[TaskSpec], found: Predictions, seed: int = 0) -> tuple[TaskSpec, ...]:
    """The tasks, multilabel ones with the thresholds that are best for their F1 in `found`.

    The best cut for a rare label rests on a handful of bags. So it is the mean over the best cuts of 100 bootstrap
    samples, which varies less (bagging: Breiman, "Bagging predictors", 1996). That the best cut for F1 lies below 1/2
    for all but easy labels, and how badly one chosen on few positives may do: Lipton, Elkan and Narayanaswamy,
    "Thresholding classifiers to maximize F1 score", 2014.

    Args:
        found: of bags that the weights were not trained on. A task without labelled bags keeps what it has.
        seed: of the samples.
    """
    tuned = []
    for task in tasks:
        logits, labels = found.of(task)
        if not kind_of(task).thresholded or len(labels) == 0:
            tuned.append(task)
            continue
        probability, target = decode(task, logits.double()).numpy(), labels.double().numpy()
        rng, bags = generator(Stream.THRESHOLDS, seed), len(target)
        draws = [integers(rng, 0, bags - 1, bags) for _ in range(_DRAWS)]
        cuts = np.mean([best_f1_thresholds(probability[rows], target[rows]) for rows in draws], axis=0)
        tuned.append(replace(task, thresholds=tuple(cuts.tolist())))
    return tuple(tuned)
