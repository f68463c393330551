"""A model over a split: metrics, losses and what the model reports about its views and tasks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from umda_fast.data import BagBatch, BagDataset, InstanceBudgetSampler, make_loader
from umda_fast.model import task_losses
from umda_fast.train.config import DataConfig
from umda_fast.train.guard import check_batch
from umda_fast.train.metrics import TaskMetrics, mean_score
from umda_fast.train.progress import ProgressReport

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["SplitResult", "batches_in_order", "evaluate_dataset", "to_device"]


@dataclass
class SplitResult:
    """What `evaluate_dataset` found on a split.

    `tasks` is {task: {metric: value}}, NaN where a metric is undefined. `losses` are means over the bags that
    carry the label. `view_consistency`, `view_mass` [V, V] (row: the view that listens) and `influence` [T,
    T] are None for a model that has no such thing.
    """

    tasks: dict[str, dict[str, float]]
    mean_score: float
    losses: dict[str, float]
    bags: int
    instances: int
    view_consistency: float | None
    view_mass: Tensor | None
    influence: Tensor | None


class _Mean:
    """Weighted mean of tensors, kept on their device until it is read."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0

    def add(self, value: Tensor | None, weight: float = 1.0) -> None:
        if value is None or weight == 0:
            return
        scaled = value.detach().double() * weight
        self.total = scaled if self.total is None else self.total + scaled
        self.weight += weight

    def value(self) -> Tensor | None:
        return None if self.total is None else (self.total / self.weight).cpu()


def batches_in_order(dataset: BagDataset, data: DataConfig) -> Iterable[BagBatch]:
    """All bags of `dataset` in its order, batched by `data.budget`."""
    sampler = InstanceBudgetSampler(dataset.sizes, data.budget, shuffle=False)
    return make_loader(dataset, sampler, workers=data.workers)


def to_device(host: BagBatch, fabric: Fabric) -> BagBatch:
    """`host` on `fabric`'s device, features in float32, however compactly they are stored."""
    batch = host.to(fabric.device, non_blocking=fabric.device.type == "cuda")
    batch.views = {name: features.float() for name, features in batch.views.items()}
    return batch


@torch.no_grad()
def evaluate_dataset(
    model: nn.Module,
    dataset: BagDataset,
    fabric: Fabric,
    data: DataConfig,
    *,
    title: str = "evaluate",
    progress: bool = False,
) -> SplitResult:
    """Run `model` in evaluation mode over `dataset` on `fabric`'s device.

    Raises:
        DataError: a feature or a label is NaN or infinite; names bag, view and instance.
    """
    tasks = dataset.tasks
    was_training = model.training
    model.eval()
    metrics = TaskMetrics(tasks).to(fabric.device)
    losses = {task.name: _Mean() for task in tasks}
    consistency, influence = _Mean(), _Mean()
    mass_sum: Tensor | None = None
    mass_rows: Tensor | None = None
    bags = instances = 0
    with ProgressReport(title, device=fabric.device, enabled=progress) as report:
        for host in batches_in_order(dataset, data):
            check_batch(host)
            batch = to_device(host, fabric)
            with fabric.autocast():
                out: Any = model(**batch.inputs())
                batch_losses = task_losses(tasks, out.logits, batch.labels, batch.label_mask)
            metrics.update(out.logits, batch.labels, batch.label_mask)
            for name, loss in batch_losses.items():
                losses[name].add(loss, float(host.label_mask[name].sum()))
            consistency.add(getattr(out, "view_consistency", None), host.num_instances)
            influence.add(getattr(out, "influence", None), len(host))
            mass = getattr(out, "view_mass", None)
            if mass is not None:
                present = batch.mask.double().sum(dim=0)
                summed = mass.double().sum(dim=0)  # rows of missing views are zero
                mass_sum = summed if mass_sum is None else mass_sum + summed
                mass_rows = present if mass_rows is None else mass_rows + present
            bags += len(host)
            instances += host.num_instances
            report.update(bags / max(len(dataset), 1), instances=host.num_instances)
    model.train(was_training)
    values = metrics.compute()
    view_mass = None
    if mass_sum is not None and mass_rows is not None:
        view_mass = (mass_sum / mass_rows.clamp(min=1.0).unsqueeze(1)).cpu()
    means = {name: mean.value() for name, mean in losses.items()}
    consistent = consistency.value()
    return SplitResult(
        tasks=values,
        mean_score=mean_score(tasks, values),
        losses={name: math.nan if value is None else float(value) for name, value in means.items()},
        bags=bags,
        instances=instances,
        view_consistency=None if consistent is None else float(consistent),
        view_mass=view_mass,
        influence=influence.value(),
    )
