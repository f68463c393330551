"""Residual blocks: gains on what is added, and the feed-forward part (docs/model.md, section 1).

Source of the gains: Touvron et al., "Going deeper with Image Transformers" (LayerScale), ICCV 2021, here from 0 on.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from umda_fast.ops import gelu_dropout, linear_residual, norm_linear

__all__ = ["add_feed_forward", "feed_forward", "gained", "rate", "residual_gain"]


def residual_gain(width: int, start: float | None) -> nn.Parameter | None:
    """g [D], all `start`; None where it is None: what is added is then not scaled."""
    return None if start is None else nn.Parameter(torch.full((width,), start))


def gained(layer: nn.Linear, gain: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of `x -> gain * layer(x)`: scaled themselves, which costs nothing for every row of x."""
    if gain is None:
        return layer.weight, layer.bias
    return gain[:, None] * layer.weight, gain * layer.bias


def rate(dropout: nn.Dropout) -> float:
    """The probability with which it drops an element now: 0 in evaluation."""
    return dropout.p if dropout.training else 0.0


def feed_forward(width: int, ffn: int, dropout: float) -> nn.Sequential:
    """Linear, GELU, Dropout, Linear over `ffn` times the width."""
    return nn.Sequential(nn.Linear(width, ffn * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(ffn * width, width))


def add_feed_forward(
    x: Tensor, norm: nn.LayerNorm, layers: nn.Sequential, gain: Tensor | None, dropout: float
) -> Tensor:
    """`x + g * dropout(FFN(norm(x)))`, [..., D]; layers as `feed_forward` makes them, dropout 0 in evaluation."""
    first, _, inner, last = cast("tuple[nn.Linear, nn.GELU, nn.Dropout, nn.Linear]", tuple(layers))
    hidden, _ = norm_linear(x, norm.weight, norm.bias, first.weight, eps=norm.eps)
    return linear_residual(gelu_dropout(hidden, first.bias, p=rate(inner)), *gained(last, gain), x, dropout=dropout)
