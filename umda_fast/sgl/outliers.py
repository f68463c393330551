"""Tasks that pull against all the others, from the cosines of the task gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TaskAgreement", "outlier_tasks", "task_agreement"]


@dataclass(frozen=True)
class TaskAgreement:
    """How a task's gradient stands to those of the others.

    Attributes:
        task: its name.
        agreement: mean cosine with the other tasks.
        others: mean cosine of the others among themselves; nan with fewer than three tasks.
        outlier: the task conflicts with the others on the whole (`agreement < -margin`) while they agree among
            themselves more than with it (`others - agreement > margin`).
    """

    task: str
    agreement: float
    others: float
    outlier: bool


def task_agreement(cosines: Tensor, tasks: Sequence[str], margin: float = 0.05) -> list[TaskAgreement]:
    """`TaskAgreement` of every task, in their order (waits for the device).

    With two tasks none is an outlier: which of the two is in the way cannot be told.

    Args:
        cosines: [T, T], best a running mean such as `SelfGuided.cosine_ema`: single steps are noise.
        tasks: T names.
        margin: cosines within it count as 0.

    Raises:
        ValueError: cosines that are not [T, T].
    """
    count = len(tasks)
    if cosines.shape != (count, count):
        raise ValueError(f"cosines must have shape [{count}, {count}], got {list(cosines.shape)}")
    pairs = cosines.detach().to("cpu", torch.float64).clone()
    pairs.fill_diagonal_(0.0)
    row, total = pairs.sum(1), pairs.sum()
    result: list[TaskAgreement] = []
    for t, task in enumerate(tasks):
        agreement = float(row[t]) / max(count - 1, 1)
        rest = (count - 1) * (count - 2)
        others = float(total - 2 * row[t]) / rest if rest else float("nan")
        outlier = agreement < -margin and others - agreement > margin  # False with nan
        result.append(TaskAgreement(task, agreement, others, outlier))
    return result


def outlier_tasks(cosines: Tensor, tasks: Sequence[str], margin: float = 0.05) -> list[str]:
    """Names of the outlier tasks, worst first. Arguments as of `task_agreement`.

    The one that agrees least is set apart and the rest looked at again: the conflict of two tasks is often one
    task's. Leaving an outlier out, or training it apart, is worth a try.
    """
    left, found = list(range(len(tasks))), []
    while len(left) > 2:
        index = torch.tensor(left)
        entries = task_agreement(cosines.detach().cpu()[index][:, index], [tasks[t] for t in left], margin)
        worst = min((entry.agreement, position) for position, entry in enumerate(entries))[1]
        if not entries[worst].outlier:
            break
        found.append(tasks[left.pop(worst)])
    return found
