"""Several models as one: the mean of what they predict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from umda_fast.model._numerics import wide
from umda_fast.tasks import TaskSpec, kind_of

__all__ = ["Ensemble", "EnsembleOutput"]


@dataclass
class EnsembleOutput:
    """`logits` {task: [B, outputs]} of the mean prediction, `attention` [N, T] and, where all members have them,
    `view_weights` [N, V], `view_mass` [N, V, V], `view_consistency` (scalar) and `influence` [T, T]: means over the
    members, None otherwise."""

    logits: dict[str, Tensor]
    attention: Tensor
    view_weights: Tensor | None
    view_mass: Tensor | None
    view_consistency: Tensor | None
    influence: Tensor | None


class Ensemble(nn.Module):
    """Predicts the mean of its members' probabilities, of a regression the mean of their values in original units.

    Models that differ in nothing but their seed err differently. By convexity, the log loss or squared error of the
    mean is at most the mean of theirs.

    Method: Lakshminarayanan et al., "Simple and scalable predictive uncertainty estimation using deep ensembles", 2017.

    Args:
        members: at least one model (`UMDA` or a baseline), for the same views and tasks in the same order.

    Attributes:
        config: the first member's, with the mean of the thresholds where any member has some; others have one half.

    Raises:
        ValueError: no member, or one that differs from the first in views, tasks or metadata.
    """

    def __init__(self, members: Sequence[Any]) -> None:
        super().__init__()
        if not members:
            raise ValueError("members: expected at least one model, got none")
        first = members[0].config
        for number, member in enumerate(members[1:], 1):
            for what, found, wanted in (
                ("views", tuple(member.config.views), tuple(first.views)),
                ("tasks", _kinds(member.config.tasks), _kinds(first.tasks)),
                ("metadata", _metadata(member), _metadata(members[0])),
            ):
                if found != wanted:
                    raise ValueError(f"members[{number}]: expected the {what} of the first, {wanted}, got {found}")
        self.members = nn.ModuleList(members)
        self._tasks = [tuple(member.config.tasks) for member in members]
        tasks = [_joint(column) for column in zip(*self._tasks, strict=True)]
        self.config: Any = replace(first, tasks=tuple(tasks))

    def forward(self, *args: Any, **kwargs: Any) -> EnsembleOutput:
        """Takes what the members take."""
        return self.combine([member(*args, **kwargs) for member in self.members])

    def combine(self, outputs: Sequence[Any]) -> EnsembleOutput:
        """The output for those of all members, in their order."""
        logits = {}
        for position, task in enumerate(self.config.tasks):
            specs = [tasks[position] for tasks in self._tasks]
            logits[task.name] = _mean_logits(specs, [out.logits[task.name] for out in outputs])

        def mean(name: str) -> Tensor | None:
            found = [value for out in outputs if (value := getattr(out, name, None)) is not None]
            return torch.stack(found).mean(0) if len(found) == len(outputs) else None

        attention = mean("attention")
        assert attention is not None
        others = (mean(name) for name in ("view_weights", "view_mass", "view_consistency", "influence"))
        return EnsembleOutput(logits, attention, *others)


def _mean_logits(specs: Sequence[TaskSpec], logits: Sequence[Tensor]) -> Tensor:
    """The logits whose `decode` by the first spec is the mean of all `decode`s."""
    return kind_of(specs[0]).mean_logits(specs, [wide(value) for value in logits])


def _kinds(tasks: Sequence[TaskSpec]) -> tuple[tuple[Any, ...], ...]:
    """What must agree: the scale of a regression and the weights of classes need not."""
    return tuple((*task.identity, task.labels) for task in tasks)


def _metadata(member: Any) -> tuple[str, ...]:
    return tuple(spec.name for spec in getattr(member.config, "metadata", ()))


def _joint(specs: Sequence[TaskSpec]) -> TaskSpec:
    """The first one's, with mean thresholds."""
    if all(spec.thresholds is None for spec in specs):
        return specs[0]
    each = [spec.thresholds or (0.5,) * specs[0].classes for spec in specs]
    return replace(specs[0], thresholds=tuple(math.fsum(column) / len(each) for column in zip(*each, strict=True)))
