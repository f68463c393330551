import hashlib

import numpy as np
import pytest
import torch

from umda_fast.data import load_folds, load_source
from umda_fast.data.draws import Stream, generator
from umda_fast.data.sources.digits import (
    draw_bags,
    image_views,
    load_images,
    split_images,
)
from umda_fast.errors import DataError

SHARES = {"train": 0.65, "val": 0.1, "test": 0.25}


def digest(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()[
        :16
    ]


@pytest.fixture(scope="module")
def images():
    return load_images()


@pytest.fixture(scope="module")
def splits():
    return load_source("digits")


def pixel_rows(dataset):
    """The distinct images of a dataset's instances that have their pixels."""
    bags = [dataset[index] for index in range(len(dataset))]
    return {row.tobytes() for bag in bags for row in bag.views["pixels"][bag.mask[:, 0]].numpy()}


class TestViews:
    def test_the_same_on_every_machine(self, images):
        views = image_views(images[0])
        assert {name: (view.shape[1], digest(view)) for name, view in views.items()} == {
            "pixels": (64, "9f578524b6cec1fc"),
            "fourier": (40, "be22a3238cebf222"),
            "gradients": (128, "6a470965cc5efb06"),
        }

    def test_fourier_is_blind_to_position(self):
        image = np.zeros((2, 8, 8))
        image[0, 1:4, 2:5] = 16.0
        image[1, 4:7, 3:6] = 16.0
        first, second = image_views(image)["fourier"]
        np.testing.assert_array_equal(first, second)
        assert first[0] == pytest.approx(np.log(10.0), abs=2.0**-16)

    def test_gradients_of_a_ramp_point_along_it(self):
        ramp = np.broadcast_to(np.arange(8.0) * 2.0, (8, 8))
        for image, direction in ((ramp, 0), (ramp.T, 2), (-ramp, 4), (-ramp.T, 6)):
            cells = image_views(image[None])["gradients"].reshape(4, 4, 8)
            inner = cells[1:3, 1:3]
            assert (inner[..., direction] == 4 * 4.0 / 16.0).all()
            assert inner.sum() == inner[..., direction].sum()


class TestBags:
    def test_sizes_digits_and_nines(self, images):
        digits = images[1]
        draw = draw_bags(digits, np.arange(len(digits)), 400, generator(Stream.DIGIT_BAGS))
        bags = np.split(draw.index, draw.ptr[1:-1])
        kinds = [len(set(digits[bag])) for bag in bags]
        assert {len(bag) for bag in bags} == set(range(3, 31))
        assert set(kinds) == {2, 3, 4, 5}
        assert 0.4 < np.mean([9 in digits[bag] for bag in bags]) < 0.6
        assert all(len(set(bag)) == len(bag) for bag in bags)

    def test_scarce_images_are_reused(self, images):
        digits = images[1]
        few = np.concatenate([np.flatnonzero(digits == digit)[:2] for digit in range(10)])
        draw = draw_bags(digits, few, 50, generator(Stream.DIGIT_BAGS))
        assert set(draw.index) <= set(few)
        assert np.diff(draw.ptr).max() > 20

    def test_images_are_split_by_digit(self, images):
        digits = images[1]
        parts = split_images(digits, np.arange(len(digits)), SHARES, generator(Stream.DIGIT_BAGS))
        assert sorted(np.concatenate(list(parts.values()))) == list(range(len(digits)))
        for part, share in SHARES.items():
            counts = np.bincount(digits[parts[part]])
            np.testing.assert_allclose(counts, share * np.bincount(digits), atol=1.0)


class TestSource:
    def test_shape(self, splits):
        assert {name: len(split) for name, split in splits.items()} == {
            "train": 1500,
            "val": 300,
            "test": 500,
        }
        assert [(view.name, view.width) for view in splits.views] == [
            ("pixels", 64),
            ("fourier", 40),
            ("gradients", 128),
        ]
        kinds = [(task.name, task.kind, task.outputs) for task in splits.tasks]
        assert kinds == [
            ("has_nine", "binary", 1),
            ("largest", "multiclass", 10),
            ("present", "multilabel", 10),
            ("mean", "regression", 1),
        ]
        assert len(splits.whole) == 2300
        assert splits.whole.names[1500] == "val-0000"

    def test_no_image_in_two_splits(self, splits):
        seen = {name: pixel_rows(split) for name, split in splits.items()}
        assert not seen["train"] & seen["val"]
        assert not seen["train"] & seen["test"]
        assert not seen["val"] & seen["test"]

    def test_labels_agree_with_one_another(self, splits):
        for bag in (splits.test[index] for index in range(len(splits.test))):
            present = bag.labels["present"].nonzero().flatten()
            assert 2 <= len(present) <= 5
            assert bag.labels["largest"] == present.max()
            assert bag.labels["has_nine"] == (present.max() == 9)
            assert present.min() <= bag.labels["mean"] <= present.max()

    def test_labels_are_those_of_the_images(self, images):
        splits = load_source(
            "digits", train_bags=40, val_bags=0, test_bags=0, missing_labels=0.0, missing_views=0.0
        )
        digit_of = {
            row.tobytes(): digit
            for row, digit in zip(image_views(images[0])["pixels"], images[1], strict=True)
        }
        for bag in splits.train:
            digits = [digit_of[row.tobytes()] for row in bag.views["pixels"].numpy()]
            assert bag.labels["mean"].item() == pytest.approx(np.mean(digits), rel=1e-6)
            assert bag.labels["present"].nonzero().flatten().tolist() == sorted(set(digits))

    def test_holes(self, splits):
        for name, split in splits.items():
            for column in split.labels.values():
                gone = np.isnan(column).reshape(len(column), -1).any(axis=1).mean()
                assert 0.07 < gone < 0.13 if name == "train" else gone == 0.0
            masks = torch.cat([split[index].mask for index in range(len(split))])
            assert masks.any(dim=1).all()
            torch.testing.assert_close(
                masks.double().mean(dim=0), torch.full((3,), 0.9).double(), atol=0.02, rtol=0
            )

    def test_no_holes(self):
        splits = load_source(
            "digits", train_bags=30, val_bags=5, test_bags=5, missing_labels=0.0, missing_views=0.0
        )
        assert all(bag.mask is None and len(bag.labels) == 4 for bag in splits.whole)

    def test_standardised_by_the_training_labels(self, splits):
        labels = splits.train.labels["mean"]
        assert splits.test.tasks[3].mean == pytest.approx(np.nanmean(labels))
        assert splits.test.tasks[3].std == pytest.approx(np.nanstd(labels))

    def test_seeds(self, splits):
        few = {"train_bags": 20, "val_bags": 5, "test_bags": 5}
        first, again, other = (load_source(seed=seed, **few) for seed in (0, 0, 1))
        assert torch.equal(first.train[3].views["pixels"], again.train[3].views["pixels"])
        assert first.train.sizes.tolist() != other.train.sizes.tolist()
        assert not pixel_rows(first.train) <= pixel_rows(other.train)

    def test_the_same_on_every_machine(self, splits):
        bags = [splits.train[index] for index in range(200)]
        masks = [bag.mask.numpy() for bag in bags]
        features = [features.numpy() for bag in bags for features in bag.views.values()]
        assert splits.train.sizes[:8].tolist() == [25, 25, 17, 11, 4, 13, 14, 4]
        assert digest(splits.train.sizes, *masks, *features) == "0c6a41f37f7614ad"
        assert digest(*splits.train.labels.values()) == "e231b55aef5b8b72"

    @pytest.mark.parametrize(
        "option", [{"train_bags": -1}, {"val_bags": 1.5}, {"missing_views": 1.0}, {"missing_labels": "0.1"}]
    )
    def test_bad_options(self, option):
        with pytest.raises(DataError, match=f"digits: {next(iter(option))}: expected"):
            load_source(**option)


class TestFolds:
    def test_test_images_of_folds_do_not_meet(self):
        few = {"train_bags": 60, "val_bags": 20, "test_bags": 60, "missing_views": 0.0}
        folds = list(load_folds(folds=3, repeats=1, seed=2, **few))
        tested = []
        for fold in folds:
            rows = {
                name: {row.tobytes() for bag in split for row in bag.views["pixels"].numpy()}
                for name, split in fold.items()
            }
            assert not rows["train"] & rows["test"]
            assert not rows["val"] & rows["test"]
            assert not rows["train"] & rows["val"]
            tested.append(rows["test"])
        assert not tested[0] & tested[1]
        assert not tested[1] & tested[2]

    def test_bad_folds(self):
        with pytest.raises(DataError, match="digits: folds: expected 2 to 174, got 1"):
            next(load_folds(folds=1))
