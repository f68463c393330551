"""A real number: squared error against `(label - mean) / std`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from torch import Tensor

from umda_fast.tasks.kind import ClassWeights, FloatArray, TaskSpec
from umda_fast.tasks.values import Values

__all__ = ["Regression"]


class Regression(Values):
    name = "regression"
    loss_name = "squared error (in std²)"
    standardised = True

    def losses(self, task: TaskSpec, logits: Tensor, target: Tensor) -> Tensor:
        return (logits[:, 0] - self.encode(task, target.to(logits.dtype))).square()

    def decode(self, task: TaskSpec, logits: Tensor) -> Tensor:
        return logits * task.std + task.mean

    def encode(self, task: TaskSpec, prediction: Tensor) -> Tensor:
        return (prediction - task.mean) / task.std

    def fit(self, task: TaskSpec, column: FloatArray, class_weights: ClassWeights = None) -> TaskSpec:
        """Mean and standard deviation of the labels; 0 and 1 where there are too few."""
        present = column[~np.isnan(column)]
        if len(present) == 0:
            return replace(task, mean=0.0, std=1.0)
        # fsum is exact, so that every machine standardises alike.
        mean = math.fsum(present) / len(present)
        std = math.sqrt(math.fsum((present - mean) ** 2) / len(present))
        return replace(task, mean=mean, std=std if std > 0.0 else 1.0)
