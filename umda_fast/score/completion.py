"""What a model's tasks lack until it is trained, found on its training bags."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from umda_fast.data import BagDataset
from umda_fast.runtime.config import DataConfig
from umda_fast.score.collect import collect
from umda_fast.tasks import kind_of

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["complete_tasks"]


def complete_tasks(model: Any, train: BagDataset, fabric: Fabric, data: DataConfig) -> None:
    """Complete the tasks in the `config` of `model` by what it makes of its training bags
    (`TaskKind.complete_trained`); without a joint task nothing changes, and nothing is read."""
    tasks = model.config.tasks
    if not any(kind_of(task).joint(task) for task in tasks):
        return
    found = collect(model, train, fabric, data)
    completed = tuple(kind_of(task).complete_trained(task, *found.of(task)) for task in tasks)
    model.config = replace(model.config, tasks=completed)
