"""Temperatures, intervals, confidence and the risk-coverage curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, decode
from umda_fast.score.calibration import Calibration, calibration_error, confidence, fit_calibration, risk_coverage

BINARY = TaskSpec("binary", "binary")
CLASSES = TaskSpec("classes", "multiclass", 3)
LABELS = TaskSpec("labels", "multilabel", 4)
VALUE = TaskSpec("value", "regression", mean=10.0, std=2.0)
N = 4000


def drawn(task: TaskSpec, logits: torch.Tensor) -> torch.Tensor:
    """Labels with exactly the probabilities that the logits say."""
    probabilities = decode(task, logits)
    if task.kind == "multiclass":
        return torch.multinomial(probabilities, 1)[:, 0]
    draw = torch.bernoulli(probabilities)
    return draw[:, 0] if task.kind == "binary" else draw


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
@pytest.mark.parametrize("factor", [3.0, 0.5])
def test_logits_that_are_too_large_are_divided_by_as_much(task: TaskSpec, factor: float) -> None:
    honest = 1.5 * torch.randn(N, task.outputs)
    target = drawn(task, honest)
    everyone = {task.name: torch.ones(N, dtype=torch.bool)}
    given = {task.name: factor * honest}
    fitted = fit_calibration([task], given, {task.name: target}, everyone)
    assert fitted.temperatures[task.name] == pytest.approx(factor, rel=0.1)
    assert fitted.bags == {task.name: N}
    after = fitted.apply(given)[task.name]
    assert calibration_error(task, after, target) < 0.5 * calibration_error(task, given[task.name], target)
    assert torch.equal(after.argmax(1), given[task.name].argmax(1))


def test_missing_labels_and_class_weights_are_left_out() -> None:
    logits = torch.randn(N, 1)
    target = drawn(BINARY, logits)
    keep = torch.rand(N) < 0.5
    weighted = TaskSpec("binary", "binary", class_weights=(1.0, 50.0))
    target = target.where(keep, 1 - target)
    fitted = fit_calibration([weighted], {"binary": logits}, {"binary": target}, {"binary": keep})
    assert fitted.temperatures["binary"] == pytest.approx(1.0, rel=0.2)
    assert fitted.bags["binary"] == int(keep.sum())


def test_the_interval_holds_as_often_as_it_says() -> None:
    prediction = torch.randn(2 * N, 1)
    labels = decode(VALUE, prediction)[:, 0] + torch.randn(2 * N)
    everyone = torch.ones(N, dtype=torch.bool)
    fitted = fit_calibration([VALUE], {"value": prediction[:N]}, {"value": labels[:N]}, {"value": everyone}, level=0.8)
    half = fitted.half_widths["value"]
    assert half == pytest.approx(1.2816, rel=0.1)  # the normal distribution's quantile of 0.9
    inside = (decode(VALUE, prediction[N:])[:, 0] - labels[N:]).abs() <= half
    assert float(inside.double().mean()) == pytest.approx(0.8, abs=0.03)


def test_what_cannot_be_fitted_is_left_out() -> None:
    """One class only; no label; too few residuals for the level."""
    logits = {"binary": torch.randn(5, 1), "classes": torch.randn(5, 3), "value": torch.randn(5, 1)}
    labels = {"binary": torch.ones(5), "classes": torch.arange(5) % 3, "value": torch.randn(5)}
    masks = {"binary": torch.ones(5).bool(), "classes": torch.zeros(5).bool(), "value": torch.ones(5).bool()}
    fitted = fit_calibration([BINARY, CLASSES, VALUE], logits, labels, masks)
    assert fitted == Calibration(
        left={
            "binary": "5 labelled bags, expected 20",
            "classes": "0 labelled bags, expected 20",
            "value": "5 labelled bags, expected 9",
        }
    )
    assert torch.equal(fitted.apply(logits)["binary"], logits["binary"])


@pytest.mark.parametrize("level", [0.0, 1.0])
def test_level_out_of_range(level: float) -> None:
    with pytest.raises(ValueError, match="level"):
        fit_calibration([], {}, {}, {}, level=level)


def test_confidence_is_that_of_the_prediction() -> None:
    torch.testing.assert_close(confidence(BINARY, torch.tensor([[0.0], [-2.0]])), torch.tensor([0.5, 0.880797]))
    logits = torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
    torch.testing.assert_close(confidence(CLASSES, logits), logits.softmax(1).amax(1))
    least = confidence(LABELS, torch.tensor([[5.0, -5.0, 0.5, 3.0]]))
    torch.testing.assert_close(least, torch.tensor([0.622459]))
    assert torch.equal(confidence(VALUE, torch.randn(2, 1)), torch.ones(2))


def test_risk_coverage() -> None:
    confidences = torch.tensor([0.9, 0.6, 0.8, 0.8])
    correct = torch.tensor([True, False, False, True])
    coverage, risk = risk_coverage(confidences, correct)
    assert coverage.tolist() == [0.25, 0.75, 0.75, 1.0]
    assert risk.tolist() == pytest.approx([0.0, 1 / 3, 1 / 3, 0.5])
    assert len(risk_coverage(torch.zeros(0), torch.zeros(0).bool())[0]) == 0


def test_written_and_read(tmp_path: Path) -> None:
    fitted = Calibration({"a": 1.5}, {"b": 2.0}, 0.8, {"a": 10, "b": 20})
    fitted.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == fitted
    (tmp_path / "other.json").write_text('{"x": 1}')
    for name in ("other.json", "none.json"):
        with pytest.raises(DataError, match=name):
            Calibration.load(tmp_path / name)


@pytest.mark.parametrize("task", [BINARY, CLASSES, LABELS], ids=lambda task: task.kind)
@pytest.mark.parametrize("n", [6, 19, 30, 300])
def test_no_confidence_is_beyond_what_so_many_bags_show(task: TaskSpec, n: int) -> None:
    """All bags told apart without a mistake: once the temperature ran to its limit, and every confidence to 1."""
    target = torch.arange(n * task.outputs).reshape(n, -1) % 2
    logits = 3.0 * (2 * target - 1.0) + 0.1 * torch.randn(n, task.outputs)
    if task.kind == "multiclass":
        target = torch.arange(n)[:, None] % task.classes
        logits = 3.0 * torch.nn.functional.one_hot(target[:, 0], task.classes).double()
    target = target if task.kind == "multilabel" else target[:, 0]
    fitted = fit_calibration([task], {task.name: logits}, {task.name: target}, {task.name: torch.ones(n).bool()})
    if n < 20:
        assert fitted.temperatures == fitted.bags == {}
        assert fitted.left == {task.name: f"{n} labelled bags, expected 20"}
        assert fitted.explained() == [f"{task.name}: not calibrated on validation: {n} labelled bags, expected 20"]
        assert torch.equal(fitted.apply({task.name: logits})[task.name], logits.float())
        return
    assert fitted.left == {}
    sure = confidence(task, fitted.apply({task.name: logits})[task.name]).mean()
    assert 1 - 4 / n < float(sure) < 1 - 0.5 / n


def test_a_rare_class_is_too_few_to_fit_on() -> None:
    logits, target = torch.randn(40, 1), torch.zeros(40)
    target[:4] = 1
    fitted = fit_calibration([BINARY], {"binary": logits}, {"binary": target}, {"binary": torch.ones(40).bool()})
    assert fitted == Calibration(left={"binary": "4 bags not of the most frequent class, expected 5"})


def test_a_calibration_of_an_earlier_version_is_looked_at_again(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(
        '{"temperatures": {"few": 0.09, "limit": 0.0498, "good": 1.7}, "half_widths": {"x": 2.0}, "level": 0.9, '
        '"bags": {"few": 6, "limit": 50, "good": 50, "x": 6}}'
    )
    found = Calibration.load(path)
    assert found.temperatures == {"good": 1.7}
    assert found.half_widths == {"x": 2.0}
    assert found.left == {
        "few": "6 labelled bags, expected 20",
        "limit": "its temperature had run to the limit, as where no bag is wrong",
    }
