"""Rows of one width in tiles, and sums over rows that need no atomics."""

# ruff: noqa: SIM102 - of two conditions one is decided when a kernel is compiled
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
def column_sum(p_part, p_a, p_b, p_c, p_d, parts, columns, BC: tl.constexpr, BW: tl.constexpr):
    """The k-th of a, b, c, d [columns]: the sum over i of part[i, k], part [parts, several, columns], in order and in
    float64."""
    i_k = tl.program_id(1)
    several = tl.num_programs(1)
    i_w = tl.program_id(0) * BW + tl.arange(0, BW)
    i_c = tl.arange(0, BC).to(tl.int64)
    m_w = i_w < columns
    b_sum = tl.zeros([BC, BW], tl.float64)
    for first in range(0, parts, BC):
        m_c = first + i_c < parts
        p_i = p_part + ((first + i_c) * several + i_k)[:, None] * columns + i_w[None, :]
        b_sum += tl.load(p_i, mask=m_c[:, None] & m_w[None, :], other=0.0).to(tl.float64)
    b_out = tl.sum(b_sum, 0).to(tl.float32)
    if p_a is not None:
        if i_k == 0:
            tl.store(p_a + i_w, b_out.to(p_a.dtype.element_ty), mask=m_w)
    if p_b is not None:
        if i_k == 1:
            tl.store(p_b + i_w, b_out.to(p_b.dtype.element_ty), mask=m_w)
    if p_c is not None:
        if i_k == 2:
            tl.store(p_c + i_w, b_out.to(p_c.dtype.element_ty), mask=m_w)
    if p_d is not None:
        if i_k == 3:
            tl.store(p_d + i_w, b_out.to(p_d.dtype.element_ty), mask=m_w)


def column_sum_launch(part: torch.Tensor, *outs: torch.Tensor | None) -> Launch:
    """The launch that writes the sums over the first axis of ``part`` [parts, several, columns], rounded to float32 and
    then to the dtype of each of ``outs`` [columns], at most four; of one that is None nothing is written."""
    parts, several, columns = part.shape
    return Launch(
        kernel=column_sum,
        grid=(ceil_div(columns, 16), several),
        args=(part, *outs, *[None] * (4 - len(outs)), parts, columns),
        constexprs={"BC": 64, "BW": 16},
    )
