"""The sensitivity that a test has at a specificity that is asked of it."""

from __future__ import annotations

from torch import Tensor
from torchmetrics.classification import BinarySensitivityAtSpecificity

__all__ = ["SensitivityAtSpecificity"]


class SensitivityAtSpecificity(BinarySensitivityAtSpecificity):
    """The highest sensitivity of those thresholds of the bags themselves at which so many of class 0 are below."""

    def __init__(self, specificity: float) -> None:
        super().__init__(min_specificity=specificity)

    def compute(self) -> Tensor:  # type: ignore[override]
        """Without the threshold."""
        sensitivity, _ = super().compute()
        return sensitivity
