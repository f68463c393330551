import dataclasses
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from umda_fast.data import (
    FORMATS,
    Bag,
    BagDataset,
    Splits,
    find_format,
    inspect_source,
    inspect_splits,
    load_folds,
    load_source,
)
from umda_fast.errors import DataError
from umda_fast.model.specs import TaskSpec, ViewSpec


class TestRecognition:
    def test_by_content(self, generated, tmp_path):
        file = generated[1]["bags"]
        renamed = tmp_path / "archive.bin"
        renamed.write_bytes(file.read_bytes())
        assert find_format(str(renamed)).name == "npz"
        assert len(load_source(renamed).whole) == 60
        assert find_format("digits").name == "digits"

    def test_a_path_that_is_called_digits(self, generated, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "digits").write_bytes(generated[1]["bags"].read_bytes())
        assert find_format("./digits").name == "npz"
        assert find_format("digits").name == "digits"

    def test_unknown(self, tmp_path):
        other = tmp_path / "other.bin"
        with zipfile.ZipFile(other, "w") as archive:
            archive.writestr("readme", "no arrays")
        with pytest.raises(
            DataError, match=r"other\.bin: a kind of data not understood; expected `digits`.*npz"
        ):
            load_source(other)
        with pytest.raises(DataError, match=r"nowhere: no such file or directory; expected `digits`"):
            load_source("nowhere")
        with pytest.raises(DataError, match=r"understood; expected"):
            load_source(tmp_path)

    def test_format_and_options(self, generated):
        with pytest.raises(DataError, match=r"format: expected one of digits, npz, .*got 'hdf5'"):
            load_source("x", format="hdf5")
        with pytest.raises(DataError, match="digits: option 'kinds': expected one of train_bags, val_bags"):
            load_source(kinds={})
        with pytest.raises(DataError, match="digits: option 'ptr'"):
            load_folds(ptr=1)
        with pytest.raises(
            DataError, match="option 'test_share': expected one of kinds, positive, val_share, class_weights"
        ):
            load_folds(generated[1]["bags"], test_share=0.1)
        with pytest.raises(DataError, match="nowhere: expected a readable"):
            load_source("nowhere", format="npz")
        assert load_source(generated[1]["bags"], format="npz").name == "bags"


SLIDES = (
    *("kinds", "positive", "labels", "tasks", "ignore", "metadata", "patient", "missing", "partial"),
    *("splits", "fold", "val_share", "test_share", "class_weights"),
    *("views", "mpp", "match", "tolerance", "skip_bad", "read_timeout", "bag"),
)
FILMS = (
    *("views", "tasks", "fields", "sentences", "text_width", "text", "encoder", "encoder_id", "kinds"),
    *("val_share", "test_share", "class_weights"),
)
OPTIONS = {
    "digits": ("train_bags", "val_bags", "test_bags", "missing_labels", "missing_views", "class_weights"),
    "npz": ("kinds", "positive", "val_share", "test_share", "class_weights", "ignore"),
    "pack": SLIDES,
    "films": FILMS,
    "mmimdb": ("views", "kinds", "val_share", "test_share", "class_weights"),
    "slides": SLIDES,
}
LOCAL = {"slides": ("labels", "tasks", "ignore", "patient", "partial", "splits", "fold", "mpp"), "films": ("text",)}
LOCAL["pack"] = LOCAL["slides"]


class TestOptions:
    """Names of options are in the configurations of runs: they and what is special about them stay."""

    @pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
    def test_names(self, known):
        assert known.options() == OPTIONS[known.name]
        assert known.options(folds=True) == tuple(
            name for name in OPTIONS[known.name] if name not in ("test_share", "fold")
        )
        assert known.local == LOCAL.get(known.name, ())

    def test_what_is_special_about_an_option_and_a_split_of_its_own(self, tmp_path, monkeypatch):
        from umda_fast.data.options import option
        from umda_fast.data.sources import source
        from umda_fast.data.sources.base import BagSource, GivenSplit, OpenedSource

        @dataclasses.dataclass(frozen=True, kw_only=True)
        class Texts(BagSource):
            scale: float = 1.0
            beside: str | None = option(None, local=True)
            val_share: float = 0.25
            test_share: float = option(0.25, folds=False)
            class_weights: str | None = None

            def open(self, path, folds):
                rows = np.loadtxt(path, ndmin=2) * self.scale
                data = BagDataset.from_arrays({"x": rows[:, 1:]}, labels={"y": rows[:, 0]}, name=path)
                first = {"train": np.arange(6), "val": np.arange(0), "test": np.arange(6, len(data))}
                given = [GivenSplit(first, "the first six train")] if folds is None and self.beside else []
                return OpenedSource(data, "texts", f"{len(data)} rows", given=given)

        line = source.SourceFormat("texts", "a table of numbers", lambda path: path.endswith(".txt"), Texts)
        monkeypatch.setattr(source, "FORMATS", (*FORMATS, line))
        path = tmp_path / "rows.txt"
        np.savetxt(path, np.arange(24.0).reshape(12, 2))
        assert line.options() == ("scale", "beside", "val_share", "test_share", "class_weights")
        assert line.options(folds=True) == ("scale", "beside", "val_share", "class_weights")
        assert line.local == ("beside",)
        splits = load_source(path, scale=0.5)
        assert sum(len(part) for part in splits.values()) == 12
        assert splits.description == "12 rows; split at random"
        assert splits.whole[11].views["x"].item() == 11.5
        given = load_source(path, beside="it")
        assert given.description == "12 rows; the first six train"
        assert given.test.names == splits.whole.names[6:]
        assert {*given.train.names, *given.val.names} == {*splits.whole.names[:6]}
        assert len(given.val) > 0
        folds = list(load_folds(path, folds=3, beside="it"))
        assert sorted(name for part in folds for name in part.test.names) == sorted(splits.whole.names)
        assert folds[2].description == "12 rows; fold 2 of 3, repeat 0"
        with pytest.raises(DataError, match="option 'test_share': expected one of scale, beside, val_share, class"):
            load_folds(path, test_share=0.1)


class TestInspection:
    @pytest.fixture
    def path(self, tmp_path):
        rng = np.random.default_rng(0)
        features = rng.normal(size=(60, 2))
        mask = np.ones((60, 2), dtype=bool)
        mask[:30, 1] = False
        second = rng.normal(size=(60, 3))
        second[3, 0] = np.nan  # missing there, so no fault
        features[17, 1] = np.inf
        second[44] = np.nan
        features[51:54], second[51:54] = features[33:36], second[33:36]
        ptr = np.array([*range(0, 60, 3), 60, 60])
        path = tmp_path / "odd.npz"
        np.savez(
            path,
            X=features,
            X_b=second,
            mask=mask,
            ptr=ptr,
            y=np.array([0, 1, np.nan] * 7),
            y_age=np.linspace(1.0, 10.5, 21),
            split=np.array(["train"] * 10 + ["val"] * 5 + ["test"] * 6),
        )
        return path

    def test_counts(self, path):
        report = inspect_source(path)
        assert report.format == "npz"
        assert report.bags == {"train": 10, "val": 5, "test": 6}
        assert report.instances == {"train": 30, "val": 15, "test": 15}
        assert report.instances_per_bag["test"] == {
            "min": 0.0,
            "q25": 3.0,
            "median": 3.0,
            "q75": 3.0,
            "max": 3.0,
            "mean": 2.5,
        }
        assert report.views[1].missing == {"train": 1.0, "val": 0.0, "test": 0.0}
        sick, age = report.tasks
        assert (sick.kind, sick.classes) == ("binary", ["0", "1"])
        assert sick.counts == {"train": [4, 3], "val": [1, 2], "test": [2, 2]}
        assert sick.missing == {"train": 3, "val": 2, "test": 2}
        assert sick.labelled == {"train": 7, "val": 3, "test": 4}
        assert age.values["train"]["min"] == 1.0
        assert age.values["test"]["max"] == 10.5
        assert not report.coords

    def test_faults_are_named(self, path):
        report = inspect_source(path)
        found = [(item.split, item.bag, item.view, item.values) for item in report.non_finite]
        assert found == [("train", "bag 5", "X", 1), ("val", "bag 14", "b", 3)]
        assert report.duplicates == [["val: bag 11", "test: bag 17"]]
        assert report.first_problem.startswith("train: bag 'bag 5': view 'X': 1 values are not finite")
        rest = "\n".join(report.problems)
        for text in (
            "in more than one split: val: bag 11, test: bag 17",
            "test: bag 20: a bag without instances",
        ):
            assert text in rest
        assert "train: view 'b': missing everywhere" in rest

    def test_sound_data_has_no_problem_and_the_report_is_json(self):
        report = inspect_source("digits")
        assert report.first_problem is None
        again = json.loads(json.dumps(dataclasses.asdict(report)))
        assert again["tasks"][2]["kind"] == "multilabel"
        assert again["views"][0]["width"] == 64

    def test_labels_that_teach_nothing(self):
        views, tasks = (
            (ViewSpec("x", 1),),
            (
                TaskSpec("b", "binary"),
                TaskSpec("m", "multilabel", 2),
                TaskSpec("r", "regression"),
                TaskSpec("c", "multiclass", 3, labels=("p", "q", "r")),
                TaskSpec("none", "binary"),
            ),
        )
        whole = BagDataset.from_arrays(
            {"x": np.arange(4.0)[:, None]},
            labels={
                "b": [1, 1, 0, 1],
                "m": [[0, 1], [1, 1], [0, 0], [1, 1]],
                "r": [5, 5, 1, 2],
                "c": [0, 0, 1, 0],
            },
            kinds=tasks,
        )
        splits = Splits("s", "d", whole.subset([0, 1]), whole.subset([2, 3]), whole.subset([]), whole)
        assert splits.views == views
        problems = inspect_splits(splits).problems
        assert problems == [
            "test: no bag at all",
            "train: task 'b': no bag of class 0",
            "train: task 'm': the same for all 2 bags: 1",
            "train: task 'r': all 2 labels are 5",
            "train: task 'c': no bag of class q",
            "train: task 'none': no label at all",
            "val: task 'none': no label at all",
        ]

    def test_bags_that_lack_a_whole_view_and_float16(self):
        bags = [Bag(f"b{index}", {"x": torch.full((2, 1), float(index)).half()}) for index in range(3)]
        dataset = BagDataset(bags, (ViewSpec("x", 1), ViewSpec("y", 4)), ())
        report = inspect_splits(Splits("s", "d", dataset, dataset.subset([]), dataset.subset([]), dataset))
        assert report.views[1].missing == {"train": 1.0, "val": None, "test": None}
        assert report.duplicates == []

    def test_a_broken_file_raises(self, tmp_path):
        (tmp_path / "x.npz").write_bytes(b"PK")
        with pytest.raises(DataError, match=r"x\.npz"):
            inspect_source(tmp_path / "x.npz")


@pytest.mark.parametrize("package", ["sklearn", "h5py"])
def test_what_one_source_needs_is_imported_for_it_only(package):
    code = f"import sys, umda_fast.data; sys.exit({package!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
