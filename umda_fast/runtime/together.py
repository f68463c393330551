"""What several processes of a run, started by torchrun, have to agree on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from umda_fast.data import BagBatch
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.sgl.distributed import Processes
from umda_fast.tasks import kind_of

__all__ = ["label_counts", "one_decides", "penalty_counts"]

Result = TypeVar("Result")


def one_decides(processes: Processes | None, function: Callable[[], Result]) -> Result:
    """`function()` of process 0, in all of them; where it raises `DataError`, all of them do."""
    if processes is None:
        return function()
    answer: tuple[str, str | Result] | None = None
    if processes.rank == 0:
        try:
            answer = "result", function()
        except DataError as error:
            answer = "error", str(error)
    kind, value = processes.object_from_first(answer)
    if kind == "error":
        raise DataError(value)
    result: Result = value
    return result


def label_counts(batch: BagBatch, tasks: tuple[TaskSpec, ...]) -> dict[str, float]:
    """What each task's loss is a mean over: its labels, or their weights where the classes have some. Reads the
    batch, which should lie on the host. A task without labels is absent."""
    counts = {}
    for task in tasks:
        keep = batch.label_mask[task.name]
        if not bool(keep.any()):
            continue
        weights = kind_of(task).weights(task, batch.labels[task.name][keep], torch.empty(0, dtype=torch.float64))
        counts[task.name] = float(keep.sum() if weights is None else weights.sum())
    return counts


def penalty_counts(batch: BagBatch, names: Iterable[str]) -> dict[str, float]:
    """What each penalty is a mean over (docs/model.md): by its share, the process's penalty enters that of
    the whole batch. Exact for entropy, consistency, diversity, divergence, cohesion and linear; dispersion and
    smoothness are ratios over the whole batch, of which the weighted mean over the processes takes the place."""
    views = batch.mask.sum(1).double()
    sizes = batch.ptr.diff()
    counts = {
        "entropy": float(views[views > 1].sum()),
        "consistency": float((views * (views - 1)).sum()),
        "smoothness": float(sizes[sizes > 1].sum()),
        "diversity": float((sizes > 1).sum()),
        "divergence": float(len(batch) > 0),
        "linear": float(len(batch) > 0),
        "cohesion": float((sizes > 0).sum()),
    }
    return {name: counts.get(name, float(batch.num_instances)) for name in names}
