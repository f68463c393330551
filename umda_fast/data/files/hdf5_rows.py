"""Rows of an HDF5 dataset, read in long runs."""

from __future__ import annotations

import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from umda_fast.data.arrays import IntArray
from umda_fast.data.files.bag_file import Array
from umda_fast.errors import DataError


def read_rows(path: Path, dataset: Any) -> Array:
    """All of an HDF5 dataset, in native byte order.

    HDF5 looks up every chunk by itself, which for chunks of one row takes far longer than reading them. Chunks that
    are stored as they are (no filter) lie where the index says, mostly one behind the other: their places are asked
    for once, and runs of neighbours are read in one go. `bench/bench_pack.py` measures it.
    """
    places = _chunk_places(dataset)
    if places is None:
        content: Array = dataset[()]
        return content if content.dtype.isnative else content.astype(content.dtype.newbyteorder("="))
    first, offsets = places
    rows, chunk = dataset.shape[0], dataset.chunks[0]
    content = np.empty(dataset.shape, dataset.dtype)
    row_bytes = content.nbytes // rows
    counts = np.minimum(chunk, rows - first)
    breaks = np.flatnonzero((np.diff(offsets) != chunk * row_bytes) | (np.diff(first) != chunk)) + 1
    flat = content.reshape(-1).view(np.uint8).data
    with open(path, "rb", buffering=0) as raw:
        for start, stop in zip([0, *breaks], [*breaks, len(first)], strict=True):
            begin = int(first[start]) * row_bytes
            end = (int(first[stop - 1]) + int(counts[stop - 1])) * row_bytes
            _read_exactly(path, raw.fileno(), flat[begin:end], int(offsets[start]))
    return content


def _read_exactly(path: Path, descriptor: int, into: memoryview, offset: int) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(descriptor, [into[done:]], offset + done)
        if count == 0:
            raise DataError(f"{path}: truncated: expected data up to byte {offset + len(into)}")
        done += count


def _chunk_places(dataset: Any) -> tuple[IntArray, IntArray] | None:
    """First row and file offset of every chunk, by row; None where HDF5 has to read it."""
    if (
        dataset.chunks is None
        or len(dataset) == 0
        or dataset.chunks[1:] != dataset.shape[1:]
        or not dataset.dtype.isnative
        or not hasattr(os, "preadv")
        or not hasattr(dataset.id, "chunk_iter")
        or dataset.id.get_create_plist().get_nfilters()
        or dataset.file.id.get_create_plist().get_userblock()
    ):
        return None
    # Numbers only: as many objects as chunks, kept, would have the garbage collector look at everything there is.
    rows, bytes_ = array("q"), array("q")

    def note(place: Any) -> None:
        rows.append(place.chunk_offset[0])
        bytes_.append(place.byte_offset)

    dataset.id.chunk_iter(note)
    first, offsets = np.frombuffer(rows, np.int64), np.frombuffer(bytes_, np.int64)
    order = np.argsort(first, kind="stable")
    first, offsets = first[order], offsets[order]
    whole = np.arange(0, len(dataset), dataset.chunks[0])  # a chunk never written has no place
    return (first, offsets) if np.array_equal(first, whole) else None
