"""A directory of bags as a source: its table of labels and its splits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.slide_files import NAMES, write_labels
from umda_fast.data import inspect_source, load_folds, load_source
from umda_fast.errors import DataError


def load(root, **options):
    return load_source(root, **options).whole


class TestLabels:
    def test_no_table(self, clam):
        (clam / "labels.csv").unlink()
        splits = load_source(clam)
        assert splits.tasks == ()
        assert "no table of labels" in splits.description

    def test_beside(self, clam):
        beside = clam.parent / "labels.csv"
        (clam / "labels.csv").rename(beside)
        assert [task.name for task in load(clam).tasks] == ["label", "age"]
        write_labels(beside, {"slide": ["other1", "other2"], "y": [0, 1]})  # another directory's
        assert load(clam).tasks == ()

    def test_names(self, clam):
        files = [f"{name}.{end}" for name, end in zip(NAMES, ["h5", "svs", "ndpi", "pt"] * 3, strict=True)]
        for column in ("filename", "Slide ID", "bag", "CASE", "anything"):
            write_labels(clam / "labels.csv", {column: [f"sub/{file}" for file in files], "y": [0, 1] * 6})
            assert load(clam).labels["y"].tolist() == [0, 1] * 6

    def test_kinds(self, clam):
        write_labels(
            clam / "labels.csv",
            {
                "slide": NAMES,
                "stage": [1, 2, 3] * 4,
                "score": ["0.5", "NA", "1.25"] * 4,
                "organs": ["lung;liver", "", "lung", ";"] * 3,
            },
            "\t",
        )
        (clam / "labels.csv").rename(clam / "labels.tsv")
        whole = load(clam, kinds={"organs": "multilabel", "stage": "regression"})
        assert [(task.name, task.kind) for task in whole.tasks] == [
            ("stage", "regression"),
            ("score", "regression"),
            ("organs", "multilabel"),
        ]
        assert whole.tasks[2].labels == ("liver", "lung")
        organs = whole.labels["organs"]
        assert organs[0].tolist() == [1, 1]
        assert np.isnan(organs[1]).all()
        assert organs[3].tolist() == [0, 0]
        assert set(load(clam, kinds={"organs": "multilabel"}, tasks=["organs"])[0].labels) == {"organs"}
        again = load(clam, kinds=whole.tasks)  # as a model trained on it asks
        np.testing.assert_array_equal(again.labels["organs"], organs)

    def test_class_weights(self, clam):
        write_labels(clam / "labels.csv", {"slide": NAMES, "y": [0] * 9 + [1] * 3})
        splits = load_source(clam, class_weights="balanced")
        ones = splits.train.labels["y"].sum()
        weights = splits.tasks[0].class_weights
        assert weights[1] == pytest.approx(len(splits.train) / (2 * ones))

    @pytest.mark.parametrize(
        ("columns", "options", "message"),
        [
            ({"slide": [*NAMES, "ghost"], "y": [0, 1] * 6 + [0]}, {}, r"labels for missing slides: 'ghost'; .*s00"),
            ({"slide": [*NAMES, "s01.svs"], "y": [0, 1] * 6 + [0]}, {}, r"slide 's01': expected one row, got another"),
            ({"slide": NAMES, "y": ["TCGA"] * 12}, {"tasks": "y"}, r"labels 'y': .* at least two .* got 1 \(TCGA"),
            ({"slide": [*NAMES[:11], ""], "y": [0, 1] * 6}, {}, r"column 'slide': expected a name .* in row 13"),
            ({"slide": NAMES, "split": ["train"] * 11 + ["dev"]}, {}, r"column split: expected .*'dev' for 's11'"),
            ({"slide": NAMES, "y": [0, 1] * 6}, {"tasks": ["z"]}, r"tasks: expected columns among slide, y, got 'z'"),
            ({"slide": NAMES, "y": [0, 1] * 6}, {"ignore": ["z"]}, r"ignore: expected columns among"),
            ({"slide": NAMES, "y": [0.5, 1] * 6}, {"kinds": {"y": "binary"}}, r"labels 'y': expected whole numbers"),
        ],
    )
    def test_refused(self, clam, columns, options, message):
        write_labels(clam / "labels.csv", columns)
        with pytest.raises(DataError, match=r"labels\.csv: " + message):
            load_source(clam, **options)

    def test_tables_that_are_none(self, clam):
        table = clam / "labels.csv"
        for content, message in (
            ("", "empty file"),
            ("slide,y\ns00\n", "row 2: expected 2 cells as in the header, got 1"),
            ("slide,y,y\n", "distinct columns, got 'y' more than once"),
            ('slide,y\n"s00,1\n', "expected a table"),
        ):
            table.write_text(content)
            with pytest.raises(DataError, match=rf"labels\.csv: .*{message}"):
                load(clam)
        table.write_bytes(b"slide,y\n\xff\xfe")
        with pytest.raises(DataError, match=r"labels\.csv: expected a readable table in UTF-8"):
            load(clam)
        (clam / "labels.tsv").write_text("slide\ty\n")
        with pytest.raises(DataError, match=r"expected one table of labels, got labels\.tsv too"):
            load(clam)

    def test_slides_without_a_row(self, clam):
        write_labels(clam / "labels.csv", {"slide": NAMES[:10], "y": [0, 1] * 5})
        splits = load_source(clam)
        assert np.isnan(splits.whole.labels["y"]).tolist() == [False] * 10 + [True] * 2
        assert "2 bags not in it" in splits.description
        assert sum(inspect_source(clam).tasks[0].missing.values()) == 2


class TestSplits:
    def test_patients_stay_together(self, clam):
        for seed in range(5):
            splits = load_source(clam, seed=seed)
            patients = [{int(name[1:]) // 2 for name in part.names} for part in splits.values()]
            assert sum(len(group) for group in patients) == 6
            assert all(len(part) for part in splits.values())

    def test_folds_by_patient(self, clam):
        folds = list(load_folds(clam, folds=3, repeats=2))
        assert len(folds) == 6
        for repeat in (folds[:3], folds[3:]):
            assert sorted(name for fold in repeat for name in fold.test.names) == NAMES
        for fold in folds:
            parts = [{int(name[1:]) // 2 for name in part.names} for part in fold.values()]
            assert sum(len(part) for part in parts) == 6
        with pytest.raises(DataError, match="folds: expected 2 to 6, got 7"):
            list(load_folds(clam, folds=7))

    @pytest.fixture
    def with_splits(self, clam):
        (clam / "splits").mkdir()
        for fold in range(2):
            rows = [",train,val,test"]
            parts = (NAMES[fold : fold + 6], NAMES[fold + 6 : fold + 8], NAMES[fold + 8 : fold + 10])
            for line in range(6):
                cells = [part[line] if line < len(part) else "" for part in parts]
                rows.append(",".join([str(line), *cells]))
            (clam / "splits" / f"splits_{fold}.csv").write_text("\n".join(rows) + "\n")
            (clam / "splits" / f"splits_{fold}_bool.csv").write_text("ignored\n")
            (clam / "splits" / f"splits_{fold}_descriptor.csv").write_text("ignored\n")
        return clam

    def test_of_clam(self, with_splits):
        splits = load_source(with_splits)
        assert (splits.train.names, splits.val.names, splits.test.names) == (NAMES[:6], NAMES[6:8], NAMES[8:10])
        assert len(splits.whole) == 12
        assert load_source(with_splits, fold=1).test.names == NAMES[9:11]
        folds = list(load_folds(with_splits, folds=2))
        assert [fold.test.names for fold in folds] == [NAMES[8:10], NAMES[9:11]]
        with pytest.raises(DataError, match="expected 2 folds and 1 repeat, one for each split file, got 10 and 1"):
            list(load_folds(with_splits, folds=10))
        with pytest.raises(DataError, match="fold: expected 0 to 1, got 2"):
            load_source(with_splits, fold=2)

    def test_of_clam_elsewhere(self, with_splits, tmp_path):
        (with_splits / "splits").rename(tmp_path / "elsewhere")
        assert load_source(with_splits).test.names != NAMES[8:10]
        for where in ("elsewhere", "elsewhere/splits_0.csv"):
            assert load_source(with_splits, splits=str(tmp_path / where)).test.names == NAMES[8:10]
        (tmp_path / "elsewhere").rename(tmp_path / "splits")  # beside the directory
        assert load_source(with_splits).test.names == NAMES[8:10]

    def test_of_clam_refused(self, with_splits):
        file = with_splits / "splits" / "splits_0.csv"
        text = file.read_text()
        file.write_text(text.replace("s08", "ghost"))
        with pytest.raises(DataError, match=r"splits_0\.csv: missing slides: 'ghost'"):
            load_source(with_splits)
        splits = load_source(with_splits, skip_bad=True)
        assert splits.test.names == ["s09"]
        assert "ghost" in splits.skipped[0]
        file.write_text(text.replace("s08", "s00"))
        with pytest.raises(DataError, match=r"splits_0\.csv: slide 's00': expected in one split, got train and test"):
            load_source(with_splits)
        file.write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match=r"splits_0\.csv: expected columns train, val and test, got 'a', 'b'"):
            load_source(with_splits)
        (with_splits / "splits" / "splits_3.csv").write_text(text)
        with pytest.raises(DataError, match=r"expected splits_0\.csv, splits_1\.csv, \.\.\. without a gap"):
            load_source(with_splits)

    def test_of_the_table(self, clam):
        split = ["train"] * 8 + ["test"] * 4
        write_labels(clam / "labels.csv", {"slide": NAMES, "y": [0, 1] * 6, "split": split})
        splits = load_source(clam)
        assert splits.test.names == NAMES[8:]
        assert sorted(splits.train.names + splits.val.names) == NAMES[:8]
        assert len(splits.val) in (1, 2)


def test_columns_of_the_table_may_be_metadata(clam):
    splits = load_source(clam, metadata=["age"])
    assert [task.name for task in splits.train.tasks] == ["label"]
    known = splits.whole.metadata
    assert known.names == ("age",)
    order = [splits.whole.names.index(name) for name in NAMES]
    expected = [math.nan if index == 7 else 40.5 + index for index in range(12)]
    np.testing.assert_array_equal(known.values[order, 0], expected)
    with pytest.raises(DataError, match=r"labels\.csv: column 'label': expected numbers, got 'tumor_tissue' for 's00'"):
        load_source(clam, metadata="label")
    with pytest.raises(DataError, match=r"labels\.csv: metadata: expected columns among .*, got 'weight'"):
        load_source(clam, metadata=["weight"])


def test_bad_options(clam):
    for options, message in (
        ({"match": "order"}, "match: expected coords or position, got 'order'"),
        ({"tolerance": 0}, "tolerance: expected a positive number"),
        ({"labels": str(clam / "none.csv")}, r"none\.csv: expected a readable table"),
        ({"splits": str(clam)}, "expected splits_0.csv, ... or one such file"),
    ):
        with pytest.raises(DataError, match=message):
            load(clam, **options)
    with pytest.raises(DataError, match="expected a directory of bags, got a file"):
        load_source(clam / "labels.csv", format="slides")
