"""The scores by NumPy are those of the metrics, and have intervals that few bags make wide."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from umda_fast.model import TaskSpec, decode
from umda_fast.score.intervals import bootstrap_interval, bootstrap_intervals
from umda_fast.score.metrics import TaskMetrics
from umda_fast.tasks import TaskKind, kind_of
from umda_fast.tasks.class_scores import auroc, sensitivity_at

TIMED: dict[str, Any] = {"classes": 4, "cuts": (2.0, 4.0, 6.0, 8.0), "hazards": (0.2, 0.3, 0.4, 0.5)}
TASKS = [
    TaskSpec("b", "binary"),
    TaskSpec("m", "multiclass", classes=4),
    TaskSpec("l", "multilabel", classes=3),
    TaskSpec("t", "multilabel", classes=3, thresholds=(0.2, 0.5, 0.7)),
    TaskSpec("r", "regression", mean=3.0, std=2.0),
    TaskSpec("o", "ordinal", classes=4),
    TaskSpec("s", "survival", **TIMED),
    TaskSpec("c", "survival", loss="cox", **TIMED),
]


def drawn(task: TaskSpec, bags: int, seed: int, classes: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits in steps, so that scores tie, none of them a probability of 1/2, and labels; of no more than `classes`
    classes."""
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(bags, task.outputs)).round(1) + 0.03).float()
    if task.kind == "survival":
        label = np.stack([rng.integers(1, 10, bags), rng.random(bags) < 0.6], 1).astype(float)
    elif task.kind == "multilabel":
        label = (rng.random((bags, 3)) < 0.4).astype(float)
    elif task.kind == "regression":
        label = rng.normal(size=bags)
    else:
        label = rng.integers(0, classes or max(task.classes, 2), bags)
    return logits, torch.from_numpy(label).to(kind_of(task).label_dtype)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}")
@pytest.mark.parametrize(("bags", "classes"), [(200, None), (12, 2), (6, 1), (1, 1)])
def test_they_are_those_of_the_metrics(task: TaskSpec, bags: int, classes: int | None) -> None:
    for seed in range(3):
        logits, target = drawn(task, bags, seed, classes)
        metrics = TaskMetrics([task])
        there = torch.ones(bags, dtype=torch.bool)
        metrics.update({task.name: logits}, {task.name: target}, {task.name: there})
        expected = metrics.compute()[task.name]
        prediction, label = decode(task, logits).double().numpy(), target.double().numpy()
        assert kind_of(task).scores(task, prediction, label) == pytest.approx(expected, rel=1e-5, abs=2e-6, nan_ok=True)
        # As of a kind from outside, which has none of its own.
        slow = TaskKind.scores(kind_of(task), task, prediction, label)
        assert slow == pytest.approx(expected, rel=1e-5, abs=2e-6, nan_ok=True)


def test_ties_and_the_edge_of_a_specificity() -> None:
    positive = np.array([True] * 2 + [False] * 10)
    assert auroc(np.zeros(12), positive) == 0.5
    score = np.array([0.5, 0.9, 0.6, *np.zeros(9)])
    assert sensitivity_at(0.9, score, positive) == 1.0  # one of ten false alarms is allowed
    assert sensitivity_at(0.91, score, positive) == 0.5


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}")
def test_every_metric_has_an_interval_around_it(task: TaskSpec) -> None:
    logits, target = drawn(task, 60, 0)
    found = bootstrap_intervals(task, logits, target, samples=60)
    scores = kind_of(task).scores(task, decode(task, logits.double()).numpy(), target.double().numpy())
    assert found.keys() == scores.keys() == kind_of(task).metrics(task).keys()
    assert all(low <= scores[metric] <= high for metric, (low, high) in found.items())
    assert found[kind_of(task).primary] == bootstrap_interval(task, logits, target, samples=60)
    assert bootstrap_intervals(task, logits[:0], target[:0]) == {}


def test_bags_of_a_patient_are_drawn_together() -> None:
    task = TASKS[1]
    logits, target = drawn(task, 30, 0)
    many = [part.repeat_interleave(8, 0) for part in (logits, target)]
    patients = [f"patient {index // 8}" for index in range(240)]
    by_bag = bootstrap_intervals(task, *many, samples=200)
    by_patient = bootstrap_intervals(task, *many, groups=patients, samples=200)
    assert by_patient.keys() == by_bag.keys()
    for metric, (low, high) in by_patient.items():
        assert high - low > 1.5 * (by_bag[metric][1] - by_bag[metric][0]), metric


def test_few_right_bags_prove_little() -> None:
    target = torch.tensor([0.0] * 8 + [1.0] * 4)
    found = bootstrap_intervals(TASKS[0], (8 * target - 4)[:, None], target, samples=50)
    assert all(high == 1.0 for _, high in found.values())
    assert found["accuracy"][0] < 0.8
    assert found["sensitivity_90"][0] < 0.55  # of four bags
    assert found["balanced_accuracy"][0] < found["accuracy"][0]  # of 2^2 / (1/8 + 1/4) = 10.7
    assert not any(math.isnan(end) for ends in found.values() for end in ends)
