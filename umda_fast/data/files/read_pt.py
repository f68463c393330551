"""`.pt` files of instances, as torch.save writes them.

A tensor [N, D], or a mapping with `features` (or `feats`) and perhaps `coords`, `unit`, `patch_size`, `mpp`. Plain
arrays of numpy are read as tensors are; nothing else is unpickled.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.files.bag_file import FEATURES, Array, BagFile, Reader, check_shapes, check_unchanged, is_vector
from umda_fast.data.files.header_fields import one_line, plain_header
from umda_fast.errors import DataError

# What a pickled array of numbers, or a number of numpy, is made of; numpy before 2 called its makers otherwise.
_MAKERS = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
_ARRAYS: list[Any] = [
    *((maker, f"numpy.{core}.multiarray.{name}") for name, maker in _MAKERS.items() for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bhilqBHILQefd"},
]
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _open(path: Path, mapped: bool) -> tuple[Mapping[str, Any], Tensor, Array | None, int, int | None, str]:
    """The mapping, its features and coordinates, rows, width and `BagFile.whole`. Mapped into memory, features are not
    read."""
    content = _load(path, mapped)
    named: Mapping[str, Any] = content if isinstance(content, Mapping) else {"features": content}
    named = {name: _as_tensor(path, str(name), value) for name, value in named.items()}
    found = [name for name in FEATURES if isinstance(named.get(name), Tensor)]
    if not found:
        mapping = isinstance(content, Mapping)
        came = f"a mapping with {', '.join(map(str, named))}" if mapping else type(content).__name__
        raise DataError(f"{path}: expected a tensor [N, D] or a mapping with features and coords, got {came}")
    features: Tensor = named[found[0]].detach()
    if features.dtype not in _DTYPES or features.is_sparse:
        raise DataError(f"{path}: features: expected floating-point numbers, got {features.dtype}")
    coords = named.get("coords")
    if coords is not None and not isinstance(coords, Tensor):
        raise DataError(f"{path}: coords: expected a tensor [N, 2], got {type(coords).__name__}")
    if is_vector(tuple(features.shape)):
        return named, features[None], None, 1, len(features), "slide"
    stored = None if coords is None else coords.detach().numpy()
    rows, width = check_shapes(path, tuple(features.shape), None if stored is None else stored.shape)
    features = features.reshape(features.shape[-2:])
    return named, features, None if stored is None else stored.reshape(rows, 2), rows, width, ""


def _header(path: Path) -> BagFile:
    named, features, stored, rows, width, whole = _open(path, mapped=True)
    first = features[0].contiguous().view(torch.uint8).numpy().tobytes() if rows else b""
    return plain_header(path, ".pt", rows, width, features.dtype, first, stored, named, whole)


def _content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    # Read, not mapped: a file that is cut short later must not end the process.
    _, content, stored, rows, width, _ = _open(file.path, mapped=not features)
    check_unchanged(file, rows, width, content.dtype, stored is not None)
    return content if features else None, stored


def _load(path: Path, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals(_ARRAYS):
            # The format before torch 1.6 cannot be mapped.
            mmap = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises whatever the unpickler meets
        cause = error.__context__ if isinstance(error, pickle.UnpicklingError) else error  # without torch's advice
        said = one_line(cause if isinstance(cause, Exception) else error) or type(error).__name__
        strange = re.search(r"(?:GLOBAL |<class ')([\w.]+)", said)
        if strange is None:
            raise DataError(
                f"{path}: corrupt or truncated: expected what torch.load reads with weights_only=True, got: {said}"
            ) from error
        raise DataError(
            f"{path}: expected plain tensors or arrays, alone or by name, got an object of {strange[1]}; reading one "
            "may run code, so it is not done"
        ) from error


def _as_tensor(path: Path, name: str, value: Any) -> Any:
    """An array of numbers as a tensor, anything else as it is."""
    if not isinstance(value, np.ndarray) or not value.ndim:
        return value
    try:
        return torch.from_numpy(np.ascontiguousarray(value, value.dtype.newbyteorder("=")))
    except TypeError as error:
        raise DataError(f"{path}: {name}: expected numbers, got an array of {value.dtype}") from error

PT = Reader(_header, _content)
