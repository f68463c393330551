"""What `UMDA.forward` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from umda_fast.model.pooled import PooledInstances
from umda_fast.ops import NeighborGraph

__all__ = ["UMDAOutput"]


@dataclass
class UMDAOutput:
    """Predictions, penalties and reported quantities for N instances in B bags.

    All carry gradients. In float32 (float64 for a float64 model) but for logits, representation and branches,
    which autocast may make narrower.

    Attributes:
        logits: task -> [B, outputs].
        penalties: entropy, consistency, dispersion, smoothness, diversity, divergence, cohesion, linear -> scalar; 0
            where there is nothing to take a mean of.
        attention: [N, T], of the pooling; sums to 1 over the instances of a bag.
        attention_entropy: [B, T], its entropy in nats, 0 for an empty bag.
        view_mass: [N, V, V], how much view u listens to view w in the last block, mean over heads; rows of
            missing views are 0, others sum to 1.
        view_weights: [N, V], of the fusion; sums to 1.
        influence: [T, T], Gamma; rows sum to 1.
        representation: [N, D], what the pooling reads: the output z of the last round of message passing.
        instances: the same with all that lies between it and the pooled bags, for `SelfGuided.backward`.
        view_consistency: scalar, 1 - consistency penalty.
        branches: [B, T, D].
        graph: of the instances, None with `graph=False`.
        view_logits: task -> [B, V, outputs], what every view alone says, 0 where a bag lacks it (they are part of
            `logits`); None without `view_heads`.
        view_present: bool [B, V], whether an instance of the bag has the view; None without `view_heads`.
        view_features: [B, V, T, D], of which the former are linear maps, 0 where a bag lacks the view; None without
            `view_heads`.
    """

    logits: dict[str, Tensor]
    penalties: dict[str, Tensor]
    attention: Tensor
    attention_entropy: Tensor
    view_mass: Tensor
    view_weights: Tensor
    influence: Tensor
    representation: Tensor
    instances: PooledInstances
    view_consistency: Tensor
    branches: Tensor
    graph: NeighborGraph | None
    view_logits: dict[str, Tensor] | None = None
    view_present: Tensor | None = None
    view_features: Tensor | None = None
