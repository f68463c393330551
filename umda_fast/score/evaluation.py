"""A model over a split: metrics, losses and what the model reports about its views and tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from umda_fast.data import BagBatch, BagDataset
from umda_fast.model import TaskSpec, task_losses
from umda_fast.runtime.config import DataConfig
from umda_fast.runtime.fabric import processes_of
from umda_fast.runtime.guard import check_batch
from umda_fast.runtime.progress import ProgressReport
from umda_fast.runtime.together import label_counts, penalty_counts
from umda_fast.score.calibration import best_temperature
from umda_fast.score.collect import Predictions
from umda_fast.score.inference import batches_in_order, evaluating, infer, sampler_in_order
from umda_fast.score.metrics import TaskMetrics, mean_score
from umda_fast.tasks import kind_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["SplitResult", "evaluate_dataset"]

@dataclass
class SplitResult:
    """What `evaluate_dataset` found on a split.

    `tasks` is {task: {metric: value}}, NaN where a metric is undefined. `losses` are means over the bags that
    carry the label (with class weights, weighted means); `calibrated_losses` are what is left of them once each task's
    logits are divided by the temperature that is best on these very bags, and the same for a kind that has none.
    `view_consistency`, `view_mass` [V, V] (row: the view that listens) and `influence` [T, T] are None for a model
    that has no such thing. `predictions`, of all bags in their order, are there if they were asked for, and
    `intervals` of scores if somebody made them of those (`umda_fast.train.measure`). `patients`: how many, where
    `tasks`, `mean_score` and `predictions` are of patients.
    """

    tasks: dict[str, dict[str, float]]
    mean_score: float
    losses: dict[str, float]
    calibrated_losses: dict[str, float]
    bags: int
    instances: int
    view_consistency: float | None
    view_mass: Tensor | None
    influence: Tensor | None
    predictions: Predictions | None = None
    intervals: dict[str, dict[str, Any]] = field(default_factory=dict)
    patients: int | None = None


class _Mean:
    """Weighted mean of tensors, kept on their device until it is read."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.weight = 0.0

    def add(self, value: Tensor | None, weight: float = 1.0) -> None:
        if value is None or weight == 0:
            return
        self.merge(value.detach().double() * weight, weight)

    def merge(self, total: Tensor | None, weight: float) -> None:
        """Takes in a sum of weighted values and the sum of their weights."""
        if total is None:
            return
        self.total = total if self.total is None else self.total + total
        self.weight += weight

    def value(self) -> Tensor | None:
        return None if self.total is None else (self.total / self.weight).cpu()


# Logits, labels and label masks of some bags, each task -> [B, ...].
_Outputs = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


class _Found:
    """What is summed up over the batches of a split, and over processes."""

    def __init__(self, tasks: Sequence[TaskSpec]) -> None:
        self.tasks = tuple(tasks)
        self.losses = {task.name: _Mean() for task in tasks}
        self.consistency, self.influence = _Mean(), _Mean()
        self.mass_sum, self.mass_rows = _Mean(), _Mean()
        self.bags = self.instances = 0

    def add(self, host: BagBatch, batch: BagBatch, out: Any) -> None:
        losses = task_losses(self.tasks, out.logits, batch.labels, batch.label_mask)
        # By what each is a mean over, so that it does not matter how the bags are put into batches.
        counts = label_counts(host, self.tasks)
        for name, loss in losses.items():
            self.losses[name].add(loss, counts[name])
        pairs = penalty_counts(host, ["consistency"])["consistency"]
        self.consistency.add(getattr(out, "view_consistency", None), pairs)
        self.influence.add(getattr(out, "influence", None), len(host))
        mass = getattr(out, "view_mass", None)
        if mass is not None:
            self.mass_sum.add(mass.double().sum(dim=0))  # rows of missing views are zero
            self.mass_rows.add(batch.mask.double().sum(dim=0))
        self.bags += len(host)
        self.instances += host.num_instances

    def _means(self) -> list[_Mean]:
        return [*self.losses.values(), self.consistency, self.influence, self.mass_sum, self.mass_rows]

    def state(self) -> tuple[list[tuple[Tensor | None, float]], int, int]:
        """Plain values, on the host."""
        means = [(None if m.total is None else m.total.cpu(), m.weight) for m in self._means()]
        return means, self.bags, self.instances

    def merge(self, state: tuple[list[tuple[Tensor | None, float]], int, int]) -> None:
        """Takes in what another process found."""
        means, bags, instances = state
        for mean, (total, weight) in zip(self._means(), means, strict=True):
            mean.merge(total, weight)
        self.bags += bags
        self.instances += instances

    def result(
        self, values: dict[str, dict[str, float]], outputs: Sequence[_Outputs], keep: bool
    ) -> SplitResult:
        """`values` and `outputs`: metrics, and what they are of, which the result has with `keep`."""
        means = {name: mean.value() for name, mean in self.losses.items()}
        losses = {name: math.nan if value is None else float(value) for name, value in means.items()}
        losses |= {task.name: _whole(task, outputs) for task in self.tasks if kind_of(task).joint(task)}
        consistency = self.consistency.value()
        view_mass = None
        if self.mass_sum.total is not None and self.mass_rows.total is not None:
            view_mass = (self.mass_sum.total / self.mass_rows.total.clamp(min=1.0).unsqueeze(1)).cpu()
        return SplitResult(
            tasks=values,
            mean_score=mean_score(self.tasks, values),
            losses=losses,
            calibrated_losses={task.name: _calibrated(task, losses[task.name], outputs) for task in self.tasks},
            bags=self.bags,
            instances=self.instances,
            view_consistency=None if consistency is None else float(consistency),
            view_mass=view_mass,
            influence=self.influence.value(),
            predictions=_together(outputs) if keep and outputs else None,
        )


def _labelled(task: TaskSpec, outputs: Sequence[_Outputs]) -> tuple[Tensor, Tensor]:
    """Logits and labels of the bags that carry the task's label; there are outputs."""
    kept = [(out[task.name][mask[task.name]], labels[task.name][mask[task.name]]) for out, labels, mask in outputs]
    logits, target = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return logits, target


def _whole(task: TaskSpec, outputs: Sequence[_Outputs]) -> float:
    """The loss over all bags at once; NaN without labels."""
    logits, target = _labelled(task, outputs) if outputs else (torch.zeros(0), torch.zeros(0))
    return float(kind_of(task).loss(task, logits.double(), target, None)) if len(target) else math.nan


def _calibrated(task: TaskSpec, loss: float, outputs: Sequence[_Outputs]) -> float:
    """`loss`, which is of all `outputs` together, after the best temperature."""
    kind = kind_of(task)
    if kind.calibration != "temperature" or math.isnan(loss):
        return loss
    logits, target = _labelled(task, outputs)
    return float(kind.loss(task, logits.double() / best_temperature(task, logits, target), target, None))


def _together(outputs: Sequence[_Outputs]) -> Predictions:
    parts = [{name: torch.cat([out[kind][name] for out in outputs]) for name in outputs[0][kind]} for kind in range(3)]
    return Predictions(*parts)


def _in_order(indices: Sequence[int], outputs: Sequence[_Outputs], batches: Sequence[int]) -> list[_Outputs]:
    """Outputs of all bags, bag after bag, in `batches` of so many; `indices` says which rows `outputs` are."""
    if not outputs:
        return []
    order = torch.tensor(indices).argsort()
    pieces = [
        {name: torch.cat([part[kind][name] for part in outputs])[order].split(batches) for name in outputs[0][kind]}
        for kind in range(3)
    ]
    result = []
    for number in range(len(batches)):
        logits, labels, masks = ({name: piece[number] for name, piece in kind.items()} for kind in pieces)
        result.append((logits, labels, masks))
    return result


@torch.no_grad()
def evaluate_dataset(
    model: nn.Module,
    dataset: BagDataset,
    fabric: Fabric,
    data: DataConfig,
    *,
    progress: bool = False,
    keep: bool = False,
) -> SplitResult:
    """Run `model` in evaluation mode over `dataset` on `fabric`'s device.

    Several processes share the bags; process 0 gathers the outputs of all of them, each bag once and in the
    dataset's order, computes the metrics as one process would, and tells the others. With `keep` the result has the
    predictions too.

    Raises:
        DataError: a feature or a label is NaN or infinite; names bag, view and instance.
    """
    tasks = dataset.tasks
    processes = processes_of(fabric)
    metrics = TaskMetrics(tasks).to(fabric.device)
    found = _Found(tasks)
    outputs: list[_Outputs] = []
    shown = progress and fabric.is_global_zero
    with evaluating(model), ProgressReport("evaluate", device=fabric.device, enabled=shown) as report:
        for host in batches_in_order(dataset, data, processes):
            if len(host) == 0:
                continue
            check_batch(host)
            batch, out = infer(model, host, fabric)
            with fabric.autocast():
                found.add(host, batch, out)
            if processes is None:
                metrics.update(out.logits, batch.labels, batch.label_mask)
            logits = {name: value.float().cpu() for name, value in out.logits.items()}
            outputs.append((logits, host.labels, host.label_mask))
            report.update(found.bags / max(len(dataset), 1), instances=host.num_instances)
    if processes is None:
        return found.result(metrics.compute(), outputs, keep)
    indices = [index for batch in sampler_in_order(dataset, data, processes).batches(0) for index in batch]
    parts = processes.objects((indices, outputs, found.state()))
    result: SplitResult | None = None
    if processes.rank == 0:
        found = _Found(tasks)
        for *_, state in parts:
            found.merge(state)
        # In the batches of one process: metrics add up in float32, batch by batch.
        merged = _in_order(
            [index for rows, *_ in parts for index in rows],
            [output for _, part, _ in parts for output in part],
            [len(batch) for batch in sampler_in_order(dataset, data, None).batches(0)],
        )
        for logits, labels, label_mask in merged:
            moved = ({name: value.to(fabric.device) for name, value in x.items()} for x in (logits, labels, label_mask))
            metrics.update(*moved)
        result = found.result(metrics.compute(), merged, keep)
    told: SplitResult = processes.object_from_first(result)
    return told
