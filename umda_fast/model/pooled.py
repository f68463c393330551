"""The instances behind the attention pooling, as self-guided learning takes the gradients of tasks on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from umda_fast.ops import representation_gram

__all__ = ["PooledInstances"]


@dataclass(frozen=True)
class PooledInstances:
    """What one call of `BagPooling` read, kept and returned.

    Attributes:
        z: [N, D], the instances. ptr: int64 [B+1].
        attention: [N, T]. pooled: [B, T, D].
        value: [N, H], tanh of the hidden units. gate: [N, H], sigmoid of the gates.
        score_weight: [T, H]. value_weight, gate_weight: [H, D].
    """

    z: Tensor
    ptr: Tensor
    attention: Tensor
    pooled: Tensor
    value: Tensor
    gate: Tensor
    score_weight: Tensor
    value_weight: Tensor
    gate_weight: Tensor

    @property
    def requires_grad(self) -> bool:
        """Whether the instances carry gradients."""
        return self.z.requires_grad

    def gradient_gram(self, losses: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
        """Gram matrix [S, S] of the gradients of S losses on z, which must reach z through `pooled` only.

        S backward passes from the losses to `pooled`, whose size is that of the bags, and one pass over the
        instances (`umda_fast.ops.representation_gram`). The graph is kept.

        Returns:
            gram in float32 (float64 for float64), detached. A loss that does not reach `pooled` has a zero row.

        Raises:
            ValueError: no loss reaches `pooled`: they are of another call, or pooling and heads were compiled into one
                graph, whose outputs do not depend on one another for autograd.
        """
        found = [torch.autograd.grad(x, self.pooled, retain_graph=True, allow_unused=True)[0] for x in losses]
        if all(gradient is None for gradient in found):
            raise ValueError(
                "losses: expected losses computed from `pooled` of this call, got none that reaches it (a model "
                "compiled as a whole hides the way)"
            )
        return representation_gram(
            [torch.zeros_like(self.pooled) if gradient is None else gradient for gradient in found],
            self.z.detach(),
            self.attention.detach(),
            self.ptr,
            self.pooled.detach(),
            self.value.detach(),
            self.gate.detach(),
            self.score_weight.detach(),
            self.value_weight.detach(),
            self.gate_weight.detach(),
            backend=backend,
        )
