"""Weights of a mixture: with many bags the best there are, with few less, and none of a model that knows nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from umda_fast.model import TaskSpec, decode
from umda_fast.score.mixing import Addition, calibrated_losses, mix_task

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


def added(task: TaskSpec, first: Tensor, second: Tensor, target: Tensor) -> Addition:
    return mix_task(task, [first, second], target).additions[0]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_many_bags_give_the_best_weight(task: TaskSpec) -> None:
    first, second, target = seen(task, 4000)
    found = mix_task(task, [first, second], target)
    (one,) = found.additions
    grid = [loss(task, (1 - w / 20) * first + w / 20 * one.scale * second, target) for w in range(21)]
    assert 0.4 < one.weight <= one.best < 0.6
    assert one.best - one.weight < 0.06
    gain = loss(task, first, target) - loss(
        task, found.coefficients[0] * first + found.coefficients[1] * second, target
    )
    assert one.gain == pytest.approx(gain, rel=1e-6)
    assert 0.98 * (grid[0] - min(grid)) < gain <= grid[0] - min(grid) + 1e-9
    assert one.gain > 5 * one.error > 0


@pytest.mark.parametrize("task", TASKS[:-1], ids=lambda task: task.kind)
def test_a_sure_model_does_not_drown_the_other(task: TaskSpec) -> None:
    first, second, target = seen(task, 400)
    shift = torch.randn(400, 1) * 100 if task.kind == "multiclass" else torch.zeros(400, 1)  # softmax does not see it
    plain, sure = mix_task(task, [first, second], target), mix_task(task, [30 * first, second + shift], target)
    assert sure.additions[0].weight == pytest.approx(plain.additions[0].weight, abs=0.02)
    assert sure.additions[0].scale == pytest.approx(30 * plain.additions[0].scale, rel=1e-3)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_a_model_that_knows_nothing_is_left_out(task: TaskSpec) -> None:
    first, _, target = seen(task, 4000)
    noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(9))
    assert added(task, first, noise, target).weight < 0.05
    assert added(task, noise, first, target).weight > 0.85
    lost = 1e-3 * noise
    lost[:, 0] += 30.0  # of one class, or of the value, whatever the bag
    assert mix_task(task, [lost, first], target).coefficients == (0.0, 1.0)  # the other's logits as they are


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.kind)
def test_few_bags_decide_little_by_accident(task: TaskSpec) -> None:
    """What weights that twelve bags chose cost on other bags, for a model that knows nothing and for one that does."""
    costs = {"weight": 0.0, "best": 0.0, "half": 0.0, "useful": 0.0}
    for seed in range(20):
        first, second, target = seen(task, 1012, seed)
        noise = torch.randn(first.shape, generator=torch.Generator().manual_seed(1000 + seed))
        nothing, useful = (added(task, first[:12], other[:12], target[:12]) for other in (noise, second))
        weights = {"weight": nothing.weight, "best": nothing.best, "half": 0.5, "useful": useful.weight}
        before = loss(task, first[12:], target[12:])
        for name, w in weights.items():
            other, scale = (second, useful.scale) if name == "useful" else (noise, nothing.scale)
            costs[name] += (loss(task, (1 - w) * first[12:] + w * scale * other[12:], target[12:]) - before) / 20
        for one in (nothing, useful):
            assert 0 <= one.weight <= one.best
            assert one.gain >= -1e-9  # on the bags that chose
    assert 0 < costs["weight"] < 0.5 * costs["best"]
    assert costs["weight"] < 0.1 * costs["half"]
    assert costs["useful"] < -2 * costs["weight"]


def test_nothing_is_said_of_one_bag() -> None:
    one = mix_task(TASKS[0], [torch.ones(1, 1), torch.zeros(1, 1)], torch.ones(1))
    assert one.coefficients == (1.0, 0.0)
    assert math.isnan(one.additions[0].deviation)


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
