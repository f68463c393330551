"""The maximum of a bag."""

from __future__ import annotations

import torch
from torch import Tensor

from umda_fast.model.baselines.base import OneEncoder, Pooled
from umda_fast.model.gmip import bag_index

__all__ = ["MaxPooling"]


class MaxPooling(OneEncoder):
    """Maximum of every feature over a bag's instances; zero for an empty bag.

    `attention` is the share of the features whose maximum an instance holds.
    """

    architecture = "max_pooling"

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        bag, (bags, width) = bag_index(ptr, len(z)), (len(ptr) - 1, z.shape[1])
        index = bag[:, None].expand(-1, width)
        pooled = z.new_zeros(bags, width).scatter_reduce(0, index, z, "amax", include_self=False)
        with torch.no_grad():
            holds = (z == pooled[bag]).to(z.dtype)
            holders = z.new_zeros(bags, width).index_add(0, bag, holds)
            share = (holds / holders[bag].clamp_min(1.0)).mean(1)
            surprise = -torch.xlogy(share, share)
            entropy = share.new_zeros(bags).index_add(0, bag, surprise)
        return Pooled(pooled[:, None], share[:, None], entropy[:, None])
