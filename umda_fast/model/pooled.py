"""The instances behind the attention pooling, as self-guided learning takes the gradients of tasks on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from umda_fast.ops import representation_gram

__all__ = ["BagMaximum", "PooledInstances"]


#: Bags at a time where the hidden units of B D instances are gathered.
BAGS = 64


class BagMaximum(NamedTuple):
    """The maximum of every bag and dimension, and whose it is."""

    value: Tensor  #: [B, D], 0 for an empty bag
    instance: Tensor  #: int64 [B, D], which has it; any for an empty bag
    found: Tensor  #: bool [B, D], False for an empty bag


@dataclass(frozen=True)
class PooledInstances:
    """What one call of `BagPooling` read, kept and returned.

    Attributes:
        z: [N, D], the instances. ptr: int64 [B+1].
        attention: [N, T]. pooled: [B, T, D]; with statistics, here as below, the mean is the last of the T.
        value: [N, H], tanh of the hidden units. gate: [N, H], sigmoid of the gates.
        score_weight: [T, H]. value_weight, gate_weight: [H, D].
        top: the maxima, None without statistics.
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
    top: BagMaximum | None = None

    @property
    def requires_grad(self) -> bool:
        """Whether the instances carry gradients."""
        return self.z.requires_grad

    def gradient_gram(self, losses: Sequence[Tensor], *, backend: str | None = None) -> Tensor:
        """Gram matrix [S, S] of the gradients of S losses on z, which must reach z through `pooled` and `top` only.

        S backward passes from the losses to `pooled`, whose size is that of the bags, and one pass over the
        instances (`umda_fast.ops.representation_gram`). The graph is kept.

        Returns:
            gram in float32 (float64 for float64), detached. A loss that does not reach `pooled` has a zero row.

        Raises:
            ValueError: no loss reaches `pooled`: they are of another call, or pooling and heads were compiled into one
                graph, whose outputs do not depend on one another for autograd.
        """
        ends = [self.pooled] if self.top is None else [self.pooled, self.top.value]
        found = [torch.autograd.grad(x, ends, retain_graph=True, allow_unused=True) for x in losses]
        if all(gradient is None for gradients in found for gradient in gradients):
            raise ValueError(
                "losses: expected losses computed from `pooled` of this call, got none that reaches it (a model "
                "compiled as a whole hides the way)"
            )
        whole = [
            [torch.zeros_like(end) if d_end is None else d_end for d_end, end in zip(gradients, ends, strict=True)]
            for gradients in found
        ]
        d_pooled = [gradients[0] for gradients in whole]
        gram = representation_gram(
            d_pooled,
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
        if self.top is None or not len(self.z):
            return gram
        return gram + self._through_maxima(d_pooled, [gradients[1] for gradients in whole]).to(gram)

    @torch.no_grad()
    def _through_maxima(self, d_pooled: Sequence[Tensor], d_top: Sequence[Tensor]) -> Tensor:
        """What the gradients through the maxima, m_s, add to the Gram matrix of those through `pooled`, a_s:
        `sum_i a_s[i] . m_t[i] + m_s[i] . a_t[i] + m_s[i] . m_t[i]`, float64 [S, S].

        m_s is 0 but where an instance has the maximum of its bag, so that a_s is needed there only: B D numbers."""
        assert self.top is not None
        found = self.top.found
        wide = torch.promote_types(self.z.dtype, torch.float32)
        maxima = torch.where(found, torch.stack(list(d_top)), 0.0).double().flatten(1)  # [S,B*D]
        gradients = torch.stack(list(d_pooled), 1).to(wide)  # [B,S,T,D]
        parts = [slice(first, first + BAGS) for first in range(0, len(gradients), BAGS)]
        sums = torch.cat([self._at_maxima(gradients[bags], bags) for bags in parts]).double()  # [B,D,S]
        own = maxima @ maxima.T
        cross = sums.permute(2, 0, 1).flatten(1) @ maxima.T
        return own + cross + cross.T

    def _at_maxima(self, d_pooled: Tensor, bags: slice) -> Tensor:
        """a_s[i, d], the gradient through `pooled` (docs/model.md, section 4), at the instance i that has the maximum
        of dimension d of its bag, [b, D, S], for the gradients [b, S, T, D] of some bags.

        With the derivative k[i, h] of `value * gate` by z[i, d] it is `sum_t attention[i, t] (d_pooled[s, t, d] +
        (d_pooled[s, t] . (z[i] - pooled[t])) (score_weight[t] . k[i]))`."""
        assert self.top is not None
        instance, dtype = self.top.instance[bags], d_pooled.dtype
        z, attention, value, gate = (x[instance].to(dtype) for x in (self.z, self.attention, self.value, self.gate))
        along = (z @ d_pooled.flatten(1, 2).mT).unflatten(-1, d_pooled.shape[1:3])  # [b,D,S,T]
        offset = (d_pooled * self.pooled[bags, None].to(dtype)).sum(-1)  # [b,S,T]
        k = (1 - value * value) * self.value_weight.T.to(dtype)  # [b,D,H]
        k = gate * (k + value * (1 - gate) * self.gate_weight.T.to(dtype))
        scores = k @ self.score_weight.T.to(dtype)  # [b,D,T]
        through = (along - offset[:, None]) * scores[:, :, None] + d_pooled.permute(0, 3, 1, 2)
        found: Tensor = (through * attention[:, :, None]).sum(-1)
        return found
