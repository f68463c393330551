"""Instance dropout: a random part of every bag, another one in every epoch."""

from __future__ import annotations

import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from umda_fast.data.batch import BagBatch
from umda_fast.data.draws import Stream, generator

__all__ = ["drop_instances"]


def drop_instances(batch: BagBatch, share: float, seed: int = 0, epoch: int = 0) -> BagBatch:
    """`batch` without a random `share` of each bag's instances; those kept stay in order, at least one of each bag.

    What is dropped depends on seed, epoch and the bag's name only: not on the batch a bag is in, on the number of
    processes or on where a run was resumed.

    Args:
        batch: on the CPU.
        share: at least 0 and below 1; 0 gives the batch itself.

    Raises:
        ValueError: share out of range.
    """
    if not 0.0 <= share < 1.0:
        raise ValueError(f"share: expected at least 0 and below 1, got {share}")
    if share == 0.0:
        return batch
    ptr = batch.ptr.tolist()
    kept = []
    for bag, (first, last) in enumerate(pairwise(ptr)):
        count = last - first
        keep = min(count, max(1, round(count * (1.0 - share))))
        order = generator(Stream.DROP_INSTANCES, seed, epoch, zlib.crc32(batch.names[bag].encode())).random(count)
        kept.append(first + np.sort(np.argsort(order, kind="stable")[:keep]))
    rows = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *kept]))
    sizes = torch.tensor([0, *(len(part) for part in kept)])
    thinned = replace(
        batch,
        views={name: features[rows] for name, features in batch.views.items()},
        mask=batch.mask[rows],
        ptr=sizes.cumsum(0),
        coords=None if batch.coords is None else batch.coords[rows],
        frames=None if batch.frames is None else torch.searchsorted(rows, batch.frames),
    )
    thinned.complete = batch.complete
    return thinned
