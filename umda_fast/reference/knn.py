"""Exact k-nearest-neighbour graph inside ragged bags, in plain PyTorch."""

import math
from itertools import pairwise

import torch
from torch import Tensor

#: Most similarities (queries x instances of the bag) held at a time; a tile is at least one query.
TILE_ELEMENTS = 1 << 21

#: Norms are clamped here, as in ``torch.nn.functional.cosine_similarity``: a zero vector has cosine 0.
NORM_EPSILON = 1e-8


@torch.no_grad()
def knn(x: Tensor, ptr: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    """The k most similar other instances of every instance's bag, best first, ties to the lower index.

    Args:
        x: [N, d]. Computed in float64 whatever its dtype.
        ptr: int64 [B+1]; bag b owns instances ``ptr[b]:ptr[b+1]``.
        k: neighbours per instance, at least 1.
        metric: ``"cosine"``, or ``"euclidean"`` (similarity = minus the squared distance).

    Returns:
        neighbors int32 [N, k], -1 where the bag has fewer than k + 1 instances; similarity [N, k], float32
        (float64 for float64 x), -inf there. Not differentiable: the choice of neighbours carries no gradient.

    Order is decided on the similarity as it is returned, so a tie is a tie in the output. Two equal rows
    always tie: for the cosine, equal rows share one column of the product (a matrix product may round equal
    columns differently), and the norms divide the product, not the rows, as products of float32 numbers are
    exact in float64; squared distances are summed from differences in one fixed order, which also keeps the
    digits that ``|x|^2 + |y|^2 - 2 x.y`` cancels. A NaN similarity is reported as such and ranks last.

    Memory is O(N (d + k)) plus one tile. The loop over bags and tiles reads ``ptr`` back to the host (one
    synchronisation), so ``torch.compile`` cannot trace through it.
    """
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric must be 'cosine' or 'euclidean', got {metric!r}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    neighbors = torch.full((x.shape[0], k), -1, dtype=torch.int32, device=x.device)
    similarity = torch.full((x.shape[0], k), -math.inf, dtype=dtype, device=x.device)
    points = x.double()

    offsets = ptr.tolist()
    for start, end in pairwise(offsets):
        degree = min(k, end - start - 1)
        if degree < 1:
            continue
        bag = points[start:end]
        if metric == "cosine":
            # By bits (0.0 for -0.0): a sort by value has no order for NaN.
            distinct, twin = torch.unique((bag + 0.0).view(torch.int64), dim=0, return_inverse=True)
            distinct = distinct.view(torch.float64)
            norms = torch.linalg.vector_norm(distinct, dim=-1).clamp_min(NORM_EPSILON)
        rows = max(1, TILE_ELEMENTS // (end - start))
        for first in range(start, end, rows):
            query = points[first : min(first + rows, end)]
            if metric == "cosine":
                own = norms[twin[first - start : first - start + rows], None]
                tile = (query @ distinct.T / (own * norms)).index_select(1, twin)
            else:
                tile = torch.cdist(query, bag, compute_mode="donot_use_mm_for_euclid_dist").square_().neg_()
            tile = tile.to(dtype)  # [queries, instances of the bag]
            chosen = _best(tile, first - start, degree)
            here = slice(first, first + query.shape[0])
            similarity[here, :degree] = tile.gather(1, chosen)
            neighbors[here, :degree] = (chosen + start).to(torch.int32)
    return neighbors, similarity


def _best(similarity: Tensor, first: int, degree: int) -> Tensor:
    """Columns of the ``degree`` largest entries of every row, best first, ties to the lower column; int64.

    Row r leaves out column ``first + r``, the query itself. ``topk`` does not say which of several equal
    entries it returns, but the value of its last entry is certain: everything nearer is taken, then, in
    order, as many of those that equal it as are missing. A stable sort keeps that order.
    """
    distance = similarity.neg().nan_to_num_(nan=math.inf, posinf=math.inf, neginf=-math.inf)
    # NaN is the largest of all to topk and equal to nothing below: with degree < columns it is never chosen.
    distance.diagonal(offset=first).fill_(math.nan)
    limit = distance.topk(degree, dim=1, largest=False, sorted=True).values[:, -1:]
    nearer = distance < limit
    level = distance == limit
    missing = degree - nearer.sum(1, keepdim=True)
    chosen = nearer | (level & (level.cumsum(1, dtype=torch.int32) <= missing))
    columns = chosen.nonzero()[:, 1].reshape(-1, degree)  # row by row, columns ascending
    order = distance.gather(1, columns).argsort(dim=1, stable=True)
    return columns.gather(1, order)
