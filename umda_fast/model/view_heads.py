"""Late fusion inside the model: what every view alone says for every task (docs/model.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model.gmip import BagPooling
from umda_fast.model.specs import TaskSpec
from umda_fast.ops import bag_attention_pool
from umda_fast.tasks import kind_of

__all__ = ["ViewHeads", "ViewLogits", "ViewPool", "join_pools"]


class ViewPool(NamedTuple):
    """Every view of every bag pooled by itself."""

    pooled: Tensor  #: [B, V, T, D], 0 where no instance of the bag has the view
    lse: Tensor  #: [B, V, T], logarithm of the softmax denominator; there -inf


class ViewLogits(NamedTuple):
    """What `ViewHeads` returns."""

    total: dict[str, Tensor]  #: task -> [B, outputs], what is added to the task's logits
    views: dict[str, Tensor]  #: task -> [B, V, outputs], of every view alone; 0 where it is missing
    present: Tensor  #: bool [B, V]: an instance of the bag has the view
    features: Tensor  #: [B, V, T, D], LN(pool_v), of which they are linear maps; 0 where it is missing


class ViewHeads(nn.Module):
    """`l_v[b,t] = W[v,t] dropout(LN(pool_v[b,t])) + c[v,t]` for every view v and task t, pool_v the gated attention
    pooling of what the view's encoder gave, over the instances that have the view.

    The hidden units of the attention are those of the model's pooling, the scores are each view's and task's own. LN
    has neither scale nor shift: W and c follow it.

    To the logits of a task it adds `sum_v omega_v[b,t] l_v[b,t]` over the views that a bag has, for a regression their
    mean: log-odds that independent views give add up, values do not. The weight `omega_v[b,t] = 2 sigmoid(G[t,v] .
    branch[b,t] + h[t,v])`, 1 at first (G = 0, h = 0), lets what the views say together decide which of them is heard,
    as a gating network decides between experts (Jacobs, Jordan, Nowlan and Hinton, 1991).

    Args:
        views: V. tasks: of the model. width: D. hidden: units of the pooling. dropout: before the heads.
    """

    def __init__(self, views: int, tasks: Sequence[TaskSpec], width: int, hidden: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.dropout = nn.Dropout(dropout)

        def uniform(fan_in: int, *shape: int) -> nn.Parameter:
            bound = 1 / math.sqrt(fan_in)  # as nn.Linear draws them
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))

        self.score = uniform(hidden, views, len(self.tasks), hidden)
        for t, task in enumerate(self.tasks):
            self.register_parameter(f"weight_{t}", uniform(width, views, task.outputs, width))
            self.register_parameter(f"bias_{t}", uniform(width, views, task.outputs))
        self.gate = nn.Parameter(torch.zeros(len(self.tasks), views, width))
        self.gate_bias = nn.Parameter(torch.zeros(len(self.tasks), views))

    def pool(self, pooling: BagPooling, x: Tensor, ptr: Tensor, mask: Tensor | None = None) -> ViewPool:
        """x [N, V, D], rows of missing views 0; ptr int64 [B+1]; mask bool [N, V] or None."""
        scores = torch.einsum("nvh,vth->nvt", torch.mul(*pooling.hidden(x)), self.score)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., None], -torch.inf)
        parts = [bag_attention_pool(x[:, v], scores[:, v], ptr) for v in range(x.shape[1])]
        return ViewPool(torch.stack([part.pooled for part in parts], 1), torch.stack([part.lse for part in parts], 1))

    def forward(self, pool: ViewPool, branches: Tensor) -> ViewLogits:
        """branches [B, T, D], of the tasks, as `ATSB` gives them."""
        present = pool.lse[..., 0] > -torch.inf
        features = F.layer_norm(pool.pooled, pool.pooled.shape[-1:])  # of zeros, zeros
        read = self.dropout(features)
        total, views = {}, {}
        count = present.sum(1, keepdim=True).clamp_min(1)
        omega = 2.0 * torch.sigmoid(torch.einsum("btd,tvd->btv", branches, self.gate) + self.gate_bias)
        for t, task in enumerate(self.tasks):
            logits = torch.einsum("bvd,vod->bvo", read[:, :, t], self.get_parameter(f"weight_{t}"))
            logits = (logits + self.get_parameter(f"bias_{t}")).masked_fill(~present[..., None], 0.0)
            views[task.name] = logits
            added = (omega[:, t, :, None] * logits).sum(1)
            total[task.name] = added if kind_of(task).adds_up else added / count.to(added.dtype)
        return ViewLogits(total, views, present, features)


def join_pools(parts: Sequence[ViewPool], bags: Sequence[Tensor], ptr: Tensor) -> ViewPool:
    """The pools of B bags from those of runs of instances into which they were cut.

    A softmax over the instances of a bag is one over its runs of the softmaxes inside them: with the logarithms of
    their denominators as scores, joining is a pooling again.

    Args:
        parts: of the runs, in their order. bags: int64, which bags a part is of, ascending. ptr: of all, int64 [B+1].
    """
    rows = torch.cat([part.pooled for part in parts])  # [R,V,T,D]
    scores = torch.cat([part.lse for part in parts])
    index = torch.cat(list(bags))
    _, views, tasks, width = rows.shape
    own = torch.searchsorted(index, torch.arange(len(ptr), device=index.device))
    joined = [
        bag_attention_pool(rows[:, v, t], scores[:, v, t, None], own) for v in range(views) for t in range(tasks)
    ]
    shape = (len(ptr) - 1, views, tasks)
    return ViewPool(
        torch.cat([one.pooled for one in joined], 1).view(*shape, width),
        torch.cat([one.lse for one in joined], 1).view(shape),
    )
