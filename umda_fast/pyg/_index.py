"""Checks and conversion of torch_geometric's batch vectors."""

import torch
from torch import Tensor


def to_ptr(index: Tensor, name: str, rows: int, size: int | None, size_name: str) -> Tensor:
    """Offsets int64 [size + 1] of the groups of a sorted vector int64 [rows] of group numbers.

    Args:
        size: how many groups there are; None for one more than the last number.

    Raises:
        TypeError, ValueError: another dtype or shape, a vector that is not sorted, a number outside 0..size-1.
            Reading the values synchronises with a GPU once.
    """
    if index.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {str(index.dtype).removeprefix('torch.')}")
    if index.shape != (rows,):
        raise ValueError(f"{name} must have shape [{rows}], got {list(index.shape)}")
    first = last = 0
    if rows:
        ordered = (index[1:] >= index[:-1]).all().long()
        is_sorted, first, last = torch.stack([ordered, index[0], index[-1]]).tolist()
        if not is_sorted:
            raise ValueError(
                f"{name} must be sorted, got a number below its predecessor; sort the rows first (the edges of a "
                "message-passing layer by target: data.sort(sort_by_row=False))"
            )
    if size is None:
        size = last + 1 if rows else 0
    if rows and (first < 0 or last >= size):
        wrong = first if first < 0 else last
        raise ValueError(f"{name} must be in 0..{size - 1} ({size_name} = {size}), got {wrong}")
    groups = torch.arange(size + 1, device=index.device)
    return torch.searchsorted(index.contiguous(), groups)
