"""Directories as the tools leave them, their tables of labels, and what is wrong with them."""

from __future__ import annotations

import math
import os
import pickle

import h5py
import numpy as np
import pytest
import torch

from tests.slide_files import grid, write_clam, write_labels, write_stamp, write_trident
from umda_fast.data import InstanceBudgetSampler, find_format, inspect_source, load_folds, load_source, make_loader
from umda_fast.data.dataset import concat
from umda_fast.errors import DataError

NAMES = [f"s{index:02d}" for index in range(12)]


def bag(index: int, n: int = 9, width: int = 4):
    rng = np.random.default_rng(index)
    return rng.normal(size=(n + index % 3, width)).astype(np.float32), grid(rng, n + index % 3)


@pytest.fixture
def clam(tmp_path):
    """Twelve slides of six patients, one view, two tasks with holes."""
    root = tmp_path / "clam"
    for index, name in enumerate(NAMES):
        write_clam(root, name, *bag(index))
    write_labels(
        root / "labels.csv",
        {
            "case_id": [f"p{index // 2}" for index in range(12)],
            "slide_id": NAMES,
            "label": ["tumor_tissue" if index % 4 < 2 else "normal_tissue" for index in range(12)],
            "age": ["" if index == 7 else 40.5 + index for index in range(12)],
        },
    )
    return root


@pytest.fixture
def trident(tmp_path):
    """Two encoders of the same slides; rows in another order, one row and one slide missing in the second."""
    job = tmp_path / "job"
    for index, name in enumerate(NAMES):
        features, coords = bag(index)
        order = np.random.default_rng(100 + index).permutation(len(features))[1:]
        folder = job / "20x_256px_0px_overlap"
        write_trident(folder / "features_uni_v1", name, features, coords, "uni_v1")
        if index != 5:
            write_trident(folder / "features_conch_v15", name, features[order, :3] + 100, coords[order], "conch_v15")
    patches = job / "20x_256px_0px_overlap" / "patches"
    patches.mkdir()
    with h5py.File(patches / "s00_patches.h5", "w") as file:
        file["coords"] = bag(0)[1]
    slide = job / "20x_256px_0px_overlap" / "slide_features_titan"
    slide.mkdir()
    with h5py.File(slide / "s00.h5", "w") as file:
        file["features"] = np.zeros(8, np.float32)
    (job / "_config_feats.json").write_text("{}")
    write_labels(job / "labels.tsv", {"slide": [f"{name}.svs" for name in NAMES], "grade": ([*"123"] * 4)}, "\t")
    return job


def load(root, **options):
    return load_source(root, **options).whole


class TestLayouts:
    def test_clam(self, clam):
        splits = load_source(clam)
        whole = splits.whole
        assert find_format(str(clam)).name == "slides"
        assert whole.names == NAMES
        assert [view.name for view in whole.views] == ["features"]
        assert [(task.name, task.kind, task.labels) for task in whole.tasks] == [
            ("label", "binary", ("normal_tissue", "tumor_tissue")),
            ("age", "regression", None),
        ]
        for index, got in enumerate(whole):
            features, coords = bag(index)
            np.testing.assert_array_equal(got.views["features"], features)
            np.testing.assert_array_equal(got.coords, coords)
            assert got.mask is None
        assert whole.positions.unit == "px"
        assert "CLAM" in splits.description
        assert "by patient" in splits.description

    def test_clam_with_pt_files_only(self, clam):
        for path in (clam / "h5_files").iterdir():
            path.unlink()
        got = load(clam)
        assert got[3].coords is None
        assert got.positions is None
        np.testing.assert_array_equal(got[3].views["features"], bag(3)[0])

    def test_clam_with_some_h5_files(self, clam):
        (clam / "h5_files" / "s03.h5").unlink()
        with pytest.raises(DataError, match=r"pt_files/s03\.pt: expected coordinates as .*h5 has them, got none"):
            load(clam)
        assert load(clam, skip_bad=True).names == [name for name in NAMES if name != "s03"]
        whole = load(clam, match="position")
        assert whole.names == NAMES
        assert whole[0].coords is None

    def test_trident(self, trident):
        for root in (trident, trident / "20x_256px_0px_overlap"):
            whole = load(root, labels=str(trident / "labels.tsv"))
            assert [view.name for view in whole.views] == ["conch_v15", "uni_v1"]
            assert whole.positions.patch_size.tolist() == [512.0] * 12
            self.check_matched(whole)

    @staticmethod
    def check_matched(whole):
        """Features agree at every place, whatever the order in the files was."""
        for index, got in enumerate(whole):
            features, coords = bag(index)
            rows = {tuple(place): row for row, place in enumerate(coords)}
            at = [rows[tuple(place)] for place in got.coords.long().tolist()]
            assert sorted(at) == list(range(len(features)))
            np.testing.assert_array_equal(got.views["uni_v1"], features[at])
            if index == 5:
                assert "conch_v15" not in got.views
                assert got.mask.tolist() == [[False, True]] * len(got)
                continue
            present = got.mask[:, 0]
            assert int((~present).sum()) == 1
            np.testing.assert_array_equal(got.views["conch_v15"][present], features[at][present, :3] + 100)

    def test_trident_of_two_patch_sizes(self, trident):
        write_trident(trident / "10x_256px_0px_overlap" / "features_uni_v1", "s00", *bag(0))
        with pytest.raises(DataError, match=r"patches of one size, got 10x_256px_0px_overlap, 20x_256px_0px_overlap"):
            load(trident)

    def test_stamp(self, tmp_path):
        """Extractors in directories with a hash; slides in folders of their own."""
        for index, name in enumerate(NAMES[:4]):
            features, coords = bag(index)
            for extractor, jitter in (("uni-1a2b3c4d", 0.0), ("virchow2-5e6f7a8b", 0.01)):
                folder = tmp_path / extractor / f"folder{index}"
                write_stamp(folder, name, features, coords / 2 + jitter, extractor.partition("-")[0])
                (folder / f"{name}.jpg").write_bytes(b"thumbnail")
        whole = load(tmp_path)
        assert [view.name for view in whole.views] == ["uni", "virchow2"]
        assert whole.names == NAMES[:4]
        assert (whole.positions.unit, whole.positions.patch_size[0]) == ("um", 256.0)
        assert whole[0].mask is None
        assert whole[0].views["uni"].dtype == torch.float16
        one = load(tmp_path / "uni-1a2b3c4d")
        assert [view.name for view in one.views] == ["uni"]
        assert one.names == NAMES[:4]

    def test_folders_of_slides(self, tmp_path):
        """Sub-directories with different slides of one kind are no views; nor is a run directory."""
        for index, folder in enumerate(("first", "second")):
            (tmp_path / folder).mkdir()
            torch.save(torch.from_numpy(bag(index)[0]), tmp_path / folder / f"s{index}.pt")
        (tmp_path / "runs" / "one").mkdir(parents=True)
        torch.save({"epoch": 1}, tmp_path / "runs" / "one" / "checkpoint.pt")
        (tmp_path / "runs" / "one" / "metrics.jsonl").write_text("")
        whole = load(tmp_path)
        assert ([view.name for view in whole.views], whole.names) == (["features"], ["s0", "s1"])
        torch.save(torch.zeros(3, 7), tmp_path / "second" / "s1.pt")  # another width: another encoder
        assert [(view.name, view.width) for view in load(tmp_path).views] == [("first", 4), ("second", 7)]

    def test_plain_files(self, tmp_path):
        features = bag(0)[0]
        torch.save(torch.from_numpy(features), tmp_path / "a.pt")
        torch.save(torch.from_numpy(features[1:]).half(), tmp_path / "b.pt")
        np.savez(tmp_path / "c.npz", features=features[2:])
        whole = load(tmp_path)
        assert whole.names == ["a", "b", "c"]
        assert {whole[row].views["features"].dtype for row in range(3)} == {torch.float32}  # one float32 makes all so
        assert whole.tasks == ()

    def test_directories_beside_files(self, tmp_path):
        (tmp_path / "old").mkdir()
        for folder in (tmp_path, tmp_path / "old"):
            torch.save(torch.from_numpy(bag(0)[0]), folder / "a.pt")
        assert "not read, as there are files beside: old" in load_source(tmp_path).description

    def test_views_without_coordinates(self, tmp_path):
        features, _ = bag(0)
        for view in ("one", "two"):
            (tmp_path / view).mkdir()
            torch.save(torch.from_numpy(features), tmp_path / view / "a.pt")
        with pytest.raises(DataError, match=r"two/a\.pt: expected coordinates to match .*match=position"):
            load(tmp_path)
        assert load(tmp_path, match="position")[0].mask is None
        torch.save(torch.from_numpy(features[:-1]), tmp_path / "two" / "a.pt")
        with pytest.raises(DataError, match=r"two/a\.pt: expected 9 rows as in .*one/a\.pt, got 8"):
            load(tmp_path, match="position")

    def test_empty_slides(self, tmp_path):
        folder = tmp_path / "features_uni_v1"
        write_trident(folder, "full", *bag(0))
        write_trident(folder, "flat", np.empty((0,), np.float32), np.empty((0, 2)))
        write_trident(folder, "wide", np.empty((0, 4), np.float32), np.empty((0, 2)))
        other = tmp_path / "features_conch"
        write_trident(other, "flat", *bag(1), encoder="conch")
        write_trident(other, "wide", np.empty((0, 4), np.float32), np.empty((0, 2)), "conch")
        whole = load(tmp_path)
        assert whole.names == ["flat", "full", "wide"]
        assert whole.sizes.tolist() == [10, 9, 0]
        batch = whole.collate(list(whole))
        assert batch.ptr.tolist() == [0, 10, 19, 19]
        assert batch.mask.sum(dim=0).tolist() == [10, 9]

    def test_several_views_of_clam(self, tmp_path):
        features, coords = bag(0)
        write_clam(tmp_path / "resnet", "a", features, coords)
        write_clam(tmp_path / "uni", "a", features[::-1], coords[::-1])
        got = load(tmp_path)[0]
        assert list(got.views) == ["resnet", "uni"]
        np.testing.assert_array_equal(got.views["resnet"], got.views["uni"])
        assert list(load(tmp_path, views=["uni"])[0].views) == ["uni"]
        assert list(load(tmp_path, views="uni")[0].views) == ["uni"]
        with pytest.raises(DataError, match="views: expected names among resnet, uni, got 'x'"):
            load(tmp_path, views=["x"])


class TestUnits:
    def test_pixels_become_micrometres_where_the_pixel_size_is_known(self, clam):
        coords = bag(2)[1]
        whole = load(clam, mpp=0.25)
        assert whole.positions.unit == "um"
        assert whole.positions.pixel_size.tolist() == [0.25] * 12
        np.testing.assert_allclose(whole[2].coords, coords * 0.25)
        for wrong in (250, "x", math.nan, 0):
            with pytest.raises(DataError, match="mpp: expected micrometres per pixel"):
                load(clam, mpp=wrong)

    def test_a_column_of_pixel_sizes(self, clam):
        table = write_labels(clam / "labels.csv", {"slide": NAMES, "mpp": [0.25] * 6 + [0.5] * 6, "y": [0, 1] * 6})
        whole = load(clam)
        np.testing.assert_allclose(whole[7].coords, bag(7)[1] * 0.5)
        assert [task.name for task in whole.tasks] == ["y"]
        table.write_text(table.read_text().replace("0.5,1", "500,1", 1))
        with pytest.raises(DataError, match=r"labels\.csv: slide 's07': mpp: expected"):
            load(clam)
        table.write_text(table.read_text().replace("500,1", ",1", 1))
        whole = load(clam)  # not known everywhere, so pixels everywhere
        assert whole.positions.unit == "px"
        assert np.isnan(whole.positions.pixel_size[7])

    def test_both_units(self, tmp_path):
        features, coords = bag(0)
        write_stamp(tmp_path, "a", features, coords / 4)
        write_trident(tmp_path, "b", features + 1, coords)
        with pytest.raises(DataError, match=r"b\.h5: wrong unit: level-0 pixels, where .*a\.h5 has micrometres.*mpp"):
            load(tmp_path)
        whole = load(tmp_path, mpp=0.25)
        assert whole.positions.unit == "um"
        assert whole.positions.patch_size.tolist() == [256.0, 128.0]
        np.testing.assert_allclose(whole[0].coords, whole[1].coords)
        skipping = load(tmp_path, skip_bad=True)
        assert skipping.names == ["a"]
        assert "b.h5: wrong unit" in skipping.skipped[0]

    def test_views_that_share_no_place(self, tmp_path):
        features, coords = bag(0)
        write_clam(tmp_path / "one", "a", features, coords + 1)
        write_clam(tmp_path / "two", "a", features, (coords + 1) // 7)
        with pytest.raises(DataError, match=r"two/.*a\.h5: wrong unit or slide: no patch lies where one of .*spans"):
            load(tmp_path)

    def test_views_of_different_patches(self, tmp_path):
        features, coords = bag(0)
        write_trident(tmp_path / "one", "a", features, coords, "one")
        write_trident(tmp_path / "two", "a", features, coords * 2, "two", patch_size_level0=1024)
        with pytest.raises(DataError, match=r"two/a\.h5: expected patches of 512 px as in .*one/a\.h5, got 1024"):
            load(tmp_path)

    def test_positions_follow_subsets(self, trident):
        splits = load_source(trident, mpp=0.5)
        part = splits.train.subset([2, 0])
        assert part.positions.patch_size.tolist() == [256.0, 256.0]
        both = concat([splits.train, splits.val], "both")
        assert len(both.positions.pixel_size) == len(both)


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
            ({"slide": NAMES, "y": ["TCGA"] * 12}, {}, r"column 'y': expected labels that differ, .*ignore='\[y\]'"),
            ({"slide": NAMES, "y": [f"text {n}" for n in range(12)]}, {}, r"column 'y': expected classes, got 12"),
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


class TestBad:
    """Every fault alone is an error naming the file; skipped, the rest goes on."""

    @pytest.fixture(
        params=["truncated", "garbage", "width", "nan", "coords", "stem", "content", "unit", "step", "pickle"]
    )
    def fault(self, request, trident):
        folder = trident / "20x_256px_0px_overlap" / "features_uni_v1"
        path = folder / "s03.h5"
        features, coords = bag(3)
        if request.param == "truncated":
            os.truncate(path, path.stat().st_size // 2)
        elif request.param == "garbage":
            path.write_bytes(b"not HDF5" * 100)
        elif request.param == "width":
            write_trident(folder, "s03", features[:, :2], coords)
        elif request.param == "nan":
            features[2, 1] = np.nan
            write_trident(folder, "s03", features, coords)
        elif request.param == "coords":
            write_trident(folder, "s03", features, coords[:-1])
        elif request.param == "stem":
            path = folder / "s03.pt"
            torch.save(torch.from_numpy(features), path)
        elif request.param == "content":
            path = write_trident(folder, "s03b", features, coords)
        elif request.param == "unit":
            path.unlink()
            path = write_stamp(folder, "s03", features, coords, unit="mm")
        elif request.param == "step":
            write_trident(folder, "s03", features, coords // 2)
        elif request.param == "pickle":
            path.unlink()
            path = folder / "s03.pt"
            path.write_bytes(pickle.dumps({"features": [1]}, protocol=2))
        return request.param, path

    def test_is_an_error_with_its_name(self, fault, trident):
        with pytest.raises(DataError, match=str(fault[1])):
            inspect_source(trident)

    def test_is_skipped(self, fault, trident):
        kind, path = fault
        report = inspect_source(trident, skip_bad=True)
        assert len(report.skipped) == 1
        assert str(path) in report.skipped[0]
        assert report.first_problem == f"skipped: {report.skipped[0]}"
        # The slide stays with its other view where there is one.
        assert sum(report.bags.values()) == 12
        whole = load(trident, skip_bad=True)
        assert (list(whole[3].views) == ["conch_v15"]) == (kind not in ("stem", "content"))

    def test_labels_of_a_slide_that_was_skipped(self, clam):
        (clam / "h5_files" / "s03.h5").write_bytes(b"")
        with pytest.raises(DataError, match=r"s03\.h5: corrupt or truncated"):
            load(clam)
        whole = load(clam, skip_bad=True)
        assert whole.names == [name for name in NAMES if name != "s03"]
        assert len(whole.skipped) == 1

    def test_nothing_left(self, tmp_path):
        (tmp_path / "a.h5").write_bytes(b"")
        with pytest.raises(DataError, match=r"view 'features': expected features, got none in 0 files"):
            load(tmp_path, skip_bad=True)

    def test_a_run_directory(self, tmp_path):
        torch.save({"model": {}, "epoch": 3}, tmp_path / "checkpoint.pt")
        with pytest.raises(DataError, match=r"checkpoint\.pt: expected a tensor .*got a mapping with model, epoch"):
            load(tmp_path)

    def test_options(self, clam):
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


class TestReading:
    def test_lazily(self, clam):
        whole = load(clam)
        (clam / "h5_files" / "s03.h5").unlink()
        assert len(whole) == 12
        whole[2]
        with pytest.raises(DataError, match=r"s03\.h5"):
            whole[3]

    @pytest.mark.parametrize("workers", [0, 2])
    def test_workers_and_budget(self, trident, workers):
        """Bags larger than the budget are batches of their own; no file stays open."""
        whole = load(trident)
        sampler = InstanceBudgetSampler(whole.sizes, 10, shuffle=False)
        before = len(os.listdir("/proc/self/fd")) if workers == 0 else 0
        batches = list(make_loader(whole, sampler, workers=workers, pin=False))
        assert [name for batch in batches for name in batch.names] == NAMES
        assert all(len(batch) == 1 for batch in batches)
        assert {batch.num_instances for batch in batches} == {9, 10, 11}
        assert (len(os.listdir("/proc/self/fd")) if workers == 0 else 0) == before

    def test_half_precision_is_kept(self, tmp_path):
        features, coords = bag(0)
        write_stamp(tmp_path, "a", features, coords)
        write_stamp(tmp_path, "b", features + 1, coords)
        whole = load(tmp_path)
        assert whole.collate(list(whole)).views["uni"].dtype == torch.float16

    def test_pickled(self, trident):
        whole = pickle.loads(pickle.dumps(load(trident)))
        assert whole[4].views["uni_v1"].shape == (10, 4)


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
