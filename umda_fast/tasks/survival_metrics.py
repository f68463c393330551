"""The scores of `survival_scores` as metrics that see bags batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from umda_fast.tasks.intervals import survival_at

__all__ = ["AtTimes", "Concordance"]


class _Gathered(Metric):
    """Keeps all predictions [B, n] and labels [B, 2]."""

    full_state_update = False
    predictions: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("targets", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Takes in some bags."""
        self.predictions.append(prediction.detach())
        self.targets.append(target.detach())

    def gathered(self) -> tuple[Any, Any, Any]:
        """Predictions, times and events, float64."""
        predictions, targets = (
            torch.cat(list(part)).double().cpu().numpy() for part in (self.predictions, self.targets)
        )
        return predictions, targets[:, 0], targets[:, 1]


class Concordance(_Gathered):
    """A concordance of risks [B, 1]."""

    def __init__(self, score: Callable[[Any, Any, Any], float]) -> None:
        super().__init__()
        self.score = score

    def compute(self) -> Tensor:
        """Of all bags seen."""
        risk, time, event = self.gathered()
        return torch.tensor(self.score(risk[:, 0], time, event))


class AtTimes(_Gathered):
    """A score of survival at `times` [M]; takes survival and the cuts at which it is, [B, 2, K], which differ between
    folds."""

    def __init__(self, score: Callable[[Any, Any, Any, Any], float], times: tuple[float, ...]) -> None:
        super().__init__()
        self.score, self.times = score, times

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Takes in some bags, all with the same cuts."""
        times = prediction.new_tensor(self.times)
        super().update(survival_at(prediction[0, 1], prediction[:, 0], times), target)

    def compute(self) -> Tensor:
        """Of all bags seen."""
        survival, time, event = self.gathered()
        return torch.tensor(self.score(survival, time, event, np.array(self.times)))
