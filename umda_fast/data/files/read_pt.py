"""`.pt` files of instances, as torch.save writes them.

A tensor [N, D], or a mapping with `features` (or `feats`) and perhaps `coords`, `unit`, `patch_size`, `mpp`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from umda_fast.data.files.bag_file import FEATURES, Array, BagFile, Reader, check_shapes, check_unchanged
from umda_fast.data.files.header_fields import one_line, plain_header
from umda_fast.errors import DataError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _open(path: Path, mapped: bool) -> tuple[Mapping[str, Any], Tensor, Array | None, int, int | None]:
    """The mapping, its features and coordinates, rows and width. Mapped into memory, features are not read."""
    content = _load(path, mapped)
    named: Mapping[str, Any] = content if isinstance(content, Mapping) else {"features": content}
    found = [name for name in FEATURES if isinstance(named.get(name), Tensor)]
    if not found:
        came = f"a mapping with {', '.join(map(str, named))}" if named is content else type(content).__name__
        raise DataError(f"{path}: expected a tensor [N, D] or a mapping with features and coords, got {came}")
    features: Tensor = named[found[0]].detach()
    if features.dtype not in _DTYPES or features.is_sparse:
        raise DataError(f"{path}: features: expected floating-point numbers, got {features.dtype}")
    coords = named.get("coords")
    if coords is not None and not isinstance(coords, Tensor):
        raise DataError(f"{path}: coords: expected a tensor [N, 2], got {type(coords).__name__}")
    stored = None if coords is None else coords.detach().numpy()
    rows, width = check_shapes(path, tuple(features.shape), None if stored is None else stored.shape)
    return named, features, None if stored is None else stored.reshape(rows, 2), rows, width


def _header(path: Path) -> BagFile:
    named, features, stored, rows, width = _open(path, mapped=True)
    first = features[0].contiguous().view(torch.uint8).numpy().tobytes() if rows else b""
    return plain_header(path, ".pt", rows, width, features.dtype, first, stored, named)


def _content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    # Read, not mapped: a file that is cut short later must not end the process.
    _, content, stored, rows, width = _open(file.path, mapped=not features)
    check_unchanged(file, rows, width, content.dtype, stored is not None)
    return content if features else None, stored


def _load(path: Path, mapped: bool) -> Any:
    try:
        if mapped and zipfile.is_zipfile(path):  # the format before torch 1.6 cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the unpickler meets
        raise DataError(
            f"{path}: corrupt, truncated or not plain tensors: expected what torch.load reads with weights_only=True, "
            f"got: {one_line(error)}"
        ) from error


PT = Reader(_header, _content)
