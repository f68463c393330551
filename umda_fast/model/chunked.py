"""Bags too large for all activations at once: encoders and cross-view attention on some instances at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from umda_fast.model._numerics import wide
from umda_fast.model.config import UMDAConfig
from umda_fast.model.encoders import ViewEncoders
from umda_fast.model.fusion import ViewConsistency, ViewFusion
from umda_fast.model.hcva import concentration_penalty
from umda_fast.model.linear_path import LinearPath
from umda_fast.model.output import UMDAOutput
from umda_fast.ops import _validate

__all__ = ["CHUNK", "Chunkable", "forward_chunked", "in_chunks"]

CHUNK = 8192
"""Instances at a time in `forward_chunked`."""

# What `UMDA.cross_views` takes and returns.
CrossViews: TypeAlias = Callable[[Mapping[str, Tensor], Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


class Chunkable(Protocol):
    """What `forward_chunked` asks of a model: three methods, and the blocks that see each instance by itself (`UMDA`
    has them, and says what the methods do)."""

    training: bool
    config: UMDAConfig
    encoders: ViewEncoders
    fusion: ViewFusion
    consistency: ViewConsistency

    @property
    def linear(self) -> LinearPath | None: ...

    def __call__(self, *args: Any, **inputs: Any) -> Any: ...

    def cross_views(
        self, views: Mapping[str, Tensor], mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...

    def pool(self, z: Tensor, ptr: Tensor, *args: Any, **kwargs: Any) -> UMDAOutput: ...

    def with_linear(self, out: UMDAOutput, scores: Tensor, ptr: Tensor) -> UMDAOutput: ...


def _pieces(
    views: Mapping[str, Tensor], mask: Tensor | None, chunk: int
) -> Iterator[tuple[dict[str, Tensor], Tensor | None]]:
    for start in range(0, len(next(iter(views.values()))), chunk):
        rows = slice(start, start + chunk)
        yield {name: features[rows] for name, features in views.items()}, None if mask is None else mask[rows]


def in_chunks(
    cross_views: CrossViews, views: Mapping[str, Tensor], mask: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`cross_views(views, mask)` on at most `chunk` instances at a time (0: on all at once).

    Where gradients are needed, a piece keeps its inputs only and runs again, with the same dropout, in the backward
    pass. Gradients are those of the whole within rounding (a sum over instances is taken in another order).

    Method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    if not chunk:
        return cross_views(views, mask)  # len() below would fix the number of instances in an exported program
    count = len(next(iter(views.values()), ()))
    if count <= chunk or any(len(features) != count for features in views.values()):
        return cross_views(views, mask)  # wrong shapes are reported there
    parts = [
        checkpoint(cross_views, part, own, use_reentrant=False) if torch.is_grad_enabled() else cross_views(part, own)
        for part, own in _pieces(views, mask, chunk)
    ]
    x, mass, entropy = zip(*parts, strict=True)
    return torch.cat(x), torch.cat(mass), None if entropy[0] is None else torch.cat(entropy, dim=1)


class _Moments:
    """Mean and sum of squares around it of every view and feature, merged piece by piece (Chan, Golub and LeVeque,
    1979), in float64."""

    def __init__(self) -> None:
        self.count = self.mean = self.square = torch.zeros(())

    def add(self, y: Tensor, mask: Tensor | None) -> None:
        y = y.double()
        present = y.new_ones(y.shape[:2]) if mask is None else mask.to(y.dtype)
        new = present.sum(0)[:, None]  # [V,1]
        own = (y * present[..., None]).sum(0) / new.clamp_min(1.0)  # [V,D]
        square = ((y - own).square() * present[..., None]).sum(0)
        if self.count.dim() == 0:
            self.count, self.mean, self.square = new, own, square
            return
        total = self.count + new
        apart = own - self.mean
        self.mean = self.mean + apart * (new / total.clamp_min(1.0))
        self.square = self.square + square + apart.square() * (self.count * new / total.clamp_min(1.0))
        self.count = total

    def dispersion(self, delta: float) -> Tensor:
        """`dispersion_penalty` of what was added."""
        views, width = self.mean.shape
        count = self.count[:, 0]
        spread = torch.relu(1.0 - (self.square / self.count.clamp_min(1.0) + 1e-4).sqrt()).mean(1)
        several = count > 1
        penalty = (spread * several).sum() / several.sum().clamp_min(1)
        first, second = torch.triu_indices(views, views, offset=1, device=count.device)
        apart = torch.linalg.vector_norm(self.mean[first] - self.mean[second], dim=-1) / width**0.5
        both = (count[first] > 0) & (count[second] > 0)
        return penalty + (torch.relu(delta - apart) * both).sum() / both.sum().clamp_min(1)


class _WeightedMean:
    """Mean of piecewise means, in float64."""

    def __init__(self) -> None:
        self.total = self.weight = torch.zeros((), dtype=torch.float64)

    def add(self, value: Tensor, weight: Tensor) -> None:
        weight = weight.double()
        self.total = self.total.to(weight.device) + value.double() * weight
        self.weight = self.weight.to(weight.device) + weight

    def value(self) -> Tensor:
        return self.total / self.weight.clamp_min(1.0)


@torch.no_grad()
def forward_chunked(
    model: Chunkable,
    views: Mapping[str, Tensor],
    ptr: Tensor,
    mask: Tensor | None = None,
    coords: Tensor | None = None,
    *,
    metadata: Tensor | None = None,
    chunk: int = CHUNK,
) -> UMDAOutput:
    """`model(views, ptr, mask, coords, metadata=metadata)` for bags of any size, without gradients.

    Encoders, cross-view attention and fusion see `chunk` instances at a time; of what is [N, V, D] nothing is kept.
    The graph is exact and over whole bags. Beyond the features, memory is a few arrays [N, D]. Equal to the model's
    own forward within rounding.

    Args:
        model: in evaluation mode. views: in any floating dtype; each chunk is cast to float32 (float64 stays).
        chunk: instances at a time. Others: as of `UMDA.forward`.

    Raises:
        ValueError: the model is in training mode, `chunk` < 1. TypeError, ValueError: as of `UMDA.forward`.
    """
    if model.training:
        raise ValueError("model: expected evaluation mode, got training mode")
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1, got {chunk}")
    if mask is not None:
        _validate.views_present(mask, "mask")
    count = len(next(iter(views.values()), ()))
    if count <= chunk:
        whole = {name: wide(features) for name, features in views.items()}
        out: UMDAOutput = model(whole, ptr, mask, coords, metadata=metadata)
        return out
    fused, masses, betas, linear = [], [], [], []
    entropies, consistency, moments = _WeightedMean(), _WeightedMean(), _Moments()
    for part, own in _pieces(views, mask, chunk):
        part = {name: wide(features) for name, features in part.items()}
        x, mass, entropy = model.cross_views(part, own)
        if model.linear is not None:
            linear.append(model.linear.scores(model.encoders, part, own))
        z, beta = model.fusion(x, own)
        present = x.new_full((len(x),), x.shape[1]) if own is None else own.sum(1)
        consistency.add(model.consistency(x, own), (present * (present - 1)).sum())
        if entropy is not None:
            entropies.add(concentration_penalty(entropy, own), present[present > 1].sum())
        moments.add(x, own)
        fused.append(z)
        masses.append(mass)
        betas.append(beta)
    view_mass = torch.cat(masses)
    penalties = {
        "entropy": entropies.value().to(view_mass),
        "consistency": consistency.value().to(view_mass),
        "dispersion": moments.dispersion(model.config.delta).to(view_mass),
    }
    result = model.pool(torch.cat(fused), ptr, coords, view_mass, torch.cat(betas), penalties, metadata)
    return model.with_linear(result, torch.cat(linear), ptr) if linear else result
