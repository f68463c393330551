"""Message passing over a neighbour graph (docs/model.md, section 2), in plain PyTorch.

A graph is a table (``neighbors`` int32 [N, k], -1 where absent, anywhere in a row; ``indptr`` None) or CSR
(``neighbors`` int32 [E], ``indptr`` int64 [N+1]). Values of edges have the shape of ``neighbors``; those at
absent edges are never used.

Every function reads the graph as a list of edges (row, column); absent edges point at a row of zeros behind
the last instance. A list too long for one tile is cut into pieces whose gathered vectors are computed again
in backward. All are differentiable, twice, and repeat bit by bit; no shape depends on the data.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from umda_fast.reference._numerics import (
    accumulation_dtype,
    gather,
    recomputed,
    scatter_sum,
    segment_index,
    with_zero_row,
)

#: Most gathered elements (edges x vector width) of one operand held at a time.
TILE_ELEMENTS = 1 << 25

#: Norms are clamped here, as in ``torch.nn.functional.cosine_similarity``.
NORM_EPSILON = 1e-8


def graph_transpose(neighbors: Tensor, indptr: Tensor | None, num_nodes: int) -> tuple[Tensor, Tensor]:
    """The edges by target: ``t_ptr`` int64 [num_nodes+1] and ``t_edge`` int64 [E], E the size of the table.

    ``t_edge[t_ptr[j]:t_ptr[j+1]]`` are the flat positions in ``neighbors`` of the edges that point at j,
    ascending; behind ``t_ptr[num_nodes]`` it holds -1, one for every absent edge, so that no shape depends on
    the data. ``indptr`` does not matter here; it is taken so that all functions read alike.
    """
    target = neighbors.reshape(-1).to(torch.int64)
    target, order = target.masked_fill(target < 0, num_nodes).sort(stable=True)
    t_ptr = torch.searchsorted(target, torch.arange(num_nodes + 1, device=neighbors.device))
    return t_ptr, order.masked_fill(target == num_nodes, -1)


def graph_order(neighbors: Tensor, indptr: Tensor | None, t_ptr: Tensor, t_edge: Tensor) -> Tensor:
    """All nodes, breadth first over the edges in both directions, from the first node not reached so far.

    After Cuthill and McKee (1969), without their sorting by degree: of a node's neighbours, those that it points at
    come first, in their order, then those that point at it. Walks the graph on the host.

    Args:
        neighbors, indptr: the graph.
        t_ptr, t_edge: its transpose.

    Returns:
        int64 [num_nodes], a permutation.
    """
    nodes = t_ptr.shape[0] - 1
    row, column, _ = _edges(neighbors, indptr, nodes)
    order: list[int] = []
    first = (torch.arange(nodes + 1) * neighbors.shape[1] if indptr is None else indptr).tolist()
    rows, columns, pointers, edges = row.tolist(), column.tolist(), t_ptr.tolist(), t_edge.tolist()
    reached = [False] * nodes + [True]  # the last one stands for absent
    for start in range(nodes):
        at = len(order)
        if not reached[start]:
            reached[start] = True
            order.append(start)
        while at < len(order):
            i = order[at]
            at += 1
            sources = (rows[e] for e in edges[pointers[i] : pointers[i + 1]])
            for j in (*columns[first[i] : first[i + 1]], *sources):
                if not reached[j]:
                    reached[j] = True
                    order.append(j)
    return torch.tensor(order, dtype=torch.int64, device=neighbors.device)


def edge_cosine(r: Tensor, neighbors: Tensor, indptr: Tensor | None = None) -> Tensor:
    """``cos(r_i, r_j)`` of every edge, norms clamped at 1e-8, 0 where absent.

    Args:
        r: [N, d].
        neighbors, indptr: the graph.

    Returns:
        neighbors' shape, float32 (float64 for float64).
    """
    rf = r.to(accumulation_dtype(r))
    unit = rf / torch.linalg.vector_norm(rf, dim=-1, keepdim=True).clamp_min(NORM_EPSILON)
    unit = with_zero_row(unit)
    row, column, _ = _edges(neighbors, indptr, r.shape[0])
    pieces = [_map(_dot, unit, unit, row[e], column[e], whole=whole) for e, whole in _pieces(row, r.shape[1])]
    return torch.cat(pieces).reshape(neighbors.shape)


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    neighbors: Tensor,
    indptr: Tensor | None = None,
    self_loop: bool = True,
) -> tuple[Tensor, Tensor]:
    """``sum_j alpha[i,j] v_j``, alpha the softmax over N(i) (and i) of ``q_i.k_j/sqrt(Dh) + log_weight``.

    Args:
        q, k, v: [N, H, Dh].
        log_weight: neighbors' shape, the same for all heads, or None for zeros; the self loop has 0.
        neighbors, indptr: the graph.
        self_loop: whether i attends to itself as well.

    Returns:
        out [N, H, Dh] in q's dtype and lse float32 (float64 for float64) [N, H], the logarithm of the softmax
        denominator. A row with nothing to attend to (or only weights of 0) has out 0, lse -inf, no gradient.
    """
    n, heads, width = q.shape
    qf, kf, vf = (with_zero_row(x.to(accumulation_dtype(x))) for x in (q, k, v))
    row, column, valid = _edges(neighbors, indptr, n)
    pieces = list(_pieces(row, heads * width))

    scores = torch.cat([_map(_dot, qf, kf, row[e], column[e], whole=whole) for e, whole in pieces])
    scores = scores / math.sqrt(width)  # [E,H]
    if log_weight is not None:
        scores = scores + log_weight.to(scores.dtype).reshape(-1).masked_fill(~valid, 0.0)[:, None]
    peak = scores.new_full((n + 1, heads), -math.inf)
    peak = peak.scatter_reduce(0, row[:, None].expand(-1, heads), scores.detach(), "amax")
    own = (qf * kf).sum(-1) / math.sqrt(width)  # [N+1,H]
    if self_loop:
        peak = torch.maximum(peak, own.detach())
    peak = peak.masked_fill(peak == -math.inf, 0.0)

    e_scores = (scores - gather(peak, row)).exp()
    total = scatter_sum(e_scores, row, n + 1)
    if self_loop:
        e_own = (own - peak).exp()
        total = total + e_own
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    alpha = e_scores / gather(total, row)

    out = sum(
        (_map(_messages, alpha[e], vf, row[e], column[e], n + 1, whole=whole) for e, whole in pieces),
        start=torch.zeros_like(vf),
    )
    if self_loop:
        out = out + (e_own / total)[..., None] * vf
    lse = (peak + total.log()).masked_fill(empty, -math.inf)
    return out[:n].to(q.dtype), lse[:n]


def neighbor_sum(x: Tensor, weight: Tensor, neighbors: Tensor, indptr: Tensor | None = None) -> Tensor:
    """``sum_j weight[i,j] x_j`` over the neighbours j of i: [N, D] in x's dtype.

    Args:
        x: [N, D].
        weight: neighbors' shape.
        neighbors, indptr: the graph.
    """
    n, width = x.shape
    xf, w, row, column = _weighted(x, weight, neighbors, indptr)
    out = sum(
        (_map(_messages, w[e], xf, row[e], column[e], n + 1, whole=whole) for e, whole in _pieces(row, width)),
        start=torch.zeros_like(xf),
    )
    return out[:n].to(x.dtype)


def smoothness_energy(
    z: Tensor, weight: Tensor, neighbors: Tensor, indptr: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``sum_E w[i,j] ||z_i - z_j||^2 / (D sum_E w)`` and ``sum_E w``: two scalars in float32 or float64.

    The energy is 0, without gradient, where the weights sum to 0.

    Args:
        z: [N, D].
        weight: neighbors' shape.
        neighbors, indptr: the graph.
    """
    width = z.shape[1]
    zf, w, row, column = _weighted(z, weight, neighbors, indptr)
    pieces = [
        _map(_squared_distance, zf, zf, row[e], column[e], whole=whole) for e, whole in _pieces(row, width)
    ]
    weight_sum = w.sum()
    nothing = weight_sum == 0
    energy = (w * torch.cat(pieces)).sum() / (width * weight_sum.masked_fill(nothing, 1.0))
    return energy.masked_fill(nothing, 0.0), weight_sum


def _edges(neighbors: Tensor, indptr: Tensor | None, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column (int64 [E], both n where absent) and presence (bool [E]) of every edge, in flat order."""
    column = neighbors.reshape(-1).to(torch.int64)
    if indptr is None:
        rows = torch.arange(n, device=neighbors.device)
        row = rows[:, None].expand(neighbors.shape).reshape(-1)
    else:
        row = segment_index(indptr, column.shape[0])
    valid = column >= 0
    return row.masked_fill(~valid, n), column.masked_fill(~valid, n), valid


def _weighted(
    x: Tensor, weight: Tensor, neighbors: Tensor, indptr: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N+1, D], its last row 0, weight [E], 0 where absent, row and column [E] of every edge, as sums take them."""
    wide = with_zero_row(x.to(accumulation_dtype(x)))
    row, column, valid = _edges(neighbors, indptr, x.shape[0])
    return wide, weight.to(wide.dtype).reshape(-1).masked_fill(~valid, 0.0), row, column


def _pieces(row: Tensor, width: int) -> Iterator[tuple[slice, bool]]:
    """Slices of the edges that keep ``edges x width`` under a tile, and whether there is only one."""
    edges = row.shape[0]
    step = max(1, TILE_ELEMENTS // max(1, width))
    for first in range(0, max(1, edges), step):
        yield slice(first, first + step), edges <= step


def _map(function: Callable[..., Tensor], *args: Any, whole: bool) -> Tensor:
    return function(*args) if whole else recomputed(function, *args)


def _dot(x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return (gather(x, row) * gather(y, column)).sum(-1)


def _squared_distance(x: Tensor, y: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return (gather(x, row) - gather(y, column)).square().sum(-1)


def _messages(weight: Tensor, x: Tensor, row: Tensor, column: Tensor, n: int) -> Tensor:
    return scatter_sum(weight[..., None] * gather(x, column), row, n)
