"""Grades in an order: the likelihood, labels, scores, and a run from the table to the report."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score
from torch import Tensor

from tests.command_line import call
from umda_fast.data.labels import label_columns
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, decode, task_losses
from umda_fast.score.calibration import best_temperature
from umda_fast.score.intervals import bootstrap_interval, primary_score
from umda_fast.score.metrics import TaskMetrics
from umda_fast.score.mixing import mix_task
from umda_fast.tasks import kind_of

GRADES = TaskSpec("grade", "ordinal", classes=5)


def _logits(bags: int = 40, classes: int = 5, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(bags, classes - 1, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("classes", [2, 3, 4, 7])
def test_the_likelihood_is_that_of_the_cumulative_logits(classes: int) -> None:
    task, logits = TaskSpec("g", "ordinal", classes=classes), _logits(classes=classes)
    even = torch.tensor([(classes - k) / k for k in range(1, classes)], dtype=torch.float64).log()
    gaps = torch.nn.functional.softplus(logits[:, 1:] + (even[:-1] - even[1:]).expm1().log())
    steps = torch.cat([torch.zeros(len(logits), 1, dtype=torch.float64), -gaps.cumsum(1)], 1)
    at_least = torch.sigmoid(logits[:, :1] + steps - steps.mean(1, keepdim=True))
    one, none = at_least.new_ones(len(logits), 1), at_least.new_zeros(len(logits), 1)
    expected = torch.cat([one, at_least], 1) - torch.cat([at_least, none], 1)
    torch.testing.assert_close(decode(task, logits), expected, rtol=0, atol=1e-13)
    target = torch.arange(len(logits)) % classes
    loss = task_losses([task], {"g": logits}, {"g": target})["g"]
    assert float(loss) == pytest.approx(float(-expected[range(len(logits)), target].log().mean()), rel=1e-12)


def test_two_grades_are_a_binary_task() -> None:
    logits, target = _logits(classes=2), torch.arange(40) % 2
    for kind in ("ordinal", "binary"):
        task = TaskSpec("g", kind, classes=2 if kind == "ordinal" else 1)
        loss = task_losses([task], {"g": logits}, {"g": target})["g"]
        assert float(loss) == pytest.approx(
            float(torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], target.double())), rel=1e-12
        )


def test_ranks_are_consistent_whatever_the_head_says_and_nothing_overflows() -> None:
    logits = (_logits(scale=60.0)).float().requires_grad_()
    probabilities = decode(GRADES, logits)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(logits)))
    assert (probabilities >= 0).all()  # so those of `at least k` fall with k
    loss = task_losses([GRADES], {"grade": logits}, {"grade": torch.arange(40) % 5})["grade"]
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_nothing_said_is_every_grade_alike() -> None:
    torch.testing.assert_close(decode(GRADES, torch.zeros(1, 4)), torch.full((1, 5), 0.2))


def test_the_gradient() -> None:
    kind, target = kind_of(GRADES), torch.arange(6) % 5
    logits = _logits(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: kind.losses(GRADES, x, target), (logits,))


def test_the_mean_of_predictions() -> None:
    parts = [_logits(seed=seed) for seed in (1, 2, 3)]
    mean = kind_of(GRADES).mean_logits([GRADES] * 3, parts)
    expected = torch.stack([decode(GRADES, part) for part in parts]).mean(0)
    torch.testing.assert_close(decode(GRADES, mean), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kind_of(GRADES).mean_logits([GRADES], parts[:1]), parts[0], rtol=1e-9, atol=1e-9)


def test_the_constant_is_the_shares_of_the_grades() -> None:
    column = np.array([0.0] * 3 + [1.0] * 5 + [3.0] * 8 + [4.0] + [np.nan] * 4)
    logits = torch.from_numpy(kind_of(GRADES).constant(GRADES, column))[None]
    counts = torch.tensor([3.5, 5.5, 0.5, 8.5, 1.5], dtype=torch.float64)
    torch.testing.assert_close(decode(GRADES, logits)[0], counts / counts.sum())


def test_least_squares_targets_predict_their_grade() -> None:
    for classes in (2, 3, 4, 9):
        task, grades = TaskSpec("g", "ordinal", classes=classes), np.arange(classes, dtype=np.float64)
        logits = torch.from_numpy(kind_of(task).linear_targets(task, grades))
        assert kind_of(task).correct(task, decode(task, logits), torch.arange(classes)).all()  # type: ignore[attr-defined]


def test_scores_agree_with_scikit_learn() -> None:
    logits, target = _logits(200), torch.from_numpy(np.random.default_rng(0).integers(0, 5, 200))
    metrics = TaskMetrics([GRADES])
    for part in (slice(0, 7), slice(7, 90), slice(90, None)):
        metrics.update(
            {"grade": logits[part].float()}, {"grade": target[part]}, {"grade": torch.ones(200, dtype=torch.bool)[part]}
        )
    found = metrics.compute()["grade"]
    cumulative = decode(GRADES, logits).cumsum(1).numpy()
    grade = (cumulative < 0.5).sum(1)
    kappa = cohen_kappa_score(target.numpy(), grade, weights="quadratic")
    assert found["kappa"] == pytest.approx(kappa, abs=1e-6)
    assert primary_score(GRADES, decode(GRADES, logits).numpy(), target.double().numpy()) == pytest.approx(kappa)
    assert found["mae_grades"] == pytest.approx(np.abs(grade - target.numpy()).mean(), abs=1e-6)
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(target.numpy(), grade), abs=1e-6)
    assert found["accuracy"] == pytest.approx((grade == target.numpy()).mean(), abs=1e-6)
    low, high = bootstrap_interval(GRADES, logits, target, samples=200)
    assert low < kappa < high


def test_scores_where_they_are_not_defined() -> None:
    metrics, ones = TaskMetrics([GRADES]), torch.ones(6, dtype=torch.bool)
    metrics.update({"grade": _logits(6).float()}, {"grade": torch.full((6,), 2)}, {"grade": ones})
    found = metrics.compute()["grade"]
    assert np.isnan(found["kappa"])
    assert np.isfinite(found["mae_grades"])
    assert np.isnan(primary_score(GRADES, decode(GRADES, _logits(6)).numpy(), np.full(6, 2.0)))


def test_a_temperature_makes_good_what_is_too_sure() -> None:
    generator = torch.Generator().manual_seed(0)
    calm = _logits(4000, scale=1.0)
    target = torch.multinomial(decode(GRADES, calm), 1, generator=generator)[:, 0]
    assert best_temperature(GRADES, calm, target) == pytest.approx(1.0, abs=0.06)
    assert best_temperature(GRADES, 3.0 * calm, target) == pytest.approx(3.0, abs=0.15)
    # And what knows something of the grades is mixed to what knows nothing.
    nothing = _logits(4000, scale=0.1, seed=5)
    assert mix_task(GRADES, [nothing, calm], target).additions[0].weight > 0.9


def _one(values: list[Any], kind: Any) -> tuple[TaskSpec, Any]:
    (spec,), columns = label_columns({"y": values}, len(values), {"y": kind}, where="set")
    return spec, columns["y"]


def test_labels() -> None:
    spec, column = _one([3, 1, np.nan, 5], "ordinal")
    assert spec == TaskSpec("y", "ordinal", classes=3, labels=("1", "3", "5"))
    np.testing.assert_array_equal(column, [1, 0, np.nan, 2])
    given = {"kind": "ordinal", "labels": ["low", "mid", "high", "worst"]}
    spec, column = _one(["high", "low", ""], given)
    assert spec == TaskSpec("y", "ordinal", classes=4, labels=("low", "mid", "high", "worst"))
    np.testing.assert_array_equal(column, [2, 0, np.nan])
    assert _one([2, 1], {"kind": "ordinal", "labels": [1, 2, 3]})[0].labels == ("1", "2", "3")


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (["G2", "G1"], "ordinal", "set: labels 'y': expected the order of the grades, lowest first, for their names"),
        (["G2", "G1"], "ordinal", "--set 'data.options.kinds={y: {kind: ordinal, labels: [G1, G2]}}'"),
        ([0.5, 1], "ordinal", "expected whole numbers for ordinal, got 0.5"),
        ([1, 1], "ordinal", "expected at least two distinct values for ordinal, got 1 (1)"),
        (["G4"], {"kind": "ordinal", "labels": ["G1", "G2"]}, "expected one of G1, G2, got 'G4'"),
        ([1], {"kind": "ordinal"}, "kinds['y']: TaskSpec('y').classes: expected at least 2 for a ordinal task, got 1"),
    ],
)
def test_bad_labels(values: list[Any], kind: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        _one(values, kind)


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Bags whose grade follows one feature, and whose second task the other."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 5, 260)
    ptr = np.concatenate([[0], sizes.cumsum()])
    hidden = rng.normal(size=len(sizes))
    x = rng.normal(size=(ptr[-1], 5)).astype(np.float32)
    x[:, 0] = np.repeat(hidden, sizes) + 0.1 * x[:, 0]
    grade = np.digitize(hidden + 0.3 * rng.logistic(size=len(sizes)), [-1.0, 0.0, 1.0]) + 1.0
    path = tmp_path / "cohort.npz"
    np.savez(path, X=x, ptr=ptr, y_grade=np.where(np.arange(len(sizes)) % 40 == 3, np.nan, grade),
             y_sign=np.array(["minus", "plus"])[(hidden > 0).astype(int)])  # fmt: skip
    return path


def test_a_run(cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, kinds = tmp_path / "run", ["--set", "data.options.kinds={grade: ordinal}"]
    small = ["--set", "model.width=16", "--device", "cpu", "--set", "train.lr=0.01", "--quiet"]
    mean, layers = ["--set", "model.architecture=mean_pooling"], ["--set", "model.heads=2", "--set", "model.layers=1"]
    assert call("inspect", cohort, *kinds) == 0
    assert "ordinal" in capsys.readouterr().out
    assert call("train", "--data", cohort, *kinds, *small, *mean, "--set", "train.steps=80", "--out", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["tasks"]["grade"]) == {"kappa", "mae_grades", "accuracy", "balanced_accuracy"}
    assert metrics["tasks"]["grade"]["kappa"] > 0.7
    assert call("evaluate", run, run, "--json", tmp_path / "scores.json", "--quiet") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]["grade"]
    assert scores == pytest.approx(metrics["tasks"]["grade"], abs=1e-5)

    table = tmp_path / "predicted.csv"
    assert call("predict", run, "--data", cohort, "--out", table, "--refer-below", 0.5, "--quiet") == 0
    with open(table, newline="") as stream:
        lines = list(csv.DictReader(stream))
    grades = [f"grade_probability_{name}" for name in "1234"]
    assert list(lines[0])[:6] == ["bag", *grades, "grade_predicted"]
    assert sum(float(lines[0][name]) for name in grades) == pytest.approx(1, abs=1e-5)
    assert {line["grade_predicted"] for line in lines} <= set("1234")
    assert all(0 < float(line["grade_confidence"]) <= 1 for line in lines)

    assert call("report", run, "--samples", 20, "--quiet") == 0
    assert "grade (ordinal)" in (run / "report.html").read_text()
    whole = tmp_path / "whole"
    assert call("train", "--data", cohort, *kinds, *small, *layers, "--set", "train.steps=4", "--out", whole) == 0
    assert call("adapt", whole, "--data", cohort, *kinds, "--out", tmp_path / "adapted") == 0
    adapted = json.loads((tmp_path / "adapted" / "metrics.json").read_text())
    assert adapted["tasks"]["grade"]["kappa"] > 0.5
    assert call("crossval", "--data", cohort, *kinds, *small, *mean, "--set", "train.steps=4", "--folds", 2,
                "--out", tmp_path / "cv") == 0  # fmt: skip
