import re

import numpy as np
import pytest

from umda_fast.data import load_folds, load_source
from umda_fast.data.sources.npz import read_npz
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec


@pytest.fixture
def save(tmp_path):
    """Write arrays to a file; the arrays of a valid one, changed by the keywords (None removes)."""

    def write(**changes):
        rng = np.random.default_rng(0)
        ptr = np.arange(0, 41, 2)
        arrays = {"X": rng.normal(size=(40, 3)), "ptr": ptr, "y": np.arange(20) % 2, **changes}
        path = tmp_path / "data.npz"
        np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
        return path

    return write


class TestForms:
    def test_every_file_gives_its_own_arrays_back(self, npz_file):
        arrays = read_npz(str(npz_file))
        splits = load_source(npz_file)
        ptr = arrays.get("ptr", np.arange(len(arrays["y"]) + 1) if "y" in arrays else None)
        assert len(splits.whole) == len(ptr) - 1
        assert splits.name == npz_file.stem
        for view in splits.views:
            packed = np.concatenate(
                [splits.whole[index].views[view.name] for index in range(len(splits.whole))]
            )
            np.testing.assert_array_equal(packed, arrays[view.name].astype(np.float32))
        expected = arrays["Y"].T if "Y" in arrays else [arrays["y"]]
        names = arrays["tasks"].tolist() if "tasks" in arrays else ["y"]
        assert [task.name for task in splits.tasks] == names
        for name, column in zip(names, expected, strict=True):
            np.testing.assert_array_equal(splits.whole.labels[name], column)
        kind = "multiclass" if len(np.unique(expected)) > 2 else "binary"
        assert {task.kind for task in splits.tasks} == {kind}
        parts = [name for split in splits.values() for name in split.names]
        assert sorted(parts) == sorted(splits.whole.names)
        bags = len(splits.whole)
        assert [len(split) / bags for split in splits.values()] == pytest.approx([0.65, 0.15, 0.2], abs=0.03)

    def test_every_file_folds(self, npz_file):
        folds = list(load_folds(npz_file, folds=4, repeats=2, seed=1))
        assert len(folds) == 8
        for repeat in (folds[:4], folds[4:]):
            tested = [name for fold in repeat for name in fold.test.names]
            assert sorted(tested) == sorted(folds[0].whole.names)
        for fold in folds:
            assert not set(fold.train.names) & {*fold.val.names, *fold.test.names}
            assert fold.val
            assert len(fold.train) + len(fold.val) + len(fold.test) == len(fold.whole)

    def test_views_labels_names_masks_and_coords(self, save):
        mask = np.ones((40, 3), dtype=bool)
        mask[5, 0] = mask[6, 1] = False
        path = save(
            X_second=np.ones((40, 2), dtype=np.float16),
            X_third=np.ones((40, 4), dtype=np.int32),
            y_age=np.linspace(20, 81, 20),
            y_signs=np.tile([[0, 1, 1], [1, 0, 0]], (10, 1)),
            y_site=np.array(["a", "b", "", "c"] * 5),
            mask=mask,
            coords=np.arange(80).reshape(40, 2),
            names=np.array([f"slide {index}" for index in range(20)]),
        )
        whole = load_source(path).whole
        assert [(view.name, view.width) for view in whole.views] == [("X", 3), ("second", 2), ("third", 4)]
        assert [(task.name, task.kind) for task in whole.tasks] == [
            ("y", "binary"),
            ("age", "regression"),
            ("signs", "multilabel"),
            ("site", "multiclass"),
        ]
        bag = whole[2]
        assert bag.name == "slide 2"
        assert bag.mask.tolist() == [[True, True, True], [False, True, True]]
        assert bag.coords.tolist() == [[8.0, 9.0], [10.0, 11.0]]
        assert set(bag.labels) == {"y", "age", "signs"}

    def test_columns_of_unnamed_or_chosen_y_are_one_task(self, save):
        labels = np.tile([[0, 1], [1, 0]], (10, 1))
        (task,) = load_source(save(y=None, Y=labels)).tasks
        assert (task.name, task.kind, task.classes) == ("Y", "multilabel", 2)
        path = save(y=None, Y=labels, tasks=np.array(["a", "b"]))
        assert [task.name for task in load_source(path).tasks] == ["a", "b"]
        (task,) = load_source(path, kinds={"Y": "multilabel"}).tasks
        assert (task.kind, task.labels) == ("multilabel", ("a", "b"))
        np.testing.assert_array_equal(load_source(path, kinds=[task]).whole.labels["Y"], labels)

    def test_kinds_and_class_weights(self, save):
        path = save(y=np.arange(20) % 4 + 1.0)
        assert load_source(path).tasks[0].labels == ("1", "2", "3", "4")
        splits = load_source(path, kinds={"y": "regression"})
        assert splits.tasks[0].mean == pytest.approx(splits.train.labels["y"].mean())
        balanced = load_source(path, class_weights="balanced")
        assert balanced.test.tasks[0].class_weights == pytest.approx([1.0] * 4, abs=0.5)

    def test_a_trained_model_s_tasks_are_kept(self, save):
        tasks = [TaskSpec("age", "regression", mean=1.0, std=2.0), TaskSpec("y", "multiclass", 3)]
        splits = load_source(save(), kinds=tasks)
        assert splits.tasks == tuple(tasks)
        assert np.isnan(splits.whole.labels["age"]).all()
        assert load_source(save(y=None), kinds=tasks).tasks == tuple(tasks)

    def test_ignored_arrays(self, save):
        path = save(history=np.ones(3))
        assert load_source(path, ignore=["history"]).tasks[0].name == "y"


class TestSplits:
    def test_as_the_file_says(self, save):
        split = np.array(["train"] * 10 + ["val"] * 4 + ["test"] * 6)
        splits = load_source(save(split=split))
        assert [len(part) for part in splits.values()] == [10, 4, 6]
        assert splits.val.names == [f"bag {index}" for index in range(10, 14)]

    def test_val_is_taken_from_train_where_the_file_has_none(self, save):
        splits = load_source(save(split=np.array(["train"] * 10 + ["test"] * 10)), val_share=0.2)
        assert [len(part) for part in splits.values()] == [8, 2, 10]
        assert not set(splits.val.names) & set(splits.test.names)
        splits = load_source(save(split=np.array(["train"] * 10 + ["val"] * 10)))
        assert [len(part) for part in splits.values()] == [10, 10, 0]

    def test_shares_and_seeds(self, save):
        path = save()
        first = load_source(path, val_share=0.0, test_share=0.5)
        assert [len(part) for part in first.values()] == [10, 0, 10]
        assert first.test.names == load_source(path, val_share=0.0, test_share=0.5).test.names
        assert first.test.names != load_source(path, seed=1, val_share=0.0, test_share=0.5).test.names

    def test_groups_stay_together(self, save):
        groups = np.repeat([f"patient {index}" for index in range(5)], 4)
        path = save(groups=groups)
        for splits in (load_source(path, val_share=0.2), *load_folds(path, folds=5, val_share=0.25)):
            sides = [{groups[int(name.split()[1])] for name in split.names} for split in splits.values()]
            assert sum(len(side) for side in sides) == 5


BAD = {
    "no features": ({"X": None}, "data.npz: X: expected the features [N, d]"),
    "unknown array": ({"Ptr": np.ones(2)}, "data.npz: Ptr: an array of unknown meaning, shape [2]"),
    "ptr start": ({"ptr": np.arange(1, 41, 2)}, "data.npz: ptr: expected to start at 0, got 1"),
    "ptr falls": (
        {"ptr": np.array([0, 9, 5, 40])},
        "data.npz: ptr: expected never to decrease, got 9 then 5",
    ),
    "ptr end": (
        {"ptr": np.arange(0, 39, 2)},
        "data.npz: ptr: expected to end at the number of instances 40, got 38",
    ),
    "ptr beyond": (
        {"ptr": np.arange(0, 43, 2)},
        "data.npz: ptr: expected to end at the number of instances 40",
    ),
    "y length": (
        {"y": np.ones(19)},
        "data.npz: labels 'y': expected 20 rows, one for each bag, got shape [19]",
    ),
    "y without ptr": (
        {"ptr": None},
        "data.npz: labels 'y': expected 40, one for each row of the features, got 20",
    ),
    "y infinite": ({"y": np.full(20, np.inf)}, "data.npz: labels 'y': expected finite numbers"),
    "Y rank": ({"y": None, "Y": np.ones(20)}, "data.npz: Y: expected [B, T], got [20]"),
    "Y values": (
        {"y": None, "Y": np.full((20, 2), 2)},
        "data.npz: labels 'Y': expected values of 0 or 1, got 2",
    ),
    "tasks": (
        {"Y": np.ones((20, 2)), "tasks": np.array(["a"])},
        "data.npz: tasks: expected [2], one for each column of Y, got [1]",
    ),
    "tasks without Y": ({"tasks": np.array(["a"])}, "data.npz: tasks: expected beside Y"),
    "view rows": ({"X_b": np.ones((39, 2))}, "data.npz: view 'b': expected 40 rows as in view 'X', got 39"),
    "view rank": ({"X": np.ones(40)}, "data.npz: view 'X': expected [N, d]"),
    "view named X": ({"X_X": np.ones((40, 2))}, "data.npz: X_X: expected another name"),
    "mask": ({"mask": np.zeros((40, 1))}, "data.npz: mask: expected at least one view for every instance"),
    "mask columns": ({"mask": np.ones((40, 2))}, "data.npz: mask: expected [40, 1], one column for each"),
    "names": ({"names": np.array(["a"] * 20)}, "data.npz: bag 'a': expected distinct names"),
    "split": ({"split": np.array(["train"] * 19 + ["dev"])}, "got 'dev' for 'bag 19'"),
    "groups": ({"groups": np.array(["a"])}, "data.npz: groups: expected [20], one for each bag, got [1]"),
    "objects": (
        {"y": np.array([{}] * 20, dtype=object)},
        "data.npz: expected a readable .npz file of plain arrays",
    ),
}


class TestBadFiles:
    @pytest.mark.parametrize("case", BAD)
    def test_contents(self, save, case):
        changes, message = BAD[case]
        with pytest.raises(DataError, match=re.escape(message)):
            load_source(save(**changes))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"ignore": ["z"]}, "data.npz: ignore: expected names among X, ptr, y, got 'z'"),
            ({"kinds": {"z": "binary"}}, "data.npz: kinds: expected tasks among y, got 'z'"),
            ({"kinds": {"y": {"kind": "multiclass", "classes": 2, "colour": 1}}}, "data.npz: kinds['y']"),
            ({"val_share": 0.9}, "data.npz: shares: expected numbers in 0..1 that sum to 1"),
            ({"class_weights": "sqrt"}, "class_weights: expected"),
            ({"bags": 3}, "data.npz: option 'bags': expected one of kinds, positive, val_share, test_share"),
        ],
    )
    def test_options(self, save, options, message):
        with pytest.raises(DataError, match=re.escape(message)):
            load_source(save(), **options)

    def test_cut_short_empty_and_garbled(self, save, tmp_path):
        whole = save().read_bytes()
        middle = len(whole) // 2
        # np.savez does not compress: a flipped bit among the numbers is found by the archive's checksum.
        flipped = whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]
        for content in (whole[:middle], whole[:-10], b"", b"hello", flipped):
            path = tmp_path / "bad.npz"
            path.write_bytes(content)
            with pytest.raises(DataError, match=r"bad\.npz: expected a readable \.npz file"):
                load_source(path)

    def test_one_array(self, tmp_path):
        path = tmp_path / "one.npz"
        with path.open("wb") as file:
            np.save(file, np.ones(3))
        with pytest.raises(DataError, match=r"one\.npz: expected an \.npz archive of named arrays"):
            load_source(path)
