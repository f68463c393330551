"""Weights of a mixture: the best there are, and none where few bags say nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from umda_fast.model import TaskSpec, decode
from umda_fast.score.mixing import SURE, calibrated_losses, mix_task

TASKS = (
    TaskSpec("binary", "binary", class_weights=(1.0, 3.0)),
    TaskSpec("classes", "multiclass", classes=4),
    TaskSpec("labels", "multilabel", classes=3),
    TaskSpec("value", "regression", mean=5.0, std=2.0),
)


def seen(task: TaskSpec, bags: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two models that see the truth through noise of their own, and labels."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(bags, task.outputs, generator=generator)
    if task.kind == "regression":
        target = decode(task, truth)[:, 0]
    elif task.kind == "multiclass":
        target = truth.argmax(1)
    else:
        target = (truth > 0.5).float()
        target = target[:, 0] if task.kind == "binary" else target
    # The mean of what the truth may be: of a regression, no number times it is better.
    first, second = ((truth + 0.8 * torch.randn(truth.shape, generator=generator)) / 1.64 for _ in range(2))
    return first, second, target


def loss(task: TaskSpec, logits: Tensor, target: Tensor) -> float:
    losses, weight = calibrated_losses(task, logits, target)
    return float((losses * weight).sum() / weight.sum())


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_the_weight_is_the_best_of_all(task: TaskSpec) -> None:
    first, second, target = seen(task, 400)
    found = mix_task(task, [first, second], target)
    (added,) = found.additions
    grid = [loss(task, (1 - w / 20) * first + w / 20 * added.scale * second, target) for w in range(21)]
    assert 0.3 < added.weight < 0.7
    assert loss(task, found.coefficients[0] * first + found.coefficients[1] * second, target) <= min(grid) + 1e-4
    assert added.gain == pytest.approx(grid[0] - min(grid), abs=1e-3)
    assert added.gain > 2 * added.error > 0


@pytest.mark.parametrize("task", TASKS[:-1], ids=lambda task: task.kind)
def test_a_sure_model_does_not_drown_the_other(task: TaskSpec) -> None:
    first, second, target = seen(task, 400)
    shift = torch.randn(400, 1) * 100 if task.kind == "multiclass" else torch.zeros(400, 1)  # softmax does not see it
    plain, sure = mix_task(task, [first, second], target), mix_task(task, [30 * first, second + shift], target)
    assert sure.additions[0].weight == pytest.approx(plain.additions[0].weight, abs=0.02)
    assert sure.additions[0].scale == pytest.approx(30 * plain.additions[0].scale, rel=1e-3)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_model_that_lost_is_left_out(task: TaskSpec) -> None:
    first, _, target = seen(task, 400)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(9))
    assert mix_task(task, [first, noise], target).coefficients[1] == 0.0
    assert mix_task(task, [noise, first], target).additions[0].weight > 0.85
    lost = 1e-3 * noise
    lost[:, 0] += 30.0  # of one class, or of the value, whatever the bag
    assert mix_task(task, [lost, first], target).coefficients == (0.0, 1.0)  # the other's logits as they are


def test_few_bags_decide_nothing_by_accident() -> None:
    """Noise mixed in would fit twelve bags better in about half of all draws, and by more than its error in some."""
    assert SURE == 2.0
    task, mixed, better = TASKS[0], 0, 0
    for seed in range(15):
        first, _, target = seen(task, 12, seed)
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(1000 + seed))
        (added,) = mix_task(task, [first, noise], target).additions
        better += added.gain > 1e-6
        mixed += added.weight > 0
        assert (added.weight > 0) == (added.gain > SURE * added.error)
    assert better > 2 * mixed
    one = mix_task(task, [torch.ones(1, 1), torch.zeros(1, 1)], torch.ones(1))
    assert one.coefficients == (1.0, 0.0)


def test_what_is_not_finite_or_constant_is_left_out() -> None:
    task = TASKS[0]
    first, second, target = seen(task, 50)
    second[3] = float("nan")
    assert mix_task(task, [first, second], target).coefficients == (1.0, 0.0)
    assert mix_task(task, [first, torch.full_like(first, 2.0)], target).coefficients[0] > 0


def test_three_models() -> None:
    task = TASKS[-1]
    first, second, target = seen(task, 400)
    third = seen(task, 400)[0].flip(0)  # of other bags
    found = mix_task(task, [first, third, second], target)
    assert found.coefficients[1] == 0.0
    assert found.coefficients[0] + found.coefficients[2] == pytest.approx(1.0)
    assert found.coefficients[2] == mix_task(task, [first, second], target).coefficients[1]
