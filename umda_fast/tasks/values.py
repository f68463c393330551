"""Kinds that predict one number for a bag, in the units of the label."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.errors import DataError
from umda_fast.tasks.columns import expect_numbers
from umda_fast.tasks.kind import Array, FloatArray, TaskKind, TaskSpec
from umda_fast.tasks.shown import Scatter, Shown

if TYPE_CHECKING:
    from torchmetrics import Metric

__all__ = ["Values"]

_BINS = 4


class Values(TaskKind):
    """One number. Beside `name`, `loss_name` and `losses` of one logit, a kind says how a value is made of the logit
    (`decode`), and a logit of the value (`encode`); and which labels are `allowed`, if not all numbers are."""

    primary = "r2"
    calibration = "interval"
    adds_up = False
    expected: ClassVar[str] = "a finite number"
    """What `allowed` allows, in words."""

    def allowed(self, values: FloatArray) -> npt.NDArray[np.bool_]:
        """Which numbers may be labels."""
        return np.isfinite(values)

    @abstractmethod
    def encode(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        """The logits that `decode` makes `prediction`, both [B, 1]."""

    def mean_logits(self, tasks: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
        values = torch.stack([self.decode(task, value) for task, value in zip(tasks, logits, strict=True)])
        return self.encode(tasks[0], values.mean(0))

    def linear_targets(self, task: TaskSpec, target: Array) -> FloatArray:
        encoded: FloatArray = self.encode(task, torch.from_numpy(target)[:, None]).numpy()
        return encoded

    # ---- labels

    def read(self, where: str, name: str, array: Array) -> tuple[TaskSpec, FloatArray]:
        task = TaskSpec(name, self.name)
        column = self.read_as(where, task, array)
        return self.fit(task, column), column

    def read_as(self, where: str, task: TaskSpec, array: Array) -> FloatArray:
        numbers = expect_numbers(where, array, self.name)
        wrong = np.flatnonzero(~np.isnan(numbers) & ~self.allowed(numbers))
        if len(wrong):
            raise DataError(f"{where}: expected {self.expected}, got {numbers[wrong[0]]:g} in row {wrong[0]}")
        return numbers

    def check_label(self, where: str, task: TaskSpec, label: Tensor) -> None:
        if label.dim() != 0:
            raise DataError(f"{where}: expected one value, got shape {list(label.shape)}")
        value = float(label)
        if not self.allowed(np.array(value)):
            raise DataError(f"{where}: expected {self.expected}, got {value:g}")

    def constant(self, task: TaskSpec, column: FloatArray) -> FloatArray:
        """The mean, which has the least loss of those that come from a distribution with that mean."""
        present = column[~np.isnan(column)]
        if not len(present):
            return np.zeros(1)
        logits: FloatArray = self.linear_targets(task, np.array([present.mean()]))[0]
        return logits

    def strata(self, task: TaskSpec, column: FloatArray) -> list[npt.NDArray[np.bool_]]:
        """The quartiles."""
        present = column[~np.isnan(column)]
        if not len(present):
            return []
        inner = np.quantile(present, np.linspace(0.0, 1.0, _BINS + 1)[1:-1])
        bins = np.searchsorted(inner, column, side="right")
        return [(bins == index) & ~np.isnan(column) for index in range(_BINS)]

    def summary(self, column: FloatArray) -> dict[str, float]:
        present = column[~np.isnan(column)]
        if not len(present):
            return {}
        figures = {"mean": present.mean(), "std": present.std(), "min": present.min(), "max": present.max()}
        return {name: float(figure) for name, figure in figures.items()}

    def problem(self, task: TaskSpec, column: FloatArray, everywhere: FloatArray) -> str | None:
        found = self.summary(column)
        labelled = int((~np.isnan(column)).sum())
        return f"all {labelled} labels are {found['mean']:g}" if found["std"] == 0.0 else None

    # ---- scores

    def metrics(self, task: TaskSpec) -> dict[str, Metric]:
        from torchmetrics import MeanAbsoluteError, R2Score

        return {"mae": MeanAbsoluteError(), "r2": R2Score()}

    def for_metric(self, task: TaskSpec, metric: str, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        return prediction.reshape(-1), target.reshape(-1)

    def defined(self, task: TaskSpec, metric: str, target: Tensor) -> Tensor | None:
        if metric != "r2":
            return None
        return torch.tensor(False) if len(target) < 2 else target.var() != 0

    def primary_score(self, task: TaskSpec, prediction: Array, target: Array) -> float:
        spread = ((target - target.mean()) ** 2).sum()
        return float(1 - ((target - prediction[:, 0]) ** 2).sum() / spread) if spread > 0 else float("nan")

    def scores(self, task: TaskSpec, prediction: Array, target: Array) -> dict[str, float]:
        if type(self).metrics is not Values.metrics:  # a kind from outside with more
            return super().scores(task, prediction, target)
        mae = float(np.abs(prediction[:, 0] - target).mean())
        return {"mae": mae, "r2": self.primary_score(task, prediction, target)}

    # ---- shown

    def columns(self, task: TaskSpec) -> list[str]:
        return [task.name]

    def cells(self, task: TaskSpec, prediction: Tensor) -> list[list[str]]:
        return [[f"{value:.6g}"] for value in prediction.reshape(-1).tolist()]

    def shown_errors(self, task: TaskSpec, prediction: Tensor, target: Tensor) -> Shown:
        return Scatter(prediction[:, 0], target)
