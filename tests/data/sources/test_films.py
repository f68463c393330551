import csv
import pickle

import numpy as np
import pytest
import torch

from tests.data.conftest import REAL
from umda_fast.data import find_format, inspect_splits, load_folds, load_source
from umda_fast.data.sources.text import sentences, text_features
from umda_fast.errors import DataError
from umda_fast.train import load_run, make_config, predict, train

COLUMNS = ("id", "title", "overview", "tagline", "genres", "original_language", "runtime", "release_date", "revenue")
PLOTS = (
    "A ship sinks. Nobody swims.",
    "Dr. Who wakes up in the U.S. Army!",
    "",
    "One sentence",
    'He said "no." Then he left.',
)


def film(row):
    return {
        "id": f"f{row}",
        "title": f"Film {row}",
        "overview": PLOTS[row % len(PLOTS)],
        "tagline": "Beware." if row % 2 else "",
        "genres": ("Drama|War", "Comedy", "", "Drama")[row % 4],
        "original_language": ("en", "fr")[row % 2] if row != 7 else "yi",
        "runtime": str(90 + row) if row % 3 else "",
        "release_date": f"{1990 + 10 * (row % 3)}-05-01",
        "revenue": "" if row % 2 else ("0" if row == 4 else f"{10 ** (row % 5 + 1)}.0"),
        "split": "val" if row % 10 == 9 else "train",
    }


@pytest.fixture
def films(tmp_path):
    """Write a directory of films, changed by functions of the rows and of the posters."""

    def write(count=120, rows=None, posters=None, columns=(*COLUMNS, "split")):
        table = [film(row) for row in range(count)]
        features = np.random.default_rng(0).normal(size=(count, 6)).astype(np.float32)
        features[3] = np.nan
        for change, value in ((rows, table), (posters, features)):
            if change is not None:
                change(value)
        with open(tmp_path / "movies.csv", "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(table)
        np.save(tmp_path / "poster_features.npy", features)
        return tmp_path

    return write


class TestText:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("A ship sinks. Nobody swims.", ["A ship sinks.", "Nobody swims."]),
            ("Dr. Who meets J. Doe in the U.S. Army!", ["Dr. Who meets J. Doe in the U.S. Army!"]),
            ("Why?  Because!\nIt is 3.5 m long. 12 men go.", ["Why?", "Because!", "It is 3.5 m long.", "12 men go."]),
            (
                "\u201cStop.\u201d \u00c9lise runs\u2026 They wait.",
                ["\u201cStop.\u201d", "\u00c9lise runs\u2026", "They wait."],
            ),
            ("no capital. here", ["no capital. here"]),
            ("", []),
        ],
    )
    def test_sentences(self, text, expected):
        # A closing quotation mark goes with the cut, so that both sides are compared without it.
        assert [part.rstrip("\u201d") for part in sentences(text)] == [part.rstrip("\u201d") for part in expected]

    def test_features_depend_on_the_text_only(self):
        alone = text_features(["A ship sinks"], 512)
        among = text_features(["War", "a SHIP  sinks", "", "\u00c1 ship sinks"], 512)
        assert among.dtype == np.float32
        assert among.shape == (4, 512)
        np.testing.assert_array_equal(among[1].toarray(), alone.toarray())
        np.testing.assert_array_equal(among[3].toarray(), alone.toarray())
        assert among[2].nnz == 0
        np.testing.assert_allclose(np.sqrt(among[[0, 1, 3]].power(2).sum(1)), 1.0, rtol=1e-6)

    def test_words_that_share_letters_are_near(self):
        a, b, c = text_features(["detectives", "detective", "romance"], 4096).toarray()
        assert a @ b > 0.5 > 0.1 > abs(a @ c)


class TestBags:
    def test_is_recognised(self, films):
        assert find_format(str(films(10))).name == "films"

    def test_instances_views_and_what_is_missing(self, films):
        data = load_source(films(), text_width=256).whole
        assert [(view.name, view.width) for view in data.views] == [("text", 256), ("poster", 6)]
        first = data[0]
        expected = text_features([PLOTS[0], "A ship sinks.", "Nobody swims."], 256).toarray()
        np.testing.assert_array_equal(first.views["text"], expected)
        assert first.mask.all()
        assert (first.views["poster"] == first.views["poster"][0]).all()
        # f2 has neither plot nor tagline, f3 has no poster.
        assert data[2].mask.tolist() == [[False, True]]
        assert data[3].mask.tolist() == [[True, False]] * 3
        assert len(data[5]) == 4  # the plot, its two sentences, the tagline
        assert data.sizes.tolist() == [len(data[index]) for index in range(len(data))]

    def test_labels(self, films):
        splits = load_source(films(200))
        data = splits.whole
        tasks = {task.name: task for task in splits.tasks}
        assert tasks["genres"].labels == ("Comedy", "Drama", "War")
        assert data[0].labels["genres"].tolist() == [0.0, 1.0, 1.0]
        assert "genres" not in data[2].labels
        assert tasks["language"].labels == ("en", "fr", "other")  # one film of 200 is in yi
        assert data[7].labels["language"] == 2
        assert tasks["decade"].labels == ("1990s", "2000s", "2010s")
        assert "runtime" not in data[3].labels
        assert data[2].labels["revenue"] == 3.0
        assert "revenue" not in data[1].labels
        assert "revenue" not in data[4].labels  # 0 is not known, not nothing
        train = splits.train.labels["runtime"]
        assert tasks["runtime"].mean == pytest.approx(np.nanmean(train))

    def test_views_tasks_and_fields_can_be_chosen(self, films):
        place = films()
        posters = load_source(place, views=["poster"], tasks=["decade", "genres"]).whole
        assert set(posters[0].views) == {"poster"}
        assert (posters.sizes == 1).all()
        assert [task.name for task in posters.tasks] == ["genres", "decade"]
        titled = load_source(place, views="text", fields=["title", "overview"], text_width=64).whole
        np.testing.assert_array_equal(titled[3].views["text"][1:2], text_features(["Film 3"], 64).toarray())
        plots = load_source(place, sentences=False, text_width=64).whole
        assert (plots.sizes == 1).all()
        np.testing.assert_array_equal(plots[0].views["text"], text_features([PLOTS[0]], 64).toarray())
        assert plots[2].mask.tolist() == [[False, True]]

    def test_embeddings_of_ones_own(self, films, tmp_path):
        place = films(10)
        sizes = np.arange(10)
        x = np.random.default_rng(1).normal(size=(sizes.sum(), 5)).astype(np.float32)
        np.savez(tmp_path / "own.npz", X=x, ptr=np.append(0, sizes.cumsum()))
        data = load_source(place, text=str(tmp_path / "own.npz")).whole
        assert data[0].mask.tolist() == [[False, True]]
        np.testing.assert_array_equal(data[4].views["text"], x[6:10])
        np.savez(tmp_path / "own.npz", X=x[:3], ptr=[0, 3])
        with pytest.raises(DataError, match=r"own.npz: ptr: expected 11 values .* got 2"):
            load_source(place, text=str(tmp_path / "own.npz"))

    def test_store_goes_to_workers(self, films):
        data = load_source(films(10)).whole
        again = pickle.loads(pickle.dumps(data))
        torch.testing.assert_close(again[0].views, data[0].views)


class TestSplits:
    def test_val_of_the_table_is_what_is_reported(self, films):
        splits = load_source(films())
        assert splits.test.names == [f"f{row}" for row in range(120) if row % 10 == 9]
        assert len(splits.val) == 11
        assert not set(splits.train.names) & set(splits.val.names)
        assert len(splits.train) == 97
        assert "test is the table's val" in splits.description

    def test_three_parts_are_taken_as_they_are(self, films):
        def rows(table):
            for row in table:
                row["split"] = ("train", "train", "val", "test")[int(row["id"][1:]) % 4]

        splits = load_source(films(40, rows))
        assert [len(split) for split in splits.values()] == [20, 10, 10]

    def test_at_random_without_a_column(self, films):
        splits = load_source(films(columns=COLUMNS), val_share=0.2, test_share=0.3)
        assert [len(split) for split in splits.values()] == pytest.approx([60, 24, 36], abs=2)

    def test_folds(self, films):
        folds = list(load_folds(films(60), folds=3))
        assert sorted(name for fold in folds for name in fold.test.names) == sorted(f"f{row}" for row in range(60))


@pytest.mark.parametrize(
    ("rows", "posters", "options", "message"),
    [
        (
            lambda t: t[4].update(runtime="long"),
            None,
            {},
            r"movies.csv: runtime of film 'f4': expected a number .*'long'",
        ),
        (lambda t: t[4].update(release_date="May"), None, {}, r"release_date of film 'f4': expected YYYY.* got 'May'"),
        (
            lambda t: t[4].update(split="dev"),
            None,
            {},
            r"split of film 'f4': expected one of train, val, test, got 'dev'",
        ),
        (
            lambda t: t[4].update(id=""),
            None,
            {},
            r"movies.csv: id: expected one for every film, got a blank for film 5",
        ),
        (lambda t: t[4].update(id="f3"), None, {}, r"'f3': expected distinct names"),
        (lambda t: t.pop(), None, {}, r"poster_features.npy: expected 119 rows, .* got 120"),
        (None, lambda p: p.__setitem__((5, 0), np.inf), {}, r"poster_features.npy: row 5: expected finite numbers"),
        (None, None, {"views": ["poster", "sound"]}, r"views: expected some of text, poster, got 'sound'"),
        (None, None, {"tasks": []}, r"tasks: expected some of genres.* got none"),
        (None, None, {"fields": ["plot"]}, r"movies.csv: expected a column 'plot', got id, title"),
    ],
)
def test_what_is_wrong_is_named(films, rows, posters, options, message):
    with pytest.raises(DataError, match=message):
        load_source(films(rows=rows, posters=posters), **options)


def test_a_broken_matrix_is_named(films):
    place = films(10)
    (place / "poster_features.npy").write_bytes(b"not numpy")
    with pytest.raises(DataError, match=r"poster_features.npy: expected a readable .npy"):
        load_source(place)


def test_a_trained_model_predicts_for_other_films(films, tmp_path):
    """Another file, with other languages and genres: its features mean the same, its classes are the model's."""
    options = {"source": str(films()), "options": {"text_width": 128}}
    config = make_config({"data": options, "model": {"width": 16, "heads": 2}, "train": {"epochs": 1}})
    train(config, tmp_path / "run", progress=False, plots=False)

    def rows(table):
        for row in table:
            row.update(original_language="xx", genres="Drama|Western", split="train")

    place = films(20, rows)
    predict(load_run(tmp_path / "run"), source=str(place), out=tmp_path / "p.csv", progress=False)
    with open(tmp_path / "p.csv", encoding="utf-8") as stream:
        header, *lines = csv.reader(stream)
    assert len(lines) == 20
    assert "genres_probability_War" in header
    assert "language_probability_other" in header


@pytest.mark.skipif(not (REAL / "movies").is_dir(), reason="the real films are not on this machine")
def test_the_real_films():
    splits = load_source(str(REAL / "movies"), text_width=256)
    report = inspect_splits(splits)
    assert report.bags == {"train": 2860, "val": 328, "test": 398}
    assert report.problems == []
    assert [task.outputs for task in splits.tasks] == [19, 1, 1, 7, 7]
