"""The source `digits`: bags of scikit-learn's 1797 real handwritten digits (8 x 8, UCI), nothing to download.

Every image is seen through three views: its pixels, the magnitudes of its Fourier transform (blind to position, and to
a half turn: a 6 is a 9), and the orientations of its gradients. A bag holds 3 to 30 images of 2 to 5 digits. Images
are split first and bags drawn afterwards, so that no image is in two splits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.dataset import BagDataset, concat
from umda_fast.data.draws import Stream, generator, integers, permutation
from umda_fast.data.labels import ClassWeights
from umda_fast.data.sources.base import Source
from umda_fast.data.splits import SPLITS, Splits, check_folds
from umda_fast.errors import DataError
from umda_fast.extras import require
from umda_fast.model.specs import TaskSpec

_DIGITS = tuple(str(digit) for digit in range(10))
_TASKS = (
    TaskSpec("has_nine", "binary", labels=("no", "yes")),
    TaskSpec("largest", "multiclass", classes=10, labels=_DIGITS),
    TaskSpec("present", "multilabel", classes=10, labels=_DIGITS),
    TaskSpec("mean", "regression"),
)
_SHARES = {"train": 0.65, "val": 0.1, "test": 0.25}
_ORIENTATIONS = 8
_CELL = 2


def is_digits(source: str) -> bool:
    """Whether `source` is the name of this source."""
    return source == "digits"


@dataclass(frozen=True)
class BagDraw:
    """Which images are in which bag: bag b holds images index[ptr[b]:ptr[b+1]]."""

    index: IntArray
    ptr: IntArray


def load_images() -> tuple[FloatArray, IntArray]:
    """Images float64 [1797, 8, 8] with whole numbers 0..16, and their digits int64 [1797].

    Raises:
        MissingExtraError: scikit-learn, which carries the images, is not installed.
    """
    require("digits", "sklearn")
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images.astype(np.float64), data.target.astype(np.int64)


def image_views(images: FloatArray) -> dict[str, npt.NDArray[np.float32]]:
    """The three views of 8 x 8 images: pixels [n, 64] in 0..1, fourier [n, 40], gradients [n, 128].

    fourier is log(1 + |DFT|), the half that a real image's symmetry leaves. gradients is, in every cell of 2
    x 2 pixels, the length of the gradient (central differences, zero outside) shared linearly between the
    nearest two of 8 directions (Dalal and Triggs 2005, without their block normalisation).
    """
    n = len(images)
    scaled = images / 16.0
    fourier = np.log1p(np.abs(np.fft.rfft2(scaled)))
    padded = np.pad(scaled, ((0, 0), (1, 1), (1, 1)))
    dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    length = np.sqrt(dx * dx + dy * dy)
    turn = np.arctan2(dy, dx) / (2.0 * np.pi) * _ORIENTATIONS
    # A linear share of a direction rather than a hard bin: rounding of the angle then moves nothing by much.
    apart = np.abs(turn[..., None] - np.arange(_ORIENTATIONS))
    apart = np.minimum(apart % _ORIENTATIONS, -apart % _ORIENTATIONS)
    share = np.maximum(0.0, 1.0 - apart) * length[..., None]
    cells = 8 // _CELL
    gradients = share.reshape(n, cells, _CELL, cells, _CELL, _ORIENTATIONS).sum(axis=(2, 4))
    return {"pixels": _rounded(scaled), "fourier": _rounded(fourier), "gradients": _rounded(gradients)}


def _rounded(features: FloatArray) -> npt.NDArray[np.float32]:
    """To multiples of 2^-16, because FFT, log and arctan2 differ in the last bits between machines."""
    flat = features.reshape(len(features), -1)
    return (np.round(flat * 2.0**16) / 2.0**16).astype(np.float32)


def split_images(
    digits: IntArray, images: IntArray, shares: dict[str, float], rng: np.random.Generator
) -> dict[str, IntArray]:
    """Part -> images in ascending order, the same share of every digit in each."""
    cuts = np.cumsum(list(shares.values()))[:-1]
    parts: dict[str, list[IntArray]] = {part: [] for part in shares}
    for digit in range(10):
        pool = images[digits[images] == digit]
        pool = pool[permutation(rng, len(pool))]
        pieces = np.split(pool, np.round(cuts * len(pool)).astype(np.int64))
        for part, piece in zip(shares, pieces, strict=True):
            parts[part].append(piece)
    return {part: np.sort(np.concatenate(pieces)) for part, pieces in parts.items()}


def draw_bags(digits: IntArray, images: IntArray, bags: int, rng: np.random.Generator) -> BagDraw:
    """Draw bags of 3 to 30 of `images`, of 2 to 5 digits; half of the bags hold a nine.

    No image is twice in a bag unless the bag asks for more of a digit than there are.
    """
    pools = [images[digits[images] == digit] for digit in range(10)]
    index: list[IntArray] = []
    sizes = integers(rng, 3, 30, bags)
    nine = rng.random(bags) < 0.5
    for size, with_nine in zip(sizes.tolist(), nine.tolist(), strict=True):
        kinds = int(integers(rng, 2, min(5, size), 1)[0])
        chosen = permutation(rng, 9)[: kinds - with_nine]
        if with_nine:
            chosen = np.append(chosen, 9)
        # One image of every digit chosen, the others at random among them.
        counts = np.ones(kinds, dtype=np.int64)
        counts += np.bincount(integers(rng, 0, kinds - 1, size - kinds), minlength=kinds)
        drawn = []
        for digit, count in zip(chosen.tolist(), counts.tolist(), strict=True):
            order = permutation(rng, len(pools[digit]))
            drawn.append(pools[digit][np.resize(order, count)])
        index.append(np.concatenate(drawn)[permutation(rng, size)])
    ptr = np.concatenate([np.zeros(1, dtype=np.int64), sizes.cumsum()])
    return BagDraw(np.concatenate(index) if index else np.empty(0, dtype=np.int64), ptr)


def _labels(digits: IntArray, draw: BagDraw) -> dict[str, FloatArray]:
    bags = len(draw.ptr) - 1
    present = np.zeros((bags, 10))
    np.add.at(present, (np.repeat(np.arange(bags), np.diff(draw.ptr)), digits[draw.index]), 1.0)
    mean = present @ np.arange(10.0) / np.maximum(present.sum(axis=1), 1.0)
    present = (present > 0).astype(np.float64)
    return {
        "has_nine": present[:, 9].copy(),
        "largest": 9.0 - present[:, ::-1].argmax(axis=1),
        "present": present,
        "mean": mean,
    }


def _dataset(
    name: str,
    views: dict[str, npt.NDArray[np.float32]],
    digits: IntArray,
    draw: BagDraw,
    missing_labels: float,
    missing_views: float,
    rng: np.random.Generator,
) -> BagDataset:
    instances, bags = len(draw.index), len(draw.ptr) - 1
    mask = rng.random((instances, len(views))) >= missing_views
    # An instance keeps at least one view.
    kept = integers(rng, 0, len(views) - 1, instances)
    bare = ~mask.any(axis=1)
    mask[bare, kept[bare]] = True
    labels = _labels(digits, draw)
    for column in labels.values():
        column[rng.random(bags) < missing_labels] = np.nan
    return BagDataset.from_arrays(
        {
            view: features[draw.index] * mask[:, [column]]
            for column, (view, features) in enumerate(views.items())
        },
        draw.ptr,
        labels,
        mask=mask,
        kinds=_TASKS,
        names=[f"{name}-{bag:04d}" for bag in range(bags)],
        name=f"digits ({name})",
    )


@dataclass(frozen=True, kw_only=True)
class DigitsSource(Source):
    """Bags of digits; tasks has_nine (binary), largest (10 classes), present (10 labels), mean (regression).

    The seed is that of everything drawn; the same bags on every machine. In cross-validation a fold's test bags are
    drawn from images that no other fold tests on.

    Attributes:
        train_bags, val_bags, test_bags: how many to draw.
        missing_labels: share of the training bags' labels, of each task, left out.
        missing_views: share of the views of all instances left out; every instance keeps at least one.
        class_weights: "balanced" or None.

    Raises:
        DataError: an option out of range.
    """

    train_bags: int = 1500
    val_bags: int = 300
    test_bags: int = 500
    missing_labels: float = 0.1
    missing_views: float = 0.1
    class_weights: ClassWeights = None

    def __post_init__(self) -> None:
        for name in ("train_bags", "val_bags", "test_bags"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise DataError(f"digits: {name}: expected a non-negative int, got {value!r}")
        for name in ("missing_labels", "missing_views"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value < 1.0:
                raise DataError(f"digits: {name}: expected a share in 0..1, below 1, got {value!r}")

    def load_splits(self, path: str, seed: int) -> Splits:
        """`path` says nothing. Raises DataError: no scikit-learn."""
        _, digits = load_images()
        everything = np.arange(len(digits), dtype=np.int64)
        parts = split_images(digits, everything, _SHARES, generator(Stream.DIGIT_IMAGES, seed))
        return self._draw(parts, [seed])

    def load_folds(self, path: str, folds: int, repeats: int, seed: int) -> Iterator[Splits]:
        """`path` says nothing. Raises DataError: no scikit-learn, folds or repeats out of range."""
        _, digits = load_images()
        check_folds("digits", folds, repeats, int(np.bincount(digits).min()))
        everything = np.arange(len(digits), dtype=np.int64)
        rest = _SHARES["train"] + _SHARES["val"]
        shares = {split: _SHARES[split] / rest for split in ("train", "val")}
        for repeat in range(repeats):
            rng = generator(Stream.DIGIT_IMAGES, seed, repeat, folds)
            parts = split_images(digits, everything, {str(fold): 1.0 / folds for fold in range(folds)}, rng)
            for fold in range(folds):
                test = parts[str(fold)]
                others = np.setdiff1d(everything, test)
                split = {**split_images(digits, others, shares, rng), "test": test}
                yield self._draw(split, [seed, repeat, folds, fold])

    def _draw(self, parts: dict[str, IntArray], seed: Sequence[int]) -> Splits:
        """Bags of the images of each split."""
        images, digits = load_images()
        views = image_views(images)
        bags = {"train": self.train_bags, "val": self.val_bags, "test": self.test_bags}
        datasets = {}
        for stream, split in enumerate(SPLITS):
            draw = draw_bags(digits, parts[split], bags[split], generator(Stream.DIGIT_BAGS, *seed, stream))
            datasets[split] = _dataset(
                split,
                views,
                digits,
                draw,
                self.missing_labels if split == "train" else 0.0,
                self.missing_views,
                generator(Stream.DIGIT_HOLES, *seed, stream),
            )
        return Splits(
            name="digits",
            description=(
                "bags of 3 to 30 handwritten digits in three views; "
                f"{self.missing_views:.0%} of the views and {self.missing_labels:.0%} of the training "
                "labels are missing"
            ),
            train=datasets["train"],
            val=datasets["val"],
            test=datasets["test"],
            whole=concat(list(datasets.values()), "digits"),
            drawn=True,
            class_weights=self.class_weights,
        ).fitted(self.class_weights)
