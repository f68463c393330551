"""Hybrid cross-view attention over token sequences (docs/model.md, section 1), in plain PyTorch."""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from umda_fast.reference._numerics import (
    accumulation_dtype,
    entropy_terms,
    gate_terms,
    gather,
    masked_softmax,
    recomputed,
    segment_index,
    with_zero_row,
    without_autocast,
)

#: Most scores (instances x heads x query tokens x key tokens) that one tile holds at a time.
TILE_ELEMENTS = 1 << 22


@without_autocast
def cross_view_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    cu_tokens: Tensor,
    cu_segments: Tensor,
    view_of_segment: Tensor,
    num_views: int,
    bias: Tensor | None = None,
    token_entropy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Blend attention over the tokens of a token's own view with attention over those of all other views.

    For head h and query token i of view u, over the tokens j of the same instance::

        intra = softmax over j of view u of      q[i].k[j] / sqrt(Dh)
        a     = softmax over j of views w != u of q[i].k[j] / sqrt(Dh) + bias[h,u,w]
        g     = sigmoid(gate_logits[i]),  1 where no token of another view has a bias above -inf
        out   = g sum_j intra[j] v[j] + (1 - g) sum_j a[j] v[j]
        p[w]  = g if w == u else (1 - g) sum_{j of w} a[j]
        mass  = mean_h p,  entropy = -sum_w p[w] log p[w],  token_entropy = -sum_j a[j] log a[j]

    Args:
        q, k, v: [L, H, Dh], the tokens of all segments, one after another.
        gate_logits: [L, H].
        cu_tokens: int64 [S+1]; segment s owns tokens ``cu_tokens[s]:cu_tokens[s+1]``.
        cu_segments: int64 [n+1]; instance i owns segments ``cu_segments[i]:cu_segments[i+1]``.
        view_of_segment: int32 [S], each in ``0..num_views-1``. Two segments of one view count as one.
        num_views: the number V of views.
        bias: [H, V, V], or None; its diagonal is ignored. For a query view, tokens of a view of -inf are no keys.
        token_entropy: also return the entropy of ``a`` over tokens.

    Returns:
        out [L, H, Dh] in q's dtype; mass [L, V]; entropy [L, H]; token_entropy [L, H] (shape [0] when not
        asked for); lse_intra and lse_cross [L, H], the logarithms of the two softmax denominators, -inf
        where there is no key. All but out in float32 (float64 for float64); all differentiable, twice.

    Instances are taken by growing length and padded together into tiles; an instance too long for a tile is
    taken by query rows. A tile's scores are computed again in backward, so memory is O(tile + tokens) in
    both directions, where a tile is at least one row of one instance. The tiles are planned on the host:
    this reads the offsets back (one synchronisation) and their number depends on the data, so
    ``torch.compile`` cannot trace through it.
    """
    tokens, heads = q.shape[:2]
    dtype = accumulation_dtype(q)
    device = q.device
    view_of_token = gather(view_of_segment.to(torch.int64)[:, None], segment_index(cu_tokens, tokens))[:, 0]
    # Index `tokens` is padding: zero vectors, and view `num_views`, which is nobody's.
    view = torch.cat([view_of_token, view_of_token.new_full((1,), num_views)])
    qz, kz, vz, gz = (with_zero_row(x.to(dtype)) for x in (q, k, v, gate_logits))
    pair_bias = None
    if bias is not None:
        pair_bias = bias.to(dtype).masked_fill(torch.eye(num_views, dtype=torch.bool, device=device), 0.0)

    def tile(query_index: Tensor, key_index: Tensor) -> list[Tensor]:
        return _tile(qz, kz, vz, gz, pair_bias, view, query_index, key_index, num_views, token_entropy)

    offsets = cu_tokens[cu_segments].tolist()
    lengths = [end - start for start, end in pairwise(offsets)]
    tiles = list(_tiles(lengths, heads))
    rows, parts = [], []
    for instances, first, count in tiles:
        start = torch.tensor([offsets[i] for i in instances], device=device)[:, None]
        length = torch.tensor([lengths[i] for i in instances], device=device)[:, None]
        key = torch.arange(max(lengths[i] for i in instances), device=device)[None]
        key_index = torch.where(key < length, start + key, tokens)  # [b,K]
        query_index = key_index[:, first : first + count]  # [b,Q]
        indices = query_index, key_index
        parts.append(tile(*indices) if len(tiles) == 1 else recomputed(tile, *indices))
        rows.append(query_index.reshape(-1))
    if not tiles:  # nothing to join: one tile without rows has the right shapes
        nothing = cu_tokens.new_zeros(0, 0)
        parts.append(tile(nothing, nothing))
        rows.append(nothing.reshape(-1))

    # Where each token's row went; padding rows all land on the last slot, which nobody reads.
    row = torch.cat(rows)
    place = row.new_zeros(tokens + 1).scatter(0, row, torch.arange(row.numel(), device=device))[:tokens]
    results = [gather(torch.cat(pieces), place) for pieces in zip(*parts, strict=True)]
    out, mass, entropy, lse_intra, lse_cross = results[:5]
    over_tokens = results[5] if token_entropy else entropy.new_zeros(0)
    return out.to(q.dtype), mass, entropy, over_tokens, lse_intra, lse_cross


def _tiles(lengths: list[int], heads: int) -> Iterator[tuple[list[int], int, int]]:
    """(instances, first query, queries) of every tile: short instances whole, or some rows of a long one."""
    batch: list[int] = []
    for instance in sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: lengths[i]):
        length = lengths[instance]
        if batch and (len(batch) + 1) * length * length * heads > TILE_ELEMENTS:
            yield batch, 0, lengths[batch[-1]]
            batch = []
        count = max(1, TILE_ELEMENTS // (length * heads))
        if count >= length:
            batch.append(instance)
        else:
            for first in range(0, length, count):
                yield [instance], first, min(count, length - first)
    if batch:
        yield batch, 0, lengths[batch[-1]]


def _tile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    bias: Tensor | None,
    view: Tensor,
    query_index: Tensor,
    key_index: Tensor,
    num_views: int,
    token_entropy: bool,
) -> list[Tensor]:
    """out, mass, entropy, lse_intra, lse_cross (and token_entropy) of queries [b, Q] as rows [b * Q, ...]."""
    qt, kt, vt = gather(q, query_index), gather(k, key_index), gather(v, key_index)  # [b,Q|K,H,Dh]
    gate = gather(gate_logits, query_index).transpose(1, 2)  # [b,H,Q]
    query_view, key_view = view[query_index], view[key_index]
    real = query_view[:, :, None].ne(num_views) & key_view[:, None, :].ne(num_views)
    own = real & (query_view[:, :, None] == key_view[:, None, :])  # [b,Q,K]
    other = real & ~own
    # [b,Q|K,V], zero rows for padding
    of_query, of_key = (one_hot(x, num_views + 1)[..., :-1].to(q.dtype) for x in (query_view, key_view))

    scores = torch.einsum("bqhd,bkhd->bhqk", qt, kt) / math.sqrt(q.shape[-1])
    intra, _, lse_intra = masked_softmax(scores, own[:, None])
    allowed = other[:, None]
    if bias is not None:
        # As a product, so that the gradient of the few entries of the bias is summed by a matrix product. It would
        # spread -inf to all keys.
        closed = bias == -math.inf
        scores = scores + torch.einsum("bqu,huw,bkw->bhqk", of_query, bias.masked_fill(closed, 0.0), of_key)
        closed = pad(closed, (0, 1, 0, 1))  # the padding's view
        allowed = allowed & ~closed[:, query_view[:, :, None], key_view[:, None, :]].transpose(0, 1)
    cross, log_cross, lse_cross = masked_softmax(scores, allowed)
    listens = lse_cross != -math.inf  # [b,H,Q]
    g, rest, gate_entropy = gate_terms(gate, listens)  # [b,H,Q]

    out = g[..., None] * torch.einsum("bhqk,bkhd->bhqd", intra, vt)
    out = out + rest[..., None] * torch.einsum("bhqk,bkhd->bhqd", cross, vt)
    a = torch.einsum("bhqk,bkw->bhqw", cross, of_key)  # the mass that each other view draws
    p = rest[..., None] * a + g[..., None] * of_query[:, None]
    entropy = gate_entropy + rest * entropy_terms(a, a.masked_fill(a == 0, 1.0).log()).sum(-1)
    results = [out, p.mean(1, keepdim=True), entropy, lse_intra, lse_cross]
    if token_entropy:
        results.append(entropy_terms(cross, log_cross).sum(-1))
    rows = [x.transpose(1, 2).flatten(0, 1) for x in results]  # [b,H,Q,...] -> [b*Q,H,...]
    rows[1] = rows[1].squeeze(1)
    return rows
