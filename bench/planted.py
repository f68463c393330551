"""Made bags in which it is known what a model has to do: which part of it must work, and how well it can.

Of scikit-learn's handwritten digits, training and test bags of different pictures:

- `which view`: two views show a digit each, and the third says which of them is asked for (the first if it is even):
  views have to be read together.
- `outlier`: seven pictures of one digit, or six and one of another: whatever the digit, instances have to be compared.

Of random numbers, every bag of five instances:

- `one feature`: the class is in a view of one feature, beside a view of sixteen without meaning.
- `common shift`: the class is in what all 64 features have in common, which a norm of the row takes away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from umda_fast.data import BagDataset

Generator = np.random.Generator
Arrays = tuple[dict[str, np.ndarray[Any, Any]], np.ndarray[Any, Any], np.ndarray[Any, Any]]
Sizes = Mapping[str, int]

SIZES: dict[str, dict[str, int]] = {
    "which view": {"train": 1500, "val": 250, "test": 1000},
    "outlier": {"train": 1000, "val": 200, "test": 1000},
    "one feature": {"train": 300, "val": 100, "test": 500},
    "common shift": {"train": 300, "val": 100, "test": 500},
}
_SHOWN = 7


class _Pictures:
    """Digits to draw from, other ones for testing."""

    def __init__(self, rng: Generator) -> None:
        found: Any = load_digits()
        self.pixels = (found.data / 16.0).astype(np.float32)
        order = rng.permutation(len(found.target))
        self._parts = {True: order[1200:], False: order[:1200]}
        self._digits, self._rng = found.target, rng

    def draw(self, digit: int, test: bool) -> int:
        part = self._parts[test]
        return int(self._rng.choice(part[self._digits[part] == digit]))


def _which_view(rng: Generator, sizes: Sizes) -> Arrays:
    pictures, rows, labels = _Pictures(rng), [], []
    for part, count in sizes.items():
        for _ in range(count):
            digits = rng.integers(10, size=3)
            labels.append(digits[digits[2] % 2])
            rows.append([pictures.draw(digit, part == "test") for digit in digits])
    drawn = np.array(rows)
    views = {name: pictures.pixels[drawn[:, i]] for i, name in enumerate(("first", "second", "which"))}
    return views, np.arange(len(labels) + 1), np.array(labels)


def _outlier(rng: Generator, sizes: Sizes) -> Arrays:
    pictures, rows, labels = _Pictures(rng), [], []
    for part, count in sizes.items():
        for _ in range(count):
            label, digit, step = rng.integers(2), rng.integers(10), rng.integers(1, 10)
            digits = [digit] * (_SHOWN - label) + [(digit + step) % 10] * label
            labels.append(label)
            rows += [pictures.draw(one, part == "test") for one in rng.permutation(digits)]
    return {"pixels": pictures.pixels[rows]}, np.arange(len(labels) + 1) * _SHOWN, np.array(labels)


def _one_feature(rng: Generator, sizes: Sizes) -> Arrays:
    labels, ptr, each = _balanced(rng, sizes)
    noise = rng.normal(size=(len(each), 16)).astype(np.float32)
    told = (2.0 * each + 0.5 * rng.normal(size=len(each))).astype(np.float32)
    return {"noise": noise, "told": told[:, None]}, ptr, labels


def _common_shift(rng: Generator, sizes: Sizes) -> Arrays:
    labels, ptr, each = _balanced(rng, sizes)
    shift = 2.0 * each - 1.0 + 0.3 * rng.normal(size=len(each))
    return {"features": (rng.normal(size=(len(each), 64)) + shift[:, None]).astype(np.float32)}, ptr, labels


def _balanced(rng: Generator, sizes: Sizes) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    count = sum(sizes.values())
    labels = rng.integers(0, 2, count)
    return labels, np.arange(count + 1) * 5, np.repeat(labels, 5)


_MADE: dict[str, Callable[[Generator, Sizes], Arrays]] = {
    "which view": _which_view,
    "outlier": _outlier,
    "one feature": _one_feature,
    "common shift": _common_shift,
}


def planted(name: str, seed: int, sizes: Sizes | None = None) -> dict[str, BagDataset]:
    """Split -> bags of the set `name` of `SIZES`; `sizes`: other numbers of bags for train, val and test."""
    sizes = SIZES[name] if sizes is None else sizes
    views, ptr, labels = _MADE[name](np.random.default_rng([11, seed]), sizes)
    kinds = {"label": "multiclass" if name == "which view" else "binary"}
    bags = BagDataset.from_arrays(views, ptr, {"label": labels}, kinds=kinds, name=name)
    ends = np.cumsum([0, *sizes.values()])
    return {part: bags.subset(np.arange(*ends[i : i + 2]), part) for i, part in enumerate(sizes)}
