"""What the Triton kernels share: the gate, a matrix product, the search for the segment that owns a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["INTERPRETED", "LN2", "LOG2E", "dot", "gate", "owner", "tile_offsets"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(b_a, b_b, b_c):
    """b_a @ b_b + b_c, accumulated in float32; float32 operands are not rounded to TF32."""
    if INTERPRETED:
        # Triton's interpreter holds bfloat16 as integers and multiplies those.
        b_a = b_a.to(tl.float32)
        b_b = b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_c, input_precision="ieee")


@triton.jit
def gate(b_x, m_other):
    """sigmoid(x), 1 - sigmoid(x) and the entropy of that pair; (1, 0, 0) where no other view is present."""
    b_e = tl.exp2(-tl.abs(b_x) * LOG2E)
    b_tail = LN2 * tl.log2(1.0 + b_e)
    b_g = 1.0 / (1.0 + tl.exp2(-b_x * LOG2E))
    b_r = 1.0 / (1.0 + tl.exp2(b_x * LOG2E))
    # -log g = relu(-x) + tail, -log(1 - g) = relu(x) + tail
    b_h = b_g * (tl.maximum(-b_x, 0.0) + b_tail) + b_r * (tl.maximum(b_x, 0.0) + b_tail)
    return tl.where(m_other, b_g, 1.0), tl.where(m_other, b_r, 0.0), tl.where(m_other, b_h, 0.0)


@triton.jit
def owner(p_offsets, count, i_x):
    """The segment that owns i_x: the last s in 0..count-1 with p_offsets[s] <= i_x (empty ones own
    nothing)."""
    i_low = tl.cast(count, tl.int64) * 0
    i_high = tl.cast(count, tl.int64)
    while i_high - i_low > 1:
        i_mid = (i_low + i_high) // 2
        m_low = tl.load(p_offsets + i_mid) <= i_x
        i_low = tl.where(m_low, i_mid, i_low)
        i_high = tl.where(m_low, i_high, i_mid)
    return i_low


def tile_offsets(offsets: torch.Tensor, tile: int) -> torch.Tensor:
    """int64 [S + 1]: the first tile of each segment, when a segment takes its length over ``tile``, rounded
    up.

    Stays on the device: the grid is bounded by shapes (``tokens // tile + S``), not by what the offsets hold.
    """
    tiles = (offsets.diff() + (tile - 1)) // tile
    return torch.cat([tiles.new_zeros(1), tiles.cumsum(0)])
