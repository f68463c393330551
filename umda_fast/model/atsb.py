"""Adaptive task-specific branching and its penalties (docs/model.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model._numerics import Constants, autocast_off, wide
from umda_fast.model.experts import ExpertGates

__all__ = ["ATSB", "ATSBOutput", "TaskNorm", "cohesion_penalty", "divergence_penalty"]


class TaskNorm(nn.Module):
    """Layer norm of [..., T, D] over D, with a scale and a shift for every task."""

    def __init__(self, tasks: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(tasks, width))
        self.bias = nn.Parameter(torch.zeros(tasks, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class ATSBOutput(NamedTuple):
    """What `ATSB` returns."""

    branches: Tensor  #: [B, T, D]
    influence: Tensor  #: [T, T], Gamma: row t says from which private paths task t reads; rows sum to 1


class ATSB(Constants):
    """`branch[b,t] = GELU(LN_t( S pooled[b,t] + sum_s Gamma[t,s] P_s pooled[b,s] ))`, `P_s = U_s R_s^T`.

    `Gamma = rowsoftmax(C C^T / sqrt(d_c) + kappa * A_hier + kappa_g * sg(cosines))`, A_hier minus the distances.
    S has no bias, so that what precedes LN is linear and commutes with pooling. A linear map of `statistics`,
    numbers of a bag that are the same for all tasks, is added there.

    Args:
        width: D. tasks: T. rank: r of the private paths. embedding: d_c.
        kappa: weight of the hierarchy. kappa_g: weight of the gradient cosines.
        hierarchy: [T][T] tree distances between tasks, or None.
        private: False leaves the private paths out; Gamma is then the identity.
        experts: expert gates take the place of the private paths (and of Gamma):
            `branch[b,t] = GELU(LN_t(S pooled[b,t] + experts(pooled)[b,t]))`. Not linear: it does not commute with
            the pooling.
        statistics: numbers of a bag that all tasks read as well; 0 for none.

    The cosines last given in training are kept in the buffer `task_cosines`: later calls without any, in
    evaluation above all, use those.
    """

    hierarchy: Tensor
    task_cosines: Tensor

    def __init__(
        self,
        width: int,
        tasks: int,
        rank: int | None = None,
        embedding: int = 16,
        kappa: float = 1.0,
        kappa_g: float = 0.0,
        hierarchy: Sequence[Sequence[float]] | None = None,
        private: bool = True,
        experts: ExpertGates | None = None,
        statistics: int = 0,
    ) -> None:
        super().__init__()
        private = private and experts is None
        rank = max(1, width // 8) if rank is None else rank
        self.kappa = kappa
        self.kappa_g = kappa_g
        self.private = private
        self.shared = nn.Linear(width, width, bias=False)
        self.shared_statistics = nn.Linear(statistics, width, bias=False) if statistics else None
        self.experts = experts
        if private:
            self.read = nn.Parameter(torch.randn(tasks, width, rank) / math.sqrt(width))
            self.write = nn.Parameter(torch.randn(tasks, width, rank) / math.sqrt(3 * rank))
            self.task_embedding = nn.Parameter(torch.randn(tasks, embedding))
        distances = [[0.0] * tasks] * tasks if hierarchy is None else hierarchy
        self.register_constant("hierarchy", [[-distance for distance in row] for row in distances])
        if self.hierarchy.shape != (tasks, tasks):
            raise ValueError(f"hierarchy: expected [{tasks}][{tasks}], got {list(self.hierarchy.shape)}")
        self.register_buffer("task_cosines", torch.zeros(tasks, tasks))
        self.norm = TaskNorm(tasks, width)

    def influence(self, task_cosines: Tensor | None = None) -> Tensor:
        """Gamma [T, T] in the parameters' dtype; task_cosines [T, T] or None for those last given in training."""
        if not self.private:
            return torch.eye(self.norm.weight.shape[0], dtype=self.norm.weight.dtype, device=self.norm.weight.device)
        if task_cosines is None:
            task_cosines = self.task_cosines
        elif task_cosines.shape != self.task_cosines.shape:
            raise ValueError(
                f"task_cosines must have shape {list(self.task_cosines.shape)}, got {list(task_cosines.shape)}"
            )
        else:
            task_cosines = task_cosines.detach().to(self.task_cosines)
            if self.training:
                self.task_cosines.copy_(task_cosines)
        c = self.task_embedding
        # Broadcast, not matmul: [T, T] is small, and autocast would round it.
        affinity = (c[:, None, :] * c[None, :, :]).sum(-1) / math.sqrt(c.shape[1])
        return (affinity + self.kappa * self.hierarchy + self.kappa_g * task_cosines).softmax(-1)

    def project(self, x: Tensor, influence: Tensor) -> Tensor:
        """What precedes the norm, [n, T, D] -> [n, T, D]. Without experts it is linear: of pooled bags, or of
        instances, then pooled after it."""
        shared: Tensor = self.shared(x)
        if self.experts is not None:
            mixed: Tensor = self.experts(x)
            return shared + mixed
        if not self.private:
            return shared
        hidden = torch.einsum("btd,tdr->btr", x, self.read)
        private = torch.einsum("btr,tdr->btd", hidden, self.write)
        return shared + torch.einsum("ts,bsd->btd", influence.to(private.dtype), private)

    def forward(
        self, pooled: Tensor, task_cosines: Tensor | None = None, statistics: Tensor | None = None
    ) -> ATSBOutput:
        """pooled [B, T, D]; task_cosines [T, T], cosines of the tasks' gradients, or None; statistics [B, numbers], or
        None where there are none."""
        influence = self.influence(task_cosines)
        projected = self.project(pooled, influence)
        if self.shared_statistics is not None:
            projected = projected + self.shared_statistics(statistics)[:, None]
        return ATSBOutput(F.gelu(self.norm(projected)), influence)

    def divergence(self) -> Tensor:
        """`divergence_penalty` of the private paths, 0 without them."""
        return divergence_penalty(self.read) if self.private else self.norm.weight.new_zeros(())


def divergence_penalty(read: Tensor) -> Tensor:
    """Branches specialise: `mean_{s<t} ||Rn_s^T Rn_t||_F^2 / r`, Rn the column-normalised R.

    Args:
        read: [T, D, r].

    Returns:
        A scalar in 0..r, 0 for one task.
    """
    tasks, width, rank = read.shape
    if tasks == 1:
        return read.new_zeros(())
    columns = F.normalize(read, dim=1, eps=1e-8).transpose(1, 2).reshape(tasks * rank, width)
    with autocast_off(columns):
        overlap = (columns @ columns.T).square().view(tasks, rank, tasks, rank).sum((1, 3)) / rank  # [T,T]
    return overlap.triu(1).sum() / (tasks * (tasks - 1) / 2)


def cohesion_penalty(branches: Tensor, influence: Tensor, present: Tensor | None = None) -> Tensor:
    """Branches do not drift apart:
    `sum_{s != t} Gamma[t,s] (1 - cos(branch[b,t], branch[b,s])) / sum_{s != t} Gamma[t,s]`, mean over bags.

    Args:
        branches: [B, T, D].
        influence: [T, T], Gamma.
        present: bool [B], the bags that count (those with an instance: the branches of an empty one are
            constants); None for all.

    Returns:
        A scalar, 0 for one task or without bags.
    """
    branches = wide(branches)
    bags, tasks, _ = branches.shape
    if tasks == 1:
        return branches.new_zeros(())
    unit = F.normalize(branches, dim=-1, eps=1e-8)
    count = branches.new_full((), bags)
    if present is not None:
        unit = unit.masked_fill(~present[:, None, None], 0.0)
        count = present.sum().to(branches.dtype)
    with autocast_off(branches):
        flat = unit.transpose(0, 1).reshape(tasks, -1)
        cosine = (flat @ flat.T) / count.clamp_min(1.0)  # [T,T], mean over bags
    weight = influence.to(branches.dtype) * (1.0 - torch.eye(tasks, dtype=branches.dtype, device=branches.device))
    total = weight.sum()
    penalty = (weight * (1.0 - cosine)).sum() / total.clamp_min(torch.finfo(total.dtype).tiny)
    return penalty * (count > 0)
