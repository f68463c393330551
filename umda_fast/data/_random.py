"""Random draws that are the same on every machine and for every numpy version.

numpy keeps the bit streams of `PCG64` and `SeedSequence` fixed for good, but not the algorithms of
`Generator.permutation`, `choice` or `integers` (NEP 19). Here every draw comes from the doubles of
`Generator.random`, 53 raw bits each, by a stable sort or a floor.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]


def generator(*key: int) -> np.random.Generator:
    """A generator of its own for each sequence of non-negative integers, e.g. (seed, purpose, epoch)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(list(key))))


def permutation(rng: np.random.Generator, n: int) -> IntArray:
    """A random order of 0..n-1, int64 [n]."""
    return np.argsort(rng.random(n), kind="stable").astype(np.int64)


def integers(rng: np.random.Generator, low: int, high: int, size: int) -> IntArray:
    """`size` integers uniform in low..high, both included, int64."""
    return low + np.floor(rng.random(size) * (high - low + 1)).astype(np.int64)
