"""Fusion of views to one vector per instance, and the penalties on the views (docs/model.md, section 1)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model._numerics import wide
from umda_fast.ops import fuse_views

__all__ = ["FusedViews", "ViewConsistency", "ViewFusion", "dispersion_penalty", "fuse_and_penalize"]


class ViewFusion(nn.Module):
    """`beta[i,u] = softmax over present u of w_f . tanh(W_f y[i,u])`, `z[i] = sum_u beta[i,u] y[i,u]`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y [N, V, D]; mask bool [N, V] or None. Returns z [N, D] and beta [N, V], 0 at missing views."""
        scores = self.scores(y)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        beta = scores.softmax(-1)
        return (beta[..., None] * y).sum(1).to(y.dtype), beta

    def scores(self, y: Tensor) -> Tensor:
        """y [N, V, D]. Returns `w_f . tanh(W_f y)` [N, V], whose softmax is beta."""
        return wide(self.score(torch.tanh(self.hidden(y))).squeeze(-1))


class ViewConsistency(nn.Module):
    """Consistency penalty: mean over i, u < w present of `1 - cos(P y[i,u], P y[i,w])`, P: D -> D/2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(width, max(1, width // 2), bias=False)

    def forward(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """y [N, V, D]; mask bool [N, V] or None. Returns a scalar, 0 where no instance has two views."""
        unit = F.normalize(wide(self.projection(y)), dim=-1, eps=1e-8)
        if mask is None:
            count = unit.new_full(unit.shape[:1], unit.shape[1])
        else:
            unit = unit.masked_fill(~mask[..., None], 0.0)
            count = mask.sum(1).to(unit.dtype)
        # sum_{u<w} e_u.e_w = (|sum_u e_u|^2 - sum_u |e_u|^2) / 2: nothing of size V^2.
        cosines = (unit.sum(1).square().sum() - unit.square().sum()) / 2
        return _mean_disagreement(cosines, (count * (count - 1)).sum() / 2)


def _mean_disagreement(cosine_sum: Tensor, pairs: Tensor) -> Tensor:
    """Mean of 1 - cosine over so many pairs, 0 where there is none."""
    return (pairs - cosine_sum) / pairs.clamp_min(1.0)


def dispersion_penalty(y: Tensor, mask: Tensor | None = None, delta: float = 1.0) -> Tensor:
    """Views do not collapse: `mean_{u,d} relu(1 - sqrt(Var_i y[i,u,d] + 1e-4))
    + mean_{u<w} relu(delta - ||mu_u - mu_w|| / sqrt(D))`.

    Mean and (population) variance are over the instances that have view u. The first term is over views that at
    least two instances have, the second over pairs of views that at least one instance each has.

    Args:
        y: [N, V, D].
        mask: bool [N, V], or None when all views are present.
        delta: margin between the means.

    Returns:
        A scalar; a term without anything to take a mean of is 0.
    """
    y = wide(y)
    n, views, _ = y.shape
    present = y.new_ones(n, views) if mask is None else mask.to(y.dtype)
    count = present.sum(0)  # [V]
    share = (present / count.clamp_min(1.0))[..., None]  # [N,V,1]
    mean = (y * share).sum(0)  # [V,D]
    return _dispersion(mean, ((y - mean).square() * share).sum(0), count, delta)


def _dispersion(mean: Tensor, variance: Tensor, count: Tensor, delta: float) -> Tensor:
    """The dispersion penalty from mean and variance [V, D] over the `count` [V] instances that have a view."""
    views, width = mean.shape
    spread = torch.relu(1.0 - (variance + 1e-4).sqrt()).mean(1)
    several = (count > 1).to(mean.dtype)
    penalty = (spread * several).sum() / several.sum().clamp_min(1.0)
    if views == 1:
        return penalty
    first, second = torch.triu_indices(views, views, offset=1, device=mean.device)
    apart = torch.linalg.vector_norm(mean[first] - mean[second], dim=-1) / width**0.5
    both = ((count[first] > 0) & (count[second] > 0)).to(mean.dtype)
    return penalty + (torch.relu(delta - apart) * both).sum() / both.sum().clamp_min(1.0)


class FusedViews(NamedTuple):
    """What `fuse_and_penalize` returns."""

    z: Tensor  #: [N, D]
    beta: Tensor  #: [N, V], 0 at missing views
    consistency: Tensor  #: scalar
    dispersion: Tensor  #: scalar


def fuse_and_penalize(
    fusion: ViewFusion, consistency: ViewConsistency, y: Tensor, mask: Tensor | None = None, delta: float = 1.0
) -> FusedViews:
    """`fusion(y, mask)`, `consistency(y, mask)` and `dispersion_penalty(y, mask, delta)` in one sweep over y.

    The matrix products with y (scores, projections) come before the sweep, which is `umda_fast.ops.fuse_views`.

    Args:
        y: [N, V, D]; its rows of missing views finite, for the matrix products.
        mask: bool [N, V] with at least one view per instance, or None when all are present.
        delta: margin between the means.

    Raises:
        TypeError, ValueError: as `umda_fast.ops.fuse_views`.
    """
    out = fuse_views(y, fusion.scores(y), consistency.projection(y), mask=mask)
    return FusedViews(
        out.z,
        out.beta,
        _mean_disagreement(out.cosine_sum, out.pairs.to(out.cosine_sum.dtype)),
        _dispersion(out.mean, out.variance, out.instances, delta),
    )
