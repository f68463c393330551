"""Skill: how much better than a constant a model predicts, from 0 to 1 for every task, so that tasks can be averaged.

Scores as they are cannot: R2 has no lower bound, so that one task that overfits outweighs whatever the others learn,
and an accuracy of .9 may be less than what naming the most frequent class gives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from umda_fast.model import TaskSpec
from umda_fast.tasks import kind_of

if TYPE_CHECKING:
    from umda_fast.data import BagDataset
    from umda_fast.score.evaluation import SplitResult

__all__ = ["Skill", "SkillScale"]


@dataclass(frozen=True)
class Skill:
    """Attributes:
        tasks: of each task, in 0..1; NaN without labels.
        mean: of the tasks that have one; NaN if none has.
    """

    tasks: dict[str, float]
    mean: float


class SkillScale:
    """What skill is relative to, from the labels of training bags.

    The skill of a task is the mean of two parts, each cut off at 0: `1 - loss / loss_0`, where `loss_0` is the loss, on
    the bags that are scored, of the constant prediction that fits the training labels best; and
    `(score - chance) / (1 - chance)` of the primary metric. The score sees only what is decided, the loss what is
    thought likely; of a task with temperatures it is the loss at the best one (`SplitResult.calibrated_losses`): how
    sure all predictions are together is mended after the training by one number, and a model that still learns to tell
    bags apart while it becomes too sure is not to be thrown away for it. A part that is not defined on the bags is left
    out, and so is the loss where `loss_0` is not above 0, as a log likelihood without its constant may be.

    Method: Murphy, "Skill scores based on the mean square error", 1988, for any loss.

    Args:
        train: bags that a model is trained on; its tasks are those that have a skill.
    """

    def __init__(self, train: BagDataset) -> None:
        self.tasks: tuple[TaskSpec, ...] = tuple(train.tasks)
        self.chance: dict[str, float] = {}
        self._constants: dict[str, torch.Tensor] = {}
        for task in self.tasks:
            column, kind = train.labels[task.name], kind_of(task)
            self._constants[task.name] = torch.from_numpy(kind.constant(task, column))
            self.chance[task.name] = kind.chance(task, column)

    def constant_losses(self, dataset: BagDataset) -> dict[str, float]:
        """`loss_0` of every task on `dataset`, NaN without labels."""
        losses = {}
        for task in self.tasks:
            target = torch.from_numpy(dataset.labels[task.name])
            keep = ~target.isnan() if target.ndim == 1 else ~target.isnan().any(1)
            logits = self._constants[task.name].expand(len(target), -1)
            loss = kind_of(task).loss(task, logits, target, keep) if bool(keep.any()) else math.nan
            losses[task.name] = float(loss)
        return losses

    def __call__(self, result: SplitResult, dataset: BagDataset) -> Skill:
        """The skill of a model with `result` on `dataset`."""
        reference = self.constant_losses(dataset)
        tasks = {}
        for task in self.tasks:
            chance = self.chance[task.name]
            score = result.tasks[task.name][kind_of(task).primary]
            loss_0 = reference[task.name]
            parts = [(score - chance) / (1.0 - chance)]
            parts += [1.0 - result.calibrated_losses[task.name] / loss_0] if loss_0 > 0.0 else []
            tasks[task.name] = _mean([min(max(part, 0.0), 1.0) for part in parts if math.isfinite(part)])
        return Skill(tasks, _mean([value for value in tasks.values() if math.isfinite(value)]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
