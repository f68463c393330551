import math

import numpy as np
import pytest
import torch
from sklearn import metrics as reference

from umda_fast.model import TaskSpec
from umda_fast.score.metrics import TaskMetrics, mean_score

TASKS = (
    TaskSpec("b", "binary"),
    TaskSpec("c", "multiclass", classes=4),
    TaskSpec("l", "multilabel", classes=3),
    TaskSpec("r", "regression", mean=10.0, std=4.0),
)


def _data(bags: int = 60) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    logits = {
        "b": torch.randn(bags, 1, generator=generator),
        "c": torch.randn(bags, 4, generator=generator),
        "l": torch.randn(bags, 3, generator=generator),
        "r": torch.randn(bags, 1, generator=generator),
    }
    labels = {
        "b": torch.randint(0, 2, (bags,), generator=generator).float(),
        "c": torch.randint(0, 3, (bags,), generator=generator),  # class 3 never occurs
        "l": torch.randint(0, 2, (bags, 3), generator=generator).float(),
        "r": 10.0 + 4.0 * torch.randn(bags, generator=generator),
    }
    mask = {task.name: torch.rand(bags, generator=generator) < 0.8 for task in TASKS}
    return logits, labels, mask


def _update_in_parts(metrics: TaskMetrics, *data: dict[str, torch.Tensor]) -> None:
    for part in (slice(0, 7), slice(7, 40), slice(40, None)):
        metrics.update(*({name: values[part] for name, values in group.items()} for group in data))


def test_values_agree_with_scikit_learn_and_missing_labels_are_left_out() -> None:
    logits, labels, mask = _data()
    metrics = TaskMetrics(TASKS)
    # A label that is missing may hold anything.
    spoilt = {name: torch.where(mask[name].view(-1, *[1] * (v.ndim - 1)), v, 1 - v) for name, v in labels.items()}
    _update_in_parts(metrics, logits, spoilt, mask)
    values = metrics.compute()

    keep = mask["b"].numpy()
    probability = torch.sigmoid(logits["b"][:, 0]).numpy()[keep]
    truth = labels["b"].numpy()[keep]
    assert values["b"]["auroc"] == pytest.approx(reference.roc_auc_score(truth, probability), abs=1e-6)
    assert values["b"]["accuracy"] == pytest.approx(np.mean((probability >= 0.5) == truth), abs=1e-6)

    chosen = probability >= 0.5
    assert values["b"]["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, chosen), abs=1e-6)
    assert values["b"]["f1"] == pytest.approx(reference.f1_score(truth, chosen), abs=1e-6)
    assert values["b"]["auprc"] == pytest.approx(reference.average_precision_score(truth, probability), abs=1e-6)
    assert values["b"]["cohen_kappa"] == pytest.approx(reference.cohen_kappa_score(truth, chosen), abs=1e-6)
    false, hit, _ = reference.roc_curve(truth, probability, drop_intermediate=False)
    assert values["b"]["sensitivity_90"] == pytest.approx(hit[false <= 0.1].max(), abs=1e-6)

    keep = mask["c"].numpy()
    scores = torch.softmax(logits["c"], dim=1).numpy()[keep]
    truth = labels["c"].numpy()[keep]
    one_to_rest = [reference.roc_auc_score(truth == k, scores[:, k]) for k in range(3)]
    assert values["c"]["auroc"] == pytest.approx(np.mean(one_to_rest), abs=1e-6)
    assert values["c"]["accuracy"] == pytest.approx(np.mean(scores.argmax(1) == truth), abs=1e-6)

    chosen = scores.argmax(1)
    assert values["c"]["balanced_accuracy"] == pytest.approx(
        np.mean([np.mean(chosen[truth == k] == k) for k in range(3)])
    )
    per_class = reference.f1_score(truth, chosen, average=None, labels=range(3), zero_division=0)
    assert values["c"]["f1_macro"] == pytest.approx(per_class.mean(), abs=1e-6)
    precisions = [reference.average_precision_score(truth == k, scores[:, k]) for k in range(3)]
    assert values["c"]["auprc"] == pytest.approx(np.mean(precisions), abs=1e-6)
    assert values["c"]["cohen_kappa"] == pytest.approx(reference.cohen_kappa_score(truth, chosen), abs=1e-6)

    keep = mask["l"].numpy()
    scores = torch.sigmoid(logits["l"]).numpy()[keep]
    truth = labels["l"].numpy()[keep]
    for average in ("macro", "micro"):
        expected = reference.f1_score(truth, scores >= 0.5, average=average)
        assert values["l"][f"f1_{average}"] == pytest.approx(expected, abs=1e-6)
    precision = reference.average_precision_score(truth, scores, average="macro")
    assert values["l"]["map"] == pytest.approx(precision, abs=1e-6)

    keep = mask["r"].numpy()
    prediction = (logits["r"][:, 0] * 4.0 + 10.0).numpy()[keep]
    truth = labels["r"].numpy()[keep]
    assert values["r"]["mae"] == pytest.approx(reference.mean_absolute_error(truth, prediction), abs=1e-5)
    assert values["r"]["r2"] == pytest.approx(reference.r2_score(truth, prediction), abs=1e-5)

    expected = np.mean([values["b"]["auroc"], values["c"]["accuracy"], values["l"]["f1_macro"], values["r"]["r2"]])
    assert mean_score(TASKS, values) == pytest.approx(expected)


def test_undefined_metrics_are_nan_and_leave_the_mean() -> None:
    logits, labels, mask = _data(5)
    labels["b"] = torch.ones(5)  # one class only: no AUROC
    mask = {name: torch.full_like(values, name in ("b", "c")) for name, values in mask.items()}
    metrics = TaskMetrics(TASKS)
    metrics.update(logits, labels, mask)
    values = metrics.compute()
    assert math.isnan(values["b"]["auroc"])
    assert math.isfinite(values["b"]["accuracy"])
    assert all(math.isnan(value) for name in ("l", "r") for value in values[name].values())
    assert mean_score(TASKS, values) == pytest.approx(values["c"]["accuracy"])
    metrics.reset()
    assert math.isnan(mean_score(TASKS, metrics.compute()))
