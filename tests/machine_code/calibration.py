"""Kernels whose speed is published, to be read by the same model: how far off is it?

Simple forms of what others have measured; what is compared is the kind of kernel at the width named, not this code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import triton
import triton.language as tl

from umda_fast.kernels._launch import Launch, ceil_div

__all__ = ["CALIBRATION", "Published"]

ROWS = 32768


@triton.jit
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """y = x, float32."""
    i_x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i_x, tl.load(p_x + i_x, mask=i_x < n), mask=i_x < n)


@triton.jit
def softmax_kernel(p_x, p_y, COLUMNS: tl.constexpr):
    """Softmax of one row that fits in registers."""
    i_x = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    b_x = tl.load(p_x + i_x).to(tl.float32)
    b_p = tl.exp(b_x - tl.max(b_x, 0))
    tl.store(p_y + i_x, (b_p / tl.sum(b_p, 0)).to(p_y.dtype.element_ty))


@triton.jit
def layer_norm_kernel(p_x, p_w, p_b, p_y, eps, COLUMNS: tl.constexpr):
    """Layer norm of one row that fits in registers."""
    i_c = tl.arange(0, COLUMNS)
    i_x = tl.program_id(0).to(tl.int64) * COLUMNS + i_c
    b_x = tl.load(p_x + i_x).to(tl.float32)
    b_x -= tl.sum(b_x, 0) / COLUMNS
    b_x *= tl.rsqrt(tl.sum(b_x * b_x, 0) / COLUMNS + eps)
    b_y = b_x * tl.load(p_w + i_c).to(tl.float32) + tl.load(p_b + i_c).to(tl.float32)
    tl.store(p_y + i_x, b_y.to(p_y.dtype.element_ty))


@triton.jit
def attention_kernel(
    p_q, p_k, p_v, p_o, n, scale,
    DH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Flash attention, forward: a tile of queries against all keys of a head; n is a multiple of both tiles."""
    first = tl.program_id(1).to(tl.int64) * n * DH
    i_d = tl.arange(0, DH)
    i_m = tl.program_id(0) * BM + tl.arange(0, BM)
    b_q = tl.load(p_q + first + i_m[:, None] * DH + i_d[None, :])
    b_top = tl.full([BM], float("-inf"), tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_o = tl.zeros([BM, DH], tl.float32)
    for i_b in range(0, n, BN):
        i_n = i_b + tl.arange(0, BN)
        b_k = tl.load(p_k + first + i_n[None, :] * DH + i_d[:, None])
        b_s = tl.dot(b_q, b_k) * scale
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new[:, None])
        b_old = tl.exp2(b_top - b_new)
        b_sum = b_sum * b_old + tl.sum(b_p, 1)
        b_v = tl.load(p_v + first + i_n[:, None] * DH + i_d[None, :])
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_old[:, None])
        b_top = b_new
    b_o = b_o / b_sum[:, None]
    tl.store(p_o + first + i_m[:, None] * DH + i_d[None, :], b_o.to(p_o.dtype.element_ty))


@dataclass(frozen=True)
class Published:
    """A kernel and, by compute capability, the share that others measured for its kind: of the copy rate that
    `devices.COPY` gives, or of the dense bfloat16 tensor rate."""

    name: str
    launches: Callable[[], list[Launch]]
    measured: dict[int, float]
    gpus: dict[int, str] = field(default_factory=dict)  #: where it was measured, if not on the GPU of `DEVICES`


def _rows(kernel: triton.JITFunction, columns: int) -> list[Launch]:
    x = torch.empty(ROWS, columns, dtype=torch.bfloat16, device="meta")
    w = torch.empty(columns, dtype=torch.bfloat16, device="meta")
    args = (x, x) if kernel is softmax_kernel else (x, w, w, x, 1e-5)
    return [Launch(kernel, (ROWS,), args, {"COLUMNS": columns}, 8, 1)]


def _copy() -> list[Launch]:
    x = torch.empty(1 << 28, device="meta")
    return [Launch(copy_kernel, (ceil_div(x.numel(), 4096),), (x, x, x.numel()), {"BLOCK": 4096}, 8, 1)]


def _attention() -> list[Launch]:
    n, heads, width = 4096, 64, 128
    x = torch.empty(heads, n, width, dtype=torch.bfloat16, device="meta")
    tile = {"DH": width, "BM": 128, "BN": 64}
    return [Launch(attention_kernel, (n // 128, heads), (x, x, x, x, n, 0.125), tile, 8, 3)]


H100 = {90: "H100"}

#: A copy is the measure itself, so nothing is measured of it: the model has to find nothing that limits it. Rows:
#: Dao-AILab/quack, media/2025-07-10-membound-sol.md, H100, softmax and RMSNorm (our layer norm does a little more) of
#: more than 4096 columns: about 3 TB/s, 90 % of nominal, which is `devices.COPY`. Attention, no mask, 4096 tokens:
#: Triton's tutorial 458 TFLOP/s on H100 (pytorch/benchmark, pull request 2391), of 989; up to 73 % on A100 in
#: FlashAttention-2 (Dao, 2023, abstract).
CALIBRATION: tuple[Published, ...] = (
    Published("copy, float32", _copy, {}),
    Published("softmax, 4096 columns, bfloat16", partial(_rows, softmax_kernel, 4096), {90: 1.0}, H100),
    Published("layer norm, 4096 columns, bfloat16", partial(_rows, layer_norm_kernel, 4096), {90: 1.0}, H100),
    Published("attention forward, Dh 128, bfloat16", _attention, {80: 0.73, 90: 458 / 989}, H100),
)
