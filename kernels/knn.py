"""Exact k-nearest-neighbour graph inside ragged bags; no n x n block ever reaches device memory.

Traffic and work for bags of n_b instances with d features of e bytes:

- multiply-adds: sum_b n_b^2 d for the cosine, at the matrix rate of the type (float32 is not rounded to
  TF32, so at the rate of ordinary arithmetic); sum_b n_b^2 d subtractions and as many multiply-adds for the
  squared distance;
- bytes that must move: N d e in, 8 N k out, 4 N norms out and in. A program of BM queries reads its bag
  once, so sum_b n_b^2 d e / BM bytes come from cache.

The floor is the larger of the two times; from a few hundred instances per bag on that is the arithmetic.

A program owns BM queries of one bag and sweeps the bag in tiles of BN. It keeps the best KP >= k pairs
(similarity, index) of every query as one int64 each, ordered by similarity and then by lower index, in no
particular order until the end. From a tile it takes, while any query has one, the best entry above the
query's worst kept pair: after the first tiles most have none, and such a tile costs one comparison beyond
its product. Equal rows give equal bits wherever they stand: each entry of a tile is one sum in one order.
Distances are summed from differences: |x|^2 + |y|^2 - 2 x.y would lose the digits of near neighbours far
from the origin, such as pixel coordinates.

The tiles of ragged bags are scheduled on the device (``tile_offsets`` and a binary search); the grid is
bounded by N and the number of bags, so nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._launch import (
    FLOAT_DTYPES,
    Launch,
    ceil_div,
    check_device,
    innermost_contiguous,
    next_power_of_2,
    run_all,
)
from ._primitives import dot, owner, tile_offsets
from ._tuning import Config, configured

__all__ = ["candidates", "key", "knn", "plan"]

# The 32 bits of a float, with the lower ones of a negative float flipped, order as the floats do. Below
# -inf, NaN, and below that what is no neighbour.
NAN_ORDER = tl.constexpr(-2139095042)
ABSENT_ORDER = tl.constexpr(-2147483648)
EMPTY = tl.constexpr(-(1 << 63))
LAST_INDEX = tl.constexpr(0x7FFFFFFF)

MAX_NEIGHBORS = 64


@triton.jit
def _ordered(b_s):
    """int32 that order as the float32 b_s do, NaN below every number."""
    b_s = tl.where(b_s == 0.0, 0.0, b_s)  # -0 and 0 are equal
    b_i = b_s.to(tl.int32, bitcast=True)
    b_i = b_i ^ ((b_i >> 31) & 0x7FFFFFFF)
    return tl.where(b_s == b_s, b_i, NAN_ORDER)


@triton.jit(do_not_specialize=["n"])
def knn_inverse_norm(p_x, p_inverse, n, s_x, D: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """1 / max(|x|, 1e-8), the clamp of ``torch.nn.functional.cosine_similarity``."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    o_d = tl.arange(0, BD)
    b_sum = tl.zeros([BM], tl.float32)
    for i_d in range(0, D, BD):
        m_x = (o_m < n)[:, None] & (i_d + o_d < D)[None, :]
        b_x = tl.load(p_x + o_m[:, None] * s_x + (i_d + o_d)[None, :], mask=m_x, other=0.0).to(tl.float32)
        b_sum += tl.sum(b_x * b_x, 1)
    tl.store(p_inverse + o_m, 1.0 / tl.maximum(tl.sqrt_rn(b_sum), 1e-8), mask=o_m < n)


@triton.jit(do_not_specialize=["bags", "k"])
def knn_search(
    p_x, p_inverse, p_ptr, p_tiles, p_neighbors, p_similarity,
    bags, k, s_x,
    D: tl.constexpr, KP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, COSINE:
    tl.constexpr,
):  # fmt: skip
    """The k best of BM queries of one bag."""
    i_t = tl.program_id(0).to(tl.int64)
    if i_t >= tl.load(p_tiles + bags):
        return
    i_s = owner(p_tiles, bags, i_t)
    i_first = tl.load(p_ptr + i_s)
    i_end = tl.load(p_ptr + i_s + 1)
    o_m = i_first + (i_t - tl.load(p_tiles + i_s)) * BM + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    o_k = tl.arange(0, KP)
    m_m = o_m < i_end
    p_q = p_x + o_m * s_x
    if COSINE:
        b_iq = tl.load(p_inverse + o_m, mask=m_m, other=0.0)
        if D <= BD:
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_m[:, None] & (o_d < D)[None, :], other=0.0)
    # Pairs nobody has yet, all different so that one is replaced at a time.
    b_best = tl.zeros([BM, KP], tl.int64) + EMPTY + o_k[None, :]
    b_worst = tl.min(b_best, 1)  # [BM]
    for i_n in range(i_first, i_end, BN):
        o_j = i_n + o_n
        m_j = o_j < i_end
        p_j = p_x + o_j * s_x
        b_s = tl.zeros([BM, BN], tl.float32)
        if COSINE:
            if D <= BD:
                b_j = tl.load(p_j[:, None] + o_d[None, :], mask=m_j[:, None] & (o_d < D)[None, :], other=0.0)
                b_s = dot(b_q, tl.trans(b_j), b_s)
            else:
                for i_d in range(0, D, BD):
                    m_d = (i_d + o_d < D)[None, :]
                    b_q = tl.load(p_q[:, None] + (i_d + o_d)[None, :], mask=m_m[:, None] & m_d, other=0.0)
                    b_j = tl.load(p_j[:, None] + (i_d + o_d)[None, :], mask=m_j[:, None] & m_d, other=0.0)
                    b_s = dot(b_q, tl.trans(b_j), b_s)
            b_s = b_s * b_iq[:, None] * tl.load(p_inverse + o_j, mask=m_j, other=0.0)[None, :]
        else:
            for i_d in range(D):
                b_q = tl.load(p_q + i_d, mask=m_m, other=0.0).to(tl.float32)
                b_j = tl.load(p_j + i_d, mask=m_j, other=0.0).to(tl.float32)
                b_x = b_q[:, None] - b_j[None, :]
                b_s -= b_x * b_x
        m_s = m_m[:, None] & m_j[None, :] & (o_m[:, None] != o_j[None, :])
        b_o = tl.where(m_s, _ordered(b_s), ABSENT_ORDER)  # [BM, BN]
        b_top, i_top = tl.max(b_o, 1, return_indices=True)
        m_top = b_top > (b_worst >> 32).to(tl.int32)
        while tl.max(m_top.to(tl.int32), 0) > 0:
            b_pair = (b_top.to(tl.int64) << 32) + (LAST_INDEX - (i_n + i_top))
            b_best = tl.where(m_top[:, None] & (b_best == b_worst[:, None]), b_pair[:, None], b_best)
            b_o = tl.where(m_top[:, None] & (o_n[None, :] == i_top[:, None]), ABSENT_ORDER, b_o)
            b_worst = tl.min(b_best, 1)
            b_top, i_top = tl.max(b_o, 1, return_indices=True)
            m_top = b_top > (b_worst >> 32).to(tl.int32)
    # k times the best of what is left: a sort of KP takes longer to compile and no less to run.
    for i_k in range(k):
        b_top = tl.max(b_best, 1)
        b_best = tl.where(b_best == b_top[:, None], EMPTY, b_best)
        b_i = (b_top >> 32).to(tl.int32)
        b_v = (b_i ^ ((b_i >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        b_v = tl.where(b_i == NAN_ORDER, float("nan"), b_v)
        b_j = LAST_INDEX - (b_top & 0xFFFFFFFF).to(tl.int32)
        tl.store(p_neighbors + o_m * k + i_k, tl.where(b_i == ABSENT_ORDER, -1, b_j), mask=m_m)
        tl.store(p_similarity + o_m * k + i_k, tl.where(b_i == ABSENT_ORDER, float("-inf"), b_v), mask=m_m)


def _tile(dtype: torch.dtype, width: int, queries: int, others: int) -> dict[str, int]:
    # A float32 product holds its operands in registers, BD of each row at a time; longer rows spill.
    features = 16 if dtype == torch.float32 else min(64, max(16, next_power_of_2(width)))
    return {"BM": queries, "BN": others, "BD": features}


def key(dtype: torch.dtype, width: int, k: int, metric: str) -> str:
    """What a configuration is pinned or measured for; never a number of instances."""
    return f"knn {metric} {dtype} d={width} kept={next_power_of_2(k)}"


def candidates(dtype: torch.dtype, width: int) -> list[Config]:
    """The configurations that ``umda_fast.kernels.tune`` measures."""
    return [
        Config(_tile(dtype, width, queries, others), num_warps)
        for queries in (16, 32, 64, 128)
        for others in (32, 64, 128)
        for num_warps in (4, 8)
    ]


def plan(
    x: torch.Tensor, ptr: torch.Tensor, k: int, metric: str
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of ``knn``, not yet written, and the launches that write them."""
    x, ptr = innermost_contiguous(x), ptr.contiguous()
    n, width = x.shape
    bags = ptr.shape[0] - 1
    neighbors = torch.empty((n, k), dtype=torch.int32, device=x.device)
    similarity = torch.empty((n, k), dtype=torch.float32, device=x.device)
    if n == 0:
        return [], (neighbors, similarity)
    cosine = metric == "cosine"
    kept = next_power_of_2(k)
    pinned = Config(_tile(x.dtype, width, 64, 64), 8)
    config = configured(x.device, key(x.dtype, width, k, metric), pinned)
    tile = config.tile
    launches: list[Launch] = []
    inverse: torch.Tensor | None = None
    if cosine:
        inverse = torch.empty((n,), dtype=torch.float32, device=x.device)
        launches.append(
            Launch(
                kernel=knn_inverse_norm,
                grid=(ceil_div(n, 32),),
                args=(x, inverse, n, x.stride(0)),
                constexprs={"D": width, "BM": 32, "BD": min(128, next_power_of_2(width))},
            )
        )
    constexprs: dict[str, Any] = {"D": width, "KP": kept, **tile, "COSINE": cosine}
    launches.append(
        Launch(
            kernel=knn_search,
            grid=(n // tile["BM"] + bags,),
            args=(
                x,
                inverse,
                ptr,
                tile_offsets(ptr, tile["BM"]),
                neighbors,
                similarity,
                bags,
                k,
                x.stride(0),
            ),
            constexprs=constexprs,
            num_warps=config.num_warps,
            max_registers=config.max_registers,
        )
    )
    return launches, (neighbors, similarity)


def knn(x: torch.Tensor, ptr: torch.Tensor, k: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The k most similar other instances of every instance's bag, best first, ties to the lower index.

    Args:
        x: [N, d] float32, float16 or bfloat16; copied only when its innermost stride is not 1.
        ptr: int64 [B + 1], bag b owns instances ``ptr[b]:ptr[b + 1]``.
        k: 1 to 64.
        metric: "cosine" (norms clamped at 1e-8) or "euclidean" (minus the squared distance).

    Returns:
        neighbors int32 [N, k], -1 where a bag has fewer than k + 1 instances; similarity float32 [N, k],
        -inf there. NaN ranks after every number. Sums run in float32.

    Raises:
        ValueError: a shape, device, k or metric that does not fit.
        TypeError: a dtype that is not served.
    """
    check_device("x", x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] < 1:
        raise ValueError(f"x: expected [N, d] with d >= 1, got {tuple(x.shape)}")
    if ptr.dtype != torch.int64 or ptr.dim() != 1 or ptr.shape[0] < 1 or ptr.device != x.device:
        raise ValueError(
            f"ptr: expected int64 [B + 1] on {x.device}, got {ptr.dtype} {tuple(ptr.shape)} on {ptr.device}"
        )
    if not 1 <= k <= MAX_NEIGHBORS:
        raise ValueError(f"k: expected 1 to {MAX_NEIGHBORS}, got {k}")
    if metric not in ("cosine", "euclidean"):
        raise ValueError(f"metric: expected 'cosine' or 'euclidean', got {metric!r}")
    launches, outputs = plan(x, ptr, k, metric)
    run_all(launches, x.device)
    return outputs
