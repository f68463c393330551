"""Residual blocks: gains on what is added, and the feed-forward part (docs/model.md, section 1).

Source of the gains: Touvron et al., "Going deeper with Image Transformers" (LayerScale), ICCV 2021, here from 0 on.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.ops import dropout_add_norm, gelu_dropout

__all__ = ["add_feed_forward", "add_linear", "feed_forward", "normalized", "rate", "residual_gain"]


def residual_gain(width: int, start: float | None) -> nn.Parameter | None:
    """g [D], all `start`; None where it is None: what is added is then not scaled."""
    return None if start is None else nn.Parameter(torch.full((width,), start))


def rate(dropout: nn.Dropout) -> float:
    """The probability with which it drops an element now: 0 in evaluation."""
    return dropout.p if dropout.training else 0.0


def feed_forward(width: int, ffn: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, Dropout, Linear over `ffn` times the width."""
    return nn.Sequential(nn.Linear(width, ffn * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn * width, width))


def normalized(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """LN(x), in the dtype in which linear layers read it: under autocast cast once, and not by each of them."""
    y: Tensor = norm(x)
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return y
    return y.to(torch.get_autocast_dtype(device))


def add_linear(
    x: Tensor,
    read: Tensor,
    layer: nn.Linear,
    gain: Tensor | None,
    dropout: nn.Dropout,
    norm_after: nn.LayerNorm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`s = x + g * dropout(layer(read))` [..., D], and `norm_after(s)`, which the next layer reads, if it is given."""
    product = F.linear(read, layer.weight)
    if norm_after is None:
        return dropout_add_norm(product, x, layer.bias, gain, p=rate(dropout))
    norm, eps = (norm_after.weight, norm_after.bias), norm_after.eps
    return dropout_add_norm(product, x, layer.bias, gain, *norm, p=rate(dropout), eps=eps)


def add_feed_forward(
    x: Tensor,
    read: Tensor,
    layers: nn.Sequential,
    gain: Tensor | None,
    dropout: nn.Dropout,
    norm_after: nn.LayerNorm | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`s = x + g * dropout(FFN(read))` [..., D], and `norm_after(s)`; layers as `feed_forward` makes them."""
    first, _, inner, last = cast("tuple[nn.Linear, nn.GELU, nn.Dropout, nn.Linear]", tuple(layers))
    hidden = gelu_dropout(F.linear(read, first.weight), first.bias, p=rate(inner))
    return add_linear(x, hidden, last, gain, dropout, norm_after)
