"""One file of instances: what its header says, and what is asked of every format's features and coordinates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from umda_fast.data.arrays import FloatArray
from umda_fast.errors import DataError

Unit: TypeAlias = Literal["um", "px"]
Array: TypeAlias = npt.NDArray[Any]

FEATURES = ("features", "feats", "patch_embeddings")
"""Names that features have in a file, the most usual first."""

_LARGEST_UM = 250_000.0  # no slide is wider than 25 cm


@dataclass(frozen=True)
class BagFile:
    """What the header of a file says.

    Attributes:
        path: of the file; its stem is the bag's name.
        tool: who wrote it, for messages.
        rows: instances.
        width: of the features; None in an empty file that does not say.
        dtype: of the features as stored.
        unit: of the coordinates after `scale`; None without coordinates.
        scale: what stored coordinates are multiplied by.
        patch_size: edge of a patch in `unit`, NaN if not known.
        step: distance of neighbouring patches in `unit`, NaN if not known.
        pixel_size: micrometres per level-0 pixel, NaN if not known.
        encoder: what made the features, if the file says.
        tiling: of which patches, the same for slides of any resolution, if the file says: "20x_256px", "256um".
        probe: of the content; equal for equal features, seldom equal for others.
        whole: "slide" or "patient" where its only row is of all of that, and has no coordinates; blank where rows are
            patches.
    """

    path: Path
    tool: str
    rows: int
    width: int | None
    dtype: torch.dtype
    unit: Unit | None
    scale: float
    patch_size: float
    step: float
    pixel_size: float
    encoder: str | None
    tiling: str | None
    probe: tuple[object, ...]
    whole: str = ""


@dataclass(frozen=True)
class Reader:
    """One format.

    Attributes:
        header: what a file of it says before its features are read.
        content: its features in their stored dtype (None unless they are wanted), and its coordinates as stored,
            [n, 2], or None.
    """

    header: Callable[[Path], BagFile]
    content: Callable[[BagFile, bool], tuple[Tensor | None, Array | None]]


def is_vector(shape: tuple[int, ...]) -> bool:
    """Whether features of this shape are one vector [D], which only a whole slide has; an empty one is no instance."""
    return len(shape) == 1 and shape[0] > 0


def check_shapes(path: Path, features: tuple[int, ...], coords: tuple[int, ...] | None) -> tuple[int, int | None]:
    """Rows and width; a first axis of length 1, that of one slide, may stand before them. A vector is one row, whatever
    coordinates stand beside it (TRIDENT keeps those of the patches that it was made of).

    Raises:
        DataError: features or coordinates of another shape.
    """
    given = features
    if is_vector(features):
        return 1, features[0]
    features = features[1:] if len(features) == 3 and features[0] == 1 else features
    coords = coords[1:] if coords is not None and len(coords) == 3 and coords[0] == 1 else coords
    if features == (0,):
        rows, width = 0, None
    elif len(features) == 2 and features[1] > 0:
        rows, width = features
    else:
        raise DataError(f"{path}: features: expected [N, D], got {list(given)}")
    if coords is not None and coords != (rows, 2) and not (rows == 0 and coords == (0,)):
        raise DataError(f"{path}: coords: expected [{rows}, 2], one row for each of the features, got {list(coords)}")
    return rows, width


def check_unchanged(file: BagFile, rows: int, width: int | None, dtype: torch.dtype, located: bool) -> None:
    """Raise DataError if a file is not what its header was."""
    if (rows, width, dtype, located) != (file.rows, file.width, file.dtype, file.unit is not None):
        raise DataError(
            f"{file.path}: changed while in use: expected {file.rows} rows of width {file.width}, got {rows} of {width}"
        )


def checked_coords(file: BagFile, stored: Array) -> FloatArray:
    """Coordinates float64 [n, 2] in the file's unit. Raises DataError: not finite, or not in that unit."""
    where = f"{file.path}: coords"
    with np.errstate(invalid="ignore"):  # of a NaN that signals; said below with its place
        coords: FloatArray = stored.astype(np.float64)
    if not np.isfinite(coords).all():
        row = int(np.flatnonzero(~np.isfinite(coords).all(axis=1))[0])
        raise DataError(f"{where}: expected finite numbers, got {coords[row].tolist()} at row {row}")
    if file.unit == "px":
        if stored.dtype.kind == "f" and not (coords == np.floor(coords)).all():
            row = int(np.flatnonzero((coords != np.floor(coords)).any(axis=1))[0])
            raise DataError(
                f"{where}: wrong unit: expected whole level-0 pixels, got {coords[row].tolist()} at row {row}; "
                "coordinates in micrometres need the attribute unit = 'um'"
            )
        return coords
    coords = coords * file.scale
    if len(coords) and np.abs(coords).max() > _LARGEST_UM:
        raise DataError(
            f"{where}: wrong unit: expected micrometres, got {np.abs(coords).max():.0f}, "
            "which is wider than any slide; are these pixels?"
        )
    return coords


def check_step(file: BagFile, coords: FloatArray) -> None:
    """Raise DataError if patches lie closer together than the file's own patch size and overlap allow.

    Coordinates of another level than 0, or in another unit than the file says, are found by this.
    """
    if math.isnan(file.step) or len(coords) < 2:
        return
    order = np.lexsort((coords[:, 0], coords[:, 1]))
    gaps = np.diff(coords[order], axis=0)
    along = gaps[(gaps[:, 1] == 0) & (gaps[:, 0] > 0), 0]
    if len(along) and along.min() < 0.75 * file.step:
        raise DataError(
            f"{file.path}: coords: wrong unit: expected patches at least {file.step:g} {file.unit} apart, as patch "
            f"size and overlap say, got {along.min():g}; are these coordinates of another level or unit?"
        )
