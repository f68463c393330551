"""Expert gates between the pooled bag and a task's branch: MMoE and PLE.

Sources: Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts",
KDD 2018; Tang et al., "Progressive Layered Extraction (PLE)", RecSys 2020 (here with one extraction level,
which that paper calls CGC).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ExpertGates", "Experts"]


class Experts(nn.Module):
    """E independent layers `GELU(x A_e + b_e)`, D -> D, as one batched product.

    Args:
        count: E. width: D.
    """

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)  # as nn.Linear draws them
        self.weight = nn.Parameter(torch.empty(count, width, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D]. Returns [..., E, D]."""
        return F.gelu(torch.einsum("...d,edf->...ef", x, self.weight) + self.bias)


class ExpertGates(nn.Module):
    """`out[b,t] = sum_e gate[b,t,e] E_e(x[b,t])`, the gate a softmax of `x[b,t] G_t` over the experts of task t.

    Those are the `shared` experts and, for PLE, the task's own `private` ones; without private experts this is MMoE.

    Args:
        width: D. tasks: T. shared: experts of all tasks, at least 1. private: experts of each task alone.

    Raises:
        ValueError: no shared expert, or a negative number of private ones.
    """

    def __init__(self, width: int, tasks: int, shared: int = 4, private: int = 0) -> None:
        super().__init__()
        if shared < 1 or private < 0:
            raise ValueError(
                f"shared, private: expected at least 1 shared and 0 private experts, got {shared}, {private}"
            )
        self.shared = Experts(shared, width)
        self.private = nn.ModuleList(Experts(private, width) for _ in range(tasks if private else 0))
        self.gate = nn.Parameter(torch.zeros(tasks, width, shared + private))  # equal shares to begin with

    def gates(self, x: Tensor) -> Tensor:
        """x [B, T, D]. Returns [B, T, E], shared experts first; sums to 1 over E."""
        return torch.einsum("btd,tde->bte", x, self.gate).softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, D]. Returns [B, T, D]."""
        outputs = self.shared(x)  # [B,T,E,D]
        if len(self.private):
            own = torch.stack([experts(x[:, t]) for t, experts in enumerate(self.private)], dim=1)
            outputs = torch.cat([outputs, own], dim=2)
        mixed: Tensor = (self.gates(x)[..., None] * outputs).sum(2)
        return mixed
