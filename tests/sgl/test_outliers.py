"""Outlier tasks from the cosines of the gradients."""

from __future__ import annotations

import math

import pytest
import torch

from umda_fast.sgl.outliers import outlier_tasks, task_agreement


def cosines_of(gradients: torch.Tensor) -> torch.Tensor:
    unit = torch.nn.functional.normalize(gradients, dim=1)
    return unit @ unit.T


NAMES = ["a", "b", "c", "d", "e"]


def test_the_task_that_pulls_the_other_way_is_named() -> None:
    common = torch.randn(50)
    gradients = torch.stack([common + 0.5 * torch.randn(50) for _ in range(5)])
    gradients[3] = -gradients[3]
    cosines = cosines_of(gradients)
    assert outlier_tasks(cosines, NAMES) == ["d"]
    entries = {entry.task: entry for entry in task_agreement(cosines, NAMES)}
    rest = [0, 1, 2, 4]
    assert entries["d"].agreement == pytest.approx(float(cosines[3, rest].mean()), abs=1e-6)
    among = cosines[rest][:, rest]
    assert entries["d"].others == pytest.approx(float((among.sum() - 4) / 12), abs=1e-6)
    assert not any(entries[name].outlier for name in "abce")


def test_two_outliers_do_not_hide_each_other() -> None:
    eye = torch.eye(4)
    # Three tasks agree; two oppose them and have nothing to do with each other.
    gradients = torch.stack([eye[0], eye[0] + 0.1 * eye[1], eye[0], -eye[0] + eye[2], -eye[0] + 1.1 * eye[3]])
    assert set(outlier_tasks(cosines_of(gradients), NAMES)) == {"d", "e"}


def test_unrelated_and_agreeing_tasks_are_no_outliers() -> None:
    assert outlier_tasks(torch.eye(5), NAMES) == []
    assert outlier_tasks(torch.ones(5, 5), NAMES) == []


def test_general_conflict_is_nobodys() -> None:
    """Three gradients that sum to zero: all cosines are -1/2."""
    cosines = torch.full((3, 3), -0.5).fill_diagonal_(1.0)
    assert outlier_tasks(cosines, NAMES[:3]) == []


def test_few_tasks() -> None:
    pair = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    assert outlier_tasks(pair, ["a", "b"]) == []
    assert math.isnan(task_agreement(pair, ["a", "b"])[0].others)
    assert task_agreement(torch.ones(1, 1), ["a"])[0].agreement == 0.0


def test_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"cosines must have shape \[2, 2\], got \[3, 3\]"):
        task_agreement(torch.eye(3), ["a", "b"])
