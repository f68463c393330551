"""HDF5 files of instances, as CLAM, TRIDENT and STAMP write them.

What the tools write (read from their sources, 2026; the tests write files in the same way):

CLAM     `extract_features_fp.py`, `utils/file_utils.py`: `h5_files/<slide>.h5` with `features` float32 [N, D] and
         `coords` int32 [N, 2] in level-0 pixels, both resizable, grown batch by batch, chunks of 32 rows, no
         attribute; `pt_files/<slide>.pt`, the same features as a tensor.
TRIDENT  `trident/IO.py`, `wsi_objects/WSI.py`: `features` (attributes `encoder`, `name`, `savetodir`) and `coords`
         int64 [N, 2] in level-0 pixels (attributes `patch_size`, `patch_size_level0`, `level0_magnification`,
         `target_magnification`, `overlap`, ...), resizable, chunks of one row; a slide without tissue has features of
         shape (0,) or (0, D).
STAMP    `preprocessing/__init__.py`, `modeling/data.py`: `feats` float16 [N, D] and `coords` float32 [N, 2] in
         micrometres, contiguous; attributes of the file: `unit` "um", `tile_size_um` (2.0: `tile_size`),
         `tile_size_px`, `extractor`, `stamp_version`, ... Before 2.0 the unit was 224 pixels to 256 micrometres.

Of whole slides (read as above):

TRIDENT  `wsi_objects/WSI.py`: `slide_features_<encoder>/<slide>.h5` with `features` float32 [D], and `coords` of the
         patches that it was made of.
STAMP    `encoding/encoder/__init__.py`: `feats` [D] or [1, D] in a file for each slide or patient; attributes of the
         file: `feat_type` "slide" or "patient", `encoder`. (Before, one file for all: not read.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.files.bag_file import FEATURES, Array, BagFile, Reader, check_shapes, check_unchanged, is_vector
from umda_fast.data.files.hdf5_rows import read_rows
from umda_fast.data.files.header_fields import (
    one_line,
    pixel_size_of,
    positive_number,
    probe_of,
    text_of,
    tiling_in_um,
    tiling_of,
    torch_dtype,
    unit_of,
)
from umda_fast.errors import DataError
from umda_fast.extras import require

_STAMP_TILE_PX, _STAMP_TILE_UM = 224, 256.0  # before version 2.0, with no other size possible


@contextmanager
def _opened_file(path: Path) -> Iterator[Any]:
    require(f"{path}: reading it", "h5py")
    import h5py

    try:
        # Opened for one read and closed: nothing is shared with forked workers, and never more than one is open.
        # Read-only file systems without locks are no reason to fail.
        with h5py.File(path, "r", locking="best-effort") as file:
            yield file
    except DataError:
        raise
    except Exception as error:  # of corrupt files h5py raises whatever its conversions meet
        writer = _writer(path, str(error))
        if writer is not None:
            raise DataError(f"{path}: still being written: {writer}; wait until it is whole") from error
        raise DataError(
            f"{path}: corrupt or truncated: expected a readable HDF5 file, got: {one_line(error)}"
        ) from error


def _writer(path: Path, message: str) -> str | None:
    """Why a file that cannot be opened is not whole yet, or None."""
    lock = path.with_name(f"{path.name}.lock")  # as TRIDENT marks what it works on
    if lock.exists():
        return f"there is {lock.name}"
    if "unable to lock file" in message:
        return "another process has it open"
    return "it was opened to write and never closed" if "already open for write" in message else None


@dataclass(frozen=True)
class _Datasets:
    """An open file: the data sets, `features` being called `name`, and what their shapes say."""

    file: Any
    name: str
    features: Any
    coords: Any
    rows: int
    width: int | None
    dtype: torch.dtype
    whole: str


@contextmanager
def _open(path: Path) -> Iterator[_Datasets]:
    require(f"{path}: reading it", "h5py")
    import h5py

    with _opened_file(path) as file:
        name = next((name for name in FEATURES if isinstance(file.get(name), h5py.Dataset)), None)
        if name is None:
            raise DataError(
                f"{path}: expected features [N, D] under the name {', '.join(FEATURES)}, "
                f"got {', '.join(map(str, file)) or 'nothing'}"
            )
        features, coords = file[name], file.get("coords")
        kind = text_of(file.attrs.get("feat_type"))
        whole = kind if kind in ("slide", "patient") else "slide" if is_vector(features.shape) else ""
        if whole:
            coords = None  # of the patches that it was made of
        if coords is not None and not isinstance(coords, h5py.Dataset):
            raise DataError(f"{path}: coords: expected numbers [N, 2], got a group")
        rows, width = check_shapes(path, features.shape, None if coords is None else coords.shape)
        if whole and rows != 1:
            raise DataError(f"{path}: expected one row of a whole {whole}, as feat_type says, got {rows}")
        yield _Datasets(file, name, features, coords, rows, width, torch_dtype(path, features.dtype), whole)


def _header(path: Path) -> BagFile:
    with _open(path) as opened:
        first = opened.features[(0,) * (opened.features.ndim - 1)].tobytes() if opened.rows else b""
        return BagFile(
            path=path,
            rows=opened.rows,
            width=opened.width,
            dtype=opened.dtype,
            probe=probe_of(opened.rows, opened.width, opened.dtype, first),
            **_place(path, opened),
        )


def _content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    with _open(file.path) as opened:
        check_unchanged(file, opened.rows, opened.width, opened.dtype, opened.coords is not None)
        read = read_rows(file.path, opened.features) if features else None
        shape = None if read is None else (1, -1) if opened.whole else read.shape[-2:]
        content = None if read is None else torch.from_numpy(read.reshape(shape))
        stored = None if opened.coords is None else read_rows(file.path, opened.coords).reshape(file.rows, 2)
        return content, stored


def _place(path: Path, opened: _Datasets) -> dict[str, Any]:
    """Who wrote the file, and everything about its coordinates."""
    top, coords = opened.file.attrs, opened.coords
    at: Mapping[str, Any] = {} if coords is None else coords.attrs
    named = (opened.features.attrs.get("encoder"), top.get("extractor"), top.get("encoder"))
    encoder = next((text for value in named if (text := text_of(value))), None)
    pixel_size = pixel_size_of(path, at, top)
    plain: dict[str, Any] = {"encoder": encoder, "pixel_size": pixel_size, "scale": 1.0}
    nothing = {"patch_size": math.nan, "step": math.nan, "tiling": None}
    if opened.whole:
        trident = "TRIDENT" if "savetodir" in opened.features.attrs else "HDF5"
        tool = "STAMP" if opened.name == "feats" else trident
        return {**plain, **nothing, "tool": tool, "unit": None, "tiling": opened.whole, "whole": opened.whole}
    if opened.name == "feats":
        if coords is None:
            return {**plain, **nothing, "tool": "STAMP", "unit": None}
        place = _stamp_place(path, top, coords)
        return {**plain, **place, "tool": "STAMP", "unit": "um", "tiling": tiling_in_um(place["patch_size"])}
    if "patch_size_level0" in at:
        size, overlap = positive_number(at["patch_size_level0"]), positive_number(at.get("overlap", 0))
        target, pixels = positive_number(at.get("target_magnification")), positive_number(at.get("patch_size"))
        down = positive_number(at.get("level0_magnification")) / target
        step = size - (0.0 if math.isnan(overlap) else overlap * down)
        return {
            **plain,
            "tool": "TRIDENT",
            "unit": "px",
            "patch_size": size,
            "step": step if step > 0 else math.nan,
            "tiling": tiling_of(target, pixels, overlap),
        }
    clam = coords is not None and coords.maxshape[0] is None
    tool = "CLAM" if clam else "HDF5"
    if coords is None:
        return {**plain, **nothing, "tool": tool, "unit": None}
    unit = unit_of(path, at.get("unit", top.get("unit")))
    size = positive_number(at.get("patch_size", top.get("patch_size")))
    tiling = tiling_in_um(size) if unit == "um" else None
    return {**plain, "tool": tool, "unit": unit, "patch_size": size, "step": math.nan, "tiling": tiling}


def _stamp_place(path: Path, attributes: Mapping[str, Any], coords: Any) -> dict[str, Any]:
    unit, size = text_of(attributes.get("unit")), positive_number(attributes.get("tile_size_um"))
    if math.isnan(size) and unit == "um":
        size = positive_number(attributes.get("tile_size"))  # 2.0
    if not math.isnan(size) and unit in ("um", None):
        return {"scale": 1.0, "patch_size": size, "step": size}
    stride = positive_number(attributes.get("tile_size")) if unit != "um" else math.nan
    if math.isnan(stride) and unit in ("px", None) and len(coords) > 1:
        gaps = [np.diff(np.unique(column)) for column in read_rows(path, coords).astype(np.float64).T]
        stride = min((float(gap.min()) for gap in gaps if len(gap)), default=math.nan)
    if unit in ("px", None) and not math.isnan(stride) and round(stride) == _STAMP_TILE_PX:
        scale = _STAMP_TILE_UM / _STAMP_TILE_PX
        return {"scale": scale, "patch_size": _STAMP_TILE_UM, "step": _STAMP_TILE_UM}
    if unit == "um":
        return {"scale": 1.0, "patch_size": math.nan, "step": math.nan}
    raise DataError(
        f"{path}: wrong unit: expected coordinates in micrometres (attributes unit = 'um' and tile_size_um), or 224 "
        f"pixels apart as STAMP wrote them before 2.0, got unit {unit or 'none'}, distance {stride:g}"
    )


HDF5 = Reader(_header, _content)
