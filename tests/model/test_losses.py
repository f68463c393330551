"""Losses with missing labels and class weights, and predictions, against values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from umda_fast import TaskSpec
from umda_fast.model import decode, task_losses

BINARY = TaskSpec("b", "binary")
CLASSES = TaskSpec("c", "multiclass", 3)
LABELS = TaskSpec("l", "multilabel", 2)
VALUE = TaskSpec("v", "regression", mean=10.0, std=2.0)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def one(task: TaskSpec, logits: list, labels: list, mask: list | None = None) -> float:
    dtype = torch.int64 if task.kind == "multiclass" else torch.float32
    masks = None if mask is None else {task.name: torch.tensor(mask)}
    labels = [0 if task.kind == "multiclass" and x is None else x for x in labels]
    target = {task.name: torch.tensor(labels, dtype=dtype)}
    return float(task_losses([task], {task.name: torch.tensor(logits)}, target, masks)[task.name])


def test_missing_labels() -> None:
    nan = math.nan
    got = one(BINARY, [[1.0], [-2.0], [5.0]], [1.0, 0.0, nan], [True, True, False])
    assert got == pytest.approx((softplus(-1.0) + softplus(-2.0)) / 2)
    got = one(VALUE, [[0.5], [9.0]], [12.0, nan], [True, False])
    assert got == pytest.approx((0.5 - 1.0) ** 2)
    got = one(LABELS, [[1.0, 2.0], [3.0, -1.0]], [[nan, nan], [0.0, 1.0]], [False, True])
    assert got == pytest.approx((softplus(3.0) + softplus(1.0)) / 2)
    got = one(CLASSES, [[0.0, 1.0, 2.0], [9.0, 9.0, 9.0]], [2, -5], [True, False])
    assert got == pytest.approx(math.log(1 + math.exp(-1) + math.exp(-2)), rel=1e-6)


def test_class_weights() -> None:
    weighted = TaskSpec("b", "binary", class_weights=(1.0, 3.0))
    got = one(weighted, [[1.0], [-2.0], [0.0]], [1.0, 0.0, 1.0], [True, True, False])
    assert got == pytest.approx((3 * softplus(-1.0) + softplus(-2.0)) / 4)
    weighted = TaskSpec("c", "multiclass", 2, class_weights=(2.0, 1.0))
    assert one(weighted, [[1.0, 0.0], [1.0, 0.0]], [0, 1]) == pytest.approx((2 * softplus(-1) + softplus(1)) / 3)
    weighted = TaskSpec("l", "multilabel", 2, class_weights=(4.0, 1.0))
    assert one(weighted, [[1.0, 2.0]], [[1.0, 0.0]]) == pytest.approx((4 * softplus(-1.0) + softplus(2.0)) / 2)


def test_task_without_labels_is_absent() -> None:
    logits = {"b": torch.zeros(2, 1), "v": torch.zeros(2, 1)}
    labels = {"b": torch.zeros(2), "v": torch.zeros(2)}
    masks = {"b": torch.tensor([False, False]), "v": torch.tensor([False, True])}
    assert list(task_losses([BINARY, VALUE], logits, labels, masks)) == ["v"]
    assert list(task_losses([BINARY, VALUE], logits, {"b": labels["b"]})) == ["b"]
    assert list(task_losses([BINARY, VALUE], logits, labels, {"v": masks["v"]}, labelled={"v"})) == ["v"]


def test_masked_labels_have_no_gradient() -> None:
    logits = torch.zeros(3, 1, requires_grad=True)
    labels = {"v": torch.tensor([1.0, math.nan, 3.0])}
    task_losses([VALUE], {"v": logits}, labels, {"v": torch.tensor([True, False, True])})["v"].backward()
    assert logits.grad is not None
    assert logits.grad[1] == 0
    assert logits.grad.isfinite().all()


def test_narrow_logits_are_widened() -> None:
    assert task_losses([BINARY], {"b": torch.zeros(1, 1).bfloat16()}, {"b": torch.ones(1)})["b"].dtype == torch.float32
    assert task_losses([BINARY], {"b": torch.zeros(1, 1).double()}, {"b": torch.ones(1)})["b"].dtype == torch.float64


@pytest.mark.parametrize(
    ("logits", "labels", "mask", "message"),
    [
        (torch.zeros(2, 1), torch.zeros(2), None, r"task 'c': logits: expected shape \[B, 3\], got \[2, 1\]"),
        (torch.zeros(2, 3), torch.zeros(3), None, r"task 'c': labels: expected shape \[2\], got \[3\]"),
        (torch.zeros(2, 3), torch.zeros(2), torch.ones(2), r"task 'c': label_mask: expected bool \[2\]"),
    ],
)
def test_errors(logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_losses([CLASSES], {"c": logits}, {"c": labels}, None if mask is None else {"c": mask})


def test_decode() -> None:
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    torch.testing.assert_close(decode(CLASSES, logits), logits.softmax(1))
    torch.testing.assert_close(decode(TaskSpec("l", "multilabel", 3), logits), logits.sigmoid())
    assert decode(BINARY, torch.zeros(2, 1)).tolist() == [[0.5], [0.5]]
    assert decode(VALUE, torch.tensor([[1.5]])).tolist() == [[13.0]]
