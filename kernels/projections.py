"""Linear layers that take what stands around them along.

`norm_linear`: a layer norm and up to two linear layers that read it; the normalised rows exist in registers only.
Traffic: x once from memory (once more per block of columns, from the level-2 cache: blocks of one row tile run side by
side), the results once, the weights from cache. `linear_residual`: a linear layer whose result is dropped out and added
to the residual stream before it is written: the product itself never reaches memory.

Both are matrix products [M, D] x [D, P] on the tensor cores with float32 accumulation; the statistics of a row are
merged from those of its tiles of columns (Chan, Golub and LeVeque 1983), so a large mean costs no digits. Backward is
not fused: it recomputes the normalised rows and leaves the products, which are plain ones, to the library.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from umda_fast.kernels._launch import (
    FLOAT_DTYPES,
    Launch,
    ceil_div,
    check_device,
    check_shape,
    next_power_of_2,
    run_all,
)
from umda_fast.kernels._primitives import dot
from umda_fast.kernels._tuning import Config, configured

__all__ = ["linear_residual", "norm_linear", "plan_linear_residual", "plan_norm_linear"]


@triton.jit
def norm_linear_kernel(
    p_x, p_gamma, p_beta, p_w, p_b, p_w2, p_b2, p_y, p_y2, p_mean, p_rstd,
    rows, columns, columns2, blocks, blocks2, eps,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of y, or of y2 for the last ``blocks2`` blocks of columns."""
    i_program = tl.program_id(0)
    i_block = i_program % (blocks + blocks2)
    i_m = (i_program // (blocks + blocks2)).to(tl.int64) * BM + tl.arange(0, BM)
    m_m = i_m < rows
    i_k = tl.arange(0, BK)
    b_mean = tl.zeros([BM], tl.float32)
    b_m2 = tl.zeros([BM], tl.float32)
    for k in range(0, D, BK):
        m_x = m_m[:, None] & (k + i_k < D)[None, :]
        b_x = tl.load(p_x + i_m[:, None] * D + (k + i_k)[None, :], mask=m_x, other=0.0).to(tl.float32)
        count = min(BK, D - k)
        b_tile = tl.sum(b_x, 1) / count
        b_off = tl.where((k + i_k < D)[None, :], b_x - b_tile[:, None], 0.0)
        b_delta = b_tile - b_mean
        b_m2 += tl.sum(b_off * b_off, 1) + b_delta * b_delta * (k * count / (k + count))
        b_mean += b_delta * (count / (k + count))
    b_rstd = 1.0 / tl.sqrt(b_m2 / D + eps)
    if i_block == 0:
        tl.store(p_mean + i_m, b_mean, mask=m_m)
        tl.store(p_rstd + i_m, b_rstd, mask=m_m)

    second = i_block >= blocks
    if second:
        p_out = p_y2
        p_weight = p_w2
        width = columns2
        i_n = (i_block - blocks) * BN + tl.arange(0, BN)
    else:
        p_out = p_y
        p_weight = p_w
        width = columns
        i_n = i_block * BN + tl.arange(0, BN)
    m_n = i_n < width
    b_y = tl.zeros([BM, BN], tl.float32)
    for k in range(0, D, BK):
        m_k = k + i_k < D
        b_x = tl.load(p_x + i_m[:, None] * D + (k + i_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_gamma = tl.load(p_gamma + k + i_k, mask=m_k, other=0.0).to(tl.float32)
        b_beta = tl.load(p_beta + k + i_k, mask=m_k, other=0.0).to(tl.float32)
        b_n = (b_x.to(tl.float32) - b_mean[:, None]) * b_rstd[:, None] * b_gamma[None, :] + b_beta[None, :]
        m_w = m_k[:, None] & m_n[None, :]
        b_w = tl.load(p_weight + i_n[None, :].to(tl.int64) * D + (k + i_k)[:, None], mask=m_w, other=0.0)
        b_y = dot(b_n.to(b_w.dtype), b_w, b_y)
    if second:
        if p_b2 is not None:
            b_y += tl.load(p_b2 + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    else:
        if p_b is not None:
            b_y += tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        p_out + i_m[:, None] * width + i_n[None, :], b_y.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :]
    )


@triton.jit
def linear_residual_kernel(
    p_x, p_w, p_b, p_residual, p_keep, p_y, rows, columns, blocks, scale,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BN] of y."""
    i_program = tl.program_id(0)
    i_m = (i_program // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    i_n = (i_program % blocks) * BN + tl.arange(0, BN)
    m_m, m_n = i_m < rows, i_n < columns
    i_k = tl.arange(0, BK)
    b_y = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        m_k = k + i_k < K
        b_x = tl.load(p_x + i_m[:, None] * K + (k + i_k)[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
        m_w = m_k[:, None] & m_n[None, :]
        b_w = tl.load(p_w + i_n[None, :].to(tl.int64) * K + (k + i_k)[:, None], mask=m_w, other=0.0)
        b_y = dot(b_x, b_w, b_y)
    if p_b is not None:
        b_y += tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    i_y = i_m[:, None] * columns + i_n[None, :]
    if p_keep is not None:
        b_y = tl.where(tl.load(p_keep + i_y, mask=m_y, other=False), b_y * scale, 0.0)
    b_y += tl.load(p_residual + i_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y + i_y, b_y.to(p_y.dtype.element_ty), mask=m_y)


def _config(name: str, dtype: torch.dtype, width: int, device: torch.device) -> Config:
    wide = dtype == torch.float32
    # A float32 product holds its operands in registers, and so do rows that 16 bytes do not divide: larger tiles spill.
    edge = 32 if wide or width % 8 else 64
    columns = 16 if wide else min(edge, max(16, next_power_of_2(width)))
    return configured(device, f"{name} {dtype} D={width}", Config({"BM": edge, "BN": edge, "BK": columns}, 4))


def plan_norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight2: torch.Tensor | None,
    bias2: torch.Tensor | None,
    eps: float,
) -> tuple[list[Launch], tuple[torch.Tensor, ...]]:
    """Outputs of ``norm_linear``, not yet written, and the launch that writes them."""
    x, weight = x.contiguous(), weight.contiguous()
    weight2 = None if weight2 is None else weight2.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    columns, columns2 = weight.shape[0], 0 if weight2 is None else weight2.shape[0]
    y = torch.empty((*x.shape[:-1], columns), dtype=weight.dtype, device=x.device)
    y2 = torch.empty((*x.shape[:-1], columns2), dtype=weight.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    config = _config("norm_linear", weight.dtype, width, x.device)
    blocks, blocks2 = ceil_div(columns, config.tile["BN"]), ceil_div(columns2, config.tile["BN"])
    launch = Launch(
        kernel=norm_linear_kernel,
        grid=(ceil_div(rows, config.tile["BM"]) * (blocks + blocks2),),
        args=(
            *(x, norm_weight.contiguous(), norm_bias.contiguous(), weight, bias),
            *(weight if weight2 is None else weight2, bias2, y, y2, mean, rstd),
            *(rows, columns, columns2, blocks, blocks2, eps),
        ),
        constexprs={"D": width, **config.tile},
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return [launch], (y, y2, mean, rstd)


def norm_linear(
    x: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    weight2: torch.Tensor | None,
    bias2: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`LN(x) weight^T + bias` and `LN(x) weight2^T + bias2`.

    Args:
        x: [..., D] float32, float16 or bfloat16, D >= 1; copied if it is not contiguous.
        norm_weight, norm_bias: [D], any floating dtype.
        weight: [P, D], weight2: [P2, D] or None; one dtype of those above. bias: [P] or None, bias2: [P2] or None.

    Returns:
        y [..., P] and y2 [..., P2] (P2 = 0 without weight2) in the dtype of weight; mean and 1 / deviation of every
        row, float32 [...].

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit.
    """
    check_device("x", x)
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    width = x.shape[-1]
    check_shape("norm_weight", norm_weight, (width,), None, x)
    check_shape("norm_bias", norm_bias, (width,), None, x)
    check_shape("weight", weight, (weight.shape[0], width), weight.dtype, x)
    check_shape("bias", bias, weight.shape[:1], None, x)
    if weight2 is not None:
        check_shape("weight2", weight2, (weight2.shape[0], width), weight.dtype, x)
        check_shape("bias2", bias2, weight2.shape[:1], None, x)
    launches, (y, y2, mean, rstd) = plan_norm_linear(x, norm_weight, norm_bias, weight, bias, weight2, bias2, eps)
    run_all(launches, x.device)
    return y, y2, mean, rstd


def plan_linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
) -> tuple[list[Launch], torch.Tensor]:
    """The output of ``linear_residual``, not yet written, and the launch that writes it."""
    x, weight, residual = x.contiguous(), weight.contiguous(), residual.contiguous()
    keep = None if keep is None else keep.contiguous()
    columns, width = weight.shape
    rows = residual.numel() // columns
    y = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    config = _config("linear_residual", weight.dtype, width, x.device)
    blocks = ceil_div(columns, config.tile["BN"])
    launch = Launch(
        kernel=linear_residual_kernel,
        grid=(ceil_div(rows, config.tile["BM"]) * blocks,),
        args=(x, weight, bias, residual, keep, y, rows, columns, blocks, scale),
        constexprs={"K": width, **config.tile},
        num_warps=config.num_warps,
        max_registers=config.max_registers,
    )
    return [launch], y


def linear_residual(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """`residual + scale * keep * (x weight^T + bias)`, rounded once.

    Args:
        x: [..., K]; weight: [P, K] in its dtype: float32, float16 or bfloat16. bias: [P] or None.
        residual: [..., P], any of those dtypes. keep: bool [..., P] or None. What is not contiguous is copied.

    Returns:
        [..., P] in the dtype of residual.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit.
    """
    check_device("x", x)
    for name, tensor in (("x", x), ("residual", residual)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    check_shape("weight", weight, (weight.shape[0], x.shape[-1]), x.dtype, x)
    check_shape("bias", bias, weight.shape[:1], None, x)
    shape = (*x.shape[:-1], weight.shape[0])
    check_shape("residual", residual, shape, None, x)
    check_shape("keep", keep, shape, torch.bool, x)
    launches, y = plan_linear_residual(x, weight, bias, residual, keep, scale)
    run_all(launches, x.device)
    return y
