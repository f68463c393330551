"""Bags too large for all activations at once: encoders and cross-view attention on some instances at a time."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

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
from umda_fast.model.view_heads import ViewHeads, ViewPool, join_pools
from umda_fast.ops import _validate

__all__ = ["CHUNK", "Chunkable", "CrossViews", "forward_chunked", "in_chunks"]

CHUNK = 8192
"""Instances at a time in `forward_chunked`."""


class CrossViews(NamedTuple):
    """What `UMDA.cross_views` returns for N instances of B bags."""

    y: Tensor  #: [N, V, D]
    mass: Tensor  #: [N, V, V]
    entropy: Tensor | None  #: [layers, N, V, H], of the mass; None without cross-view attention
    alone: ViewPool | None  #: of what the encoders gave; None without `view_heads`


Run: TypeAlias = Callable[[Mapping[str, Tensor], Tensor, Tensor | None], CrossViews]


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

    @property
    def view_heads(self) -> ViewHeads | None: ...

    def __call__(self, *args: Any, **inputs: Any) -> Any: ...

    def cross_views(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None = None) -> CrossViews: ...

    def pool(self, z: Tensor, ptr: Tensor, *args: Any, **kwargs: Any) -> UMDAOutput: ...

    def with_linear(self, out: UMDAOutput, scores: Tensor, ptr: Tensor) -> UMDAOutput: ...

    def with_view_heads(self, out: UMDAOutput, pool: ViewPool) -> UMDAOutput: ...


class _Piece(NamedTuple):
    """A run of instances: their features and mask, the bags of which they are (int64, ascending) and where these begin
    and end among them."""

    views: dict[str, Tensor]
    ptr: Tensor
    mask: Tensor | None
    bags: Tensor


def _pieces(views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None, chunk: int) -> Iterator[_Piece]:
    count = len(next(iter(views.values())))
    _validate.offsets(ptr, "ptr", count, "N", like=next(iter(views.values())))
    offsets = ptr.tolist()
    for start in range(0, count, chunk):
        stop = min(start + chunk, count)
        first, last = bisect_right(offsets, start) - 1, bisect_left(offsets, stop)
        own = [max(offset, start) - start for offset in offsets[first:last]]
        yield _Piece(
            {name: features[start:stop] for name, features in views.items()},
            ptr.new_tensor([*own, stop - start]),
            None if mask is None else mask[start:stop],
            torch.arange(first, last, device=ptr.device),
        )


def in_chunks(
    cross_views: Run, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None, chunk: int
) -> CrossViews:
    """`cross_views(views, ptr, mask)` on at most `chunk` instances at a time (0: on all at once).

    Where gradients are needed, a piece keeps its inputs only and runs again, with the same dropout, in the backward
    pass. Gradients are those of the whole within rounding (a sum over instances is taken in another order).

    Method: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
    """
    if not chunk or ptr.is_meta:  # on meta nothing takes memory, and bags have no bounds
        return cross_views(views, ptr, mask)  # len() below would fix the number of instances in an exported program
    count = len(next(iter(views.values()), ()))
    if count <= chunk or any(len(features) != count for features in views.values()):
        return cross_views(views, ptr, mask)  # wrong shapes are reported there
    parts: list[CrossViews] = []
    bags: list[Tensor] = []
    for piece in _pieces(views, ptr, mask, chunk):
        inputs = (piece.views, piece.ptr, piece.mask)
        again = torch.is_grad_enabled()
        parts.append(checkpoint(cross_views, *inputs, use_reentrant=False) if again else cross_views(*inputs))
        bags.append(piece.bags)
    entropies = [part.entropy for part in parts if part.entropy is not None]
    alone = [part.alone for part in parts if part.alone is not None]
    return CrossViews(
        torch.cat([part.y for part in parts]),
        torch.cat([part.mass for part in parts]),
        torch.cat(entropies, dim=1) if entropies else None,
        join_pools(alone, bags, ptr) if alone else None,
    )


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
    frames: Tensor | None = None,
    chunk: int = CHUNK,
) -> UMDAOutput:
    """`model(views, ptr, mask, coords, metadata=metadata, frames=frames)` for bags of any size, without gradients.

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
        out: UMDAOutput = model(whole, ptr, mask, coords, metadata=metadata, frames=frames)
        return out
    fused, masses, betas, linear = [], [], [], []
    pools: list[ViewPool] = []
    bags: list[Tensor] = []
    entropies, consistency, moments = _WeightedMean(), _WeightedMean(), _Moments()
    for piece in _pieces(views, ptr, mask, chunk):
        part, own = {name: wide(features) for name, features in piece.views.items()}, piece.mask
        x, mass, entropy, alone = model.cross_views(part, piece.ptr, own)
        if alone is not None:
            pools.append(alone)
            bags.append(piece.bags)
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
    result = model.pool(torch.cat(fused), ptr, coords, view_mass, torch.cat(betas), penalties, metadata, frames=frames)
    if linear:
        result = model.with_linear(result, torch.cat(linear), ptr)
    return model.with_view_heads(result, join_pools(pools, bags, ptr)) if pools else result
