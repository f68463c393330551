import math
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from umda_fast.data import Bag, BagDataset, collate, concat
from umda_fast.data.arrays import all_finite
from umda_fast.data.thinning import drop_instances
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec

VIEWS = (ViewSpec("a", 3), ViewSpec("b", 2))
TASKS = (
    TaskSpec("sick", "binary"),
    TaskSpec("stage", "multiclass", 4),
    TaskSpec("signs", "multilabel", 2),
    TaskSpec("age", "regression", mean=50.0, std=10.0),
)
LABELS = {
    "sick": torch.tensor(1.0),
    "stage": torch.tensor(2),
    "signs": torch.tensor([0.0, 1.0]),
    "age": torch.tensor(63.5),
}


def make_bag(n=4, name="one", **changes):
    fields = {
        "views": {"a": torch.arange(3.0 * n).reshape(n, 3), "b": torch.ones(n, 2)},
        "labels": dict(LABELS),
    }
    return Bag(name, **{**fields, **changes})


class TestBatch:
    def test_packs_in_order(self):
        batch = collate([make_bag(4), make_bag(0, "none"), make_bag(2, "two")], VIEWS, TASKS)
        assert len(batch) == 3
        assert batch.num_instances == 6
        assert batch.ptr.dtype == torch.int64
        assert batch.ptr.tolist() == [0, 4, 4, 6]
        assert batch.names == ["one", "none", "two"]
        torch.testing.assert_close(batch.views["a"][4:], make_bag(2).views["a"])
        assert batch.mask.all()
        assert batch.mask.shape == (6, 2)
        assert batch.coords is None
        assert set(batch.inputs()) == {"views", "ptr", "mask", "coords"}

    def test_labels_have_the_dtype_of_their_kind_and_missing_ones_are_masked(self):
        batch = collate([make_bag(), make_bag(2, "two", labels={"age": torch.tensor(20.0)})], VIEWS, TASKS)
        dtypes = {name: label.dtype for name, label in batch.labels.items()}
        assert dtypes == {
            "sick": torch.float32,
            "stage": torch.int64,
            "signs": torch.float32,
            "age": torch.float32,
        }
        assert batch.labels["age"].tolist() == [63.5, 20.0]
        assert batch.labels["stage"].tolist() == [2, 0]
        assert batch.labels["signs"].tolist() == [[0.0, 1.0], [0.0, 0.0]]
        assert batch.label_mask["age"].tolist() == [True, True]
        for name in ("sick", "stage", "signs"):
            assert batch.label_mask[name].tolist() == [True, False]

    def test_rows_of_missing_views_are_zero_whatever_they_held(self):
        features = torch.full((3, 2), float("nan"))
        features[0] = 5.0
        mask = torch.tensor([[True, True], [True, False], [True, False]])
        bag = Bag("holes", {"a": torch.ones(3, 3), "b": features}, mask=mask)
        whole = Bag("no b", {"a": torch.ones(1, 3)})
        batch = collate([bag, whole], VIEWS, TASKS)
        assert batch.views["b"].tolist() == [[5.0, 5.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]
        assert batch.mask.tolist() == [*mask.tolist(), [True, False]]
        assert torch.isnan(features[1:]).all(), "the bag's own features were written to"

    def test_a_bag_alone_is_not_copied_unless_it_has_holes(self):
        bag = make_bag(3, mask=torch.tensor([[True, True], [True, False], [True, True]]))
        batch = collate([bag], VIEWS, TASKS)
        assert batch.views["a"].data_ptr() == bag.views["a"].data_ptr()
        assert batch.views["b"].tolist() == [[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]
        assert bag.views["b"].tolist() == [[1.0, 1.0]] * 3

    def test_a_view_that_no_bag_has(self):
        batch = collate([Bag("x", {"a": torch.ones(2, 3)})], VIEWS, ())
        assert batch.views["b"].tolist() == [[0.0, 0.0], [0.0, 0.0]]
        assert not batch.mask[:, 1].any()
        batch = collate([Bag("x", {"a": torch.ones(2, 3, dtype=torch.float64)})], VIEWS, ())
        assert batch.views["b"].dtype == torch.float64

    def test_no_bags(self):
        batch = collate([], VIEWS, TASKS)
        assert len(batch) == batch.num_instances == 0
        assert batch.ptr.tolist() == [0]
        assert batch.views["a"].shape == (0, 3)
        assert batch.labels["signs"].shape == (0, 2)

    def test_coords(self):
        bags = [make_bag(2, coords=torch.ones(2, 2)), make_bag(1, "two", coords=torch.zeros(1, 2))]
        assert collate(bags, VIEWS, TASKS).coords.tolist() == [[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]
        with pytest.raises(DataError, match="bag 'three': coords"):
            collate([*bags, make_bag(1, "three")], VIEWS, TASKS)

    def test_to_moves_every_tensor(self):
        batch = collate([make_bag(coords=torch.ones(4, 2))], VIEWS, TASKS).to("meta")
        moved = [batch.mask, batch.ptr, batch.coords]
        for tensors in (batch.views, batch.labels, batch.label_mask):
            moved += tensors.values()
        assert all(tensor.is_meta for tensor in moved)
        assert batch.names == ["one"]

    def test_pin_memory_pins_every_tensor(self, monkeypatch):
        pinned = []
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
        batch = collate([make_bag(coords=torch.ones(4, 2))], VIEWS, TASKS)
        batch.pin_memory()
        held = [batch.mask, batch.ptr, batch.coords]
        for tensors in (batch.views, batch.labels, batch.label_mask):
            held += tensors.values()
        assert {id(tensor) for tensor in pinned} == {id(tensor) for tensor in held}

    def test_dtypes_of_a_view_may_not_differ(self):
        half = make_bag(1, "half", views={"a": torch.ones(1, 3).half(), "b": torch.ones(1, 2)})
        with pytest.raises(
            DataError, match=r"bag 'half': view 'a': expected dtype torch\.float32 as in bag 'one'"
        ):
            collate([make_bag(), half], VIEWS, TASKS)
        assert collate([half], VIEWS, TASKS).views["a"].dtype == torch.float16


class TestBadBags:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"views": {}}, "bag 'one': views: expected at least one"),
            ({"views": {"a": torch.ones(3)}}, "bag 'one': view 'a': expected a floating-point tensor [n, d]"),
            ({"views": {"a": torch.ones(3, 3).long()}}, "bag 'one': view 'a': expected a floating-point"),
            ({"views": {"a": np.ones((3, 3))}}, "bag 'one': view 'a': expected a floating-point"),
            (
                {"views": {"a": torch.ones(3, 3), "b": torch.ones(2, 2)}},
                "bag 'one': view 'b': expected 3 instances as in view 'a', got 2",
            ),
            ({"mask": torch.ones(3, 2).bool()}, "bag 'one': mask: expected bool [4, V]"),
            ({"mask": torch.ones(4, 2)}, "bag 'one': mask: expected bool [4, V]"),
            (
                {"mask": torch.tensor([[1, 1], [1, 1], [0, 0], [1, 0]]).bool()},
                "bag 'one': mask: expected at least one view for every instance, got none for instance 2",
            ),
            ({"coords": torch.ones(4, 3)}, "bag 'one': coords: expected [4, 2]"),
        ],
    )
    def test_alone(self, changes, message):
        with pytest.raises(DataError, match=re.escape(message)):
            make_bag(**changes)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"views": {"c": torch.ones(2, 2)}}, "bag 'one': view 'c': expected one of a, b"),
            ({"views": {"a": torch.ones(2, 4)}}, "bag 'one': view 'a': expected width 3, got 4"),
            ({"mask": torch.ones(4, 3).bool()}, "bag 'one': mask: expected 2 columns"),
            (
                {"views": {"a": torch.ones(4, 3)}, "mask": torch.ones(4, 2).bool()},
                "bag 'one': view 'b': the mask says it is there",
            ),
            ({"labels": {"sex": torch.tensor(1.0)}}, "bag 'one': label 'sex': expected a task among sick"),
            ({"labels": {"sick": 1.0}}, "task 'sick': expected a tensor"),
            ({"labels": {"sick": torch.tensor(2.0)}}, "task 'sick': expected 0 or 1, got 2"),
            ({"labels": {"stage": torch.tensor(4)}}, "task 'stage': expected a class in 0..3, got 4"),
            ({"labels": {"stage": torch.tensor(-1)}}, "task 'stage': expected a class in 0..3, got -1"),
            ({"labels": {"stage": torch.tensor([1])}}, "task 'stage': expected one value"),
            ({"labels": {"signs": torch.ones(3)}}, "task 'signs': expected 2 values of 0 or 1"),
            ({"labels": {"signs": torch.tensor([0.0, 0.5])}}, "task 'signs': expected values of 0 or 1"),
            ({"labels": {"age": torch.tensor(float("nan"))}}, "task 'age': expected a finite number"),
        ],
    )
    def test_against_the_specs(self, changes, message):
        bag = make_bag(**changes)
        for use in (lambda: BagDataset([bag], VIEWS, TASKS), lambda: collate([bag], VIEWS, TASKS)):
            with pytest.raises(DataError, match=re.escape(message)):
                use()

    def test_names_are_distinct(self):
        with pytest.raises(DataError, match="slides: bag 'one': expected distinct names"):
            BagDataset([make_bag(), make_bag()], VIEWS, TASKS, "slides")

    def test_specs_of_a_dataset(self):
        with pytest.raises(ValueError, match="views: expected at least one"):
            BagDataset([], (), TASKS)
        with pytest.raises(ValueError, match="views: expected distinct"):
            BagDataset([], (VIEWS[0], VIEWS[0]), TASKS)
        with pytest.raises(ValueError, match="tasks: expected distinct"):
            BagDataset([], VIEWS, (TASKS[0], TASKS[0]))


class CountingStore:
    """Knows sizes, names and labels; counts loads."""

    def __init__(self, sizes, width=3):
        self.names = [f"slide {index}" for index in range(len(sizes))]
        self.sizes = np.array(sizes, dtype=np.int64)
        self.labels = {"sick": np.arange(len(sizes)) % 2.0}
        self.width = width
        self.loaded = []

    def load(self, index):
        self.loaded.append(index)
        features = torch.full((int(self.sizes[index]), self.width), float(index))
        return Bag(
            self.names[index], {"a": features}, labels={"sick": torch.tensor(self.labels["sick"][index])}
        )


class TestDataset:
    def test_of_bags(self):
        dataset = BagDataset([make_bag(), make_bag(2, "two", labels={})], VIEWS, TASKS)
        assert len(dataset) == 2
        assert dataset.sizes.tolist() == [4, 2]
        assert dataset.names == ["one", "two"]
        assert dataset[1].name == "two"
        assert dataset.labels["age"][0] == 63.5
        assert np.isnan(dataset.labels["age"][1])
        assert np.isnan(dataset.labels["signs"][1]).all()
        with pytest.raises(IndexError):
            dataset[2]

    def test_empty(self):
        dataset = BagDataset([], VIEWS, TASKS)
        assert len(dataset) == 0
        assert dataset.labels["signs"].shape == (0, 2)
        assert list(dataset) == []

    def test_a_store_is_read_only_when_a_bag_is_asked_for(self):
        store = CountingStore([5, 1, 0, 7])
        dataset = BagDataset(store, VIEWS[:1], TASKS[:1])
        part = dataset.subset([3, 0])
        assert part.sizes.tolist() == [7, 5]
        assert part.names == ["slide 3", "slide 0"]
        assert part.labels["sick"].tolist() == [1.0, 0.0]
        assert part.subset(np.array([1]))[0].name == "slide 0"
        joined = concat([part, dataset.subset([1])], "both")
        assert joined.sizes.tolist() == [7, 5, 1]
        assert store.loaded == [0]
        assert [bag.name for bag in joined] == ["slide 3", "slide 0", "slide 1"]

    def test_a_store_s_bag_is_checked_when_loaded(self):
        dataset = BagDataset(CountingStore([2], width=5), VIEWS[:1], TASKS[:1])
        with pytest.raises(DataError, match="bag 'slide 0': view 'a': expected width 3, got 5"):
            dataset[0]

    def test_with_tasks(self):
        dataset = BagDataset([make_bag()], VIEWS, TASKS)
        tasks = [*TASKS[:3], TaskSpec("age", "regression", mean=1.0, std=2.0)]
        assert dataset.with_tasks(tasks).tasks[3].mean == 1.0
        assert dataset.tasks[3].mean == 50.0
        with pytest.raises(ValueError, match="tasks: expected the names"):
            dataset.with_tasks(TASKS[:2])

    def test_concat_needs_the_same_specs(self):
        dataset = BagDataset([make_bag()], VIEWS, TASKS)
        with pytest.raises(ValueError, match="parts: expected the views and tasks of 'bags'"):
            concat([dataset, BagDataset([], VIEWS, TASKS[:1], "other")], "both")
        with pytest.raises(ValueError, match="parts: expected at least one"):
            concat([], "both")

    def test_collate_is_that_of_the_specs(self):
        dataset = BagDataset([make_bag(), make_bag(2, "two")], VIEWS, TASKS)
        batch = dataset.collate([dataset[1], dataset[0]])
        assert batch.names == ["two", "one"]


class TestFromArrays:
    def test_slices_without_a_copy(self):
        features = np.random.default_rng(0).random((6, 3), dtype=np.float32)
        dataset = BagDataset.from_arrays({"a": features}, [0, 2, 2, 6], {"sick": [0, 1, np.nan]})
        assert [len(bag) for bag in dataset] == [2, 0, 4]
        assert dataset[2].views["a"].data_ptr() == features[2:].ctypes.data
        assert dataset.views == (ViewSpec("a", 3),)
        assert dataset.tasks == (TaskSpec("sick", "binary", labels=("0", "1")),)
        assert dataset[1].labels["sick"].item() == 1.0
        assert dataset[2].labels == {}
        assert dataset.names == ["bag 0", "bag 1", "bag 2"]

    def test_all_kinds_masks_and_coords(self):
        dataset = BagDataset.from_arrays(
            {"a": torch.ones(4, 3, dtype=torch.float64), "b": np.ones((4, 2), dtype=np.uint8)},
            np.array([0, 1, 4], dtype=np.int32),
            {"stage": [2, 0], "signs": [[0, 1], [np.nan, np.nan]], "age": [61.5, 40.0]},
            mask=[[1, 0], [1, 1], [0, 1], [1, 1]],
            coords=np.arange(8).reshape(4, 2),
            kinds={"stage": {"kind": "multiclass", "classes": 4}},
            names=["x", "y"],
        )
        assert dataset.tasks[0] == TaskSpec("stage", "multiclass", 4)
        assert dataset.tasks[2].mean == pytest.approx(50.75)
        bag = dataset[1]
        assert bag.name == "y"
        assert bag.mask.tolist() == [[True, True], [False, True], [True, True]]
        assert bag.coords.tolist() == [[2.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
        assert set(bag.labels) == {"stage", "age"}
        assert bag.labels["stage"].dtype == torch.int64
        assert {features.dtype for features in bag.views.values()} == {torch.float32}

    def test_without_ptr_every_row_is_a_bag(self):
        dataset = BagDataset.from_arrays({"a": np.ones((3, 2))})
        assert dataset.sizes.tolist() == [1, 1, 1]
        assert dataset.tasks == ()

    def test_read_only_and_bfloat16_input(self):
        features = np.ones((2, 2), dtype=np.float32)
        features.flags.writeable = False
        assert BagDataset.from_arrays({"a": features})[0].views["a"].tolist() == [[1.0, 1.0]]
        kept = BagDataset.from_arrays({"a": torch.ones(2, 2).bfloat16()}, dtype=torch.bfloat16)
        assert kept[0].views["a"].dtype == torch.bfloat16

    def test_pickles(self):
        dataset = BagDataset.from_arrays(
            {"a": np.ones((3, 2))}, [0, 1, 3], {"age": [1.5, 2.5]}, names=["p", "q"]
        )
        again = pickle.loads(pickle.dumps(dataset))
        assert again.names == ["p", "q"]
        torch.testing.assert_close(again[1].views["a"], dataset[1].views["a"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"views": {}}, "set: views: expected at least one"),
            ({"views": {"a": np.ones(6)}}, "set: view 'a': expected [N, d]"),
            ({"views": {"a": np.ones((6, 0))}}, "set: view 'a': expected [N, d] with d at least 1"),
            ({"views": {"a": np.full((6, 1), "x")}}, "set: view 'a': expected numbers"),
            (
                {"views": {"a": [[1.0], [2.0, 3.0]]}},
                "set: view 'a': expected an array, got rows of different",
            ),
            (
                {"views": {"a": np.ones((6, 1)), "b": np.ones((5, 1))}},
                "set: view 'b': expected 6 rows as in view 'a', got 5",
            ),
            ({"ptr": [1, 2, 6]}, "set: ptr: expected to start at 0, got 1"),
            ({"ptr": [0, 4, 2, 6]}, "set: ptr: expected never to decrease, got 4 then 2 at position 2"),
            ({"ptr": [0, 4, 5]}, "set: ptr: expected to end at the number of instances 6, got 5"),
            ({"ptr": []}, "set: ptr: expected integers [B+1]"),
            ({"ptr": [0.0, 6.0]}, "set: ptr: expected integers [B+1]"),
            ({"ptr": [[0, 6]]}, "set: ptr: expected integers [B+1]"),
            (
                {"labels": {"y": [0, 1, 1]}},
                "set: labels 'y': expected 2 rows, one for each bag, got shape [3]",
            ),
            (
                {"labels": {"y": [0, 3]}, "kinds": [TaskSpec("y", "multiclass", 3)]},
                "labels 'y': expected a class",
            ),
            ({"names": ["x"]}, "set: names: expected 2"),
            ({"names": ["x", "x"]}, "set: bag 'x': expected distinct names"),
            ({"mask": np.ones((6, 2))}, "set: mask: expected [6, 1]"),
            ({"mask": np.full((6, 1), 2)}, "set: mask: expected true and false"),
            (
                {"mask": [[1], [1], [1], [0], [1], [1]]},
                "set: mask: expected at least one view for every instance, got none for row 3 "
                "(bag 'bag 1', instance 1)",
            ),
            ({"coords": np.ones((6, 3))}, "set: coords: expected numbers [6, 2]"),
        ],
    )
    def test_bad_input(self, changes, message):
        arguments = {"views": {"a": np.ones((6, 3))}, "ptr": [0, 2, 6], "name": "set", **changes}
        with pytest.raises(DataError, match=re.escape(message)):
            BagDataset.from_arrays(**arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_all_finite(dtype):
    values = torch.full((65, 33), torch.finfo(dtype).max, dtype=dtype)  # their sum is infinite
    assert all_finite(values)
    assert all_finite(values[:0])
    for bad in (math.nan, math.inf, -math.inf):
        for place in (0, 1000, -1):
            broken = values.clone()
            broken.view(-1)[place] = bad
            assert not all_finite(broken)


def test_a_mask_is_handed_on_where_a_view_is_missing() -> None:
    """A batch in which none is missing needs none; what is known of it goes with it to another device."""
    views = (ViewSpec("a", 2), ViewSpec("b", 3))
    whole = Bag("x", {"a": torch.ones(4, 2), "b": torch.ones(4, 3)})
    partly = Bag("y", {"a": torch.ones(4, 2)})
    batch = collate([whole], views, ())
    assert batch.complete
    assert batch.inputs()["mask"] is None
    assert batch.to("cpu").inputs()["mask"] is None
    assert drop_instances(batch, 0.5).inputs()["mask"] is None
    other = replace(batch, mask=torch.tensor([[True, False]] * 4))
    assert other.inputs()["mask"] is other.mask  # not what was known of another mask
    batch = collate([whole, partly], views, ()).to("cpu")
    assert not batch.complete
    mask = batch.inputs()["mask"]
    assert torch.equal(mask, torch.tensor([[True, True]] * 4 + [[True, False]] * 4))
