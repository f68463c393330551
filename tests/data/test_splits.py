import re

import numpy as np
import pytest

from umda_fast.data import BagDataset, Splits, k_fold, split_bags
from umda_fast.errors import DataError


def make_dataset(labels, bags=None):
    bags = len(next(iter(labels.values()))) if bags is None else bags
    return BagDataset.from_arrays({"x": np.zeros((bags, 1))}, labels=labels, name="set")


RNG = np.random.default_rng(0)
MIXED = make_dataset(
    {
        "rare": np.where(RNG.random(400) < 0.2, np.nan, RNG.random(400) < 0.05),
        "grade": RNG.choice(4, 400, p=[0.6, 0.2, 0.15, 0.05]).astype(float),
        "signs": (RNG.random((400, 3)) < [0.5, 0.1, 0.3]).astype(float),
        "age": RNG.normal(60, 10, 400),
    }
)


class TestSplit:
    def test_every_bag_in_one_part(self):
        parts = split_bags(MIXED, {"train": 0.7, "val": 0.1, "test": 0.2})
        assert list(parts) == ["train", "val", "test"]
        together = np.concatenate(list(parts.values()))
        assert sorted(together) == list(range(400))
        assert [len(part) for part in parts.values()] == pytest.approx([280, 40, 80], rel=0.1)

    def test_one_binary_task_is_split_to_the_bag(self):
        dataset = make_dataset({"y": [0] * 60 + [1] * 40})
        for rows, share in zip(
            split_bags(dataset, {"a": 0.7, "b": 0.1, "c": 0.2}).values(), (0.7, 0.1, 0.2), strict=True
        ):
            assert np.bincount(dataset.labels["y"][rows].astype(int)).tolist() == [60 * share, 40 * share]

    def test_several_tasks_with_holes_are_balanced_at_once(self):
        parts = split_bags(MIXED, {"train": 0.75, "test": 0.25}, seed=5)
        for share, rows in zip((0.75, 0.25), parts.values(), strict=True):
            labels = MIXED.subset(rows).labels
            for name, column in MIXED.labels.items():
                if name == "age":
                    continue
                for value in np.unique(column[~np.isnan(column)]):
                    expected = share * (column == value).sum(axis=0)
                    assert np.abs((labels[name] == value).sum(axis=0) - expected).max() <= 3.0
            assert np.median(labels["age"]) == pytest.approx(60, abs=2.5)

    def test_seeds(self):
        shares = {"train": 0.5, "test": 0.5}
        first = split_bags(MIXED, shares, seed=0)["train"]
        assert np.array_equal(first, split_bags(MIXED, shares, seed=0)["train"])
        assert not np.array_equal(first, split_bags(MIXED, shares, seed=1)["train"])

    def test_the_same_on_every_machine(self):
        dataset = make_dataset({"y": [0, 1] * 5})
        assert split_bags(dataset, {"train": 0.6, "test": 0.4}, seed=2)["test"].tolist() == [0, 3, 5, 8]

    def test_groups_stay_together(self):
        groups = [f"patient {index // 5}" for index in range(400)]
        parts = split_bags(MIXED, {"train": 0.7, "test": 0.3}, groups=groups)
        sides = [{groups[row] for row in rows} for rows in parts.values()]
        assert not sides[0] & sides[1]
        assert len(parts["test"]) == pytest.approx(120, abs=10)

    def test_no_task_and_no_bag(self):
        bare = BagDataset.from_arrays({"x": np.zeros((10, 1))})
        assert [len(part) for part in split_bags(bare, {"a": 0.5, "b": 0.5}).values()] == [5, 5]
        none = BagDataset.from_arrays({"x": np.zeros((0, 1))}, labels={"y": np.empty(0)})
        assert [len(part) for part in split_bags(none, {"a": 0.5, "b": 0.5}).values()] == [0, 0]

    def test_a_part_without_share_stays_empty(self):
        parts = split_bags(MIXED, {"train": 1.0, "test": 0.0})
        assert len(parts["train"]) == 400

    @pytest.mark.parametrize("shares", [{"a": 0.5, "b": 0.4}, {"a": 1.5, "b": -0.5}])
    def test_bad_shares(self, shares):
        with pytest.raises(DataError, match=r"set: shares: expected numbers in 0\.\.1 that sum to 1"):
            split_bags(MIXED, shares)

    def test_bad_groups(self):
        with pytest.raises(DataError, match="set: groups: expected 400, one for each bag, got 1"):
            split_bags(MIXED, {"a": 1.0}, groups=["x"])


class TestFolds:
    def test_every_bag_tests_once_in_each_repeat(self):
        folds = k_fold(MIXED, 10, repeats=2, seed=1)
        assert [(fold.repeat, fold.fold) for fold in folds] == [(r, f) for r in range(2) for f in range(10)]
        for repeat in range(2):
            tested = np.concatenate([fold.test for fold in folds if fold.repeat == repeat])
            assert sorted(tested) == list(range(400))
        for fold in folds:
            assert sorted([*fold.train, *fold.test]) == list(range(400))
            assert (MIXED.labels["grade"][fold.test] == 1).sum() in (7, 8)
        assert not np.array_equal(folds[0].test, folds[10].test)

    def test_sizes_differ_by_one(self):
        dataset = make_dataset({"y": [0] * 45 + [1] * 47})
        folds = k_fold(dataset, 10)
        assert {len(fold.test) for fold in folds} == {9, 10}
        assert {int(dataset.labels["y"][fold.test].sum()) for fold in folds} == {4, 5}

    def test_groups(self):
        groups = [f"patient {index // 8}" for index in range(400)]
        for fold in k_fold(MIXED, 5, groups=groups):
            assert not {groups[row] for row in fold.train} & {groups[row] for row in fold.test}

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"folds": 1}, "set: folds: expected 2 to 400, got 1"),
            ({"folds": 401}, "set: folds: expected 2 to 400, got 401"),
            ({"folds": 5, "groups": ["a"] * 200 + ["b"] * 200}, "set: folds: expected 2 to 2, got 5"),
            ({"folds": 5, "repeats": 0}, "set: repeats: expected at least 1"),
        ],
    )
    def test_bad_arguments(self, arguments, message):
        with pytest.raises(DataError, match=re.escape(message)):
            k_fold(MIXED, **arguments)


class TestSplits:
    def test_is_a_mapping_fitted_to_the_training_labels(self):
        dataset = make_dataset({"age": np.array([10.0, 20.0, 90.5, 70.0]), "y": np.array([0, 0, 1, 0])})
        splits = Splits(
            "s", "d", dataset.subset([0, 1]), dataset.subset([2]), dataset.subset([3]), whole=dataset
        ).fitted("balanced")
        assert list(splits) == ["train", "val", "test"]
        assert splits["val"] is splits.val
        for part in (*splits.values(), splits.whole):
            assert (part.tasks[0].mean, part.tasks[0].std) == (15.0, 5.0)
        assert splits.tasks[1].class_weights == (0.5, 1.0)
        assert splits.views == dataset.views
        assert splits.fitted(keep=["y"]).tasks[1].class_weights == (0.5, 1.0)
        with pytest.raises(KeyError, match="expected one of train, val, test"):
            splits["validation"]
