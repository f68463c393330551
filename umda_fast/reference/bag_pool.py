"""Multi-task attention pooling of ragged bags (docs/model.md, section 2), in plain PyTorch."""

import math

import torch
from torch import Tensor

from umda_fast.reference._numerics import (
    accumulation_dtype,
    entropy_terms,
    gather,
    scatter_sum,
    segment_index,
    without_autocast,
)

#: Instances summed one after another; a longer bag is summed in chunks first, so that the error grows slowly.
CHUNK = 256


@without_autocast
def bag_pool(z: Tensor, scores: Tensor, ptr: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention pooling with one softmax per bag and task.

    For bag b and task t, over the instances i of b::

        A[i,t] = softmax_i(scores[i,t]),   pooled[b,t] = sum_i A[i,t] z[i]
        entropy[b,t] = -sum_i A[i,t] log A[i,t],   lse[b,t] = log sum_i exp(scores[i,t])

    Args:
        z: [N, D].
        scores: [N, T].
        ptr: int64 [B+1]; bag b owns instances ``ptr[b]:ptr[b+1]``, none when empty.

    Returns:
        pooled [B, T, D] in z's dtype; entropy and lse [B, T] in float32 (float64 for float64). An empty bag
        (or one whose scores are all -inf) has 0, 0 and -inf. All differentiable, twice; no data-dependent
        shapes.
    """
    dtype = accumulation_dtype(z)
    bags = _Bags(ptr, z.shape[0])
    zf, s = z.to(dtype), scores.to(dtype)
    tasks = s.shape[1]

    peak = s.new_full((bags.count, tasks), -math.inf)
    peak = peak.scatter_reduce(0, bags.index[:, None].expand(-1, tasks), s.detach(), "amax")
    peak = peak.masked_fill(peak == -math.inf, 0.0)
    shifted = s - bags.spread(peak)
    e = shifted.exp()  # [N,T]
    total = bags.sum(e)  # [B,T]
    empty = total == 0
    log_total = total.masked_fill(empty, 1.0).log()
    log_a = shifted - bags.spread(log_total)
    a = log_a.exp()

    # One task at a time: [N,T,D] would be the largest tensor by far.
    pooled = [bags.sum(a[:, t, None] * zf) for t in range(tasks)]
    stacked = torch.stack(pooled, 1) if pooled else zf.new_zeros(bags.count, 0, zf.shape[1])
    return (
        stacked.to(z.dtype),
        bags.sum(entropy_terms(a, log_a)),
        (peak + log_total).masked_fill(empty, -math.inf),
    )


class _Bags:
    """Sums over ragged bags, and their transpose, in two steps: chunks of a bag, then bags.

    A bag of n instances fills ceil(n / CHUNK) chunks; N // CHUNK + B of them are enough for any ``ptr``, so
    that no shape depends on the data.
    """

    def __init__(self, ptr: Tensor, n: int) -> None:
        self.count = ptr.shape[0] - 1
        self.index = segment_index(ptr, n)  # [N] -> bag
        chunks = (ptr.diff() + CHUNK - 1) // CHUNK
        chunk_ptr = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])
        self.num_chunks = n // CHUNK + self.count
        within = torch.arange(n, device=ptr.device) - ptr[self.index]
        self.chunk = chunk_ptr[self.index] + within // CHUNK  # [N] -> chunk
        # Chunks that are not used hold zeros, wherever they are added.
        self.bag = segment_index(chunk_ptr, self.num_chunks).clamp_max(self.count - 1)  # [chunks] -> bag

    def sum(self, x: Tensor) -> Tensor:
        """[N, C] -> [B, C]."""
        return scatter_sum(scatter_sum(x, self.chunk, self.num_chunks), self.bag, self.count)

    def spread(self, y: Tensor) -> Tensor:
        """[B, C] -> [N, C], the value of each instance's bag."""
        return gather(gather(y, self.bag), self.chunk)
