"""Probabilities from which the labels of a multilabel task are predicted, chosen on bags not trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from lightning_fabric import Fabric
from torch import Tensor

from umda_fast.data import BagDataset
from umda_fast.data.draws import Stream, generator, integers
from umda_fast.model import TaskSpec, decode
from umda_fast.runtime.config import DataConfig
from umda_fast.score.collect import Predictions, collect
from umda_fast.tasks import kind_of
from umda_fast.tasks.kind import FloatArray

__all__ = ["Rule", "best_f1_thresholds", "choose_thresholds", "share_thresholds", "tune_thresholds", "with_thresholds"]

FEWEST = 10
"""Bags on which the thresholds of `share` are chosen, at least."""
_DRAWS = 100
_Matrix = npt.NDArray[np.float64]
Rule: TypeAlias = Literal["auto", "share", "f1", "half"]
"""How thresholds are chosen; `half` leaves them as they are."""


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


def share_thresholds(probability: _Matrix, share: _Matrix) -> _Matrix:
    """For each label the cut above which lies its share of the bags, at least one, float64 [C]: halfway between two
    probabilities seen; 0.5 for a label whose share is 0.

    Args:
        probability: float64 [B, C], B > 0. share: of the bags that have each label, [C], 0 to 1.
    """
    bags = len(probability)
    falling = -np.sort(-probability, axis=0)
    falling = np.concatenate([falling, np.zeros((1, falling.shape[1]))])
    chosen = np.clip(np.rint(share * bags).astype(np.int64), 1, bags)[None]
    cut = (np.take_along_axis(falling, chosen - 1, axis=0) + np.take_along_axis(falling, chosen, axis=0))[0] / 2.0
    return np.where(share > 0.0, cut, 0.5)


def choose_thresholds(
    model: Any, datasets: Mapping[str, BagDataset], rule: Rule, fabric: Fabric, data: DataConfig
) -> None:
    """Choose them on the split `val` for a model trained on `train`, and put them into its `config`; without `val` or a
    task that has some nothing changes."""
    tasks = model.config.tasks
    if rule == "half" or not len(datasets.get("val", ())) or not any(kind_of(task).thresholded for task in tasks):
        return
    found = collect(model, datasets["val"], fabric, data)
    model.config = replace(model.config, tasks=tune_thresholds(tasks, found, rule, datasets["train"].labels))


def tune_thresholds(
    tasks: Sequence[TaskSpec],
    found: Predictions,
    rule: Rule = "f1",
    labels: Mapping[str, FloatArray] | None = None,
    seed: int = 0,
) -> tuple[TaskSpec, ...]:
    """The tasks, each `with_thresholds` chosen on `found`, which are of bags that the weights were not trained on.

    Args:
        labels: of the training bags, task -> [B, classes], NaN where missing; `share` needs them.
    """
    return tuple(with_thresholds(task, *found.of(task), rule, (labels or {}).get(task.name), seed) for task in tasks)


def with_thresholds(
    task: TaskSpec, logits: Tensor, target: Tensor, rule: Rule, trained: FloatArray | None = None, seed: int = 0
) -> TaskSpec:
    """`task`; if it is a multilabel one, with thresholds chosen on bags that the weights were not trained on.

    `share`: every label is predicted for as large a share of these bags as have it among the bags trained on. How rare
    a label is is known well, from all training bags, and is the only thing that is asked of these few beside their
    order. With fewer than `FEWEST` bags thresholds stay as they are.

    `auto`: as by `share` or one half for all, whichever has the higher macro F1 on these bags, one half if neither.
    Rare labels that are hard to tell are nearly never predicted from one half on. Where a model is right about nearly
    every bag, it is `share` that errs: these bags are a draw, and need not have a label as often as the training bags.

    `f1`: those that are best for their F1 on these bags. The best cut for a rare label rests on a handful of bags. So
    it is the mean over the best cuts of 100 bootstrap samples, which varies less (bagging: Breiman, "Bagging
    predictors", 1996). That the best cut for F1 lies below 1/2 for all but easy labels, and how badly one chosen on
    few positives may do: Lipton, Elkan and Narayanaswamy, "Thresholding classifiers to maximize F1 score", 2014.

    Args:
        logits, target: [B, classes], of the bags with labels. Without any the task keeps what it has.
        trained: labels of the training bags, [n, classes], NaN where missing; `share` and `auto` need them.
        seed: of the samples.

    Raises:
        ValueError: `share` or `auto` without `trained`.
    """
    if rule == "half" or not kind_of(task).thresholded or len(target) < (1 if rule == "f1" else FEWEST):
        return task
    probability, known = decode(task, logits.double()).numpy(), target.double().numpy()
    if rule != "f1":
        if trained is None:
            raise ValueError(f"trained: expected the training labels of task {task.name!r}, got None")
        shares = trained[~np.isnan(trained).any(axis=1)].mean(axis=0)
        shared = replace(task, thresholds=tuple(share_thresholds(probability, shares).tolist()))
        half, score = replace(task, thresholds=None), kind_of(task).primary_score
        if rule == "auto" and score(shared, probability, known) <= score(half, probability, known):
            return half
        return shared
    rng, bags = generator(Stream.THRESHOLDS, seed), len(known)
    draws = [integers(rng, 0, bags - 1, bags) for _ in range(_DRAWS)]
    cuts = np.mean([best_f1_thresholds(probability[rows], known[rows]) for rows in draws], axis=0)
    return replace(task, thresholds=tuple(cuts.tolist()))
