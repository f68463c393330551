"""Bootstrap intervals of the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from umda_fast.model import TaskSpec, decode
from umda_fast.score.intervals import bootstrap_interval, primary_score
from umda_fast.score.metrics import TaskMetrics
from umda_fast.tasks import kind_of

TASKS = [
    TaskSpec("binary", "binary"),
    TaskSpec("classes", "multiclass", 3),
    TaskSpec("labels", "multilabel", 4),
    TaskSpec("value", "regression", mean=3.0, std=2.0),
]


def draw(task: TaskSpec, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    logits = torch.randn(n, task.outputs)
    noisy = decode(task, logits + torch.randn(n, task.outputs))
    if task.kind == "regression":
        return logits, noisy[:, 0]
    if task.kind == "multiclass":
        return logits, noisy.argmax(1)
    return logits, (noisy if task.kind == "multilabel" else noisy[:, 0]).round()


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_the_score_is_the_one_the_trainer_reports(task: TaskSpec) -> None:
    logits, target = draw(task, 60)
    if task.kind == "multilabel":
        logits[:, 3], target[:, 3] = -5.0, 0.0  # a label that is neither predicted nor there
    metrics = TaskMetrics([task])
    metrics.update({task.name: logits}, {task.name: target}, {task.name: torch.ones(60).bool()})
    expected = metrics.compute()[task.name][kind_of(task).primary]
    score = primary_score(task, decode(task, logits).numpy(), target.numpy())
    assert score == pytest.approx(expected, abs=1e-5)


def test_the_interval_is_that_of_a_binomial() -> None:
    """Accuracy is a mean of independent hits: its standard error is known."""
    task, n = TASKS[1], 400
    logits, target = draw(task, n)
    low, high = bootstrap_interval(task, logits, target)
    hit = float((logits.argmax(1) == target).double().mean())
    error = math.sqrt(hit * (1 - hit) / n)
    assert low == pytest.approx(hit - 1.96 * error, abs=0.4 * error)
    assert high == pytest.approx(hit + 1.96 * error, abs=0.4 * error)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_it_is_the_same_every_time_and_holds_the_score(task: TaskSpec) -> None:
    logits, target = draw(task, 80)
    first = bootstrap_interval(task, logits, target, samples=200)
    assert first == bootstrap_interval(task, logits, target, samples=200)
    assert first[0] < primary_score(task, decode(task, logits).numpy(), target.numpy()) < first[1]


def test_an_undefined_score_has_no_interval() -> None:
    logits = torch.randn(10, 1)
    for target in (torch.ones(10), torch.eye(10)[0]):  # one class, or nearly: a third of the draws lack the positive
        assert all(np.isnan(bootstrap_interval(TASKS[0], logits, target)))
    assert all(np.isnan(bootstrap_interval(TASKS[3], logits[:0], logits[:0, 0])))
