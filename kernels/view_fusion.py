"""Fusion of views, their moments, and the cosines between their projections: one sweep each way.

Traffic and work, per instance, for V views, width D, projections of width P and e bytes per element:

====================  ===========================================  =======================================
pass                  bytes that must move                         operations
====================  ===========================================  =======================================
forward               (V D + V P + D) e  (y, projected in; z)      (5 V) D + (5 V) P
                      + 8 V (scores in; beta)
backward              (2 V D + 2 V P + D) e  (y, projected, d_z    (7 V) D + (9 V) P
                      in; dy, d_projected) + 12 V
====================  ===========================================  =======================================

Far below what a GPU computes per byte, so every element crosses the memory bus once:

- ``view_fusion_forward``: a program owns a run of blocks of BN instances and a slice of BD features; the softmax over
  V scores is so small that every slice repeats it. Sums for the moments stay in the registers of the thread that
  read the element, about a shift (the mean of the first block that has the view), so that nothing cancels far from 0.
- ``view_fusion_cosines``: with S_u = e_0 + ... + e_{u-1} and e the normalised projections, an instance's cosines are
  sum_u e_u . S_u, linear in V. Norms come first, so rows are read twice, the second time from cache.
- ``view_fusion_reduce`` adds what the programs leave behind, in order and in float64.
- ``view_fusion_backward``, ``view_fusion_cosines_backward``: nothing is summed over instances. Up to ``KEEP_VIEWS``
  views of a row that fits one tile stay in registers between the products and the results; others are read again,
  from cache.

No atomics, and no number that depends on the device. With g[u] = d_z.y[u] + d_beta[u] and S the sum of all e:

    d_scores[u] = beta[u] (g[u] - sum_w beta[w] g[w])
    dy[u] = beta[u] d_z + (d_mean[u] + 2 d_variance[u] (y[u] - mean[u])) / count[u]
    d_projected[u] = d_cosine_sum / |projected[u]| (S - e[u] (e[u].S))
"""

# ruff: noqa: RUF005 - a starred tuple is not in Triton's language
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import (
    FLOAT_DTYPES,
    Launch,
    ceil_div,
    check_device,
    check_shape,
    innermost_contiguous,
    next_power_of_2,
    run_all,
)
from ._primitives import LOG2E

__all__ = ["plan_backward", "plan_forward", "view_fusion", "view_fusion_backward"]

# Runs of instances whose sums are kept apart: enough for many waves on any chip, few and long enough that the partial
# sums (12 V D bytes each) stay far below y itself. Not a function of the device, so that results are not.
MAX_CHUNKS = 1024
MIN_CHUNK = 256
# The largest V, and the widest row, that backward keeps in registers.
KEEP_VIEWS = 4
KEEP_WIDTH = 1024
CLAMP = tl.constexpr(1e-8)


@triton.jit
def _masks(p_mask, o_n, m_n, s_mn, s_mv, V: tl.constexpr, HAS_MASK: tl.constexpr):
    """V vectors [BN]: which instances have the view."""
    m_v = ()
    for u in tl.static_range(V):
        if HAS_MASK:
            m_v = m_v + (tl.load(p_mask + o_n * s_mn + tl.cast(u, tl.int64) * s_mv, mask=m_n, other=0) != 0,)
        else:
            m_v = m_v + (m_n,)
    return m_v


@triton.jit
def _softmax(p_s, o_n, m_n, m_v, s_sn, s_sv, V: tl.constexpr):
    """V vectors [BN]: softmax of the scores over the present views, 0 at the others."""
    b_x = ()
    b_max = tl.zeros_like(o_n).to(tl.float32) - float("inf")
    for u in tl.static_range(V):
        p_u = p_s + o_n * s_sn + tl.cast(u, tl.int64) * s_sv
        b_xu = tl.load(p_u, mask=m_v[u], other=float("-inf")).to(tl.float32)
        b_max = tl.maximum(b_max, b_xu)
        b_x = b_x + (b_xu,)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = tl.zeros_like(b_max)
    b_e = ()
    for u in tl.static_range(V):
        b_eu = tl.exp2((b_x[u] - b_max) * LOG2E)
        b_sum += b_eu
        b_e = b_e + (b_eu,)
    b_sum = tl.where(b_sum == 0.0, 1.0, b_sum)  # no view, or none with a score above -inf
    b_beta = ()
    for u in tl.static_range(V):
        b_beta = b_beta + (tl.where(m_v[u], b_e[u] / b_sum, 0.0),)
    return b_beta


@triton.jit
def _rows(p_x, o_n, s_n, s_v, o_d, m_v, m_d, u: tl.constexpr):
    """Tile [BN, BD] of view u; rows of a missing view are zeros, whatever memory holds."""
    p_u = p_x + tl.cast(u, tl.int64) * s_v + o_n[:, None] * s_n + o_d[None, :]
    return tl.load(p_u, mask=m_v[u][:, None] & m_d[None, :], other=0.0)


@triton.jit(do_not_specialize=["n", "blocks"])
def view_fusion_forward(
    p_y, p_s, p_mask, p_z, p_beta, p_part, p_count, p_pairs,
    n, blocks,
    s_yn, s_yv, s_sn, s_sv, s_mn, s_mv,
    V: tl.constexpr, D: tl.constexpr, TILES: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """z, beta of ``blocks`` blocks of BN instances, for BD features; partial sums [chunk, V, 3, D]."""
    i_t = tl.program_id(0) % TILES
    i_c = (tl.program_id(0) // TILES).to(tl.int64)
    o_d = i_t * BD + tl.arange(0, BD)
    m_d = o_d < D
    o_r = tl.arange(0, BN)
    b_shift = ()
    for u in tl.static_range(V):
        # The first block that has the view.
        i_f = i_c * blocks
        if HAS_MASK:
            i_end = i_f + blocks - 1
            p_u = p_mask + tl.cast(u, tl.int64) * s_mv
            o_f = i_f * BN + o_r
            i_any = tl.max(tl.load(p_u + o_f * s_mn, mask=o_f < n, other=0).to(tl.int32), 0)
            while (i_any == 0) & (i_f < i_end):
                i_f += 1
                o_f = i_f * BN + o_r
                i_any = tl.max(tl.load(p_u + o_f * s_mn, mask=o_f < n, other=0).to(tl.int32), 0)
        o_f = i_f * BN + o_r
        m_f = _masks(p_mask, o_f, o_f < n, s_mn, s_mv, V, HAS_MASK)
        b_first = _rows(p_y, o_f, s_yn, s_yv, o_d, m_f, m_d, u).to(tl.float32)
        b_seen = tl.maximum(tl.sum(m_f[u].to(tl.float32), 0), 1.0)
        b_mean = tl.sum(b_first, 0) / b_seen
        # Any number would do, but for one that is none.
        b_shift = b_shift + (tl.where(tl.abs(b_mean) < float("inf"), b_mean, 0.0),)
    b_sums = ()
    b_squares = ()
    b_counts = ()
    for _u in tl.static_range(V):
        b_sums = b_sums + (tl.zeros([BN, BD], tl.float32),)
        b_squares = b_squares + (tl.zeros([BN, BD], tl.float32),)
        b_counts = b_counts + (tl.zeros([BN], tl.int32),)
    b_pairs = tl.zeros([BN], tl.int32)
    for i_b in range(blocks):
        o_n = (i_c * blocks + i_b) * BN + o_r
        m_n = o_n < n
        m_v = _masks(p_mask, o_n, m_n, s_mn, s_mv, V, HAS_MASK)
        b_beta = _softmax(p_s, o_n, m_n, m_v, s_sn, s_sv, V)
        b_z = tl.zeros([BN, BD], tl.float32)
        b_here = tl.zeros([BN], tl.int32)
        b_new_sums = ()
        b_new_squares = ()
        b_new_counts = ()
        for u in tl.static_range(V):
            b_y = _rows(p_y, o_n, s_yn, s_yv, o_d, m_v, m_d, u).to(tl.float32)
            b_z += b_beta[u][:, None] * b_y
            b_off = tl.where(m_v[u][:, None], b_y - b_shift[u][None, :], 0.0)
            b_new_sums = b_new_sums + (b_sums[u] + b_off,)
            b_new_squares = b_new_squares + (b_squares[u] + b_off * b_off,)
            b_new_counts = b_new_counts + (b_counts[u] + m_v[u].to(tl.int32),)
            b_here += m_v[u].to(tl.int32)
            if i_t == 0:
                tl.store(p_beta + o_n * V + u, b_beta[u], mask=m_n)
        b_pairs += b_here * (b_here - 1) // 2
        b_sums = b_new_sums
        b_squares = b_new_squares
        b_counts = b_new_counts
        p_zn = p_z + o_n[:, None] * D + o_d[None, :]
        tl.store(p_zn, b_z.to(p_z.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    for u in tl.static_range(V):
        p_u = p_part + (i_c * V + u) * (3 * D) + o_d
        tl.store(p_u, b_shift[u], mask=m_d)
        tl.store(p_u + D, tl.sum(b_sums[u], 0), mask=m_d)
        tl.store(p_u + 2 * D, tl.sum(b_squares[u], 0), mask=m_d)
        if i_t == 0:
            tl.store(p_count + i_c * V + u, tl.sum(b_counts[u], 0))
    if i_t == 0:
        tl.store(p_pairs + i_c, tl.sum(b_pairs, 0))


@triton.jit
def _inverse_norms(b_squares, V: tl.constexpr):
    """V vectors [BN]: 1 / max(norm, 1e-8)."""
    b_inverse = ()
    for u in tl.static_range(V):
        b_inverse = b_inverse + (1.0 / tl.maximum(tl.sqrt(b_squares[u]), CLAMP),)
    return b_inverse


@triton.jit(do_not_specialize=["n", "blocks"])
def view_fusion_cosines(
    p_x, p_mask, p_part,
    n, blocks,
    s_xn, s_xv, s_mn, s_mv,
    V: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """Sum of the cosines of ``blocks`` blocks of BN instances."""
    i_c = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    b_total = tl.zeros([BN, BD], tl.float32)
    for i_b in range(blocks):
        o_n = (i_c * blocks + i_b) * BN + o_r
        m_v = _masks(p_mask, o_n, o_n < n, s_mn, s_mv, V, HAS_MASK)
        b_squares = ()
        for _u in tl.static_range(V):
            b_squares = b_squares + (tl.zeros([BN], tl.float32),)
        for i_d in range(0, P, BD):
            b_new = ()
            for u in tl.static_range(V):
                b_x = _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, i_d + o_d < P, u).to(tl.float32)
                b_new = b_new + (b_squares[u] + tl.sum(b_x * b_x, 1),)
            b_squares = b_new
        b_inverse = _inverse_norms(b_squares, V)
        for i_d in range(0, P, BD):
            b_before = tl.zeros([BN, BD], tl.float32)
            for u in tl.static_range(V):
                b_x = _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, i_d + o_d < P, u).to(tl.float32)
                b_unit = b_x * b_inverse[u][:, None]
                b_total += b_unit * b_before
                b_before += b_unit
    tl.store(p_part + i_c, tl.sum(tl.sum(b_total, 1), 0))


@triton.jit(do_not_specialize=["chunks", "cosine_chunks"])
def view_fusion_reduce(
    p_part, p_parts_of, p_pairs_of, p_cosines_of, p_mean, p_rest, p_variance, p_count, p_cosine_sum, p_pairs,
    chunks, cosine_chunks,
    V: tl.constexpr, D: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Moments of BW columns of [V, D] from all partial sums, in float64; counts and cosines by the last program."""
    i_w = tl.program_id(0)
    o_c = tl.arange(0, BC).to(tl.int64)
    if i_w == tl.num_programs(0) - 1:
        o_v = tl.arange(0, 16)
        b_count = tl.zeros([BC, 16], tl.int64)
        b_pairs = tl.zeros([BC], tl.int64)
        for i_c in range(0, chunks, BC):
            m_c = i_c + o_c < chunks
            p_c = p_parts_of + (i_c + o_c)[:, None] * V + o_v[None, :]
            b_count += tl.load(p_c, mask=m_c[:, None] & (o_v < V)[None, :], other=0).to(tl.int64)
            b_pairs += tl.load(p_pairs_of + i_c + o_c, mask=m_c, other=0).to(tl.int64)
        tl.store(p_count + o_v, tl.sum(b_count, 0), mask=o_v < V)
        tl.store(p_pairs, tl.sum(b_pairs, 0))
        b_cosines = tl.zeros([BC], tl.float64)
        for i_c in range(0, cosine_chunks, BC):
            p_c = p_cosines_of + i_c + o_c
            b_cosines += tl.load(p_c, mask=i_c + o_c < cosine_chunks, other=0.0).to(tl.float64)
        tl.store(p_cosine_sum, tl.sum(b_cosines, 0).to(tl.float32))
    else:
        o_w = i_w * BW + tl.arange(0, BW)
        m_w = o_w < V * D
        o_u = o_w // D
        p_w = p_part + o_u * (3 * D) + o_w % D
        b_base = tl.load(p_w, mask=m_w & (tl.zeros_like(o_w) < chunks), other=0.0).to(tl.float64)
        b_first = tl.zeros([BC, BW], tl.float64)
        b_second = tl.zeros([BC, BW], tl.float64)
        b_seen = tl.zeros([BC, BW], tl.float64)
        for i_c in range(0, chunks, BC):
            m_cw = (i_c + o_c < chunks)[:, None] & m_w[None, :]
            p_cw = p_w[None, :] + (i_c + o_c)[:, None] * (3 * V * D)
            p_n = p_parts_of + (i_c + o_c)[:, None] * V + o_u[None, :]
            b_n = tl.load(p_n, mask=m_cw, other=0).to(tl.float64)
            b_off = tl.load(p_cw, mask=m_cw, other=0.0).to(tl.float64) - b_base[None, :]
            b_off = tl.where(b_n > 0, b_off, 0.0)
            b_sum = tl.load(p_cw + D, mask=m_cw, other=0.0).to(tl.float64)
            b_first += b_n * b_off + b_sum
            b_second += tl.load(p_cw + 2 * D, mask=m_cw, other=0.0).to(tl.float64)
            b_second += b_off * (2.0 * b_sum + b_n * b_off)
            b_seen += b_n
        b_n = tl.maximum(tl.sum(b_seen, 0), 1.0)
        b_sum = tl.sum(b_first, 0)
        b_off = b_sum / b_n
        b_variance = (tl.sum(b_second, 0) - b_sum * b_off) / b_n
        b_mean = (b_base + b_off).to(tl.float32)
        tl.store(p_mean + o_w, b_mean, mask=m_w)
        tl.store(p_rest + o_w, (b_base + b_off - b_mean.to(tl.float64)).to(tl.float32), mask=m_w)
        tl.store(p_variance + o_w, tl.where(b_variance < 0.0, 0.0, b_variance).to(tl.float32), mask=m_w)


@triton.jit
def _change(
    b_y, b_dz, b_beta, m_v, p_dm, p_dv, p_mean, p_rest, p_count, o_d, m_d,
    u: tl.constexpr, D: tl.constexpr,
    HAS_DZ: tl.constexpr, HAS_DM: tl.constexpr, HAS_DV: tl.constexpr,
):  # fmt: skip
    """dy [BN, BD] of view u."""
    b_dy = tl.zeros_like(b_y).to(tl.float32)
    if HAS_DM or HAS_DV:
        b_share = 1.0 / tl.maximum(tl.load(p_count + u), 1).to(tl.float32)
    if HAS_DM:
        b_dy += (b_share * tl.load(p_dm + u * D + o_d, mask=m_d, other=0.0))[None, :]
    if HAS_DV:
        b_slope = 2.0 * b_share * tl.load(p_dv + u * D + o_d, mask=m_d, other=0.0)
        b_mean = tl.load(p_mean + u * D + o_d, mask=m_d, other=0.0)
        b_rest = tl.load(p_rest + u * D + o_d, mask=m_d, other=0.0)
        b_dy += b_slope[None, :] * ((b_y.to(tl.float32) - b_mean[None, :]) - b_rest[None, :])
    if HAS_DZ:
        b_dy += b_beta[u][:, None] * b_dz.to(tl.float32)
    return tl.where(m_v[u][:, None], b_dy, 0.0)


@triton.jit(do_not_specialize=["n"])
def view_fusion_backward_y(
    p_dz, p_db, p_dm, p_dv, p_y, p_s, p_mask, p_mean, p_rest, p_count, p_dy, p_ds,
    n,
    s_zn, s_bn, s_bv, s_yn, s_yv, s_sn, s_sv, s_mn, s_mv,
    V: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr,
    HAS_DZ: tl.constexpr, HAS_DB: tl.constexpr, HAS_DM: tl.constexpr, HAS_DV: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """dy and d_scores of BN instances; KEEP: a whole row of all views stays in registers."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < n
    m_v = _masks(p_mask, o_n, m_n, s_mn, s_mv, V, HAS_MASK)
    b_beta = _softmax(p_s, o_n, m_n, m_v, s_sn, s_sv, V)
    b_g = ()
    for _u in tl.static_range(V):
        b_g = b_g + (tl.zeros([BN], tl.float32),)
    if HAS_DZ:
        p_zn = p_dz + o_n[:, None] * s_zn + o_d[None, :]
    b_dz = tl.zeros([BN, BD], tl.float32)
    b_y = ()
    if KEEP:
        m_d = o_d < D
        if HAS_DZ:
            b_dz = tl.load(p_zn, mask=m_n[:, None] & m_d[None, :], other=0.0)
        b_new = ()
        for u in tl.static_range(V):
            b_yu = _rows(p_y, o_n, s_yn, s_yv, o_d, m_v, m_d, u)
            b_y = b_y + (b_yu,)
            b_new = b_new + (tl.sum(b_dz.to(tl.float32) * b_yu.to(tl.float32), 1),)
        b_g = b_new
    elif HAS_DZ:
        for i_d in range(0, D, BD):
            m_d = i_d + o_d < D
            b_dzd = tl.load(p_zn + i_d, mask=m_n[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_new = ()
            for u in tl.static_range(V):
                b_yu = _rows(p_y, o_n, s_yn, s_yv, i_d + o_d, m_v, m_d, u).to(tl.float32)
                b_new = b_new + (b_g[u] + tl.sum(b_dzd * b_yu, 1),)
            b_g = b_new
    b_along = tl.zeros([BN], tl.float32)
    b_new = ()
    for u in tl.static_range(V):
        b_gu = tl.where(m_v[u], b_g[u], 0.0)
        if HAS_DB:
            b_gu += tl.load(p_db + o_n * s_bn + tl.cast(u, tl.int64) * s_bv, mask=m_v[u], other=0.0)
        b_along += b_beta[u] * b_gu
        b_new = b_new + (b_gu,)
    for u in tl.static_range(V):
        b_ds = tl.where(m_v[u], b_beta[u] * (b_new[u] - b_along), 0.0)
        tl.store(p_ds + o_n * V + u, b_ds.to(p_ds.dtype.element_ty), mask=m_n)
    if KEEP:
        m_d = o_d < D
        for u in tl.static_range(V):
            b_dy = _change(
                b_y[u], b_dz, b_beta, m_v, p_dm, p_dv, p_mean, p_rest, p_count, o_d, m_d, u, D, HAS_DZ, HAS_DM, HAS_DV
            )
            p_u = p_dy + (o_n * V + u)[:, None] * D + o_d[None, :]
            tl.store(p_u, b_dy.to(p_dy.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    else:
        for i_d in range(0, D, BD):
            m_d = i_d + o_d < D
            m_nd = m_n[:, None] & m_d[None, :]
            b_dzd = b_dz
            if HAS_DZ:
                b_dzd = tl.load(p_zn + i_d, mask=m_nd, other=0.0).to(tl.float32)
            for u in tl.static_range(V):
                b_yu = b_dz
                if HAS_DV:
                    b_yu = _rows(p_y, o_n, s_yn, s_yv, i_d + o_d, m_v, m_d, u).to(tl.float32)
                b_dy = _change(
                    b_yu, b_dzd, b_beta, m_v, p_dm, p_dv, p_mean, p_rest, p_count, i_d + o_d, m_d, u, D,
                    HAS_DZ, HAS_DM, HAS_DV,
                )  # fmt: skip
                p_u = p_dy + (o_n * V + u)[:, None] * D + (i_d + o_d)[None, :]
                tl.store(p_u, b_dy.to(p_dy.dtype.element_ty), mask=m_nd)


@triton.jit
def _coefficients(b_inverse, b_along, m_v, b_d, V: tl.constexpr):
    """d_projected[u] = toward[u] S - back[u] projected[u]; 0 where there is no other view, not a rounding of 0."""
    b_here = tl.zeros_like(b_inverse[0])
    for u in tl.static_range(V):
        b_here += m_v[u].to(tl.float32)
    b_toward = ()
    b_back = ()
    for u in tl.static_range(V):
        m_u = m_v[u] & (b_here > 1.0)
        b_share = tl.where(b_inverse[u] * CLAMP < 1.0, b_inverse[u] * b_along[u], 1.0)
        b_toward = b_toward + (tl.where(m_u, b_d * b_inverse[u], 0.0),)
        b_back = b_back + (tl.where(m_u, b_d * b_inverse[u] * b_inverse[u] * b_share, 0.0),)
    return b_toward, b_back


@triton.jit(do_not_specialize=["n"])
def view_fusion_backward_cosines(
    p_d, p_x, p_mask, p_dx,
    n,
    s_xn, s_xv, s_mn, s_mv,
    V: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, KEEP: tl.constexpr,
    HAS_MASK: tl.constexpr,
):  # fmt: skip
    """d_projected of BN instances; KEEP: a whole row of all views stays in registers."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.arange(0, BD)
    m_n = o_n < n
    m_v = _masks(p_mask, o_n, m_n, s_mn, s_mv, V, HAS_MASK)
    b_d = tl.load(p_d)
    b_squares = ()
    b_along = ()
    for _u in tl.static_range(V):
        b_squares = b_squares + (tl.zeros([BN], tl.float32),)
        b_along = b_along + (tl.zeros([BN], tl.float32),)
    if KEEP:
        m_d = o_d < P
        b_x = ()
        b_new = ()
        for u in tl.static_range(V):
            b_xu = _rows(p_x, o_n, s_xn, s_xv, o_d, m_v, m_d, u)
            b_x = b_x + (b_xu,)
            b_new = b_new + (tl.sum(b_xu.to(tl.float32) * b_xu.to(tl.float32), 1),)
        b_inverse = _inverse_norms(b_new, V)
        b_all = tl.zeros([BN, BD], tl.float32)
        for u in tl.static_range(V):
            b_all += b_inverse[u][:, None] * b_x[u].to(tl.float32)
        b_new = ()
        for u in tl.static_range(V):
            b_new = b_new + (tl.sum(b_all * b_x[u].to(tl.float32), 1),)
        b_toward, b_back = _coefficients(b_inverse, b_new, m_v, b_d, V)
        for u in tl.static_range(V):
            b_dx = b_toward[u][:, None] * b_all - b_back[u][:, None] * b_x[u].to(tl.float32)
            b_dx = tl.where(m_v[u][:, None], b_dx, 0.0)
            p_u = p_dx + (o_n * V + u)[:, None] * P + o_d[None, :]
            tl.store(p_u, b_dx.to(p_dx.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])
    else:
        for i_d in range(0, P, BD):
            b_new = ()
            for u in tl.static_range(V):
                b_xu = _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, i_d + o_d < P, u).to(tl.float32)
                b_new = b_new + (b_squares[u] + tl.sum(b_xu * b_xu, 1),)
            b_squares = b_new
        b_inverse = _inverse_norms(b_squares, V)
        for i_d in range(0, P, BD):
            m_d = i_d + o_d < P
            b_all = tl.zeros([BN, BD], tl.float32)
            for u in tl.static_range(V):
                b_all += b_inverse[u][:, None] * _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, m_d, u).to(tl.float32)
            b_new = ()
            for u in tl.static_range(V):
                b_xu = _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, m_d, u).to(tl.float32)
                b_new = b_new + (b_along[u] + tl.sum(b_all * b_xu, 1),)
            b_along = b_new
        b_toward, b_back = _coefficients(b_inverse, b_along, m_v, b_d, V)
        for i_d in range(0, P, BD):
            m_d = i_d + o_d < P
            b_all = tl.zeros([BN, BD], tl.float32)
            for u in tl.static_range(V):
                b_all += b_inverse[u][:, None] * _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, m_d, u).to(tl.float32)
            for u in tl.static_range(V):
                b_xu = _rows(p_x, o_n, s_xn, s_xv, i_d + o_d, m_v, m_d, u).to(tl.float32)
                b_dx = b_toward[u][:, None] * b_all - b_back[u][:, None] * b_xu
                b_dx = tl.where(m_v[u][:, None], b_dx, 0.0)
                p_u = p_dx + (o_n * V + u)[:, None] * P + (i_d + o_d)[None, :]
                tl.store(p_u, b_dx.to(p_dx.dtype.element_ty), mask=m_n[:, None] & m_d[None, :])


WARPS = 4


def _tile(dtype: torch.dtype, views: int, width: int) -> dict[str, int]:
    """BN, BD of a kernel that holds sums of every view: at most 16 bytes of a row per thread."""
    elements = min(16 // dtype.itemsize, 8 if views <= 3 else 4 if views <= 8 else 2)
    features = min(128, next_power_of_2(width))
    return {"BN": max(1, 32 * WARPS * elements // features), "BD": features}


def _row_tile(dtype: torch.dtype, views: int, width: int) -> dict[str, int | bool]:
    """BN, BD, KEEP of a backward kernel: a whole row of all views in registers where it fits, else as `_tile`."""
    features = next_power_of_2(width)
    if views > KEEP_VIEWS or features > KEEP_WIDTH:
        return {**_tile(dtype, views, width), "KEEP": False}
    return {"BN": max(1, 32 * WARPS * 16 // dtype.itemsize // features), "BD": features, "KEEP": True}


def _chunks(n: int, rows: int) -> tuple[int, int]:
    """Programs along the instances, and blocks of ``rows`` instances of each."""
    wanted = ceil_div(max(MIN_CHUNK, ceil_div(n, MAX_CHUNKS)), rows)
    blocks = max(1, min(wanted, ceil_div(n, rows)))
    return ceil_div(n, rows * blocks), blocks


def _check(y: torch.Tensor, scores: torch.Tensor, projected: torch.Tensor | None, mask: torch.Tensor | None) -> None:
    check_device("y", y)
    for name, x in (("y", y), ("scores", scores), ("projected", projected)):
        if x is not None and x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {x.dtype}")
    if y.dim() != 3:
        raise ValueError(f"y: expected [N, V, D], got {tuple(y.shape)}")
    n, views, _ = y.shape
    if not 1 <= views <= 16:
        raise ValueError(f"y: expected 1 to 16 views in dimension 1, got {views}")
    check_shape("scores", scores, (n, views), None, y)
    if projected is not None:
        check_shape("projected", projected, (n, views, projected.shape[-1]), None, y)
    check_shape("mask", mask, (n, views), torch.bool, y)


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


T = torch.Tensor
Fused = tuple[T, T, T, T, T, T, T, T]


def plan_forward(
    y: torch.Tensor, scores: torch.Tensor, projected: torch.Tensor | None, mask: torch.Tensor | None
) -> tuple[list[Launch], Fused]:
    """Outputs of ``view_fusion``, not yet written, and the launches that write them."""
    n, views, width = y.shape

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=y.device)

    y = innermost_contiguous(y)
    z, beta = empty(n, width, dtype=y.dtype), empty(n, views)
    mean, rest, variance = (empty(views, width) for _ in range(3))
    count, pairs, cosine_sum = empty(views, dtype=torch.int64), empty(dtype=torch.int64), empty()
    tile = _tile(y.dtype, views, width)
    tiles = max(1, ceil_div(width, tile["BD"]))  # beta and counts are written even where there is no feature
    chunks, blocks = _chunks(n, tile["BN"])
    part, counts = empty(chunks, views, 3, width), empty(chunks, views, dtype=torch.int32)
    pairs_of = empty(chunks, dtype=torch.int32)
    flags = {"V": views, "HAS_MASK": mask is not None}
    launches = [
        Launch(
            kernel=view_fusion_forward,
            grid=(chunks * tiles,),
            args=(
                *(y, scores, mask, z, beta, part, counts, pairs_of, n, blocks),
                *(*_strides(y), *_strides(scores), *_strides(mask)),
            ),
            constexprs={"D": width, "TILES": tiles, **tile, **flags},
            num_warps=WARPS,
        )
    ]
    cosine_chunks, cosines = 0, empty(0)
    if projected is not None:
        projected = innermost_contiguous(projected)
        tile = _tile(projected.dtype, views, projected.shape[2])
        cosine_chunks, blocks = _chunks(n, tile["BN"])
        cosines = empty(cosine_chunks)
        launches.append(
            Launch(
                kernel=view_fusion_cosines,
                grid=(cosine_chunks,),
                args=(projected, mask, cosines, n, blocks, *_strides(projected), *_strides(mask)),
                constexprs={"P": projected.shape[2], **tile, **flags},
                num_warps=WARPS,
            )
        )
    launches.append(
        Launch(
            kernel=view_fusion_reduce,
            grid=(ceil_div(views * width, 16) + 1,),
            args=(
                *(part, counts, pairs_of, cosines, mean, rest, variance, count, cosine_sum, pairs),
                *(chunks, cosine_chunks),
            ),
            constexprs={"V": views, "D": max(1, width), "BC": 64, "BW": 16},
        )
    )
    return launches, (z, beta, mean, variance, count, cosine_sum, pairs, rest)


def plan_backward(
    d_z: torch.Tensor | None,
    d_beta: torch.Tensor | None,
    d_mean: torch.Tensor | None,
    d_variance: torch.Tensor | None,
    d_cosine_sum: torch.Tensor | None,
    y: torch.Tensor,
    scores: torch.Tensor,
    projected: torch.Tensor | None,
    mask: torch.Tensor | None,
    mean: torch.Tensor,
    rest: torch.Tensor,
    count: torch.Tensor,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Outputs of ``view_fusion_backward``, not yet written, and the launches that write them."""
    n, views, width = y.shape
    y = innermost_contiguous(y)
    if d_z is not None:
        d_z = innermost_contiguous(d_z)
    d_mean, d_variance = (None if x is None else x.contiguous() for x in (d_mean, d_variance))
    dy = torch.empty((n, views, width), dtype=y.dtype, device=y.device)
    d_scores = torch.empty((n, views), dtype=scores.dtype, device=y.device)
    tile = _row_tile(y.dtype, views, width)
    launches = [
        Launch(
            kernel=view_fusion_backward_y,
            grid=(ceil_div(n, tile["BN"]),),
            args=(
                *(d_z, d_beta, d_mean, d_variance, y, scores, mask),
                *(mean.contiguous(), rest.contiguous(), count.contiguous(), dy, d_scores),
                *(n, 0 if d_z is None else d_z.stride(0), *_strides(d_beta)),
                *(*_strides(y), *_strides(scores), *_strides(mask)),
            ),
            constexprs={
                "V": views, "D": width, **tile, "HAS_MASK": mask is not None,
                "HAS_DZ": d_z is not None, "HAS_DB": d_beta is not None, "HAS_DM": d_mean is not None,
                "HAS_DV": d_variance is not None,
            },
            num_warps=WARPS,
        )
    ]  # fmt: skip
    if projected is None:
        return launches, (dy, d_scores, torch.empty(0, dtype=y.dtype, device=y.device))
    projected = innermost_contiguous(projected)
    narrow = projected.shape[2]
    if d_cosine_sum is None:
        return launches, (dy, d_scores, torch.zeros_like(projected, memory_format=torch.contiguous_format))
    d_projected = torch.empty((n, views, narrow), dtype=projected.dtype, device=y.device)
    tile = _row_tile(projected.dtype, views, narrow)
    launches.append(
        Launch(
            kernel=view_fusion_backward_cosines,
            grid=(ceil_div(n, tile["BN"]),),
            args=(d_cosine_sum, projected, mask, d_projected, n, *_strides(projected), *_strides(mask)),
            constexprs={"V": views, "P": narrow, **tile, "HAS_MASK": mask is not None},
            num_warps=WARPS,
        )
    )
    return launches, (dy, d_scores, d_projected)


def view_fusion(
    y: torch.Tensor, scores: torch.Tensor, projected: torch.Tensor | None, mask: torch.Tensor | None
) -> Fused:
    """Fusion of views with their moments and cosines (docs/model.md, block 1).

    y and projected are read through their strides unless the innermost stride is not 1. Never waits for the device.

    Args:
        y: [N, V, D] float32, float16 or bfloat16, 1 <= V <= 16.
        scores: [N, V], of which beta is the softmax; one of these dtypes.
        projected: [N, V, P], one of these dtypes; None: no cosines.
        mask: bool [N, V], which views an instance has. None: all. Missing rows may hold anything.

    Returns:
        z [N, D] in y's dtype, beta float32 [N, V], mean and variance float32 [V, D], count int64 [V], the scalars
        cosine_sum float32 and pairs int64, and for backward rest float32 [V, D], what float32 leaves out of mean.

    Raises:
        ValueError: a shape or device that does not fit, V out of range.
        TypeError: a dtype that is not served.
    """
    _check(y, scores, projected, mask)
    launches, outputs = plan_forward(y, scores, projected, mask)
    run_all(launches, y.device)
    return outputs


def view_fusion_backward(
    d_z: torch.Tensor | None,
    d_beta: torch.Tensor | None,
    d_mean: torch.Tensor | None,
    d_variance: torch.Tensor | None,
    d_cosine_sum: torch.Tensor | None,
    y: torch.Tensor,
    scores: torch.Tensor,
    projected: torch.Tensor | None,
    mask: torch.Tensor | None,
    mean: torch.Tensor,
    rest: torch.Tensor,
    count: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``view_fusion``; a gradient that is None is taken as zero and costs nothing.

    Args:
        d_z: [N, D] in y's dtype; d_beta: [N, V], d_mean and d_variance: [V, D], d_cosine_sum: [], float32.
        mean, rest, count: as ``view_fusion`` returned them. The rest as there.

    Returns:
        dy [N, V, D], d_scores [N, V] and d_projected [N, V, P] (empty when ``projected`` is None), each in the dtype
        of what it is the gradient of; zero at missing views.

    Raises:
        ValueError, TypeError: as ``view_fusion``.
    """
    _check(y, scores, projected, mask)
    n, views, width = y.shape
    check_shape("d_z", d_z, (n, width), y.dtype, y)
    check_shape("d_beta", d_beta, (n, views), torch.float32, y)
    check_shape("d_mean", d_mean, (views, width), torch.float32, y)
    check_shape("d_variance", d_variance, (views, width), torch.float32, y)
    check_shape("d_cosine_sum", d_cosine_sum, (), torch.float32, y)
    check_shape("mean", mean, (views, width), torch.float32, y)
    check_shape("rest", rest, (views, width), torch.float32, y)
    check_shape("count", count, (views,), torch.int64, y)
    gradients = d_z, d_beta, d_mean, d_variance, d_cosine_sum
    launches, outputs = plan_backward(*gradients, y, scores, projected, mask, mean, rest, count)
    run_all(launches, y.device)
    return outputs
