"""A model over a split, batch by batch, on one device or on several processes' parts of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from umda_fast.data import BagBatch, BagDataset, InstanceBudgetSampler, make_loader
from umda_fast.model import UMDA, Ensemble, Mixture
from umda_fast.model.chunked import forward_chunked
from umda_fast.runtime.config import DataConfig
from umda_fast.runtime.guard import check_batch
from umda_fast.runtime.progress import ProgressReport
from umda_fast.sgl.distributed import Processes

if TYPE_CHECKING:
    from lightning_fabric import Fabric

__all__ = ["batches_in_order", "evaluating", "infer", "outputs_in_order", "sampler_in_order", "to_device"]

# Batches of more instances go through the model in chunks.
LARGE = 32_768


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode, and then in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def batches_in_order(
    dataset: BagDataset, data: DataConfig, processes: Processes | None = None
) -> Iterable[BagBatch]:
    """All bags of `dataset` in its order, batched by `data.budget`; this process's share of each batch."""
    return make_loader(dataset, sampler_in_order(dataset, data, processes), workers=data.workers)


def sampler_in_order(
    dataset: BagDataset, data: DataConfig, processes: Processes | None = None
) -> InstanceBudgetSampler:
    """Which bags are in which of the batches of `batches_in_order`."""
    size, rank = (1, 0) if processes is None else (processes.size, processes.rank)
    return InstanceBudgetSampler(dataset.sizes, data.budget, shuffle=False, replicas=size, rank=rank)


def to_device(host: BagBatch, fabric: Fabric) -> BagBatch:
    """`host` on `fabric`'s device, features in float32, however compactly they are stored."""
    batch = host.to(fabric.device, non_blocking=fabric.device.type == "cuda")
    batch.views = {name: features.float() for name, features in batch.views.items()}
    return batch


@torch.no_grad()
def infer(model: nn.Module, host: BagBatch, fabric: Fabric) -> tuple[BagBatch, Any]:
    """`host` on `fabric`'s device and the output of `model`, which is in evaluation mode.

    More than `LARGE` instances go through a `UMDA` in chunks, their features staying as compact as they are stored;
    not so with encoders of the user's own, which might look across instances.
    """
    if isinstance(model, Ensemble):
        found = [infer(member, host, fabric) for member in model.members]
        return found[0][0], model.combine([out for _, out in found])
    if isinstance(model, Mixture):
        batch, out = infer(model.model, host, fabric)
        return batch, model.mixed(out, batch.views, batch.ptr, batch.mask)
    if isinstance(model, UMDA) and host.num_instances > LARGE and not model.encoders.custom:
        batch = host.to(fabric.device)
        with fabric.autocast():
            return batch, forward_chunked(model, **batch.inputs())
    batch = to_device(host, fabric)
    with fabric.autocast():
        return batch, model(**batch.inputs())


def outputs_in_order(
    model: nn.Module, dataset: BagDataset, fabric: Fabric, data: DataConfig, *, title: str, progress: bool = False
) -> Iterator[tuple[BagBatch, BagBatch, Any]]:
    """Every batch of `dataset` in its order, on the host and on `fabric`'s device, and what `model` makes of it.

    Raises:
        DataError: a feature or a label is NaN or infinite; names bag, view and instance.
    """
    done = 0
    with ProgressReport(title, device=fabric.device, enabled=progress) as report:
        for host in batches_in_order(dataset, data):
            check_batch(host)
            yield host, *infer(model, host, fabric)
            done += len(host)
            report.update(done / max(len(dataset), 1), instances=host.num_instances)
