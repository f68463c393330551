"""Reads one file of instances, whatever its format: header first, content later.

A format is a module with a `Reader` and a line in `READERS`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray, all_finite
from umda_fast.data.files.bag_file import BagFile, Reader, checked_coords
from umda_fast.data.files.read_hdf5 import HDF5
from umda_fast.data.files.read_npz import NPZ
from umda_fast.data.files.read_pt import PT
from umda_fast.errors import DataError

READERS: dict[str, Reader] = {".h5": HDF5, ".hdf5": HDF5, ".pt": PT, ".pth": PT, ".npz": NPZ}
SUFFIXES = tuple(READERS)


def read_header(path: Path) -> BagFile:
    """What a file holds, from its header and its first row.

    Raises:
        DataError: naming the file, when it cannot be read or holds no instances.
    """
    if not path.exists():
        raise DataError(f"{path}: expected a file, got a link to what is not there")
    return READERS[path.suffix.lower()].header(path)


def read_bag(file: BagFile) -> tuple[Tensor, FloatArray | None]:
    """Features [n, D] in their stored dtype, and coordinates float64 [n, 2] in the file's unit.

    Raises:
        DataError: naming the file: unreadable, changed since its header was read, values that are not finite,
            coordinates that cannot be in their unit.
    """
    features, stored = READERS[file.path.suffix.lower()].content(file, True)
    assert features is not None
    coords = None if stored is None else checked_coords(file, stored)
    if file.width is None:
        features = features.reshape(0, 0)
    if not all_finite(features):
        rows = (~torch.isfinite(features)).any(dim=1).nonzero().flatten()
        row = int(rows[0])
        column = int((~torch.isfinite(features[row])).nonzero()[0])
        raise DataError(
            f"{file.path}: features: expected finite numbers, got {float(features[row, column])} at row {row}, "
            f"column {column} ({len(rows)} such rows)"
        )
    return features, coords


def read_coords(file: BagFile) -> FloatArray | None:
    """Coordinates float64 [n, 2] in the file's unit, without the features. Raises as `read_bag`."""
    if file.unit is None:
        return None
    _, stored = READERS[file.path.suffix.lower()].content(file, False)
    return None if stored is None else checked_coords(file, stored)
