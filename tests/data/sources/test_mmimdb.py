import json
import pickle

import h5py
import numpy as np
import pytest

from umda_fast.data import InstanceBudgetSampler, find_format, load_folds, load_source, make_loader
from umda_fast.errors import DataError

GENRES = ("Drama", "Comedy", "Film-Noir")
STARTS = {"train": (0, 24), "dev": (24, 30), "test": (30, 40)}


def write(path, *, rows=40, widths=(30, 64), split=True, names=True, change=None):
    """A small file as the authors' script writes it: data sets, dtypes, attributes, dimension labels."""
    rng = np.random.default_rng(0)
    unread = min(rows, 40)  # of what is not read, enough
    with h5py.File(path, "w") as file:
        features = file.create_dataset("features", (rows, widths[0]), dtype="float32")
        vgg = file.create_dataset("vgg_features", (rows, widths[1]), dtype="float32")
        images = file.create_dataset("images", (unread, 3, 8, 5), dtype="int32")
        sequences = file.create_dataset("sequences", (unread,), dtype=h5py.special_dtype(vlen=np.dtype("int32")))
        genres = file.create_dataset("genres", (rows, len(GENRES)), dtype="int32")
        if names:
            ids = file.create_dataset("imdb_ids", (rows,), dtype="S7")
            ids[...] = np.array([f"{1000000 + row}" for row in range(rows)], dtype="S7")
        features[...] = rng.normal(size=features.shape)
        vgg[...] = rng.random(vgg.shape)
        images[...] = 255
        for row in range(unread):
            sequences[row] = rng.integers(0, 100, row + 1)
        genres[...] = rng.random(genres.shape) < 0.4
        genres.attrs["target_names"] = json.dumps(GENRES)
        features.dims[0].label = "batch"
        genres.dims[1].label = "classes"
        if split:
            kind = [("split", "S5"), ("source", "S12"), ("start", np.int64), ("stop", np.int64)]
            kind += [("indices", h5py.special_dtype(ref=h5py.Reference)), ("available", np.bool_), ("comment", "S1")]
            entries = [(part, source, *bounds) for part, bounds in STARTS.items() for source in ("features", "genres")]
            table = np.empty(len(entries), dtype=kind)
            for position, (part, source, start, stop) in enumerate(entries):
                table[position] = (part.encode(), source.encode(), start, stop, h5py.Reference(), True, b".")
            file.attrs["split"] = table
        if change is not None:
            change(file)
    return path


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "multimodal_imdb.hdf5")


def test_films_are_bags_of_one_instance_with_two_views(file):
    assert find_format(str(file)).name == "mmimdb"
    splits = load_source(file)
    assert [(view.name, view.width) for view in splits.views] == [("text", 30), ("poster", 64)]
    (task,) = splits.tasks
    assert (task.name, task.kind, task.labels) == ("genres", "multilabel", GENRES)
    assert {name: (part.names[0], len(part)) for name, part in splits.items()} == {
        "train": ("1000000", 24),
        "val": ("1000024", 6),
        "test": ("1000030", 10),
    }
    with h5py.File(file) as store:
        for index, bag in ((0, splits.test[0]), (9, splits.test[9])):
            row = 30 + index
            np.testing.assert_array_equal(bag.views["text"][0], store["features"][row])
            np.testing.assert_array_equal(bag.views["poster"][0], store["vgg_features"][row])
            np.testing.assert_array_equal(bag.labels["genres"], store["genres"][row])
            assert bag.mask.tolist() == [[True, True]]


def test_published_rows_where_the_attribute_is_lost(tmp_path):
    splits = load_source(write(tmp_path / "whole.hdf5", rows=25959, widths=(1, 1), split=False))
    assert [len(part) for part in splits.values()] == [15552, 2608, 7799]
    assert splits.val.names[0] == f"{1000000 + 15552}"


def test_other_files_are_split_at_random(tmp_path):
    splits = load_source(write(tmp_path / "some.hdf5", split=False, names=False), val_share=0.2, test_share=0.4)
    assert [len(part) for part in splits.values()] == pytest.approx([16, 8, 16], abs=2)
    assert "film 0" in splits.whole.names
    folds = list(load_folds(tmp_path / "some.hdf5", folds=4))
    assert sorted(name for fold in folds for name in fold.test.names) == sorted(splits.whole.names)


def test_missing_views(tmp_path):
    def change(file):
        file["vgg_features"][3] = np.nan

    whole = load_source(write(tmp_path / "holes.hdf5", change=change)).whole
    assert whole[3].mask.tolist() == [[True, False]]
    assert set(load_source(tmp_path / "holes.hdf5", views="poster").whole[4].views) == {"poster"}


def test_workers_read_what_one_process_reads(file):
    data = load_source(file).whole
    data[0]  # this process has the file open before it forks

    def rows(workers):
        sampler = InstanceBudgetSampler(data.sizes, 8, shuffle=False)
        return np.concatenate([batch.views["poster"].numpy() for batch in make_loader(data, sampler, workers=workers)])

    np.testing.assert_array_equal(rows(2), rows(0))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(data))[5].views["text"], data[5].views["text"])


def _replace(name, values):
    def change(file):
        del file[name]
        file[name] = values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            _replace("vgg_features", np.zeros((39, 4), "f4")),
            r"vgg_features: expected numbers \[40, d\], got float32 \[39",
        ),
        (_replace("features", np.zeros((40, 4), "i4")), r"features: expected floating-point features, got int32"),
        (_replace("genres", np.full((40, 3), 2, "i4")), r"genres: expected 0 or 1, got 2 in row 0, column 0"),
        (_replace("imdb_ids", np.array([b"tt1"] * 40)), r"'tt1': expected distinct names"),
        (lambda f: f["genres"].attrs.__setitem__("target_names", '["a"]'), r"target_names: expected 3 names as JSON"),
        (lambda f: f.attrs.__setitem__("split", f.attrs["split"][2:4]), r"attribute split: expected rows .* for train"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        load_source(write(tmp_path / "bad.hdf5", change=change))


def test_a_file_cut_short_is_no_surprise(file):
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"multimodal_imdb\.hdf5"):
        load_source(file)
