"""A bias, GELU and dropout, between two linear layers, in one pass each way.

====================  ===================================  ======================
pass                  elements that must move, of each     operations
====================  ===================================  ======================
forward               2 (x in; y)                          about 60
backward              3 (x, d_y in; dx)                    about 80
====================  ===================================  ======================

Bound by memory. The mask is drawn again (``_philox``) by every pass. In backward a program owns a run of rows and a
block of columns, and leaves the sum over its rows for the gradient of the bias; ``column_sum`` adds those up in order,
in float64: no atomics, and no number that depends on the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import FLOAT_DTYPES, Launch, ceil_div, check_device, check_shape, run_all
from ._philox import dropout, scale_of
from ._rows import column_sum_launch, row_tile, runs_of_rows

__all__ = ["gelu_dropout", "gelu_dropout_backward", "plan_backward", "plan_forward"]


@triton.jit
def _below(b_x):
    """The normal distribution function."""
    return 0.5 * (1.0 + tl.erf(b_x * 0.7071067811865476))


@triton.jit(do_not_specialize=["threshold"])
def gelu_dropout_forward_kernel(
    p_x, p_b, p_seed, p_y, rows, threshold, scale,
    D: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """One tile [BM, 8 BG] of y."""
    i_program = tl.program_id(0)
    blocks = (D + 8 * BG - 1) // (8 * BG)
    i_m = (i_program // blocks).to(tl.int64) * BM + tl.arange(0, BM)
    i_g = (i_program % blocks) * BG + tl.arange(0, BG)
    i_n = (i_program % blocks) * (8 * BG) + tl.arange(0, 8 * BG)
    m_n = i_n < D
    m_x = (i_m < rows)[:, None] & m_n[None, :]
    i_x = i_m[:, None] * D + i_n[None, :]
    b_x = tl.load(p_x + i_x, mask=m_x, other=0.0).to(tl.float32)
    if p_b is not None:
        b_x += tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_y = b_x * _below(b_x)
    if p_seed is not None:
        b_y = dropout(b_y, p_seed, i_m, i_g, (D + 7) // 8, threshold, scale)
    tl.store(p_y + i_x, b_y.to(p_y.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["threshold"])
def gelu_dropout_backward_kernel(
    p_dy, p_x, p_b, p_seed, p_dx, p_part, rows, run, threshold, scale,
    D: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """8 BG columns of a run of rows of dx, and what they leave for the gradient of the bias."""
    i_program = tl.program_id(0)
    blocks = (D + 8 * BG - 1) // (8 * BG)
    i_run = (i_program // blocks).to(tl.int64)
    i_g = (i_program % blocks) * BG + tl.arange(0, BG)
    i_n = (i_program % blocks) * (8 * BG) + tl.arange(0, 8 * BG)
    m_n = i_n < D
    if p_b is not None:
        b_bias = tl.load(p_b + i_n, mask=m_n, other=0.0).to(tl.float32)
    b_sum = tl.zeros([BM, 8 * BG], tl.float32)
    for first in range(0, run, BM):
        i_m = i_run * run + first + tl.arange(0, BM)
        m_x = (i_m < rows)[:, None] & m_n[None, :]
        i_x = i_m[:, None] * D + i_n[None, :]
        b_x = tl.load(p_x + i_x, mask=m_x, other=0.0).to(tl.float32)
        if p_b is not None:
            b_x += b_bias[None, :]
        b_bell = tl.exp2(b_x * b_x * -0.7213475204444817) * 0.3989422804014327
        b_dx = tl.load(p_dy + i_x, mask=m_x, other=0.0).to(tl.float32) * (_below(b_x) + b_x * b_bell)
        if p_seed is not None:
            b_dx = dropout(b_dx, p_seed, i_m, i_g, (D + 7) // 8, threshold, scale)
        tl.store(p_dx + i_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
        if p_part is not None:
            b_sum += b_dx
    if p_part is not None:
        tl.store(p_part + i_run * D + i_n, tl.sum(b_sum, 0), mask=m_n)


def plan_forward(
    x: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None, threshold: int
) -> tuple[list[Launch], torch.Tensor]:
    """The output of ``gelu_dropout``, not yet written, and the launch that writes it."""
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = row_tile(width)
    launch = Launch(
        kernel=gelu_dropout_forward_kernel,
        grid=(ceil_div(rows, tile["BM"]) * ceil_div(width, 8 * tile["BG"]),),
        args=(x, bias, seed, y, rows, threshold, scale_of(threshold)),
        constexprs={"D": width, **tile},
    )
    return [launch], y


def plan_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
) -> tuple[list[Launch], tuple[torch.Tensor, torch.Tensor]]:
    """Outputs of ``gelu_dropout_backward``, not yet written, and the launches that write them."""
    d_y, x, bias = d_y.contiguous(), x.contiguous(), None if bias is None else bias.contiguous()
    width = x.shape[-1]
    rows = x.numel() // width
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = row_tile(width)
    run, runs = runs_of_rows(rows, tile["BM"])
    part = None if bias is None else torch.empty((runs, 1, width), dtype=torch.float32, device=x.device)
    launches = [
        Launch(
            kernel=gelu_dropout_backward_kernel,
            grid=(runs * ceil_div(width, 8 * tile["BG"]),),
            args=(d_y, x, bias, seed, dx, part, rows, run, threshold, scale_of(threshold)),
            constexprs={"D": width, **tile},
        )
    ]
    if bias is None or part is None:
        return launches, (dx, torch.empty(0, dtype=x.dtype, device=x.device))
    d_bias = torch.empty(width, dtype=bias.dtype, device=x.device)
    return [*launches, column_sum_launch(part, d_bias)], (dx, d_bias)


def _check(x: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None) -> None:
    check_device("x", x)
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x: expected float32, float16 or bfloat16, got {x.dtype}")
    check_shape("bias", bias, x.shape[-1:], None, x)
    check_shape("seed", seed, (), torch.int64, x)


def gelu_dropout(x: torch.Tensor, bias: torch.Tensor | None, seed: torch.Tensor | None, threshold: int) -> torch.Tensor:
    """`dropout(gelu(x + bias))`, rounded once.

    Args:
        x: [..., D] float32, float16 or bfloat16, D >= 1; copied if it is not contiguous.
        bias: [D], any floating dtype, or None.
        seed: int64 [], or None: nothing is dropped.
        threshold: of 65536 random numbers, those that drop an element.

    Returns:
        [..., D] in x's dtype.

    Raises:
        ValueError, TypeError: a shape, device or dtype that does not fit.
    """
    _check(x, bias, seed)
    launches, y = plan_forward(x, bias, seed, threshold)
    run_all(launches, x.device)
    return y


def gelu_dropout_backward(
    d_y: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    seed: torch.Tensor | None,
    threshold: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of ``gelu_dropout``: dx as x, d_bias as bias ([0] without one). ``d_y`` has x's shape and dtype."""
    _check(x, bias, seed)
    check_shape("d_y", d_y, x.shape, x.dtype, x)
    launches, outputs = plan_backward(d_y, x, bias, seed, threshold)
    run_all(launches, x.device)
    return outputs
