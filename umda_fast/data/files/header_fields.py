"""What the texts and numbers in a file's header mean: units, pixel sizes, dtypes, names of encoders."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.files.bag_file import Array, BagFile, Unit
from umda_fast.errors import DataError

_UNITS: dict[str, Unit] = {
    "um": "um",
    "µm": "um",
    "μm": "um",
    "micron": "um",
    "microns": "um",
    "micrometer": "um",
    "micrometre": "um",
    "px": "px",
    "pixel": "px",
    "pixels": "px",
    "level0": "px",
}
_PIXEL_SIZES = (0.01, 100.0)  # micrometres; whole-slide scanners make 0.1 to 4, thumbnails up to tens


def unit_of(path: Path, given: object) -> Unit:
    """The unit named by a file, or level-0 pixels."""
    if given is None:
        return "px"
    text = given.decode() if isinstance(given, bytes) else str(given)
    unit = _UNITS.get(text.strip().lower())
    if unit is None:
        raise DataError(f"{path}: wrong unit: expected um or px, got {text!r}")
    return unit


def torch_dtype(path: Path, dtype: np.dtype[Any]) -> torch.dtype:
    """Of features that numpy has read."""
    known = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    if dtype.name not in known:
        raise DataError(f"{path}: features: expected float16, float32 or float64, got {dtype}")
    return known[dtype.name]


def probe_of(rows: int, width: int | None, dtype: torch.dtype, first: bytes) -> tuple[object, ...]:
    """`BagFile.probe` out of the bytes of the first row."""
    return rows, width, dtype, first if rows else b""


def positive_number(value: object) -> float:
    """A finite positive number, or NaN: TRIDENT writes None as text."""
    try:
        number = float(np.asarray(value).reshape(()).item() if not isinstance(value, str | bytes) else value)
    except (TypeError, ValueError):
        return math.nan
    return number if math.isfinite(number) and number > 0 else math.nan


def pixel_size_of(path: Path, *places: Mapping[str, Any]) -> float:
    """Micrometres per level-0 pixel as one of several mappings says, or NaN."""
    for place in places:
        for name in ("mpp", "level0_mpp", "slide_mpp", "mpp_x"):
            if name in place and not math.isnan(positive_number(place[name])):
                return check_pixel_size(f"{path}: {name}", positive_number(place[name]))
    return math.nan


def tiling_of(magnification: float, pixels: float, overlap: float) -> str | None:
    """A name for patches of a magnification, an edge in its pixels and their overlap; None where these are NaN."""
    if not (magnification > 0 and pixels > 0):
        return None
    return f"{magnification:g}x_{pixels:g}px" + (f"_{overlap:g}px_overlap" if overlap > 0 else "")


def tiling_in_um(size: float) -> str | None:
    """A name for patches of an edge in micrometres; None for NaN."""
    return f"{size:.0f}um" if size > 0 else None


def text_of(value: object) -> str | None:
    """A text that says something, or None."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return value if isinstance(value, str) and value not in ("", "None") else None


def one_line(error: Exception) -> str:
    """An exception's message, for one line."""
    return " ".join(str(error).split())[:200]


def check_pixel_size(where: str, value: object) -> float:
    """Micrometres per level-0 pixel as a float.

    Raises:
        DataError: no number, or none that a slide could have.
    """
    low, high = _PIXEL_SIZES
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not low <= number <= high:
        raise DataError(f"{where}: expected micrometres per pixel in {low:g}..{high:g}, got {value!r}")
    return number


def plain_header(
    path: Path,
    tool: str,
    rows: int,
    width: int | None,
    dtype: torch.dtype,
    first: bytes,
    coords: Array | None,
    named: Mapping[str, Any],
    whole: str = "",
) -> BagFile:
    """The header of a file of named arrays without attributes: `.pt`, `.npz`; without coordinates if it is of a `whole`
    slide (as of `BagFile`)."""
    coords = None if whole else coords
    if coords is not None and coords.dtype.kind not in "fiu":
        raise DataError(f"{path}: coords: expected numbers, got {coords.dtype}")

    def scalar(name: str) -> Any:
        value = named.get(name)
        if not isinstance(value, Tensor | np.ndarray):
            return value
        array = np.asarray(value)
        return array.item() if array.size == 1 else None

    unit = None if coords is None else unit_of(path, scalar("unit"))
    size = positive_number(scalar("patch_size"))
    return BagFile(
        path=path,
        tool=tool,
        rows=rows,
        width=width,
        dtype=dtype,
        unit=unit,
        scale=1.0,
        patch_size=size,
        step=math.nan,
        pixel_size=pixel_size_of(path, {"mpp": scalar("mpp")}),
        encoder=text_of(scalar("encoder")),
        tiling=whole or (tiling_in_um(size) if unit == "um" else None),
        probe=probe_of(rows, width, dtype, first),
        whole=whole,
    )
