"""What several processes of a run, started by torchrun, have to agree on."""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

from umda_fast.data import BagBatch
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.sgl.distributed import Processes
from umda_fast.tasks import kind_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

__all__ = [
    "label_counts",
    "one_decides",
    "penalty_counts",
    "processes_of",
    "started_together",
    "strategy",
]

# How long a process waits for another before it stops; the longest thing that one does alone, while the others
# wait, is to write a checkpoint.
TIMEOUT = 600.0

Result = TypeVar("Result")


def started_together() -> tuple[int, int]:
    """Processes on this machine and in all, as torchrun started them; (1, 1) without it."""
    if not (dist.is_available() and dist.is_torchelastic_launched()):
        return 1, 1
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])


def strategy() -> DDPStrategy:
    """Fabric's strategy for a process group: gloo on the CPU, NCCL on GPUs.

    The variable `UMDA_FAST_TIMEOUT` says how many seconds a process waits for another.

    Raises:
        DataError: it is not a positive number.
    """
    from lightning_fabric.strategies.ddp import DDPStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # says that processes have found each other
    text = os.environ.get("UMDA_FAST_TIMEOUT", "")
    try:
        seconds = float(text) if text else TIMEOUT
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 1e6:
        raise DataError(f"UMDA_FAST_TIMEOUT: expected seconds, more than 0, got {text!r}")
    atexit.unregister(_leave)
    atexit.register(_leave)
    return DDPStrategy(timeout=timedelta(seconds=seconds))


def _leave() -> None:
    # gloo's threads must end before the interpreter does.
    if dist.is_initialized():
        dist.destroy_process_group()


def processes_of(fabric: Fabric) -> Processes | None:
    """The processes of the run; None where there is one."""
    if fabric.world_size == 1:
        return None
    assert dist.group.WORLD is not None
    return Processes(dist.group.WORLD)


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
