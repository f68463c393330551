"""Curves of classes, and the bags that a model is most wrong about."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from umda_fast.model import TaskSpec, decode
from umda_fast.studies.curves import class_scores, plot_curves, worst_bags

NAMES = [f"s{row}" for row in range(8)]
BINARY = TaskSpec("MSI", "binary", labels=("MSI-H", "MSS"))
THREE = TaskSpec("subtype", "multiclass", 3, labels=("a", "b", "c"))


def texts(figure: Any) -> list[str]:
    return [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]


def test_areas_are_those_of_the_library() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(8, 3), torch.tensor([0, 0, 1, 1, 1, 0, 1, 0])
    scores = class_scores(THREE, decode(THREE, logits), target)
    assert [score.name for score in scores] == ["a", "b"]  # no bag is a c
    shown = texts(plot_curves("subtype", scores))
    for number, (score, text) in enumerate(zip(scores, shown[:2], strict=True)):
        truth, given = target.numpy() == number, decode(THREE, logits)[:, number].numpy()
        assert text == f"{score.name} (4 of 8): {roc_auc_score(truth, given):.3f}"
        assert shown[2 + number] == f"{score.name}: {average_precision_score(truth, given):.3f}"


def test_of_a_binary_task_the_positive_class() -> None:
    target = torch.tensor([0.0, 1, 1, 0, 1, 0, 0, 0])
    (score,) = class_scores(BINARY, decode(BINARY, (2 * target - 1)[:, None]), target)
    assert score.name == "MSS"
    assert score.truth.tolist() == (target == 1).tolist()
    assert texts(plot_curves("MSI", [score])) == ["MSS (3 of 8): 1.000", "MSS: 1.000"]


def test_of_a_multilabel_task_every_label() -> None:
    task = TaskSpec("genes", "multilabel", 3, labels=("EGFR", "KRAS", "TP53"))
    target = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])
    assert [score.name for score in class_scores(task, target, target)] == ["EGFR", "KRAS"]


@pytest.mark.parametrize("task", [TaskSpec("age", "regression"), BINARY])
def test_none_where_there_are_no_two_classes(task: TaskSpec) -> None:
    assert class_scores(task, decode(task, torch.zeros(8, 1)), torch.zeros(8)) == []


def test_ten_classes_at_most() -> None:
    task = TaskSpec("site", "multiclass", 12)
    target = torch.arange(12).repeat_interleave(torch.arange(1, 13))
    figure = plot_curves("site", class_scores(task, torch.softmax(torch.randn(len(target), 12), 1), target))
    assert [text.split()[0] for text in texts(figure)[:10]] == [str(number) for number in range(11, 1, -1)]
    assert figure.get_suptitle() == "the 10 commonest of 12 classes"


def test_the_worst_come_first() -> None:
    logits = torch.tensor([2.0, -2, 1, -1, -3, 3, 0.5, -0.5])
    target = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 0])
    found = worst_bags(BINARY, decode(BINARY, logits[:, None]), target, NAMES)
    assert found is not None
    assert [row[:3] for row in found[1]] == [["s4", "MSS", "MSI-H"], ["s1", "MSS", "MSI-H"], ["s2", "MSI-H", "MSS"]]
    expected = torch.sigmoid(torch.tensor([-3.0, -2.0, -1.0]))
    assert [row[3] for row in found[1]] == [f"{value:.3f}" for value in expected.tolist()]
    two = worst_bags(BINARY, decode(BINARY, logits[:, None]), target, NAMES, most=2)
    assert two is not None
    assert two[1] == found[1][:2]


def test_of_numbers_those_furthest_off() -> None:
    task = TaskSpec("age", "regression", mean=60.0, std=10.0)
    target = torch.tensor([60.0, 70, 50])
    found = worst_bags(task, torch.tensor([[61.0], [60.0], [55.0]]), target, NAMES)
    assert found is not None
    assert found[1] == [["s1", "70", "60", "-10"], ["s2", "50", "55", "+5"], ["s0", "60", "61", "+1"]]


def test_of_several_classes_and_of_none() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [0.6, 0.3, 0.1]])
    found = worst_bags(THREE, probabilities, torch.tensor([2, 2, 1]), NAMES)
    assert found is not None
    assert found[1] == [["s0", "c", "b", "0.300"], ["s2", "b", "a", "0.300"]]
    several = TaskSpec("genes", "multilabel", 3)
    assert worst_bags(several, probabilities, torch.ones(3, 3), NAMES) is None
    assert np.isfinite([float(row[3]) for row in found[1]]).all()
