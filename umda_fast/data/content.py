"""What a bag holds as a short text, so that a bag is known again under another name and another one under its name.

For each view: 64 bits of the features of the instances that have it, whatever their order. An instance's bits are a
multilinear hash of its float32 features (Carter and Wegman, "Universal classes of hash functions", 1979), mixed by the
finaliser of splitmix64 and added up over the bag.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from torch import Tensor

from umda_fast.data.batch import BagBatch
from umda_fast.data.draws import Stream, generator

__all__ = ["batch_contents", "same_content"]

Words = npt.NDArray[np.uint64]

_AT_ONCE = 2**22  # numbers of a large bag that are hashed at a time


@functools.cache
def _coefficients(width: int) -> Words:
    drawn: Words = generator(Stream.CONTENT, width).bit_generator.random_raw(width) | np.uint64(1)
    return drawn


def _mixed(words: Words) -> Words:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return words ^ (words >> np.uint64(31))


def _instances(features: Tensor) -> Words:
    """A word for every instance of features [n, d]."""
    width = features.shape[1]
    step = max(_AT_ONCE // max(width, 1), 1)
    words = np.zeros(len(features), dtype=np.uint64)
    for start in range(0, len(features), step):
        part = features[start : start + step].float().contiguous().numpy().view(np.uint32)
        words[start : start + step] = part.astype(np.uint64) @ _coefficients(width)
    return _mixed(words + np.uint64(width + 1))


def batch_contents(batch: BagBatch) -> list[str]:
    """The content of every bag of a batch on the host: 16 digits for each view in their order, blank where no instance
    has it, joined by `;`."""
    ptr = batch.ptr.numpy()
    columns = []
    for column, features in enumerate(batch.views.values()):
        present = batch.mask[:, column].numpy()
        words = np.where(present, _instances(features), np.uint64(0))
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words, dtype=np.uint64)])
        counts = np.concatenate([np.zeros(1, np.int64), np.cumsum(present)])
        numbers = counts[ptr[1:]] - counts[ptr[:-1]]
        hashes = _mixed(sums[ptr[1:]] - sums[ptr[:-1]] + numbers.astype(np.uint64))
        columns.append([f"{word:016x}" if n else "" for word, n in zip(hashes.tolist(), numbers.tolist(), strict=True)])
    return [";".join(cells) for cells in zip(*columns, strict=True)]


def same_content(first: str, second: str) -> bool:
    """Whether two contents agree in every view that both have, one at least."""
    both = [(a, b) for a, b in zip(first.split(";"), second.split(";"), strict=False) if a and b]
    return bool(both) and all(a == b for a, b in both)
