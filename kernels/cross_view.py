"""Hybrid cross-view attention, one vector per view: forward and backward in one sweep each.

Traffic and work, per instance, for V views, width D = H * Dh and e bytes per element:

====================  ===========================================  =======================================
pass                  bytes that must move                         multiply-adds
====================  ===========================================  =======================================
forward               4 V D e  (q, k, v in; out)                   (2 V (V - 1) + 2 V) D
                      + 4 V (V + H) (mass, entropy) + V H e
backward              7 V D e  (q, k, v, d_out in; dq, dk, dv)     (5 V (V - 1) + 2 V) D
                      + 2 V H e + 4 V (V + H) where asked for
====================  ===========================================  =======================================

At V = 3 in bfloat16 that is 16 D multiply-adds for 24 D bytes: every GPU in question is bound by memory,
and the aim is that each element crosses the memory bus once. No tensor with an H x V x V block per instance
exists; the backward pass recomputes the probabilities.

Two forms share the mathematics:

- ``registers``, V <= 4. A program owns BN instances (times BH heads when heads are narrow); each view is one
  [BR, BD] tile in registers with the same layout, the loops over views are unrolled, and a logit is one
  reduction over the lanes of a row. Nothing but a few row sums passes through
  shared memory. Rows are instances x heads, heads and
  features are tiled.
- ``matrix``, V 5..16. 4 V^2 logits and gradients no longer fit one by one, so views are padded to 16 and
  one batched matrix product per instance and feature tile yields all of them; features are swept twice,
  once for the logits and once for the values, so registers do not grow with Dh. The second sweep of the
  backward pass re-reads q, k, d_out from cache.

Everything is deterministic: the head mean of ``mass`` is summed by the program that owns the instance, in
order, and ``d_bias`` goes through one partial sum per program that a second kernel adds in order.

With a_w the softmax over the other present views, g the gate, c_w = d_out . v_w + d_mass_w / H, and E the
entropy of p = (g, (1 - g) a):  delta = sum_w a_w c_w,  H_a = -sum_w a_w log a_w,

    ds_w    = (1 - g) a_w (c_w - delta + dE (-log a_w - H_a))
    d_gate  = g (1 - g) (c_own - delta + dE (-gate_logit - H_a))
    dq = scale sum_w ds_w k_w,   dk_w = scale sum_u ds_uw q_u,
    dv_w = sum_u p_uw d_out_u,   d_bias_uw = sum_i ds_uw
"""

# ruff: noqa: RUF005 - a starred tuple is not in Triton's language
from __future__ import annotations

import math

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
from ._primitives import LN2, LOG2E, dot, gate
from ._tuning import Config, configured

__all__ = ["candidates", "cross_view", "cross_view_backward", "key", "plan_backward", "plan_forward"]

# The largest V whose views are unrolled in registers.
REGISTER_VIEWS = 4
# Programs along the instances in the backward pass: enough for many waves on any chip, few enough that the
# partial sums of d_bias (4 H V^2 bytes each) stay far below the tensors themselves. Not a function of the
# device, so that results are not.
MAX_CHUNKS = 4096


@triton.jit
def _load_views(p_x, o_x, s_v, o_d, m_rd, m_v, V: tl.constexpr, HAS_MASK: tl.constexpr):
    """V tiles [BR, BD], one per view; rows of a missing view are zeros, whatever memory holds."""
    b_x = ()
    for u in tl.static_range(V):
        m_x = m_rd
        if HAS_MASK:
            m_x = m_rd & m_v[u][:, None]
        p_u = p_x + tl.cast(u, tl.int64) * s_v
        b_x = b_x + (tl.load(p_u + o_x[:, None] + o_d[None, :], mask=m_x, other=0.0),)  # [BR, BD]
    return b_x


@triton.jit
def _load_mask(p_mask, o_n, m_n, s_mn, s_mv, V: tl.constexpr, HAS_MASK: tl.constexpr):
    """V vectors [BR]: which rows have the view."""
    m_v = ()
    for u in tl.static_range(V):
        if HAS_MASK:
            p_u = p_mask + o_n * s_mn + tl.cast(u, tl.int64) * s_mv
            m_v = m_v + (tl.load(p_u, mask=m_n, other=0) != 0,)
        else:
            m_v = m_v + (m_n,)
    return m_v


@triton.jit
def _attend(
    b_q,
    b_k,
    m_v,
    p_bias,
    o_h,
    m_r,
    u: tl.constexpr,
    V: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
):
    """Softmax of query view u over the others: (a_w), (-log a_w), H_a, some other there. b_q has scale * log2
    e. A view that is missing, or whose bias is -inf, has a logit of -inf and is not there."""
    m_other = m_r
    b_zero = tl.zeros_like(tl.sum(b_q, 1))  # [BR]
    b_max = b_zero - float("inf")
    b_s = ()
    for w in tl.static_range(V):
        if w == u:
            b_s = b_s + (b_zero,)
        else:
            b_sw = tl.sum(b_q * b_k[w].to(tl.float32), 1)  # [BR], base-2 logits
            if HAS_BIAS:
                b_sw += LOG2E * tl.load(p_bias + o_h * (V * V) + (u * V + w), mask=m_r, other=0.0)
            if HAS_MASK:
                b_sw = tl.where(m_v[u] & m_v[w], b_sw, float("-inf"))
            b_max = tl.maximum(b_max, b_sw, propagate_nan=tl.PropagateNan.ALL)
            b_s = b_s + (b_sw,)
    if HAS_MASK or HAS_BIAS:
        b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_sum = b_zero
    b_e = ()
    for w in tl.static_range(V):
        if w == u:
            b_e = b_e + (b_zero,)
        else:
            b_ew = tl.exp2(b_s[w] - b_max)
            b_sum += b_ew
            b_e = b_e + (b_ew,)
    if HAS_MASK or HAS_BIAS:
        m_other = b_sum != 0.0  # it is at least 1 where there is one
        b_sum = tl.where(m_other, b_sum, 1.0)
    b_inverse = 1.0 / b_sum
    b_log = tl.log2(b_sum)
    b_a = ()
    b_l = ()
    b_h = b_zero
    for w in tl.static_range(V):
        if w == u:
            b_a = b_a + (b_zero,)
            b_l = b_l + (b_zero,)
        else:
            b_aw = b_e[w] * b_inverse
            b_lw = LN2 * (b_log - (b_s[w] - b_max))
            if HAS_MASK or HAS_BIAS:
                b_lw = tl.where(b_aw == 0.0, 0.0, b_lw)
            b_h += b_aw * b_lw
            b_a = b_a + (b_aw,)
            b_l = b_l + (b_lw,)
    return b_a, b_l, b_h, m_other


@triton.jit(do_not_specialize=["n"])
def cross_view_forward_registers(
    p_q, p_k, p_v, p_gate, p_bias, p_mask, p_out, p_mass, p_entropy,
    n, H,
    s_qn, s_qv, s_qh, s_kn, s_kv, s_kh, s_vn, s_vv, s_vh, s_gn, s_gv, s_gh, s_mn, s_mv,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """out, mass and entropy of BN instances, all views, all heads in steps of BH."""
    BR: tl.constexpr = BN * BH
    i_b = tl.program_id(0).to(tl.int64)
    o_r = tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    o_n = i_b * BN + o_r // BH  # [BR] instance of a row
    m_n = o_n < n
    m_v = _load_mask(p_mask, o_n, m_n, s_mn, s_mv, V, HAS_MASK)
    b_mass = ()
    for _e in tl.static_range(V * V):
        b_mass = b_mass + (tl.zeros([BN], tl.float32),)
    for i_h in range(0, H, BH):
        o_h = (i_h + o_r % BH).to(tl.int64)  # [BR] head of a row
        m_r = m_n & (o_h < H)
        m_rd = m_r[:, None] & (o_d < DH)[None, :]
        b_q = _load_views(p_q, o_n * s_qn + o_h * s_qh, s_qv, o_d, m_rd, m_v, V, HAS_MASK)
        b_k = _load_views(p_k, o_n * s_kn + o_h * s_kh, s_kv, o_d, m_rd, m_v, V, HAS_MASK)
        b_v = _load_views(p_v, o_n * s_vn + o_h * s_vh, s_vv, o_d, m_rd, m_v, V, HAS_MASK)
        b_sums = ()
        for u in tl.static_range(V):
            m_u = m_r
            if HAS_MASK:
                m_u = m_r & m_v[u]
            b_a, _l, b_h, m_other = _attend(
                b_q[u].to(tl.float32) * (SCALE * LOG2E), b_k, m_v, p_bias, o_h, m_r, u, V, HAS_BIAS, HAS_MASK
            )
            if V == 1:
                m_other = m_r & False
            p_g = p_gate + o_n * s_gn + tl.cast(u, tl.int64) * s_gv + o_h * s_gh
            b_x = tl.load(p_g, mask=m_u, other=0.0).to(tl.float32)
            b_g, b_r, b_hg = gate(b_x, m_other)
            b_o = b_g[:, None] * b_v[u].to(tl.float32)  # [BR, BD]
            for w in tl.static_range(V):
                b_p = b_g
                if w != u:
                    b_p = b_r * b_a[w]
                    b_o += b_p[:, None] * b_v[w].to(tl.float32)
                b_p = tl.where(m_u, b_p, 0.0)
                if BH > 1:
                    b_p = tl.sum(tl.reshape(b_p, (BN, BH)), 1)
                b_sums = b_sums + (b_mass[u * V + w] + b_p,)
            if HAS_MASK:
                b_o = tl.where(m_u[:, None], b_o, 0.0)
            o_row = (o_n * V + u) * H + o_h  # row of the contiguous outputs
            tl.store(p_out + o_row[:, None] * DH + o_d[None, :], b_o.to(p_out.dtype.element_ty), mask=m_rd)
            tl.store(p_entropy + o_row, tl.where(m_u, b_hg + b_r * b_h, 0.0), mask=m_r)
        b_mass = b_sums
    o_b = i_b * BN + tl.arange(0, BN)
    for u in tl.static_range(V):
        for w in tl.static_range(V):
            tl.store(p_mass + o_b * (V * V) + (u * V + w), b_mass[u * V + w] / H, mask=o_b < n)


@triton.jit(do_not_specialize=["n", "blocks"])
def cross_view_backward_registers(
    p_do, p_dm, p_de, p_q, p_k, p_v, p_gate, p_bias, p_mask, p_dq, p_dk, p_dv, p_dg, p_db,
    n, blocks, H,
    s_on, s_ov, s_oh, s_cn, s_cu, s_cw, s_en, s_ev, s_eh,
    s_qn, s_qv, s_qh, s_kn, s_kv, s_kh, s_vn, s_vv, s_vh, s_gn, s_gv, s_gh, s_mn, s_mv,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DM: tl.constexpr, HAS_DE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv, d_gate of ``blocks`` blocks of BN instances for BH heads, and their share of d_bias."""
    BR: tl.constexpr = BN * BH
    # Heads are the faster axis: programs that run together read neighbouring parts of the same rows.
    i_t = tl.program_id(0) % tl.cdiv(H, BH)
    i_c = (tl.program_id(0) // tl.cdiv(H, BH)).to(tl.int64)
    o_r = tl.arange(0, BR)
    o_d = tl.arange(0, BD)
    o_h = (i_t * BH + o_r % BH).to(tl.int64)  # [BR] head of a row
    b_bias = ()
    for _e in tl.static_range(V * V):
        b_bias = b_bias + (tl.zeros([BR], tl.float32),)
    for i_b in range(blocks):
        o_n = (i_c * blocks + i_b) * BN + o_r // BH  # [BR] instance of a row
        m_n = o_n < n
        m_r = m_n & (o_h < H)
        m_rd = m_r[:, None] & (o_d < DH)[None, :]
        m_v = _load_mask(p_mask, o_n, m_n, s_mn, s_mv, V, HAS_MASK)
        b_q = _load_views(p_q, o_n * s_qn + o_h * s_qh, s_qv, o_d, m_rd, m_v, V, HAS_MASK)
        b_k = _load_views(p_k, o_n * s_kn + o_h * s_kh, s_kv, o_d, m_rd, m_v, V, HAS_MASK)
        b_v = _load_views(p_v, o_n * s_vn + o_h * s_vh, s_vv, o_d, m_rd, m_v, V, HAS_MASK)
        if HAS_DO:
            b_do = _load_views(p_do, o_n * s_on + o_h * s_oh, s_ov, o_d, m_rd, m_v, V, HAS_MASK)
        b_dk = ()
        b_dv = ()
        for _e in tl.static_range(V):
            b_dk = b_dk + (tl.zeros([BR, BD], tl.float32),)
            b_dv = b_dv + (tl.zeros([BR, BD], tl.float32),)
        b_new = ()
        for u in tl.static_range(V):
            m_u = m_r
            if HAS_MASK:
                m_u = m_r & m_v[u]
            b_qu = b_q[u].to(tl.float32) * SCALE
            b_a, b_l, b_h, m_other = _attend(b_qu * LOG2E, b_k, m_v, p_bias, o_h, m_r, u, V, HAS_BIAS, HAS_MASK)
            if V == 1:
                m_other = m_r & False
            o_u = tl.cast(u, tl.int64)
            b_x = tl.load(p_gate + o_n * s_gn + o_u * s_gv + o_h * s_gh, mask=m_u, other=0.0).to(tl.float32)
            b_g, b_r, _h = gate(b_x, m_other)
            if HAS_DE:
                b_de = tl.load(p_de + o_n * s_en + o_u * s_ev + o_h * s_eh, mask=m_u, other=0.0)
            if HAS_DO:
                b_dou = b_do[u].to(tl.float32)
            # c_w, the gradient of p_w without the entropy's part
            b_c = ()
            b_delta = tl.zeros([BR], tl.float32)
            for w in tl.static_range(V):
                b_cw = tl.zeros([BR], tl.float32)
                if HAS_DO:
                    b_cw = tl.sum(b_dou * b_v[w].to(tl.float32), 1)
                if HAS_DM:
                    p_c = p_dm + o_n * s_cn + o_u * s_cu + tl.cast(w, tl.int64) * s_cw
                    b_cw += tl.load(p_c, mask=m_u, other=0.0) / H
                if HAS_MASK:
                    b_cw = tl.where(m_u & m_v[w], b_cw, 0.0)
                b_c = b_c + (b_cw,)
                if w != u:
                    b_delta += b_a[w] * b_cw
            b_dx = b_c[u] - b_delta
            if HAS_DE:
                b_dx -= b_de * (b_x + b_h)
            b_dx = tl.where(m_other, b_g * b_r * b_dx, 0.0)
            o_row = (o_n * V + u) * H + o_h  # row of the contiguous outputs
            tl.store(p_dg + o_row, b_dx.to(p_dg.dtype.element_ty), mask=m_r)
            b_dq = tl.zeros([BR, BD], tl.float32)
            b_dk_new = ()
            b_dv_new = ()
            for w in tl.static_range(V):
                if w == u:
                    if HAS_DO:
                        b_dv_new = b_dv_new + (b_dv[w] + b_g[:, None] * b_dou,)
                    b_dk_new = b_dk_new + (b_dk[w],)
                    b_new = b_new + (b_bias[u * V + w],)
                else:
                    b_ds = b_c[w] - b_delta
                    if HAS_DE:
                        b_ds += b_de * (b_l[w] - b_h)
                    b_ds = b_r * b_a[w] * b_ds
                    if HAS_MASK:
                        b_ds = tl.where(m_u & m_v[w], b_ds, 0.0)
                    if HAS_DO:
                        b_dv_new = b_dv_new + (b_dv[w] + (b_r * b_a[w])[:, None] * b_dou,)
                    b_dq += b_ds[:, None] * b_k[w].to(tl.float32)
                    b_dk_new = b_dk_new + (b_dk[w] + b_ds[:, None] * b_qu,)
                    b_new = b_new + (b_bias[u * V + w] + b_ds,)
            b_dk = b_dk_new
            if HAS_DO:
                b_dv = b_dv_new
            p_dqu = p_dq + o_row[:, None] * DH + o_d[None, :]
            tl.store(p_dqu, (b_dq * SCALE).to(p_dq.dtype.element_ty), mask=m_rd)
        b_bias = b_new
        for u in tl.static_range(V):
            o_rd = ((o_n * V + u) * H + o_h)[:, None] * DH + o_d[None, :]
            tl.store(p_dk + o_rd, b_dk[u].to(p_dk.dtype.element_ty), mask=m_rd)
            tl.store(p_dv + o_rd, b_dv[u].to(p_dv.dtype.element_ty), mask=m_rd)
    for u in tl.static_range(V):
        for w in tl.static_range(V):
            if w != u:
                # Rows past the end hold zeros: their a_w and c_w are finite and c_w - delta is 0.
                if BH > 1:
                    o_t = i_t * BH + tl.arange(0, BH)
                    b_part = tl.sum(tl.reshape(b_bias[u * V + w], (BN, BH)), 0)  # [BH]
                    tl.store(p_db + (i_c * H + o_t) * (V * V) + (u * V + w), b_part, mask=o_t < H)
                else:
                    tl.store(p_db + (i_c * H + i_t) * (V * V) + (u * V + w), tl.sum(b_bias[u * V + w], 0))


@triton.jit
def _probabilities(b_s, m_uv, m_wv, m_off):
    """Softmax over the last axis of base-2 logits [BN, VP, VP] within m_off: a, -log a, H_a, allowed,
    other."""
    m_uw = m_uv[:, :, None] & m_wv[:, None, :] & m_off[None, :, :]  # [BN, VP, VP]
    b_s = tl.where(m_uw, b_s, float("-inf"))
    b_max = tl.max(b_s, 2)  # [BN, VP]
    b_t = b_s - tl.where(b_max == float("-inf"), 0.0, b_max)[:, :, None]
    b_e = tl.exp2(b_t)
    b_sum = tl.sum(b_e, 2)
    m_other = b_sum != 0.0  # it is at least 1 where there is one; NaN stays
    b_sum = tl.where(m_other, b_sum, 1.0)
    b_a = b_e / b_sum[:, :, None]
    b_l = tl.where(b_a == 0.0, 0.0, LN2 * (tl.log2(b_sum)[:, :, None] - b_t))
    return b_a, b_l, tl.sum(b_a * b_l, 2), m_uw, m_other


@triton.jit(do_not_specialize=["n"])
def cross_view_forward_matrix(
    p_q, p_k, p_v, p_gate, p_bias, p_mask, p_out, p_mass, p_entropy,
    n, H,
    s_qn, s_qv, s_qh, s_kn, s_kv, s_kh, s_vn, s_vv, s_vh, s_gn, s_gv, s_gh, s_mn, s_mv,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr,
    BN: tl.constexpr, VP: tl.constexpr, BD: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """out, mass and entropy of BN instances, all views, one head after the other, features in tiles of BD."""
    i_b = tl.program_id(0).to(tl.int64)
    o_n = i_b * BN + tl.arange(0, BN)
    o_u = tl.arange(0, VP).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_n = o_n < n
    m_off = o_u[:, None] != o_u[None, :]  # [VP, VP]
    m_u = m_n[:, None] & (o_u < V)[None, :]  # [BN, VP]
    if HAS_MASK:
        m_v = m_u & (tl.load(p_mask + o_n[:, None] * s_mn + o_u[None, :] * s_mv, mask=m_u, other=0) != 0)
    else:
        m_v = m_u
    b_mass = tl.zeros([BN, VP, VP], tl.float32)
    for i_h in range(H):
        o_h = tl.cast(i_h, tl.int64)
        o_q = o_n[:, None] * s_qn + o_u[None, :] * s_qv + o_h * s_qh  # [BN, VP]
        o_k = o_n[:, None] * s_kn + o_u[None, :] * s_kv + o_h * s_kh
        o_v = o_n[:, None] * s_vn + o_u[None, :] * s_vv + o_h * s_vh
        o_row = (o_n[:, None] * V + o_u[None, :]) * H + o_h
        b_s = tl.zeros([BN, VP, VP], tl.float32)
        for i_d in range(0, DH, BD):
            m_d = m_v[:, :, None] & (i_d + o_d < DH)[None, None, :]  # [BN, VP, BD]
            b_q = tl.load(p_q + o_q[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
            b_k = tl.load(p_k + o_k[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
            b_s = dot(b_q, tl.trans(b_k, (0, 2, 1)), b_s)
        b_s *= SCALE * LOG2E
        if HAS_BIAS:
            p_b = p_bias + o_h * (V * V) + o_u[:, None] * V + o_u[None, :]
            b_s += LOG2E * tl.load(p_b, mask=(o_u < V)[:, None] & (o_u < V)[None, :], other=0.0)[None, :, :]
        b_a, _l, b_h, m_uw, m_other = _probabilities(b_s, m_v, m_v, m_off)
        p_g = p_gate + o_n[:, None] * s_gn + o_u[None, :] * s_gv + o_h * s_gh
        b_g, b_r, b_hg = gate(tl.load(p_g, mask=m_v, other=0.0).to(tl.float32), m_other)
        b_p = tl.where(m_uw, b_r[:, :, None] * b_a, 0.0)
        b_p = tl.where(m_v[:, :, None] & (m_off == 0)[None, :, :], b_g[:, :, None], b_p)
        b_mass += b_p
        tl.store(p_entropy + o_row, tl.where(m_v, b_hg + b_r * b_h, 0.0), mask=m_u)
        for i_d in range(0, DH, BD):
            m_d = (i_d + o_d < DH)[None, None, :]
            b_v = tl.load(
                p_v + o_v[:, :, None] + (i_d + o_d)[None, None, :], mask=m_v[:, :, None] & m_d, other=0.0
            )  # [BN, VP, BD]
            b_o = dot(b_p.to(b_v.dtype), b_v, tl.zeros([BN, VP, BD], tl.float32))
            if HAS_MASK:
                b_o = tl.where(m_v[:, :, None], b_o, 0.0)
            p_o = p_out + o_row[:, :, None] * DH + (i_d + o_d)[None, None, :]
            tl.store(p_o, b_o.to(p_out.dtype.element_ty), mask=m_u[:, :, None] & m_d)
    p_m = p_mass + o_n[:, None, None] * (V * V) + o_u[None, :, None] * V + o_u[None, None, :]
    tl.store(p_m, b_mass / H, mask=m_u[:, :, None] & (o_u < V)[None, None, :])


@triton.jit(do_not_specialize=["n", "blocks"])
def cross_view_backward_matrix(
    p_do, p_dm, p_de, p_q, p_k, p_v, p_gate, p_bias, p_mask, p_dq, p_dk, p_dv, p_dg, p_db,
    n, blocks, H,
    s_on, s_ov, s_oh, s_cn, s_cu, s_cw, s_en, s_ev, s_eh,
    s_qn, s_qv, s_qh, s_kn, s_kv, s_kh, s_vn, s_vv, s_vh, s_gn, s_gv, s_gh, s_mn, s_mv,
    V: tl.constexpr, DH: tl.constexpr, SCALE: tl.constexpr,
    BN: tl.constexpr, VP: tl.constexpr, BD: tl.constexpr,
    HAS_DO: tl.constexpr, HAS_DM: tl.constexpr, HAS_DE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """dq, dk, dv, d_gate of ``blocks`` blocks of BN instances for one head, and their share of d_bias."""
    i_h = tl.program_id(0) % H
    i_c = (tl.program_id(0) // H).to(tl.int64)
    o_h = tl.cast(i_h, tl.int64)
    o_u = tl.arange(0, VP).to(tl.int64)
    o_d = tl.arange(0, BD)
    m_off = o_u[:, None] != o_u[None, :]  # [VP, VP]
    m_vv = (o_u < V)[:, None] & (o_u < V)[None, :]
    b_bias = tl.zeros([BN, VP, VP], tl.float32)
    for i_b in range(blocks):
        o_n = (i_c * blocks + i_b) * BN + tl.arange(0, BN)
        m_n = o_n < n
        m_u = m_n[:, None] & (o_u < V)[None, :]  # [BN, VP]
        if HAS_MASK:
            m_v = m_u & (tl.load(p_mask + o_n[:, None] * s_mn + o_u[None, :] * s_mv, mask=m_u, other=0) != 0)
        else:
            m_v = m_u
        o_q = o_n[:, None] * s_qn + o_u[None, :] * s_qv + o_h * s_qh  # [BN, VP]
        o_k = o_n[:, None] * s_kn + o_u[None, :] * s_kv + o_h * s_kh
        o_v = o_n[:, None] * s_vn + o_u[None, :] * s_vv + o_h * s_vh
        o_o = o_n[:, None] * s_on + o_u[None, :] * s_ov + o_h * s_oh
        o_row = (o_n[:, None] * V + o_u[None, :]) * H + o_h
        b_s = tl.zeros([BN, VP, VP], tl.float32)
        b_c = tl.zeros([BN, VP, VP], tl.float32)
        for i_d in range(0, DH, BD):
            m_d = m_v[:, :, None] & (i_d + o_d < DH)[None, None, :]  # [BN, VP, BD]
            b_q = tl.load(p_q + o_q[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
            b_k = tl.load(p_k + o_k[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
            b_s = dot(b_q, tl.trans(b_k, (0, 2, 1)), b_s)
            if HAS_DO:
                b_v = tl.load(p_v + o_v[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
                b_do = tl.load(p_do + o_o[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
                b_c = dot(b_do, tl.trans(b_v, (0, 2, 1)), b_c)
        b_s *= SCALE * LOG2E
        if HAS_BIAS:
            p_b = p_bias + o_h * (V * V) + o_u[:, None] * V + o_u[None, :]
            b_s += LOG2E * tl.load(p_b, mask=m_vv, other=0.0)[None, :, :]
        b_a, b_l, b_h, m_uw, m_other = _probabilities(b_s, m_v, m_v, m_off)
        p_g = p_gate + o_n[:, None] * s_gn + o_u[None, :] * s_gv + o_h * s_gh
        b_x = tl.load(p_g, mask=m_v, other=0.0).to(tl.float32)
        b_g, b_r, _h = gate(b_x, m_other)
        m_own = m_v[:, :, None] & (m_off == 0)[None, :, :]
        if HAS_DM:
            p_c = p_dm + o_n[:, None, None] * s_cn + o_u[None, :, None] * s_cu + o_u[None, None, :] * s_cw
            b_c += tl.load(p_c, mask=m_uw | m_own, other=0.0) / H
        b_own = tl.sum(tl.where(m_own, b_c, 0.0), 2)  # [BN, VP]
        b_delta = tl.sum(tl.where(m_uw, b_a * b_c, 0.0), 2)
        b_dx = b_own - b_delta
        b_ds = b_c - b_delta[:, :, None]
        if HAS_DE:
            p_e = p_de + o_n[:, None] * s_en + o_u[None, :] * s_ev + o_h * s_eh
            b_de = tl.load(p_e, mask=m_v, other=0.0)
            b_dx -= b_de * (b_x + b_h)
            b_ds += b_de[:, :, None] * (b_l - b_h[:, :, None])
        b_dx = tl.where(m_other, b_g * b_r * b_dx, 0.0)
        tl.store(p_dg + o_row, b_dx.to(p_dg.dtype.element_ty), mask=m_u)
        b_p = tl.where(m_uw, b_r[:, :, None] * b_a, 0.0)
        b_ds = tl.where(m_uw, b_p * b_ds, 0.0)
        b_p = tl.where(m_own, b_g[:, :, None], b_p)
        b_bias += b_ds
        b_pt = tl.trans(b_p.to(p_q.dtype.element_ty), (0, 2, 1))  # [BN, VP (key), VP (query)]
        b_dsl = b_ds.to(p_q.dtype.element_ty)
        b_dst = tl.trans(b_dsl, (0, 2, 1))
        for i_d in range(0, DH, BD):
            m_d = m_v[:, :, None] & (i_d + o_d < DH)[None, None, :]
            m_o = m_u[:, :, None] & (i_d + o_d < DH)[None, None, :]
            o_rd = o_row[:, :, None] * DH + (i_d + o_d)[None, None, :]
            b_k = tl.load(p_k + o_k[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
            b_dq = dot(b_dsl, b_k, tl.zeros([BN, VP, BD], tl.float32)) * SCALE
            tl.store(p_dq + o_rd, b_dq.to(p_dq.dtype.element_ty), mask=m_o)
            b_q = tl.load(p_q + o_q[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
            b_dk = dot(b_dst, b_q, tl.zeros([BN, VP, BD], tl.float32)) * SCALE
            tl.store(p_dk + o_rd, b_dk.to(p_dk.dtype.element_ty), mask=m_o)
            b_dv = tl.zeros([BN, VP, BD], tl.float32)
            if HAS_DO:
                b_do = tl.load(p_do + o_o[:, :, None] + (i_d + o_d)[None, None, :], mask=m_d, other=0.0)
                b_dv = dot(b_pt, b_do, b_dv)
            tl.store(p_dv + o_rd, b_dv.to(p_dv.dtype.element_ty), mask=m_o)
    p_part = p_db + (i_c * H + o_h) * (V * V) + o_u[:, None] * V + o_u[None, :]
    tl.store(p_part, tl.sum(b_bias, 0), mask=m_vv)


@triton.jit(do_not_specialize=["chunks", "columns"])
def cross_view_bias_reduce(p_part, p_db, chunks, columns, V: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr):
    """d_bias [H, V, V] from the partial sums [chunks, H, V, V], added in order; diagonal 0."""
    o_w = tl.program_id(0) * BW + tl.arange(0, BW)
    o_c = tl.arange(0, BC).to(tl.int64)
    m_w = (o_w < columns) & ((o_w % (V * V)) // V != o_w % V)
    b_sum = tl.zeros([BC, BW], tl.float32)
    for i_c in range(0, chunks, BC):
        m_c = i_c + o_c < chunks
        p_c = p_part + (i_c + o_c)[:, None] * columns + o_w[None, :]
        b_sum += tl.load(p_c, mask=m_c[:, None] & m_w[None, :], other=0.0)
    tl.store(p_db + o_w, tl.sum(b_sum, 0), mask=o_w < columns)


def _register_tile(dtype: torch.dtype, head_dim: int, heads: int, elements: int, num_warps: int) -> dict[str, int]:
    """BN, BH, BD such that each thread holds ``elements`` elements of a view's tile."""
    features = next_power_of_2(head_dim)
    rows = max(1, 32 * num_warps * elements // features)
    # Narrow heads share a tile until a row of memory read at once is a full 128-byte line.
    line = 128 // dtype.itemsize
    together = min(next_power_of_2(heads), max(1, line // features), rows)
    return {"BN": rows // together, "BH": together, "BD": features}


def _matrix_tile(head_dim: int, instances: int, features: int) -> dict[str, int]:
    return {"BN": instances, "VP": 16, "BD": min(features, max(16, next_power_of_2(head_dim)))}


def _pinned(dtype: torch.dtype, views: int, head_dim: int, heads: int, backward: bool) -> Config:
    if views <= REGISTER_VIEWS:
        # 16 bytes per thread and tile: the widest load there is. Four views' gradients in 16-bit types
        # would take too many registers that way, so there 8 bytes.
        elements = 16 // dtype.itemsize
        if backward and views == REGISTER_VIEWS:
            elements = min(elements, 4)
        tile = _register_tile(dtype, head_dim, heads, elements, num_warps=4)
        # Three programs per multiprocessor where they fit without a spill. Left alone, ptxas spills a few
        # registers of the backward pass of three views with several heads to a tile.
        ceiling = 168 if views < (3 if backward else REGISTER_VIEWS) else None
        if backward and views == 3 and tile["BH"] > 1:
            ceiling = 255
        return Config(tile, 4, ceiling)
    if dtype == torch.float32:
        # The product of float32 tiles runs on the ordinary units from registers; larger tiles spill.
        return Config(_matrix_tile(head_dim, 1, 16), 2) if backward else Config(_matrix_tile(head_dim, 2, 16), 4, 168)
    return Config(_matrix_tile(head_dim, 1, 64), 4) if backward else Config(_matrix_tile(head_dim, 4, 32), 4)


def key(dtype: torch.dtype, views: int, head_dim: int, heads: int, backward: bool) -> str:
    """What a configuration is pinned or measured for; never a number of instances."""
    direction = "backward" if backward else "forward"
    return f"cross_view {direction} {dtype} V={views} H={heads} Dh={head_dim}"


def _config(q: torch.Tensor, backward: bool) -> Config:
    _, views, heads, head_dim = q.shape
    name = key(q.dtype, views, head_dim, heads, backward)
    return configured(q.device, name, _pinned(q.dtype, views, head_dim, heads, backward))


def candidates(dtype: torch.dtype, views: int, head_dim: int, heads: int) -> list[Config]:
    """The configurations that ``umda_fast.kernels.tune`` measures."""
    found: list[Config] = []
    for num_warps in (1, 2, 4, 8):
        if views <= REGISTER_VIEWS:
            tiles = [_register_tile(dtype, head_dim, heads, elements, num_warps) for elements in (2, 4, 8, 16)]
            tiles = [tile for tile in tiles if tile["BN"] * tile["BH"] * tile["BD"] >= 32 * num_warps]
        else:
            tiles = [_matrix_tile(head_dim, n, width) for n in (1, 2, 4, 8) for width in (16, 32, 64)]
        found += [Config(tile, num_warps) for tile in tiles]
    return [config for place, config in enumerate(found) if config not in found[:place]]


def _check(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    check_device("q", q)
    if q.dtype not in FLOAT_DTYPES:
        raise TypeError(f"q: expected float32, float16 or bfloat16, got {q.dtype}")
    if q.dim() != 4:
        raise ValueError(f"q: expected [N, V, H, Dh], got {tuple(q.shape)}")
    n, views, heads, head_dim = q.shape
    if not 1 <= views <= 16:
        raise ValueError(f"q: expected 1 to 16 views in dimension 1, got {views}")
    if not 8 <= head_dim <= 256:
        raise ValueError(f"q: expected a head dimension of 8 to 256 in dimension 3, got {head_dim}")
    check_shape("k", k, q.shape, q.dtype, q)
    check_shape("v", v, q.shape, q.dtype, q)
    check_shape("gate_logits", gate_logits, (n, views, heads), None, q)
    check_shape("bias", bias, (heads, views, views), None, q)
    check_shape("mask", mask, (n, views), torch.bool, q)


def _strides(x: torch.Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def plan_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Outputs of ``cross_view``, not yet written, and the launches that write them."""
    n, views, heads, head_dim = q.shape
    q, k, v = (innermost_contiguous(x) for x in (q, k, v))
    out = torch.empty((n, views, heads, head_dim), dtype=q.dtype, device=q.device)
    mass = torch.empty((n, views, views), dtype=torch.float32, device=q.device)
    entropy = torch.empty((n, views, heads), dtype=torch.float32, device=q.device)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    config = _config(q, backward=False)
    launch = Launch(
        kernel=cross_view_forward_registers if views <= REGISTER_VIEWS else cross_view_forward_matrix,
        grid=(ceil_div(n, config.tile["BN"]),),
        args=(
            *(q, k, v, gate_logits, bias, mask, out, mass, entropy, n, heads),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gate_logits.stride(), *_strides(mask, 2),
        ),
        constexprs={
            "V": views, "DH": head_dim, "SCALE": 1.0 / math.sqrt(head_dim), **config.tile,
            "HAS_BIAS": bias is not None, "HAS_MASK": mask is not None,
        },
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )  # fmt: skip
    return [launch], (out, mass, entropy)


def plan_backward(
    d_out: torch.Tensor | None,
    d_mass: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Outputs of ``cross_view_backward``, not yet written, and the launches that write them."""
    n, views, heads, head_dim = q.shape
    q, k, v = (innermost_contiguous(x) for x in (q, k, v))
    if d_out is not None:
        d_out = innermost_contiguous(d_out)
    shape = (n, views, heads, head_dim)
    dq, dk, dv = (torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(3))
    d_gate = torch.empty((n, views, heads), dtype=gate_logits.dtype, device=q.device)
    d_bias = torch.empty((heads, views, views), dtype=torch.float32, device=q.device)
    if bias is not None:
        bias = bias.to(torch.float32).contiguous()
    config = _config(q, backward=True)
    tile = config.tile
    all_blocks = ceil_div(n, tile["BN"])
    blocks = max(1, ceil_div(all_blocks, MAX_CHUNKS))
    chunks = ceil_div(all_blocks, blocks)
    partial = torch.empty((chunks, heads, views, views), dtype=torch.float32, device=q.device)
    main = Launch(
        kernel=cross_view_backward_registers if views <= REGISTER_VIEWS else cross_view_backward_matrix,
        grid=(chunks * ceil_div(heads, tile.get("BH", 1)),),
        args=(
            *(d_out, d_mass, d_entropy, q, k, v, gate_logits, bias, mask, dq, dk, dv, d_gate, partial),
            *(n, blocks, heads),
            *_strides(d_out, 3), *_strides(d_mass, 3), *_strides(d_entropy, 3),
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gate_logits.stride(), *_strides(mask, 2),
        ),
        constexprs={
            "V": views, "DH": head_dim, "SCALE": 1.0 / math.sqrt(head_dim), **tile,
            "HAS_DO": d_out is not None, "HAS_DM": d_mass is not None, "HAS_DE": d_entropy is not None,
            "HAS_BIAS": bias is not None, "HAS_MASK": mask is not None,
        },
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )  # fmt: skip
    columns = heads * views * views
    reduce = Launch(
        kernel=cross_view_bias_reduce,
        grid=(ceil_div(columns, 16),),
        args=(partial, d_bias, chunks, columns),
        constexprs={"V": views, "BC": 128, "BW": 16},
    )
    return [main, reduce], (dq, dk, dv, d_gate, d_bias)


def cross_view(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hybrid cross-view attention with one vector per view (docs/model.md, block 1).

    q, k, v are read through their strides (slices of a packed QKV tensor are not copied) unless the
    innermost stride is not 1; bias is copied when it is not contiguous float32. Never waits for the device.

    Args:
        q, k, v: [N, V, H, Dh] float32, float16 or bfloat16, 1 <= V <= 16, 8 <= Dh <= 256.
        gate_logits: [N, V, H], any floating dtype.
        bias: [H, V, V], added to the logits in natural units; the diagonal is ignored. None: zero. For a query view
            a key view of -inf is as if it were missing.
        mask: bool [N, V], which views an instance has. None: all. Missing rows may hold anything.

    Returns:
        out [N, V, H, Dh] in q's dtype, mass float32 [N, V, V] (mean over heads), entropy float32 [N, V, H];
        zero at missing views.

    Raises:
        ValueError: a shape or device that does not fit, V or Dh out of range.
        TypeError: a dtype that is not served.
    """
    _check(q, k, v, gate_logits, bias, mask)
    launches, outputs = plan_forward(q, k, v, gate_logits, bias, mask)
    run_all(launches, q.device)
    return outputs


def cross_view_backward(
    d_out: torch.Tensor | None,
    d_mass: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    gate_logits: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of ``cross_view``; a gradient that is None is taken as zero and costs nothing.

    Args:
        d_out: [N, V, H, Dh] in q's dtype, d_mass: float32 [N, V, V], d_entropy: float32 [N, V, H]; any
        strides, d_out is
            copied when its innermost stride is not 1. The rest as in ``cross_view``.

    Returns:
        dq, dk, dv [N, V, H, Dh] in q's dtype, d_gate [N, V, H] in gate_logits' dtype, d_bias float32 [H, V,
        V] with a zero diagonal, computed even when bias is None. Zero at missing views.

    Raises:
        ValueError, TypeError: as ``cross_view``.
    """
    _check(q, k, v, gate_logits, bias, mask)
    n, views, heads, _ = q.shape
    check_shape("d_out", d_out, q.shape, q.dtype, q)
    check_shape("d_mass", d_mass, (n, views, views), None, q)
    check_shape("d_entropy", d_entropy, (n, views, heads), None, q)
    launches, outputs = plan_backward(d_out, d_mass, d_entropy, q, k, v, gate_logits, bias, mask)
    run_all(launches, q.device)
    return outputs
