"""`.npz` files of instances: `features` (or `feats`) and perhaps `coords`, `unit`, `patch_size`, `mpp`, as arrays."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from umda_fast.data.files.bag_file import FEATURES, Array, BagFile, Reader, check_shapes, check_unchanged, is_vector
from umda_fast.data.files.header_fields import one_line, plain_header, torch_dtype
from umda_fast.errors import DataError


@contextmanager
def _open(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, str]]]:
    """The archive, and name -> member of every array."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.removesuffix(".npy"): name for name in archive.namelist() if name.endswith(".npy")}
            if "ptr" in members:
                raise DataError(f"{path}: expected one bag, got a whole data set (it has ptr); give the file as SOURCE")
            yield archive, members
    except DataError:
        raise
    except Exception as error:  # of corrupt files zipfile and numpy's parser of headers raise many kinds
        raise DataError(
            f"{path}: corrupt or truncated: expected a readable .npz file of plain arrays, got: {one_line(error)}"
        ) from error


def _header(path: Path) -> BagFile:
    with _open(path) as (archive, members):
        with archive.open(members[_features_member(path, archive, members)]) as member:
            shape, fortran, kind = _npy_header(member)
            first = b"" if fortran or not shape else member.read(shape[-1] * kind.itemsize)
        small = [name for name in ("coords", "unit", "patch_size", "mpp", "encoder") if name in members]
        named: dict[str, Any] = {name: _member(archive, members[name]) for name in small}
    stored = named.get("coords")
    rows, width = check_shapes(path, shape, None if stored is None else stored.shape)
    whole = "slide" if is_vector(shape) else ""
    return plain_header(path, ".npz", rows, width, torch_dtype(path, kind), first, stored, named, whole)


def _content(file: BagFile, features: bool) -> tuple[Tensor | None, Array | None]:
    content = stored = None
    with _open(file.path) as (archive, members):
        if features:
            content = _member(archive, members[_features_member(file.path, archive, members)])
            content = content[None] if is_vector(content.shape) else content
        if "coords" in members and not file.whole:
            stored = _member(archive, members["coords"])
    if content is not None:
        rows, width = check_shapes(file.path, content.shape, None if stored is None else stored.shape)
        check_unchanged(file, rows, width, torch_dtype(file.path, content.dtype), stored is not None)
        content = np.ascontiguousarray(content, content.dtype.newbyteorder("=")).reshape(content.shape[-2:])
    if stored is not None and stored.size != 2 * file.rows:
        raise DataError(f"{file.path}: changed while in use: expected {file.rows} coordinates, got {stored.size // 2}")
    return (
        None if content is None else torch.from_numpy(content),
        None if stored is None else stored.reshape(file.rows, 2),
    )


def _features_member(path: Path, archive: zipfile.ZipFile, members: Mapping[str, str]) -> str:
    """The member that holds the features: by name, or the only matrix beside `coords`."""
    named = [name for name in (*FEATURES, "X") if name in members]
    if not named:
        for name in members:
            with archive.open(members[name]) as member:
                if name != "coords" and len(_npy_header(member)[0]) == 2:
                    named.append(name)
        if len(named) > 1:
            named = []
    if not named:
        raise DataError(f"{path}: expected features [N, D] and, if there, coords [N, 2], got {', '.join(members)}")
    return named[0]


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, kind = read(member)
    return shape, fortran, kind


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as member:
        array: Array = np.lib.format.read_array(member, allow_pickle=False)
        return array


NPZ = Reader(_header, _content)
