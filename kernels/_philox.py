"""Dropout whose mask is drawn again wherever it is needed: Philox4x32-10, eight elements of a row to a counter.

The same bits as `umda_fast.reference.philox`, which says how elements are numbered. `tl.philox` takes the lower word of
the seed as the first of the key; of a counter here the lower 64 bits are used.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dropout", "scale_of"]


def scale_of(threshold: int) -> float:
    """By what the elements that are kept are multiplied."""
    return 65536 / (65536 - threshold)


@triton.jit
def _random_numbers(seed, i_row, i_group, groups):
    """int32 [BM, 8 BG] in 0..65535, those of BM rows (int64) and BG groups of eight columns."""
    i_counter = i_row[:, None] * groups + i_group[None, :]
    b_low = i_counter.to(tl.uint32)
    b_high = (i_counter >> 32).to(tl.uint32)
    b_zero = b_low * 0
    b_w0, b_w1, b_w2, b_w3 = tl.philox(seed, b_low, b_high, b_zero, b_zero)
    # Word by word, the lower half first: the innermost interleave decides the highest bit of the place.
    b_even = tl.interleave(tl.interleave(b_w0 & 0xFFFF, b_w2 & 0xFFFF), tl.interleave(b_w1 & 0xFFFF, b_w3 & 0xFFFF))
    b_odd = tl.interleave(tl.interleave(b_w0 >> 16, b_w2 >> 16), tl.interleave(b_w1 >> 16, b_w3 >> 16))
    return tl.interleave(b_even, b_odd).to(tl.int32)


@triton.jit
def dropout(b_x, p_seed, i_row, i_group, groups, threshold, scale):
    """b_x [BM, 8 BG], scaled where the element is kept, else 0."""
    b_numbers = _random_numbers(tl.load(p_seed), i_row, i_group, groups)
    return tl.where(b_numbers >= threshold, b_x * scale, 0.0)
