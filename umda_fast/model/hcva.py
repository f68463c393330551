"""Hybrid cross-view attention and the penalty on its view mass (docs/model.md, section 1)."""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model.residual import add_feed_forward, add_linear, feed_forward, normalized, residual_gain
from umda_fast.ops import cross_view_attention

__all__ = ["HCVA", "HCVABlock", "HCVAOutput", "concentration_penalty"]


class HCVABlock(nn.Module):
    """One pre-norm residual block: `y = x + g_1 * W_o o(LN(x))`, then `y + g_2 * FFN(LN(y))`.

    The gate of view u and head h is `sigmoid(w_g[h] . LN(x)[i,u] + c[h])`. Queries, keys and values have no
    biases: that of the keys would cancel in the softmax.

    Args:
        width: D. heads: H, divides D; D / H in 8..256. views: V, at most 16.
        ffn: hidden width of the feed-forward part, in multiples of D.
        dropout: after attention and feed-forward part.
        layer_scale: at which the gains g_1 and g_2 [D] begin; None has none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        views: int,
        ffn: int = 2,
        dropout: float = 0.1,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.gate = nn.Linear(width, heads)
        self.influence_bias = nn.Parameter(torch.zeros(heads, views, views))
        self.output = nn.Linear(width, width)
        self.ffn_norm = nn.LayerNorm(width)
        self.ffn = feed_forward(width, ffn, dropout)
        self.dropout = nn.Dropout(dropout)
        self.attention_gain = residual_gain(width, layer_scale)
        self.ffn_gain = residual_gain(width, layer_scale)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x [N, V, D], rows of missing views 0; mask bool [N, V] or None.

        Returns y [N, V, D], view mass [N, V, V] and its entropy [N, V, H]; rows of missing views are 0.
        """
        y, _, mass, entropy = self.step(x, normalized(x, self.attention_norm), mask)
        return y, mass, entropy

    def step(
        self, x: Tensor, read: Tensor, mask: Tensor | None, norm_after: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """As `forward`, of x and `read = attention_norm(x)`; second, `norm_after(y)` where views are present, which the
        next block reads, or None without it."""
        n, views, width = x.shape
        qkv = F.linear(read, self.qkv.weight)
        q, k, v = qkv.view(n, views, 3, self.heads, width // self.heads).unbind(2)
        gate_logits = self.gate(read)
        out, mass, entropy = cross_view_attention(q, k, v, gate_logits, bias=self.influence_bias, mask=mask)
        out = out.reshape(n, views, width)
        x, read_next = add_linear(x, out, self.output, self.attention_gain, self.dropout, self.ffn_norm)
        assert read_next is not None
        x, read_after = add_feed_forward(x, read_next, self.ffn, self.ffn_gain, self.dropout, norm_after)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0.0)
        return x, read_after, mass, entropy


class HCVAOutput(NamedTuple):
    """What `HCVA` returns; rows of missing views are 0."""

    y: Tensor  #: [N, V, D]
    mass: Tensor  #: [N, V, V], how much view u listens to view w, mean over heads, in the last block
    entropy: Tensor  #: [layers, N, V, H], of the mass of every block and head, in nats


class HCVA(nn.Module):
    """`layers` blocks of hybrid cross-view attention, [N, V, D] -> [N, V, D]. Arguments as `HCVABlock` has them."""

    def __init__(
        self,
        width: int,
        heads: int,
        views: int,
        layers: int = 2,
        ffn: int = 2,
        dropout: float = 0.1,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: expected at least 1, got {layers}")
        self.blocks = nn.ModuleList(HCVABlock(width, heads, views, ffn, dropout, layer_scale) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> HCVAOutput:
        """x [N, V, D]; mask bool [N, V] with at least one view per instance, or None when all are present."""
        mass = x
        entropies = []
        blocks = cast("list[HCVABlock]", list(self.blocks))
        read: Tensor | None = normalized(x, blocks[0].attention_norm)
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            assert read is not None
            x, read, mass, entropy = block.step(x, read, mask, None if after is None else after.attention_norm)
            entropies.append(entropy)
        return HCVAOutput(x, mass, torch.stack(entropies))


def concentration_penalty(entropy: Tensor, mask: Tensor | None = None) -> Tensor:
    """No view dominates: mean over blocks, i, h, u with V_i > 1 of `1 - E[i,h,u] / log V_i`.

    Args:
        entropy: [..., N, V, H], of the view mass.
        mask: bool [N, V], or None when all views are present.

    Returns:
        A scalar, 0 where no instance has two views.
    """
    *blocks, n, views, heads = entropy.shape
    if mask is None:
        if n == 0 or views == 1:
            return entropy.sum() * 0.0
        return 1.0 - entropy.mean() / math.log(views)
    present = mask.to(entropy.dtype)
    count = present.sum(1, keepdim=True)
    weight = present * (count > 1)  # [N,V]
    scale = weight / count.clamp_min(2.0).log()
    total = weight.sum() * (blocks[0] if blocks else 1) * heads
    return (total - (entropy * scale[..., None]).sum()) / total.clamp_min(1.0)
