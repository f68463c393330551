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
from umda_fast.tasks.few_units import auroc_interval, wilson_interval

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


def perfect(task: TaskSpec, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions without a mistake."""
    if task.kind == "multiclass":
        target = torch.arange(n) % task.classes
        return 20.0 * torch.nn.functional.one_hot(target, task.classes).float(), target
    target = (torch.arange(n * task.outputs).reshape(n, task.outputs) % 3 == 0).float()
    return 20.0 * (2 * target - 1), target if task.kind == "multilabel" else target[:, 0]


@pytest.mark.parametrize("task", TASKS[:3], ids=lambda task: task.kind)
@pytest.mark.parametrize("n", [10, 25])
def test_ten_bags_without_a_mistake_prove_no_score_of_one(task: TaskSpec, n: int) -> None:
    low, high = bootstrap_interval(task, *perfect(task, n), samples=100)
    assert high == 1.0
    assert 0.5 < low < 1 - 1 / n


def test_wilson_s_interval_is_the_textbook_s() -> None:
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(0.5, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)


@pytest.mark.parametrize("separation", [0.0, 1.0, 2.0])
def test_the_interval_of_an_auroc_covers_it_at_few_bags(separation: float) -> None:
    """Draws of 5 and 5 bags whose AUROC is known: the true one is inside about as often as said."""
    rng = np.random.default_rng(0)
    truth = 0.5 * (1 + math.erf(separation / 2))
    inside = []
    for _ in range(400):
        negatives, positives = rng.normal(size=5), rng.normal(separation, size=5)
        found = float((positives[:, None] > negatives).mean())
        low, high = auroc_interval(found, 5, 5)
        assert 0 <= low <= found <= high <= 1
        assert low < high
        inside.append(low <= truth <= high)
    assert np.mean(inside) > 0.93


def test_patients_are_drawn_not_their_slides() -> None:
    """Ten slides each of ten patients, alike within a patient, say as much as ten slides."""
    task = TASKS[1]
    logits, target = draw(task, 10)
    alike = logits.repeat_interleave(10, 0), target.repeat_interleave(10, 0)
    patients = [f"patient {index // 10}" for index in range(100)]
    few, many = bootstrap_interval(task, logits, target), bootstrap_interval(task, *alike)
    by_patient = bootstrap_interval(task, *alike, groups=patients)
    assert by_patient == pytest.approx(few, abs=0.02)
    assert by_patient[1] - by_patient[0] > 1.5 * (many[1] - many[0])
