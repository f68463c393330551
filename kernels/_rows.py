"""Rows of one width in tiles, and sums over rows that need no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._launch import Launch, ceil_div, next_power_of_2

__all__ = ["column_sum_launch", "row_tile", "runs_of_rows"]

# Runs of rows whose sums are kept apart: enough for many waves on any chip, few and long enough that the partial sums
# stay far below what is read. Not a function of the device, so that results are not.
MAX_RUNS = 1024
MIN_RUN = 64


def row_tile(width: int, elements: int = 2048, most: int = 256) -> dict[str, int]:
    """BM rows and BG groups of eight columns, ``elements`` in all, of rows ``width`` wide; at most ``most`` columns."""
    columns = min(most, max(8, next_power_of_2(width)))
    return {"BM": elements // columns, "BG": columns // 8}


def runs_of_rows(rows: int, tile: int) -> tuple[int, int]:
    """Rows of a run, a multiple of ``tile``, and the number of runs."""
    run = ceil_div(max(MIN_RUN, ceil_div(rows, MAX_RUNS)), tile) * tile
    return run, ceil_div(rows, run)


@triton.jit(do_not_specialize=["parts", "columns"])
def column_sum(p_part, p_out, parts, columns, BC: tl.constexpr, BW: tl.constexpr):
    """out [columns]: the sum of part [parts, columns], in order and in float64."""
    i_w = tl.program_id(0) * BW + tl.arange(0, BW)
    i_c = tl.arange(0, BC).to(tl.int64)
    m_w = i_w < columns
    b_sum = tl.zeros([BC, BW], tl.float64)
    for first in range(0, parts, BC):
        m_c = first + i_c < parts
        p_c = p_part + (first + i_c)[:, None] * columns + i_w[None, :]
        b_sum += tl.load(p_c, mask=m_c[:, None] & m_w[None, :], other=0.0).to(tl.float64)
    tl.store(p_out + i_w, tl.sum(b_sum, 0).to(tl.float32).to(p_out.dtype.element_ty), mask=m_w)


def column_sum_launch(part: torch.Tensor, out: torch.Tensor) -> Launch:
    """The launch that writes the sum of ``part`` [parts, ...] over its rows to ``out``, float32 rounded once more."""
    columns = out.numel()
    return Launch(
        kernel=column_sum,
        grid=(ceil_div(columns, 16),),
        args=(part, out, part.shape[0], columns),
        constexprs={"BC": 64, "BW": 16},
    )
