"""Fusion of views, with what the penalties on views need (docs/model.md, section 1), in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from umda_fast.reference._numerics import accumulation_dtype, masked_softmax, without_autocast


@without_autocast
def view_fusion(
    y: Tensor, scores: Tensor, projected: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One vector per instance from its present views, and the moments and cosines of the views.

    Over the present views u of instance i, and the ``count[u]`` instances that have view u::

        beta[i,u]     = softmax_u( scores[i,u] ),   z[i] = sum_u beta[i,u] y[i,u]
        mean[u]       = sum_i y[i,u] / count[u],    variance[u] = sum_i (y[i,u] - mean[u])^2 / count[u]
        cosine_sum    = sum_i sum_{u<w} cos(projected[i,u], projected[i,w]),   pairs = its number of terms

    Args:
        y: [N, V, D].
        scores: [N, V].
        projected: [N, V, P], or None: cosine_sum is 0. Norms are clamped at 1e-8.
        mask: bool [N, V], True where the view is present; None when all are. Values at absent views are never
            used (they may be NaN); their gradients are 0.

    Returns:
        z [N, D] in y's dtype; beta [N, V], mean and variance [V, D] and the scalar cosine_sum in float32 (float64
        for float64); count [V] and the scalar pairs in int64. A view that no instance has has mean and variance
        0. All but the counts are differentiable, twice. No data-dependent shapes.
    """
    n, views, _ = y.shape
    dtype = accumulation_dtype(y)
    present = torch.ones(n, views, dtype=torch.bool, device=y.device) if mask is None else mask
    absent = ~present
    yf = y.to(dtype).masked_fill(absent[..., None], 0.0)
    beta, _, _ = masked_softmax(scores.to(dtype).masked_fill(absent, 0.0), present)
    z = (beta[..., None] * yf).sum(1).to(y.dtype)

    count = present.sum(0)
    total = count.clamp_min(1).to(dtype)[:, None]
    mean = yf.sum(0) / total
    # About the mean, and not E[x^2] - E[x]^2, which cancels where the mean is large.
    variance = (yf - mean).masked_fill(absent[..., None], 0.0).square().sum(0) / total

    views_of = present.sum(1)
    pairs = (views_of * (views_of - 1) // 2).sum()
    if projected is None:
        return z, beta, mean, variance, count, yf.new_zeros(()), pairs
    unit = normalize(projected.to(dtype).masked_fill(absent[..., None], 0.0), dim=-1, eps=1e-8)
    unit = unit.masked_fill(absent[..., None], 0.0)
    cosines = unit @ unit.mT  # [N,V,V]
    return z, beta, mean, variance, count, cosines.triu(1).sum(), pairs
