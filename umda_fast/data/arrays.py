"""Arrays as they are given: names of their types, and checks that say what was expected and what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.errors import DataError

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]
ArrayInput: TypeAlias = npt.ArrayLike | Tensor


def as_numpy(where: str, value: ArrayInput) -> npt.NDArray[Any]:
    """A numpy array of whatever was given.

    Raises:
        DataError: rows of different lengths.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        array: npt.NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return array
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(f"{where}: expected an array, got rows of different lengths") from error


def dtype_and_shape(tensor: Tensor) -> str:
    """For messages: `float32 [3, 2]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def all_finite(values: Tensor) -> bool:
    """Whether a tensor on the CPU holds neither NaN nor infinity.

    By the least and the greatest value, which NaN passes through: one vectorised read, where `isfinite` and a sum in
    float64 each take many times as long.
    """
    return values.numel() == 0 or bool(torch.isfinite(torch.stack(values.aminmax())).all())


def features_tensor(where: str, value: ArrayInput, dtype: torch.dtype) -> Tensor:
    """Features [N, d] in `dtype`; nothing is copied that has it already. Raises DataError."""
    if not isinstance(value, Tensor):
        array = as_numpy(where, value)
        if array.dtype.kind not in "fiub":
            raise DataError(f"{where}: expected numbers [N, d], got dtype {array.dtype}")
        # torch.from_numpy warns about arrays that must not be written to; nothing here writes to them.
        value = torch.from_numpy(array if array.flags.writeable and array.dtype.isnative else array.copy())
    if value.dim() != 2 or value.shape[1] == 0:
        raise DataError(f"{where}: expected [N, d] with d at least 1, got {dtype_and_shape(value)}")
    return value.to(dtype)


def common_rows(name: str, features: Mapping[str, Tensor]) -> int:
    """N, which all views must have. Raises DataError."""
    first, reference = next(iter(features.items()))
    for view, array in features.items():
        if array.shape[0] != reference.shape[0]:
            raise DataError(
                f"{name}: view {view!r}: expected {reference.shape[0]} rows as in view {first!r}, "
                f"got {array.shape[0]}"
            )
    return reference.shape[0]


def offsets_array(where: str, ptr: ArrayInput | None, rows: int) -> IntArray:
    """ptr, int64 [B+1]; None makes every row a bag. Raises DataError."""
    if ptr is None:
        return np.arange(rows + 1, dtype=np.int64)
    array = as_numpy(where, ptr)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise DataError(f"{where}: expected integers [B+1], got {array.dtype} {list(array.shape)}")
    offsets = array.astype(np.int64)
    if offsets[0] != 0:
        raise DataError(f"{where}: expected to start at 0, got {offsets[0]}")
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if len(falls):
        at = int(falls[0])
        raise DataError(
            f"{where}: expected never to decrease, got {offsets[at]} then {offsets[at + 1]} "
            f"at position {at + 1}"
        )
    if offsets[-1] != rows:
        raise DataError(f"{where}: expected to end at the number of instances {rows}, got {offsets[-1]}")
    return offsets


def mask_tensor(
    name: str,
    mask: ArrayInput,
    rows: int,
    features: Mapping[str, Tensor],
    offsets: IntArray,
    names: Sequence[str],
) -> Tensor | None:
    """Which views an instance has, bool [N, V]; None where all have all. Raises DataError."""
    array = as_numpy(f"{name}: mask", mask)
    if array.shape != (rows, len(features)):
        raise DataError(
            f"{name}: mask: expected [{rows}, {len(features)}], one column for each of the views "
            f"{', '.join(features)}, got {list(array.shape)}"
        )
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise DataError(
            f"{name}: mask: expected true and false, or 1 and 0, got other values ({array.dtype})"
        )
    present = array.astype(np.bool_)
    bare = np.flatnonzero(~present.any(axis=1))
    if len(bare):
        bag = int(np.searchsorted(offsets, bare[0], side="right")) - 1
        raise DataError(
            f"{name}: mask: expected at least one view for every instance, got none for row {bare[0]} "
            f"(bag {names[bag]!r}, instance {bare[0] - offsets[bag]})"
        )
    return None if present.all() else torch.from_numpy(present)


def coords_tensor(where: str, coords: ArrayInput, rows: int) -> Tensor:
    """Coordinates float32 [N, 2]. Raises DataError."""
    array = as_numpy(where, coords)
    if array.shape != (rows, 2) or array.dtype.kind not in "fiu":
        raise DataError(f"{where}: expected numbers [{rows}, 2], got {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array.astype(np.float32))
