"""What a block adds to a residual stream, and the layer norm of the sum, in one pass each way.

====================  ==========================================================  ==================
pass                  elements that must move, of each                            operations
====================  ==========================================================  ==================
forward               4 (x, residual in; s, LN(s))                                about 40
backward              6 (d_sum, d_normed, s, x in; dx, d_residual)                about 60
====================  ==========================================================  ==================

Bound by memory. A program holds whole rows in registers: moments are those of a row that is not read again, and the
mask is drawn again (``_philox``). In backward a program owns a run of rows, and leaves the sums over them for the
gradients of the four vectors; ``column_sum`` adds those up in order, in float64: no atomics, and no number that depends
on the device. With n = (s - mean) / deviation and a = d_normed * norm_weight:

    d_residual = d_sum + (a - mean(a) - n mean(a n)) / deviation
    dx = gain * dropout(d_residual);   d_gain = sum of dropout(d_residual) (x + bias)
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import FLOAT_DTYPES, Launch, ceil_div, check_device, check_shape, next_power_of_2, run_all
from ._philox import dropout, scale_of
from ._rows import column_sum_launch, row_tile, runs_of_rows

__all__ = ["dropout_add_norm", "dropout_add_norm_backward", "plan_backward", "plan_forward"]

MAX_WIDTH = 4096


@triton.jit
def _vector(p_v, i_n, m_n):
    """A vector in float32, as a row."""
    return tl.load(p_v + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["threshold"])
def dropout_add_norm_forward_kernel(
    p_x, p_b, p_g, p_r, p_w, p_h, p_seed, p_s, p_n, p_mean, p_rstd, rows, threshold, scale, eps,
    D: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """BM rows of s, of LN(s) and of its moments."""
    i_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    i_n = tl.arange(0, 8 * BG)
    m_m, m_n = i_m < rows, i_n < D
    m_x = m_m[:, None] & m_n[None, :]
    i_x = i_m[:, None] * D + i_n[None, :]
    b_x = tl.load(p_x + i_x, mask=m_x, other=0.0).to(tl.float32)
    if p_b is not None:
        b_x += _vector(p_b, i_n, m_n)
    if p_seed is not None:
        b_x = dropout(b_x, p_seed, i_m, tl.arange(0, BG), (D + 7) // 8, threshold, scale)
    if p_g is not None:
        b_x = b_x * _vector(p_g, i_n, m_n)
    b_s = (tl.load(p_r + i_x, mask=m_x, other=0.0).to(tl.float32) + b_x).to(p_s.dtype.element_ty)
    tl.store(p_s + i_x, b_s, mask=m_x)
    if p_w is not None:
        b_s = b_s.to(tl.float32)
        b_mean = tl.sum(tl.where(m_n[None, :], b_s, 0.0), 1) / D
        b_off = tl.where(m_n[None, :], b_s - b_mean[:, None], 0.0)
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_off * b_off, 1) / D + eps)
        b_n = b_off * b_rstd[:, None] * _vector(p_w, i_n, m_n) + _vector(p_h, i_n, m_n)
        tl.store(p_n + i_x, b_n.to(p_n.dtype.element_ty), mask=m_x)
        tl.store(p_mean + i_m, b_mean, mask=m_m)
        tl.store(p_rstd + i_m, b_rstd, mask=m_m)


@triton.jit(do_not_specialize=["threshold"])
def dropout_add_norm_backward_kernel(
    p_ds, p_dn, p_x, p_b, p_g, p_s, p_w, p_mean, p_rstd, p_seed, p_dx, p_dr, p_part, rows, run, threshold, scale,
    D: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """A run of rows of dx and d_residual, and what they leave for the gradients of bias, gain, scale and shift."""
    i_run = tl.program_id(0).to(tl.int64)
    i_n = tl.arange(0, 8 * BG)
    m_n = i_n < D
    b_db = tl.zeros([BM, 8 * BG], tl.float32)
    b_dg = tl.zeros([BM, 8 * BG], tl.float32)
    b_dw = tl.zeros([BM, 8 * BG], tl.float32)
    b_dh = tl.zeros([BM, 8 * BG], tl.float32)
    for first in range(0, run, BM):
        i_m = i_run * run + first + tl.arange(0, BM)
        m_m = i_m < rows
        m_x = m_m[:, None] & m_n[None, :]
        i_x = i_m[:, None] * D + i_n[None, :]
        b_d = tl.zeros([BM, 8 * BG], tl.float32)
        if p_ds is not None:
            b_d += tl.load(p_ds + i_x, mask=m_x, other=0.0).to(tl.float32)
        if p_dn is not None:
            b_mean = tl.load(p_mean + i_m, mask=m_m, other=0.0)[:, None]
            b_rstd = tl.load(p_rstd + i_m, mask=m_m, other=0.0)[:, None]
            b_n = (tl.load(p_s + i_x, mask=m_x, other=0.0).to(tl.float32) - b_mean) * b_rstd
            b_dn = tl.load(p_dn + i_x, mask=m_x, other=0.0).to(tl.float32)
            b_dw += b_dn * b_n
            b_dh += b_dn
            b_a = b_dn * _vector(p_w, i_n, m_n)  # 0 beyond the row
            b_straight = tl.sum(b_a, 1)[:, None] / D
            b_along = tl.sum(b_a * b_n, 1)[:, None] / D
            b_d += (b_a - b_straight - b_n * b_along) * b_rstd
        tl.store(p_dr + i_x, b_d.to(p_dr.dtype.element_ty), mask=m_x)
        if p_seed is not None:
            b_d = dropout(b_d, p_seed, i_m, tl.arange(0, BG), (D + 7) // 8, threshold, scale)
        if p_g is not None:
            b_x = tl.load(p_x + i_x, mask=m_x, other=0.0).to(tl.float32)
            if p_b is not None:
                b_x += _vector(p_b, i_n, m_n)
            # What was dropped may be anything, infinity too.
            b_dg += tl.where(m_x & (b_d != 0.0), b_d * b_x, 0.0)
            b_d = b_d * _vector(p_g, i_n, m_n)
        tl.store(p_dx + i_x, b_d.to(p_dx.dtype.element_ty), mask=m_x)
        b_db += tl.where(m_x, b_d, 0.0)
    p_run = p_part + i_run * (4 * D) + i_n
    tl.store(p_run, tl.sum(b_db, 0), mask=m_n)
    tl.store(p_run + D, tl.sum(b_dg, 0), mask=m_n)
    tl.store(p_run + 2 * D, tl.sum(b_dw, 0), mask=m_n)
    tl.store(p_run + 3 * D, tl.sum(b_dh, 0), mask=m_n)


def _tile(width: int, elements: int) -> tuple[dict[str, int], int]:
    """BM whole rows of BG groups of eight columns, and warps: ``elements`` to a thread, four warps where rows allow."""
    columns = max(8, next_power_of_2(width))
    warps = max(4, min(16, columns // (32 * elements)))
    return row_tile(width, max(columns, 32 * warps * elements), MAX_WIDTH), warps


def plan_forward(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    eps: float,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Outputs of ``dropout_add_norm``, not yet written, and the launch that writes them."""
    x, residual = x.contiguous(), residual.contiguous()
    bias, gain, norm_weight, norm_bias = (_contiguous(v) for v in (bias, gain, norm_weight, norm_bias))
    width = x.shape[-1]
    rows = x.numel() // width
    total = torch.empty(x.shape, dtype=residual.dtype, device=x.device)
    normed = torch.empty((0,) if norm_weight is None else x.shape, dtype=x.dtype, device=x.device)
    moments = (0,) if norm_weight is None else x.shape[:-1]
    mean, rstd = (torch.empty(moments, dtype=torch.float32, device=x.device) for _ in range(2))
    tile, warps = _tile(width, 16)
    launch = Launch(
        kernel=dropout_add_norm_forward_kernel,
        grid=(ceil_div(rows, tile["BM"]),),
        args=(
            *(x, bias, gain, residual, norm_weight, norm_bias, seed, total, normed, mean, rstd),
            *(rows, threshold, scale_of(threshold), eps),
        ),
        constexprs={"D": width, **tile},
        num_warps=warps,
    )
    return [launch], (total, normed, mean, rstd)


def plan_backward(
    d_sum: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    total: torch.Tensor,
    norm_weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    threshold: int,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """Outputs of ``dropout_add_norm_backward``, not yet written, and the launches that write them."""
    x, total, mean, rstd = x.contiguous(), total.contiguous(), mean.contiguous(), rstd.contiguous()
    d_sum, d_normed = _contiguous(d_sum), _contiguous(d_normed)
    bias, gain, norm_weight = _contiguous(bias), _contiguous(gain), _contiguous(norm_weight)
    width = x.shape[-1]
    rows = x.numel() // width
    dx, d_residual = torch.empty_like(x), torch.empty_like(total)
    tile, warps = _tile(width, 8)
    run, runs = runs_of_rows(rows, tile["BM"])
    part = torch.empty((runs, 4, width), dtype=torch.float32, device=x.device)
    launches = [
        Launch(
            kernel=dropout_add_norm_backward_kernel,
            grid=(runs,),
            args=(
                *(d_sum, d_normed, x, bias, gain, total, norm_weight, mean, rstd, seed, dx, d_residual, part),
                *(rows, run, threshold, scale_of(threshold)),
            ),
            constexprs={"D": width, **tile},
            num_warps=warps,
        )
    ]
    vectors = (bias, gain, norm_weight, norm_weight)
    sums = [None if v is None else torch.empty(width, dtype=v.dtype, device=x.device) for v in vectors]
    if any(v is not None for v in vectors):
        launches.append(column_sum_launch(part, *sums))
    nothing = [torch.empty(0, dtype=x.dtype, device=x.device) if s is None else s for s in sums]
    return launches, (dx, d_residual, *nothing)


def _contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()


def _check(
    x: torch.Tensor, stream: torch.Tensor, vectors: dict[str, torch.Tensor | None], seed: torch.Tensor | None
) -> None:
    check_device("x", x)
    for name, tensor in (("x", x), ("residual", stream)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    if not 1 <= x.shape[-1] <= MAX_WIDTH:
        raise ValueError(f"x: expected rows of 1 to {MAX_WIDTH} elements, got {x.shape[-1]}")
    check_shape("residual", stream, x.shape, None, x)
    for name, vector in vectors.items():
        check_shape(name, vector, x.shape[-1:], None, x)
    check_shape("seed", seed, (), torch.int64, x)


def dropout_add_norm(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    residual: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`s = residual + gain * dropout(x + bias)`, and `LN(s)`.

    Args:
        x, residual: [..., D], D in 1..4096, each float32, float16 or bfloat16; copied if they are not contiguous.
        bias, gain: [D], any floating dtype, or None. norm_weight, norm_bias: so too, both or neither.
        seed: int64 [], or None: nothing is dropped.
        threshold: of 65536 random numbers, those that drop an element.

    Returns:
        s in residual's dtype, LN(s) in x's, mean and 1 / deviation of every row, float32 [...]; the last three [0]
        without a layer norm.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit.
    """
    vectors = {"bias": bias, "gain": gain, "norm_weight": norm_weight, "norm_bias": norm_bias}
    _check(x, residual, vectors, seed)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError("norm_weight, norm_bias: expected both or neither")
    launches, outputs = plan_forward(x, bias, gain, residual, norm_weight, norm_bias, seed, threshold, eps)
    run_all(launches, x.device)
    return outputs


def dropout_add_norm_backward(
    d_sum: torch.Tensor | None,
    d_normed: torch.Tensor | None,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    gain: torch.Tensor | None,
    total: torch.Tensor,
    norm_weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    threshold: int,
) -> tuple[torch.Tensor, ...]:
    """Gradients of ``dropout_add_norm``: dx as x, d_residual as residual, and those of bias, gain, norm_weight and
    norm_bias ([0] of what is None). ``total``, ``mean`` and ``rstd`` are what it returned."""
    _check(x, total, {"bias": bias, "gain": gain, "norm_weight": norm_weight}, seed)
    check_shape("d_sum", d_sum, x.shape, total.dtype, x)
    check_shape("d_normed", d_normed, x.shape, x.dtype, x)
    if d_normed is not None:
        check_shape("mean", mean, x.shape[:-1], torch.float32, x)
        check_shape("rstd", rstd, x.shape[:-1], torch.float32, x)
    launches, outputs = plan_backward(d_sum, d_normed, x, bias, gain, total, norm_weight, mean, rstd, seed, threshold)
    run_all(launches, x.device)
    return outputs
