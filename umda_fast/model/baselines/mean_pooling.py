"""The mean of a bag."""

from __future__ import annotations

import torch
from torch import Tensor

from umda_fast.model.baselines.base import OneEncoder, Pooled
from umda_fast.model.gmip import bag_index
from umda_fast.ops import bag_attention_pool

__all__ = ["MeanPooling"]


class MeanPooling(OneEncoder):
    """Mean of a bag's instances, shared by all tasks."""

    architecture = "mean_pooling"

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        scores = z.new_zeros(len(z), 1)  # equal scores: the softmax is a mean
        pool = bag_attention_pool(z, scores, ptr)
        attention = torch.exp(-pool.lse)[bag_index(ptr, len(z))]
        return Pooled(pool.pooled, attention, pool.entropy)
