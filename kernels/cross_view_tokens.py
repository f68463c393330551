"""Hybrid cross-view attention over ragged token segments: two softmaxes in one sweep over the keys.

For an instance with n tokens of width Dh per head, n_u of them in the view of a query:

- forward: 2 n^2 Dh multiply-adds per head, those of one plain attention (a key is of the query's own view
  or of another, so it enters one of the two softmaxes); backward: 9 n^2 Dh (flash attention's 7, and 2 for
  the sweep that finds the row sums below, which saves keeping the two outputs apart: nothing but two
  numbers per row is kept for backward);
- bytes that must move: 4 L H Dh e forward (q, k, v in; out), 8 L H Dh e backward, and 4 L V for the mass, 8
  L H for the entropies. Keys and values are read once per query tile, from cache when an instance fits
  there.

A program owns BM queries of one segment and one head. It first sweeps the tokens of its own view, then
those of all others with a second running maximum, sum and accumulator; a view's share of the second sum is
kept apart in [BM, VP] and brought to the running maximum once per segment. The tiles of ragged segments are
scheduled on the device; the grid is bounded by shapes.

Backward, with P the cross softmax, a_w its mass on view w, g the gate, r = 1 - g, c_w = d_mass_w / H, H_a
the entropy of a, E that of (g, r a), H_t = -sum_j P_j log P_j the entropy over tokens, and ' for gradients:

    delta_i = sum_own P_j dP_j,   delta_c = sum_cross P_j dP_j,   dP_j = d_out . v_j
    own:     dS_j = g P_j (dP_j - delta_i)
    others:  dS_j = P_j (r dP_j + r (c_w + E' (-log a_w - H_a)) - r (delta_c + sum_w a_w c_w) - H_t' (log
    P_j + H_t)) gate' = g r (delta_i - delta_c + c_own - sum_w a_w c_w + E' (-gate_logit - H_a))

One kernel finds the row sums, then dq, gate' and partial sums of d_bias (one per query tile and view, added
in order by a third kernel, no atomics); another owns key tiles and finds dk, dv. The terms of dS_j that do
not depend on dP_j or P_j are one number per (query, view), and pass between the two.

An instance's segments may be many, short or empty. Tiles follow the mean length L / S, a matter of shapes;
with one token per segment ``cross_view`` is the kernel to use.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ._launch import (
    FLOAT_DTYPES,
    Launch,
    check_device,
    check_shape,
    innermost_contiguous,
    next_power_of_2,
    run_all,
)
from ._primitives import LN2, LOG2E, dot, gate, owner, tile_offsets
from ._tuning import Config, configured

__all__ = [
    "candidates",
    "cross_view_tokens",
    "cross_view_tokens_backward",
    "key",
    "plan_backward",
    "plan_forward",
]


@triton.jit
def _load_rows(p_x, m_x, o_d, DH: tl.constexpr):
    """[rows, BD] from row pointers; features past DH and rows outside are zeros."""
    return tl.load(p_x[:, None] + o_d[None, :], mask=m_x[:, None] & (o_d < DH)[None, :], other=0.0)


@triton.jit
def _inner(b_a, b_b, p_a, m_a, p_b, m_b, DH: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """b_a @ b_b^T [rows of a, rows of b]. With BC < BD it is taken from memory, BC features at a time.

    A float32 product holds its operands in registers along the whole of the inner dimension.
    """
    b_s = tl.zeros([p_a.shape[0], p_b.shape[0]], tl.float32)
    if BC < BD:
        o_c = tl.arange(0, BC)
        for i_d in range(0, DH, BC):
            m_d = (i_d + o_c < DH)[None, :]
            b_ac = tl.load(p_a[:, None] + (i_d + o_c)[None, :], mask=m_a[:, None] & m_d, other=0.0)
            b_bc = tl.load(p_b[:, None] + (i_d + o_c)[None, :], mask=m_b[:, None] & m_d, other=0.0)
            b_s = dot(b_ac, tl.trans(b_bc), b_s)
    else:
        b_s = dot(b_a, tl.trans(b_b), b_s)
    return b_s


@triton.jit
def _column(b_x, o_v, i_w):
    """Column i_w of b_x [rows, VP]."""
    return tl.sum(tl.where(o_v[None, :] == i_w, b_x, 0.0), 1)


@triton.jit
def _pair_bias(p_bias, i_h, i_u, i_w, V: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Base-2 bias of head i_h between two views; none inside a view."""
    b_bias = 0.0
    if HAS_BIAS:
        b_bias = tl.where(i_u == i_w, 0.0, tl.load(p_bias + (i_h * V + i_u) * V + i_w) * LOG2E)
    return b_bias


@triton.jit
def _last(i_start, i_end, b_bias, HAS_BIAS: tl.constexpr):
    """Where the tokens that are keys end: all of a segment are, or none if its view's bias is -inf."""
    if HAS_BIAS:
        i_end = tl.where(b_bias == float("-inf"), i_start, i_end)
    return i_end


@triton.jit
def _sweep(
    b_acc, b_max, b_sum, b_ent, b_seg, b_q, p_q, m_m, p_k, p_v, s_kl, s_vl, i_start, i_end, b_bias, o_d,
    DH: tl.constexpr, SCALE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, ENTROPY:
    tl.constexpr,
):  # fmt: skip
    """Tokens i_start..i_end into a running softmax; b_seg sums their exponentials alone, b_ent those times
    the logit."""
    for i_n in range(i_start, i_end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < i_end
        p_kn = p_k + o_n * s_kl
        b_k = _load_rows(p_kn, m_n, o_d, DH)  # [BN, BD]
        b_s = _inner(b_q, b_k, p_q, m_m, p_kn, m_n, DH, BD, BC) * (SCALE * LOG2E) + b_bias  # [BM, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1), propagate_nan=tl.PropagateNan.ALL)
        b_alpha = tl.exp2(b_max - b_new)
        b_p = tl.exp2(b_s - b_new[:, None])
        b_row = tl.sum(b_p, 1)
        if ENTROPY:
            b_t = tl.sum(tl.where(m_n[None, :], b_p * (b_s - b_new[:, None]), 0.0), 1)
            b_ent = b_alpha * (b_ent + tl.where(b_sum == 0.0, 0.0, b_max - b_new) * b_sum) + b_t
        b_sum = b_sum * b_alpha + b_row
        b_seg = b_seg * b_alpha + b_row
        b_v = _load_rows(p_v + o_n * s_vl, m_n, o_d, DH)  # [BN, BD]
        b_acc = dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None])
        b_max = b_new
    return b_acc, b_max, b_sum, b_ent, b_seg


@triton.jit(do_not_specialize=["segments", "instances"])
def cross_view_tokens_forward(
    p_q, p_k, p_v, p_gate, p_bias, p_tokens, p_segments, p_view, p_tiles,
    p_out, p_mass, p_entropy, p_token_entropy, p_lse_intra, p_lse_cross,
    segments, instances, H,
    s_ql, s_qh, s_kl, s_kh, s_vl, s_vh, s_gl, s_gh,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr, VP: tl.constexpr,
    HAS_BIAS: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """out, view mass of this head, entropies and logsumexps of BM queries."""
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    if i_t >= tl.load(p_tiles + segments):
        return
    i_s = owner(p_tiles, segments, i_t)
    i_i = owner(p_segments, instances, i_s)
    i_u = tl.load(p_view + i_s)
    o_m = tl.load(p_tokens + i_s) + (i_t - tl.load(p_tiles + i_s)) * BM + tl.arange(0, BM)
    m_m = o_m < tl.load(p_tokens + i_s + 1)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, VP)
    p_qm = p_q + o_m * s_ql + i_h * s_qh
    b_q = _load_rows(p_qm, m_m, o_d, DH)  # [BM, BD]
    i_low = tl.load(p_segments + i_i)
    i_high = tl.load(p_segments + i_i + 1)
    p_kh = p_k + i_h * s_kh
    p_vh = p_v + i_h * s_vh

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_max = tl.zeros([BM], tl.float32) - float("inf")
    b_sum = tl.zeros([BM], tl.float32)
    b_ent = tl.zeros([BM], tl.float32)
    b_seg = tl.zeros([BM], tl.float32)
    for i_j in range(i_low, i_high):
        if tl.load(p_view + i_j) == i_u:
            b_acc, b_max, b_sum, b_ent, b_seg = _sweep(
                b_acc, b_max, b_sum, b_ent, b_seg, b_q, p_qm, m_m, p_kh, p_vh, s_kl, s_vl,
                tl.load(p_tokens + i_j), tl.load(p_tokens + i_j + 1), 0.0, o_d, DH, SCALE, BN, BD, BC, False,
            )  # fmt: skip
    b_intra = b_acc / b_sum[:, None]
    o_row = o_m * H + i_h
    tl.store(p_lse_intra + o_row, (b_max + tl.log2(b_sum)) * LN2, mask=m_m)

    b_acc = tl.zeros([BM, BD], tl.float32)
    b_max = tl.zeros([BM], tl.float32) - float("inf")
    b_sum = tl.zeros([BM], tl.float32)
    b_share = tl.zeros([BM, VP], tl.float32)  # a view's part of b_sum
    i_others = i_low * 0
    for i_j in range(i_low, i_high):
        i_w = tl.load(p_view + i_j)
        i_start = tl.load(p_tokens + i_j)
        i_end = tl.load(p_tokens + i_j + 1)
        b_bias = _pair_bias(p_bias, i_h, i_u, i_w, V, HAS_BIAS)
        i_end = _last(i_start, i_end, b_bias, HAS_BIAS)
        if (i_w != i_u) & (i_start < i_end):
            i_others += i_end - i_start
            b_before = b_max
            b_seg = tl.zeros([BM], tl.float32)
            b_acc, b_max, b_sum, b_ent, b_seg = _sweep(
                b_acc, b_max, b_sum, b_ent, b_seg, b_q, p_qm, m_m, p_kh, p_vh, s_kl, s_vl,
                i_start, i_end, b_bias, o_d, DH, SCALE, BN, BD, BC, ENTROPY,
            )  # fmt: skip
            b_share = b_share * tl.exp2(b_before - b_max)[:, None]
            b_share += tl.where(o_v[None, :] == i_w, b_seg[:, None], 0.0)
    m_other = i_others > 0
    b_x = tl.load(p_gate + o_m * s_gl + i_h * s_gh, mask=m_m, other=0.0).to(tl.float32)
    b_g, b_r, b_hg = gate(b_x, m_m & m_other)
    b_sum = tl.where(m_other, b_sum, 1.0)
    b_inverse = tl.where(m_other, 1.0 / b_sum, 0.0)
    b_o = b_g[:, None] * b_intra + (b_r * b_inverse)[:, None] * b_acc
    p_o = p_out + o_row[:, None] * DH + o_d[None, :]
    tl.store(p_o, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_d < DH)[None, :])
    b_a = b_share * b_inverse[:, None]  # [BM, VP]
    b_h = -tl.sum(b_a * tl.log2(tl.where(b_a == 0.0, 1.0, b_a)), 1) * LN2
    tl.store(p_entropy + o_row, b_hg + b_r * b_h, mask=m_m)
    tl.store(p_lse_cross + o_row, tl.where(m_other, (b_max + tl.log2(b_sum)) * LN2, float("-inf")), mask=m_m)
    if ENTROPY:
        b_t = tl.where(m_other, (tl.log2(b_sum) - b_ent * b_inverse) * LN2, 0.0)
        tl.store(p_token_entropy + o_row, b_t, mask=m_m)
    b_p = tl.where(o_v[None, :] == i_u, b_g[:, None], b_r[:, None] * b_a)
    tl.store(p_mass + o_row[:, None] * V + o_v[None, :], b_p, mask=m_m[:, None] & (o_v < V)[None, :])


@triton.jit
def _row_sums(
    b_delta, b_mass, b_ent, b_q, b_do, b_lse, p_q, p_do, m_m, p_k, p_v, s_kl, s_vl, i_start, i_end, b_bias,
    o_d, DH: tl.constexpr, SCALE: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    HAS_DO: tl.constexpr, ENTROPY: tl.constexpr,
):  # fmt: skip
    """Adds sum P dP, sum P and -sum P log2 P over tokens i_start..i_end."""
    for i_n in range(i_start, i_end, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < i_end
        p_kn = p_k + o_n * s_kl
        b_k = _load_rows(p_kn, m_n, o_d, DH)  # [BN, BD]
        b_s = _inner(b_q, b_k, p_q, m_m, p_kn, m_n, DH, BD, BC) * (SCALE * LOG2E) + b_bias - b_lse[:, None]
        b_p = tl.where(m_n[None, :], tl.exp2(b_s), 0.0)  # [BM, BN]
        b_mass += tl.sum(b_p, 1)
        if ENTROPY:
            b_ent -= tl.sum(b_p * tl.where(m_n[None, :], b_s, 0.0), 1)
        if HAS_DO:
            p_vn = p_v + o_n * s_vl
            b_v = _load_rows(p_vn, m_n, o_d, DH)
            b_delta += tl.sum(b_p * _inner(b_do, b_v, p_do, m_m, p_vn, m_n, DH, BD, BC), 1)
    return b_delta, b_mass, b_ent


@triton.jit(do_not_specialize=["segments", "instances"])
def cross_view_tokens_backward_queries(
    p_do, p_dm, p_de, p_dt, p_q, p_k, p_v, p_gate, p_bias, p_tokens, p_segments, p_view, p_tiles,
    p_lse_intra, p_lse_cross, p_dq, p_dg, p_shift, p_blend, p_part, p_tile_view, segments, instances, H,
    s_blend, s_ol, s_oh, s_cl, s_cv, s_el, s_eh, s_tl, s_th, s_ql, s_qh, s_kl, s_kh, s_vl, s_vh, s_gl, s_gh,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD:
    tl.constexpr, BC: tl.constexpr, VP: tl.constexpr, HAS_DO: tl.constexpr, HAS_DM: tl.constexpr, HAS_DE:
    tl.constexpr, HAS_DT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Row sums, dq, d_gate, the tile's share of d_bias, and what the keys' kernel needs to know of BM
    queries."""
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    if i_t >= tl.load(p_tiles + segments):
        return
    i_s = owner(p_tiles, segments, i_t)
    i_i = owner(p_segments, instances, i_s)
    i_u = tl.load(p_view + i_s)
    o_m = tl.load(p_tokens + i_s) + (i_t - tl.load(p_tiles + i_s)) * BM + tl.arange(0, BM)
    m_m = o_m < tl.load(p_tokens + i_s + 1)
    o_d = tl.arange(0, BD)
    o_v = tl.arange(0, VP)
    o_row = o_m * H + i_h
    p_qm = p_q + o_m * s_ql + i_h * s_qh
    b_q = _load_rows(p_qm, m_m, o_d, DH)  # [BM, BD]
    p_dom = p_qm
    b_do = b_q
    if HAS_DO:
        p_dom = p_do + o_m * s_ol + i_h * s_oh
        b_do = _load_rows(p_dom, m_m, o_d, DH)
    b_lse_intra = tl.load(p_lse_intra + o_row, mask=m_m, other=0.0) * LOG2E
    b_lse_cross = tl.load(p_lse_cross + o_row, mask=m_m, other=0.0) * LOG2E
    i_low = tl.load(p_segments + i_i)
    i_high = tl.load(p_segments + i_i + 1)
    p_kh = p_k + i_h * s_kh
    p_vh = p_v + i_h * s_vh

    b_intra = tl.zeros([BM], tl.float32)
    b_cross = tl.zeros([BM], tl.float32)
    b_ent = tl.zeros([BM], tl.float32)
    b_a = tl.zeros([BM, VP], tl.float32)
    i_others = i_low * 0
    for i_j in range(i_low, i_high):
        i_w = tl.load(p_view + i_j)
        i_start = tl.load(p_tokens + i_j)
        i_end = tl.load(p_tokens + i_j + 1)
        m_own = i_w == i_u
        b_bias = _pair_bias(p_bias, i_h, i_u, i_w, V, HAS_BIAS)
        i_end = _last(i_start, i_end, b_bias, HAS_BIAS)
        b_sums = _row_sums(
            tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32), tl.zeros([BM], tl.float32),
            b_q, b_do, tl.where(m_own, b_lse_intra, b_lse_cross), p_qm, p_dom, m_m, p_kh, p_vh, s_kl, s_vl,
            i_start, i_end, b_bias, o_d, DH, SCALE, BN, BD, BC, HAS_DO, HAS_DT,
        )  # fmt: skip
        if m_own:
            b_intra += b_sums[0]
        else:
            i_others += i_end - i_start
            b_cross += b_sums[0]
            b_a += tl.where(o_v[None, :] == i_w, b_sums[1][:, None], 0.0)
            b_ent += b_sums[2]

    m_other = m_m & (i_others > 0)
    b_x = tl.load(p_gate + o_m * s_gl + i_h * s_gh, mask=m_m, other=0.0).to(tl.float32)
    b_g, b_r, _h = gate(b_x, m_other)
    b_dx = b_intra - b_cross
    b_shift = -b_cross[:, None] + tl.zeros([BM, VP], tl.float32)  # over r, for the views of others
    if HAS_DM:
        p_c = p_dm + o_m[:, None] * s_cl + o_v[None, :] * s_cv
        b_c = tl.load(p_c, mask=m_m[:, None] & (o_v < V)[None, :], other=0.0) / H  # [BM, VP]
        b_ac = tl.sum(b_a * b_c, 1)
        b_dx += _column(b_c, o_v, i_u) - b_ac
        b_shift += b_c - b_ac[:, None]
    if HAS_DE:
        b_de = tl.load(p_de + o_m * s_el + i_h * s_eh, mask=m_m, other=0.0)
        b_l = -tl.log2(tl.where(b_a == 0.0, 1.0, b_a)) * LN2
        b_h = tl.sum(b_a * b_l, 1)
        b_dx -= b_de * (b_x + b_h)
        b_shift += b_de[:, None] * (b_l - b_h[:, None])
    b_shift = b_r[:, None] * b_shift
    b_dt = tl.zeros([BM], tl.float32)
    if HAS_DT:
        b_dt = tl.load(p_dt + o_m * s_tl + i_h * s_th, mask=m_m, other=0.0)
        b_shift -= (b_dt * b_ent * LN2)[:, None]
    b_shift = tl.where(o_v[None, :] == i_u, -(b_g * b_intra)[:, None], b_shift)
    b_dx = tl.where(m_other, b_g * b_r * b_dx, 0.0)
    tl.store(p_dg + o_row, b_dx.to(p_dg.dtype.element_ty), mask=m_m)
    tl.store(p_blend + o_row, b_g, mask=m_m)
    tl.store(p_blend + s_blend + o_row, b_r, mask=m_m)
    tl.store(p_shift + o_row[:, None] * V + o_v[None, :], b_shift, mask=m_m[:, None] & (o_v < V)[None, :])

    b_dq = tl.zeros([BM, BD], tl.float32)
    b_part = tl.zeros([VP], tl.float32)
    for i_j in range(i_low, i_high):
        i_w = tl.load(p_view + i_j)
        i_start = tl.load(p_tokens + i_j)
        m_own = i_w == i_u
        b_bias = _pair_bias(p_bias, i_h, i_u, i_w, V, HAS_BIAS)
        i_end = _last(i_start, tl.load(p_tokens + i_j + 1), b_bias, HAS_BIAS)
        b_lse = tl.where(m_own, b_lse_intra, b_lse_cross)
        b_rho = tl.where(m_own, b_g, b_r)
        b_tau = tl.where(m_own, 0.0, b_dt * LN2)
        b_own = _column(b_shift, o_v, i_w)
        b_total = tl.zeros([BM], tl.float32)
        for i_n in range(i_start, i_end, BN):
            o_n = i_n + tl.arange(0, BN)
            m_n = o_n < i_end
            p_kn = p_kh + o_n * s_kl
            b_k = _load_rows(p_kn, m_n, o_d, DH)  # [BN, BD]
            b_s = _inner(b_q, b_k, p_qm, m_m, p_kn, m_n, DH, BD, BC) * (SCALE * LOG2E) + b_bias - b_lse[:, None]
            b_p = tl.where(m_m[:, None] & m_n[None, :], tl.exp2(b_s), 0.0)  # [BM, BN]
            b_ds = b_own[:, None] + tl.zeros([BM, BN], tl.float32)
            if HAS_DO:
                p_vn = p_vh + o_n * s_vl
                b_v = _load_rows(p_vn, m_n, o_d, DH)
                b_ds += b_rho[:, None] * _inner(b_do, b_v, p_dom, m_m, p_vn, m_n, DH, BD, BC)
            if HAS_DT:
                b_ds -= b_tau[:, None] * b_s
            b_ds = tl.where(m_m[:, None] & m_n[None, :], b_p * b_ds, 0.0)
            b_total += tl.sum(b_ds, 1)
            b_dq = dot(b_ds.to(b_k.dtype), b_k, b_dq)
        b_part += tl.where((o_v == i_w) & (i_w != i_u), tl.sum(b_total, 0), 0.0)
    p_dqm = p_dq + o_row[:, None] * DH + o_d[None, :]
    tl.store(p_dqm, (b_dq * SCALE).to(p_dq.dtype.element_ty), mask=m_m[:, None] & (o_d < DH)[None, :])
    tl.store(p_part + (i_t * H + i_h) * V + o_v, b_part, mask=o_v < V)
    tl.store(p_tile_view + i_t, i_u)


@triton.jit(do_not_specialize=["segments", "instances"])
def cross_view_tokens_backward_keys(
    p_do, p_dt, p_q, p_k, p_v, p_bias, p_tokens, p_segments, p_view, p_tiles, p_lse_intra, p_lse_cross,
    p_shift, p_blend, p_dk, p_dv,
    segments, instances, H, s_blend,
    s_ol, s_oh, s_tl, s_th, s_ql, s_qh, s_kl, s_kh, s_vl, s_vh,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """dk and dv of BN tokens, from all queries of their instance in tiles of BM."""
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    if i_t >= tl.load(p_tiles + segments):
        return
    i_s = owner(p_tiles, segments, i_t)
    i_i = owner(p_segments, instances, i_s)
    i_w = tl.load(p_view + i_s)
    o_n = tl.load(p_tokens + i_s) + (i_t - tl.load(p_tiles + i_s)) * BN + tl.arange(0, BN)
    m_n = o_n < tl.load(p_tokens + i_s + 1)
    o_d = tl.arange(0, BD)
    p_kn = p_k + o_n * s_kl + i_h * s_kh
    p_vn = p_v + o_n * s_vl + i_h * s_vh
    b_k = _load_rows(p_kn, m_n, o_d, DH)  # [BN, BD]
    b_v = _load_rows(p_vn, m_n, o_d, DH)
    b_dk = tl.zeros([BN, BD], tl.float32)
    b_dv = tl.zeros([BN, BD], tl.float32)
    for i_j in range(tl.load(p_segments + i_i), tl.load(p_segments + i_i + 1)):
        i_u = tl.load(p_view + i_j)
        i_start = tl.load(p_tokens + i_j)
        b_bias = _pair_bias(p_bias, i_h, i_u, i_w, V, HAS_BIAS)
        i_end = _last(i_start, tl.load(p_tokens + i_j + 1), b_bias, HAS_BIAS)
        m_own = i_u == i_w
        p_lse = p_lse_cross
        if m_own:
            p_lse = p_lse_intra
        # The second half of p_blend holds 1 - g.
        p_rho = p_blend + tl.where(m_own, 0, 1).to(tl.int64) * s_blend
        for i_m in range(i_start, i_end, BM):
            o_m = i_m + tl.arange(0, BM)
            m_m = o_m < i_end
            o_row = o_m * H + i_h
            p_qm = p_q + o_m * s_ql + i_h * s_qh
            b_q = _load_rows(p_qm, m_m, o_d, DH)  # [BM, BD]
            b_lse = tl.load(p_lse + o_row, mask=m_m, other=0.0) * LOG2E
            b_s = _inner(b_k, b_q, p_kn, m_n, p_qm, m_m, DH, BD, BC) * (SCALE * LOG2E) + b_bias - b_lse[None, :]
            m_s = m_n[:, None] & m_m[None, :]
            b_p = tl.where(m_s, tl.exp2(b_s), 0.0)  # [BN, BM]
            b_ds = tl.load(p_shift + o_row * V + i_w, mask=m_m, other=0.0)[None, :] + tl.zeros([BN, BM], tl.float32)
            if HAS_DO:
                b_rho = tl.load(p_rho + o_row, mask=m_m, other=0.0)
                p_dom = p_do + o_m * s_ol + i_h * s_oh
                b_do = _load_rows(p_dom, m_m, o_d, DH)
                b_dv = dot((b_p * b_rho[None, :]).to(b_do.dtype), b_do, b_dv)
                b_ds += b_rho[None, :] * _inner(b_v, b_do, p_vn, m_n, p_dom, m_m, DH, BD, BC)
            if HAS_DT:
                b_dt = tl.load(p_dt + o_m * s_tl + i_h * s_th, mask=m_m, other=0.0)
                b_ds -= tl.where(m_own, 0.0, b_dt * LN2)[None, :] * b_s
            b_ds = tl.where(m_s, b_p * b_ds, 0.0)
            b_dk = dot(b_ds.to(b_q.dtype), b_q, b_dk)
    m_nd = m_n[:, None] & (o_d < DH)[None, :]
    o_nd = (o_n * H + i_h)[:, None] * DH + o_d[None, :]
    tl.store(p_dk + o_nd, (b_dk * SCALE).to(p_dk.dtype.element_ty), mask=m_nd)
    tl.store(p_dv + o_nd, b_dv.to(p_dv.dtype.element_ty), mask=m_nd)


@triton.jit(do_not_specialize=["segments"])
def cross_view_tokens_bias_reduce(
    p_part, p_tile_view, p_tiles, p_db, segments, H, V: tl.constexpr, VP: tl.constexpr, BT: tl.constexpr
):
    """d_bias[h, u, :]: the partial sums of the tiles whose queries are of view u, added in order."""
    i_h = (tl.program_id(0) // V).to(tl.int64)
    i_u = tl.program_id(0) % V
    o_v = tl.arange(0, VP)
    i_end = tl.load(p_tiles + segments)
    b_sum = tl.zeros([BT, VP], tl.float32)
    for i_t in range(tl.cast(0, tl.int64), i_end, BT):
        o_t = i_t + tl.arange(0, BT)
        m_t = o_t < i_end
        m_t = m_t & (tl.load(p_tile_view + o_t, mask=m_t, other=-1) == i_u)
        p_t = p_part + (o_t * H + i_h)[:, None] * V + o_v[None, :]
        b_sum += tl.load(p_t, mask=m_t[:, None] & (o_v < V)[None, :], other=0.0)
    tl.store(p_db + (i_h * V + i_u) * V + o_v, tl.sum(b_sum, 0), mask=o_v < V)


def _tile(kernel: str, dtype: torch.dtype, head_dim: int, owned: int, swept: int) -> dict[str, int]:
    features = max(16, next_power_of_2(head_dim))
    # A float32 product runs on the ordinary units from registers: 16 of the inner dimension at a time.
    inner = 16 if dtype == torch.float32 else features
    rows = {"BM": swept, "BN": owned} if kernel == "keys" else {"BM": owned, "BN": swept}
    return {**rows, "BD": features, "BC": inner}


def _short(tokens: int, segments: int) -> bool:
    """Whether segments have 16 tokens or fewer on average: all that tiles may know of lengths."""
    return tokens <= 16 * segments


def _pinned(kernel: str, dtype: torch.dtype, head_dim: int, short: bool) -> Config:
    """For "forward", "queries" or "keys"."""
    most: int | None = None
    if dtype == torch.float32:
        owned, swept, most = 8, 16, 255
    elif short:
        owned, swept, most = 16, 16, 168
    elif head_dim <= 128:
        owned, swept = 128 if head_dim <= 64 else 64, 16 if kernel == "keys" else 32
    else:
        owned, swept = 32, 32
    return Config(_tile(kernel, dtype, head_dim, owned, swept), 8, most)


def key(kernel: str, dtype: torch.dtype, head_dim: int, tokens: int, segments: int) -> str:
    """What a configuration is pinned or measured for; of the lengths only whether segments are short."""
    length = "short" if _short(tokens, segments) else "long"
    return f"cross_view_tokens {kernel} {dtype} Dh={head_dim} {length}"


def _config(kernel: str, q: torch.Tensor, segments: int) -> Config:
    tokens, _, head_dim = q.shape
    pinned = _pinned(kernel, q.dtype, head_dim, _short(tokens, segments))
    return configured(q.device, key(kernel, q.dtype, head_dim, tokens, segments), pinned)


def candidates(kernel: str, dtype: torch.dtype, head_dim: int) -> list[Config]:
    """The configurations that ``umda_fast.kernels.tune`` measures."""
    return [
        Config(_tile(kernel, dtype, head_dim, owned, swept), num_warps)
        for owned in (8, 16, 32, 64, 128)
        for swept in (16, 32, 64)
        for num_warps in (4, 8)
        if owned >= 16 or dtype == torch.float32
    ]


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_segments: torch.Tensor,
    view_of_segment: torch.Tensor,
    num_views: int,
    bias: torch.Tensor | None,
) -> None:
    check_device("q", q)
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q: expected float32, float16 or bfloat16, got {q.dtype}")
    if q.dim() != 3:
        raise ValueError(f"q: expected [L, H, Dh], got {tuple(q.shape)}")
    tokens, heads, head_dim = q.shape
    if not 8 <= head_dim <= 256:
        raise ValueError(f"q: expected a head dimension of 8 to 256 in dimension 2, got {head_dim}")
    if not 1 <= num_views <= 16:
        raise ValueError(f"num_views: expected 1 to 16, got {num_views}")
    check_shape("k", k, q.shape, q.dtype, q)
    check_shape("v", v, q.shape, q.dtype, q)
    check_shape("gate_logits", gate_logits, (tokens, heads), None, q)
    check_shape("bias", bias, (heads, num_views, num_views), None, q)
    for name, x in (("cu_tokens", cu_tokens), ("cu_segments", cu_segments)):
        check_shape(name, x, (max(1, x.numel()),), torch.int64, q)
    check_shape("view_of_segment", view_of_segment, (cu_tokens.shape[0] - 1,), torch.int32, q)


def _strides(x: torch.Tensor | None) -> tuple[int, ...]:
    return (0, 0) if x is None else x.stride()[:2]


def plan_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_segments: torch.Tensor,
    view_of_segment: torch.Tensor,
    num_views: int,
    bias: torch.Tensor | None,
    token_entropy: bool,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """Outputs of ``cross_view_tokens``, not yet written (the mass still one per head), and their launches."""
    tokens, heads, head_dim = q.shape
    segments = cu_tokens.shape[0] - 1
    q, k, v = (innermost_contiguous(x) for x in (q, k, v))
    cu_tokens, cu_segments, view_of_segment = (x.contiguous() for x in (cu_tokens, cu_segments, view_of_segment))
    out = torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device)
    mass = torch.empty((tokens, heads, num_views), dtype=torch.float32, device=q.device)
    entropy, lse_intra, lse_cross = (
        torch.empty((tokens, heads), dtype=torch.float32, device=q.device) for _ in range(3)
    )
    entropy_shape = (tokens, heads) if token_entropy else (0,)
    over_tokens = torch.empty(entropy_shape, dtype=torch.float32, device=q.device)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    outputs = (out, mass, entropy, over_tokens, lse_intra, lse_cross)
    if tokens == 0:
        return [], outputs
    config = _config("forward", q, segments)
    tile = config.tile
    launch = Launch(
        kernel=cross_view_tokens_forward,
        grid=(tokens // tile["BM"] + segments, heads),
        args=(
            *(q, k, v, gate_logits, bias, cu_tokens, cu_segments, view_of_segment),
            tile_offsets(cu_tokens, tile["BM"]),
            *(*outputs[:3], over_tokens, lse_intra, lse_cross),
            *(segments, cu_segments.shape[0] - 1, heads),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate_logits.stride(),
        ),
        constexprs={
            "V": num_views, "DH": head_dim, "SCALE": 1.0 / math.sqrt(head_dim), **tile,
            "VP": next_power_of_2(num_views), "HAS_BIAS": bias is not None, "ENTROPY": token_entropy,
        },
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )  # fmt: skip
    return [launch], outputs


def plan_backward(
    d_out: torch.Tensor | None,
    d_mass: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    d_token_entropy: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_segments: torch.Tensor,
    view_of_segment: torch.Tensor,
    num_views: int,
    bias: torch.Tensor | None,
    lse_intra: torch.Tensor,
    lse_cross: torch.Tensor,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Outputs of ``cross_view_tokens_backward``, not yet written, and the launches that write them."""
    tokens, heads, head_dim = q.shape
    segments, instances = cu_tokens.shape[0] - 1, cu_segments.shape[0] - 1
    q, k, v = (innermost_contiguous(x) for x in (q, k, v))
    cu_tokens, cu_segments, view_of_segment = (x.contiguous() for x in (cu_tokens, cu_segments, view_of_segment))
    lse_intra, lse_cross = lse_intra.contiguous(), lse_cross.contiguous()
    if d_out is not None:
        d_out = innermost_contiguous(d_out)
    dq, dk, dv = (torch.empty((tokens, heads, head_dim), dtype=q.dtype, device=q.device) for _ in range(3))
    d_gate = torch.empty((tokens, heads), dtype=gate_logits.dtype, device=q.device)
    d_bias = torch.empty((heads, num_views, num_views), dtype=torch.float32, device=q.device)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    outputs = (dq, dk, dv, d_gate, d_bias)
    if tokens == 0:
        d_bias.zero_()
        return [], outputs
    config, key_config = _config("queries", q, segments), _config("keys", q, segments)
    tile, key_tile = config.tile, key_config.tile
    shift = torch.empty((tokens, heads, num_views), dtype=torch.float32, device=q.device)
    blend = torch.empty((2, tokens, heads), dtype=torch.float32, device=q.device)
    query_tiles = tokens // tile["BM"] + segments
    partial = torch.empty((query_tiles, heads, num_views), dtype=torch.float32, device=q.device)
    tile_view = torch.empty((query_tiles,), dtype=torch.int32, device=q.device)
    tiles = tile_offsets(cu_tokens, tile["BM"])
    padded = next_power_of_2(num_views)
    common = {"V": num_views, "DH": head_dim, "SCALE": 1.0 / math.sqrt(head_dim)}
    flags = {"HAS_DO": d_out is not None, "HAS_DT": d_token_entropy is not None, "HAS_BIAS": bias is not None}
    queries = Launch(
        kernel=cross_view_tokens_backward_queries,
        grid=(query_tiles, heads),
        args=(
            *(d_out, d_mass, d_entropy, d_token_entropy, q, k, v, gate_logits, bias),
            *(cu_tokens, cu_segments, view_of_segment, tiles, lse_intra, lse_cross),
            *(dq, d_gate, shift, blend, partial, tile_view),
            *(segments, instances, heads, tokens * heads),
            *_strides(d_out), *_strides(d_mass), *_strides(d_entropy), *_strides(d_token_entropy),
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *gate_logits.stride(),
        ),
        constexprs={
            **common, **tile, "VP": padded,
            **flags, "HAS_DM": d_mass is not None, "HAS_DE": d_entropy is not None,
        },
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )  # fmt: skip
    keys = Launch(
        kernel=cross_view_tokens_backward_keys,
        grid=(tokens // key_tile["BN"] + segments, heads),
        args=(
            *(d_out, d_token_entropy, q, k, v, bias),
            *(cu_tokens, cu_segments, view_of_segment, tile_offsets(cu_tokens, key_tile["BN"]), lse_intra,
            lse_cross), *(shift, blend, dk, dv), *(segments, instances, heads, tokens * heads),
            *_strides(d_out), *_strides(d_token_entropy), *q.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        ),
        constexprs={**common, **key_tile, **flags},
        num_warps=key_config.num_warps,
        max_registers=key_config.max_registers,
    )  # fmt: skip
    reduce = Launch(
        kernel=cross_view_tokens_bias_reduce,
        grid=(heads * num_views,),
        args=(partial, tile_view, tiles, d_bias, segments, heads),
        constexprs={"V": num_views, "VP": padded, "BT": 128},
    )
    return [queries, keys, reduce], outputs


def cross_view_tokens(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_segments: torch.Tensor,
    view_of_segment: torch.Tensor,
    num_views: int,
    bias: torch.Tensor | None,
    token_entropy: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hybrid cross-view attention over token sequences (docs/model.md, block 1).

    q, k, v are read through their strides unless the innermost is not 1. Never waits for the device.

    Args:
        q, k, v: [L, H, Dh] float32, float16 or bfloat16, 8 <= Dh <= 256.
        gate_logits: [L, H], any floating dtype.
        cu_tokens: int64 [S + 1]; segment s owns tokens ``cu_tokens[s]:cu_tokens[s + 1]``.
        cu_segments: int64 [n + 1]; instance i owns segments ``cu_segments[i]:cu_segments[i + 1]``.
        view_of_segment: int32 [S] in 0..num_views-1; two segments of one view count as one.
        num_views: 1 to 16.
        bias: [H, V, V] or None; the diagonal is ignored. For a query view, tokens of a view of -inf are no keys.
        token_entropy: whether to return the entropy of the cross softmax over tokens.

    Returns:
        out [L, H, Dh] in q's dtype; float32 mass [L, V] (mean over heads), entropy [L, H], token_entropy
        [L, H] (shape [0] when not asked for), lse_intra and lse_cross [L, H] (-inf where there is no key).

    Raises:
        ValueError: a shape or device that does not fit, Dh or num_views out of range.
        TypeError: a dtype that is not served.
    """
    _check(q, k, v, gate_logits, cu_tokens, cu_segments, view_of_segment, num_views, bias)
    launches, outputs = plan_forward(
        q, k, v, gate_logits, cu_tokens, cu_segments, view_of_segment, num_views, bias, token_entropy
    )
    run_all(launches, q.device)
    out, mass, entropy, over_tokens, lse_intra, lse_cross = outputs
    return out, mass.mean(1), entropy, over_tokens, lse_intra, lse_cross


def cross_view_tokens_backward(
    d_out: torch.Tensor | None,
    d_mass: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    d_token_entropy: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    cu_tokens: torch.Tensor,
    cu_segments: torch.Tensor,
    view_of_segment: torch.Tensor,
    num_views: int,
    bias: torch.Tensor | None,
    lse_intra: torch.Tensor,
    lse_cross: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``cross_view_tokens``; a gradient that is None is taken as zero and costs nothing.

    Args:
        d_out: [L, H, Dh] in q's dtype; d_mass: float32 [L, V]; d_entropy, d_token_entropy: float32 [L, H];
        any
            strides, d_out is copied when its innermost stride is not 1. lse_intra, lse_cross: as the forward
            pass returned them. The rest as in ``cross_view_tokens``; ``out`` is not needed.

    Returns:
        dq, dk, dv [L, H, Dh] in q's dtype, d_gate [L, H] in gate_logits' dtype, d_bias float32 [H, V, V]
        with a zero diagonal, computed even when bias is None.

    Raises:
        ValueError, TypeError: as ``cross_view_tokens``.
    """
    _check(q, k, v, gate_logits, cu_tokens, cu_segments, view_of_segment, num_views, bias)
    tokens, heads, _ = q.shape
    check_shape("d_out", d_out, q.shape, q.dtype, q)
    check_shape("d_mass", d_mass, (tokens, num_views), None, q)
    for name, x in (("d_entropy", d_entropy), ("d_token_entropy", d_token_entropy)):
        check_shape(name, x, (tokens, heads), None, q)
    for name, x in (("lse_intra", lse_intra), ("lse_cross", lse_cross)):
        check_shape(name, x, (tokens, heads), torch.float32, q)
    launches, outputs = plan_backward(
        *(d_out, d_mass, d_entropy, d_token_entropy, q, k, v, gate_logits),
        *(cu_tokens, cu_segments, view_of_segment, num_views, bias, lse_intra, lse_cross),
    )
    run_all(launches, q.device)
    return outputs
