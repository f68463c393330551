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
        if self.top is None:
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
        maxima = torch.stack([torch.where(found, gradient, 0.0).double() for gradient in d_top])  # [S,B,D]
        own = maxima.flatten(1) @ maxima.flatten(1).T
        sums = torch.stack([self._at_maxima(p.to(wide)).double() for p in d_pooled]).flatten(1)  # [S,B*D]
        cross = sums @ maxima.flatten(1).T
        return own + cross + cross.T

    def _at_maxima(self, d_pooled: Tensor) -> Tensor:
        """a_s[i, d], the gradient through `pooled` [N, D] (docs/model.md, section 4), at the instance i that has the
        maximum of dimension d of its bag, [B, D]."""
        assert self.top is not None
        instance, tasks = self.top.instance, d_pooled.shape[1]
        bag = torch.searchsorted(self.ptr, torch.arange(len(self.z), device=self.ptr.device), right=True) - 1
        z, value, gate = (x.to(d_pooled.dtype) for x in (self.z, self.value, self.gate))
        # Task after task: [N, T, D] would be larger than all else.
        along = torch.stack([(d_pooled[bag, t] * z).sum(1) for t in range(tasks)], 1)  # [N,T]
        offset = (d_pooled * self.pooled).sum(-1)  # [B,T]
        c = (self.attention * (along - offset[bag])) @ self.score_weight.to(z.dtype)  # [N,H]
        hidden = torch.cat([c * gate * (1 - value * value), c * value * gate * (1 - gate)], 1)  # [N,2H]
        weight = torch.cat([self.value_weight, self.gate_weight]).to(z.dtype)  # [2H,D]
        through_scores = torch.cat([(hidden[part] * weight.T).sum(-1) for part in instance.split(BAGS)])  # [B,D]
        return through_scores + (self.attention[instance] * d_pooled.transpose(1, 2)).sum(-1)
