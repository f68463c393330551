"""Logits and labels of a whole split, for what needs them all at once: calibration, intervals, error tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from umda_fast.data import BagDataset
from umda_fast.model import TaskSpec
from umda_fast.runtime.config import DataConfig
from umda_fast.score.calibration import Calibration, fit_calibration
from umda_fast.score.inference import evaluating, outputs_in_order

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["Predictions", "calibrate", "collect"]


@dataclass(frozen=True)
class Predictions:
    """Logits and labels of B bags, on the CPU.

    Attributes:
        logits: task -> float32 [B, outputs].
        labels, masks: task -> as `BagBatch.labels` and `BagBatch.label_mask`.
    """

    logits: dict[str, Tensor]
    labels: dict[str, Tensor]
    masks: dict[str, Tensor]

    def of(self, task: TaskSpec) -> tuple[Tensor, Tensor]:
        """Logits and labels of the bags that carry the task's label."""
        keep = self.masks[task.name]
        return self.logits[task.name][keep], self.labels[task.name][keep]


@torch.no_grad()
def collect(
    model: nn.Module,
    dataset: BagDataset,
    fabric: Fabric,
    data: DataConfig,
    *,
    title: str = "predict",
    progress: bool = False,
) -> Predictions:
    """The model's logits, in evaluation mode, and the labels of all bags of `dataset`, which is not empty.

    Raises:
        DataError: a feature or a label is NaN or infinite; names bag, view and instance.
    """
    names = [task.name for task in dataset.tasks]
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in names}
    with evaluating(model):
        for host, _, out in outputs_in_order(model, dataset, fabric, data, title=title, progress=progress):
            for name in names:
                parts[name].append((out.logits[name].float().cpu(), host.labels[name], host.label_mask[name]))
    logits, labels, masks = (
        {name: torch.cat([columns[column] for columns in parts[name]]) for name in names} for column in range(3)
    )
    return Predictions(logits, labels, masks)


def calibrate(model: nn.Module, dataset: BagDataset, fabric: Fabric, data: DataConfig) -> Calibration:
    """`fit_calibration` on `dataset`, which the weights were not trained on."""
    found = collect(model, dataset, fabric, data)
    return fit_calibration(dataset.tasks, found.logits, found.labels, found.masks)
