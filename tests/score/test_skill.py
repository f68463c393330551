"""Skill against a search for the best constant, and what it does not let happen."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from umda_fast.data import BagDataset
from umda_fast.model import TaskSpec, decode
from umda_fast.score.calibration import best_temperature
from umda_fast.score.evaluation import SplitResult
from umda_fast.score.metrics import TaskMetrics
from umda_fast.score.skill import SkillScale
from umda_fast.tasks import kind_of

NAN = float("nan")
BAGS = 400
TASKS = (
    TaskSpec("b", "binary"),
    TaskSpec("weighted", "binary", class_weights=(0.5, 3.0)),
    TaskSpec("c", "multiclass", classes=4),
    TaskSpec("c_weighted", "multiclass", classes=3, class_weights=(1.0, 2.0, 0.3)),
    TaskSpec("l", "multilabel", classes=3),
    TaskSpec("l_weighted", "multilabel", classes=2, class_weights=(9.0, 0.5)),
    TaskSpec("r", "regression", mean=10.0, std=4.0),
)


def _column(task: TaskSpec, bags: int = BAGS, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if task.kind == "regression":
        column = 11.0 + 3.0 * rng.standard_normal(bags)
    elif task.kind == "multiclass":
        column = rng.choice(task.classes, bags, p=np.arange(1, task.classes + 1) / sum(range(task.classes + 1)))
    elif task.kind == "multilabel":
        column = (rng.random((bags, task.classes)) < np.linspace(0.1, 0.6, task.classes)).astype(float)
    else:
        column = (rng.random(bags) < 0.2).astype(float)
    column = np.asarray(column, dtype=np.float64)
    column[::7] = NAN
    return column


def _data(*tasks: TaskSpec, seed: int = 0) -> BagDataset:
    columns = {task.name: _column(task, seed=seed) for task in tasks}
    features = {"x": np.zeros((BAGS, 1), dtype=np.float32)}
    data = BagDataset.from_arrays(features, np.arange(BAGS + 1), columns, kinds=tasks)
    return data.with_tasks(tasks)


def _result(data: BagDataset, logits: dict[str, torch.Tensor]) -> SplitResult:
    """As an evaluation finds it with these logits, [B, outputs] each."""
    metrics, losses, calibrated = TaskMetrics(data.tasks), {}, {}
    labels = {name: torch.from_numpy(column) for name, column in data.labels.items()}
    mask = {name: ~(x.isnan() if x.ndim == 1 else x.isnan().any(1)) for name, x in labels.items()}
    given = {task.name: labels[task.name].nan_to_num().to(kind_of(task).label_dtype) for task in data.tasks}
    metrics.update(logits, given, mask)
    for task in data.tasks:
        kind, raw, keep = kind_of(task), logits[task.name], mask[task.name]
        losses[task.name] = float(kind.loss(task, raw, labels[task.name], keep))
        best = best_temperature(task, raw[keep], given[task.name][keep])
        calibrated[task.name] = float(kind.loss(task, raw / best, labels[task.name], keep))
    return SplitResult(metrics.compute(), 0.0, losses, calibrated, BAGS, BAGS, None, None, None)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_the_constant_is_the_best_there_is(task: TaskSpec) -> None:
    column = torch.from_numpy(_column(task))
    keep = ~(column.isnan() if column.ndim == 1 else column.isnan().any(1))

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return kind_of(task).loss(task, logits.expand(BAGS, -1), column, keep)

    found = torch.from_numpy(kind_of(task).constant(task, column.numpy()))
    assert found.shape == (task.outputs,)
    best = torch.zeros(task.outputs, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([best], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(best)
        value.backward()
        return value

    optimizer.step(closure)
    assert float(loss(found)) == pytest.approx(float(loss(best.detach())), rel=2e-3)  # half a bag more of each class


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_skill_of_a_constant_is_0_of_the_labels_themselves_1(task: TaskSpec) -> None:
    train, val = _data(task), _data(task, seed=1)
    scale = SkillScale(train)
    constant = torch.from_numpy(kind_of(task).constant(task, train.labels[task.name])).expand(BAGS, -1)
    assert scale(_result(val, {task.name: constant}), val).tasks[task.name] == pytest.approx(0.0, abs=0.02)

    column = torch.from_numpy(np.nan_to_num(val.labels[task.name]))
    targets = torch.from_numpy(kind_of(task).linear_targets(task, column.numpy()))
    sure = targets if task.kind == "regression" else 30.0 * targets
    assert decode(task, sure).shape == (BAGS, task.outputs)
    found = scale(_result(val, {task.name: sure}), val)
    assert found.mean == found.tasks[task.name] == pytest.approx(1.0)


@pytest.mark.parametrize("task", TASKS[:-1], ids=lambda task: task.name)
def test_skill_does_not_depend_on_how_sure_all_predictions_are(task: TaskSpec) -> None:
    train, val = _data(task), _data(task, seed=1)
    signal = torch.from_numpy(kind_of(task).linear_targets(task, np.nan_to_num(val.labels[task.name])))
    seen = 0.5 * signal + torch.randn(signal.shape, generator=torch.Generator().manual_seed(0))
    logits = torch.from_numpy(kind_of(task).constant(task, train.labels[task.name])) + seen  # log-odds by Bayes
    scale = SkillScale(train)
    plain, sure = (_result(val, {task.name: factor * logits}) for factor in (0.3, 3.0))
    assert sure.losses[task.name] > 1.2 * sure.calibrated_losses[task.name]
    assert scale(sure, val).mean == pytest.approx(scale(plain, val).mean, rel=1e-4)
    assert sure.calibrated_losses[task.name] < scale.constant_losses(val)[task.name]


def test_a_class_that_no_training_bag_has_leaves_the_constant_finite() -> None:
    for task in TASKS:
        column = np.zeros_like(_column(task))
        assert np.isfinite(kind_of(task).constant(task, column)).all()
        assert kind_of(task).chance(task, column) < 1.0
        assert np.isfinite(kind_of(task).constant(task, np.full_like(column, NAN))).all()
        assert np.isfinite(kind_of(task).chance(task, np.full_like(column, NAN)))


def test_one_task_that_overfits_takes_its_own_share_and_no_more() -> None:
    tasks = (TASKS[0], TASKS[-1])
    data = _data(*tasks)
    scale = SkillScale(data)
    result = _result(data, {"b": torch.zeros(BAGS, 1), "r": torch.zeros(BAGS, 1)})
    result = replace(result, tasks={"b": {"auroc": 0.9}, "r": {"r2": -50.0}}, calibrated_losses={"b": 0.25, "r": 40.0})
    found = scale(result, data)
    assert found.tasks["r"] == 0.0
    assert found.mean == found.tasks["b"] / 2 > 0.2


def test_what_is_not_defined_is_left_out() -> None:
    tasks = (TASKS[0], TASKS[-1])
    data = _data(*tasks)
    scale, base = SkillScale(data), _result(data, {"b": torch.zeros(BAGS, 1), "r": torch.zeros(BAGS, 1)})
    reference = scale.constant_losses(data)["b"]
    losses = {"b": reference / 2, "r": NAN}
    half = replace(base, tasks={"b": {"auroc": NAN}, "r": {"r2": NAN}}, calibrated_losses=losses)
    found = scale(half, data)
    assert found.mean == found.tasks["b"] == pytest.approx(0.5)
    assert math.isnan(found.tasks["r"])
    none = scale(replace(half, calibrated_losses={"b": NAN, "r": NAN}), data)
    assert math.isnan(none.mean)
