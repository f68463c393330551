"""Random draws that are the same on every machine and for every numpy version.

numpy keeps the bit streams of `PCG64` and `SeedSequence` fixed for good, but not the algorithms of
`Generator.permutation`, `choice` or `integers` (NEP 19). Here every draw comes from the doubles of
`Generator.random`, 53 raw bits each, by a stable sort or a floor.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from umda_fast.data.arrays import IntArray


class Stream(IntEnum):
    """First words of the streams, one for each use, so that no two uses of one seed share their draws."""

    SHUFFLE = 1
    SPLIT = 2
    FOLD = 3
    DIGIT_IMAGES = 4
    DIGIT_BAGS = 5
    DIGIT_HOLES = 6
    DROP_INSTANCES = 7
    THRESHOLDS = 8
    LINEAR_FOLDS = 9
    CONTENT = 10
    SHOTS = 11
    MIXING = 12


def generator(stream: Stream, *key: int) -> np.random.Generator:
    """A generator of its own for each use and sequence of non-negative integers, e.g. (seed, epoch)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([int(stream), *key])))


def permutation(rng: np.random.Generator, n: int) -> IntArray:
    """A random order of 0..n-1, int64 [n]."""
    return np.argsort(rng.random(n), kind="stable").astype(np.int64)


def integers(rng: np.random.Generator, low: int, high: int, size: int) -> IntArray:
    """`size` integers uniform in low..high, both included, int64."""
    return low + np.floor(rng.random(size) * (high - low + 1)).astype(np.int64)
