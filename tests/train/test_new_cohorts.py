"""A trained model on bags that were not there when it was trained: other labels, other splits, fewer views."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import call
from tests.train.cohort import Cohort, cohort_config
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.train import ConfigError, evaluate, load_run, predict, train
from umda_fast.train.loading import configured


def write(path: Path, seed: int = 0, bags: int = 12, **arrays: Any) -> Path:
    """An .npz of two views and a task of text; an array given as None is left out."""
    rng = np.random.default_rng(seed)
    ptr = np.arange(0, 3 * bags + 1, 3)
    known = {
        "X_a": rng.normal(size=(3 * bags, 4)).astype(np.float32),
        "X_b": rng.normal(size=(3 * bags, 2)).astype(np.float32),
        "ptr": ptr,
        "y_kind": np.array(["one", "two", "three"])[np.arange(bags) % 3],
        "Y": np.stack([np.arange(bags) % 2, np.arange(bags) % 3 == 0], axis=1).astype(np.int64),
        "names": np.array([f"{path.stem}-{bag}" for bag in range(bags)]),
    }
    np.savez(path, **{name: value for name, value in {**known, **arrays}.items() if value is not None})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with balanced classes."""
    place = tmp_path_factory.mktemp("run")
    config = cohort_config(write(place / "own.npz", bags=30), options={"class_weights": "balanced"})
    train(config, place / "run", progress=False, plots=False)
    return place / "run"


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) - 1


def test_labels_do_not_stop_a_prediction(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.csv"
    kinds = np.array(["one", "four"])[np.arange(12) % 2]
    unseen = write(tmp_path / "unseen.npz", 1, y_kind=kinds, Y=np.full((12, 2), 7))
    assert call("predict", run, "--data", unseen, "--out", out, "-q") == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "labels ignored, which are not needed: " in said
    assert "expected one of one, three, two, got 'four'" in said
    assert "labels 'Y': expected values of 0 or 1" in said
    expected = out.read_text()
    bare = write(tmp_path / "unseen.npz", 1, y_kind=None, Y=None)
    assert call("predict", run, "--data", bare, "--out", out, "-q") == 0
    assert capsys.readouterr().err == ""
    assert out.read_text() == expected
    with pytest.raises(DataError, match="expected one of one, three, two, got 'four'"):
        evaluate(load_run(run), source=str(write(tmp_path / "unseen.npz", 1, y_kind=kinds)))
    arrays = {"a": np.ones((4, 4), np.float32), "b": np.ones((4, 2), np.float32)}
    given = BagDataset.from_arrays(arrays, labels={"kind": kinds[:4]}, kinds={"kind": "multiclass"})
    assert predict(load_run(run), datasets={"all": given}, out=out, progress=False) == 4
    assert "class 'four' is unknown to the model" in capsys.readouterr().err


def test_a_cohort_that_is_all_test_is_used_whole(run: Path, tmp_path: Path) -> None:
    cohort = write(tmp_path / "cohort.npz", 2, split=np.array(["test"] * 12))
    assert predict(load_run(run), source=str(cohort), out=tmp_path / "p.csv", progress=False) == 12
    for split in (None, "test", "all"):
        assert evaluate(load_run(run), source=str(cohort), split=split, progress=False).bags == 12
    assert call("report", run, "--data", cohort, "--out", tmp_path / "r.html", "--samples", 10, "-q") == 0
    assert "cohort.npz, split all<" in (tmp_path / "r.html").read_text()
    slides = Cohort(tmp_path / "slides", 6)
    slides.write(split="test")
    assert call("inspect", slides.root) == 0


def test_a_cohort_of_no_split_is_measured_whole_unless_a_part_is_asked_for(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = str(write(tmp_path / "cohort.npz", 3))
    assert evaluate(load_run(run), source=cohort, progress=False).bags == 12
    assert capsys.readouterr().err == ""
    assert evaluate(load_run(run), source=cohort, split="test", progress=False).bags < 12
    assert "does not say how it is split: test is drawn at random; --split all" in capsys.readouterr().err


def test_without_labels_there_is_nothing_to_measure(run: Path, tmp_path: Path) -> None:
    bare = str(write(tmp_path / "bare.npz", 1, y_kind=None, Y=None))
    with pytest.raises(DataError, match=r"bare\.npz: expected labels to measure by, got none for kind, Y"):
        evaluate(load_run(run), source=bare, progress=False)


def test_a_view_that_is_missing_altogether_is_said(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = write(tmp_path / "cohort.npz", 4, X_b=None)
    assert call("predict", run, "--data", cohort, "--out", tmp_path / "p.csv", "-q") == 0
    assert "cohort.npz has no view b, which it was trained with" in capsys.readouterr().err
    assert lines(tmp_path / "p.csv") == 12


def test_columns_that_a_table_lacks_are_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort(tmp_path / "bags", 16)
    cohort.write(age="50", note="-")
    options = {"metadata": ["age"], "ignore": ["note"], "tasks": ["y"]}
    train(cohort_config(cohort.root, options=options), tmp_path / "run", progress=False, plots=False)
    other = cohort.copy(tmp_path / "other")
    other.write()
    capsys.readouterr()
    for root in (other.root, cohort.root):
        assert call("predict", tmp_path / "run", "--data", root, "--out", tmp_path / "p.csv", "-q") == 0
        assert ("has no metadata age" in capsys.readouterr().err) == (root == other.root)
    (cohort.root / "labels.csv").write_text("slide_id\n" + "".join(f"{name}\n" for name in cohort.bags))
    assert call("predict", tmp_path / "run", "--data", cohort.root, "--out", tmp_path / "p.csv", "-q") == 0
    assert evaluate(load_run(tmp_path / "run"), source=str(other.root), progress=False).bags > 0


def test_options_of_the_source_can_be_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = write(tmp_path / "cohort.npz", 5, odd=np.zeros(3))
    option = "data.options.ignore=[odd]"
    assert call("evaluate", run, "--data", cohort, "-q") == 2
    for command in (["evaluate"], ["predict", "--out", tmp_path / "p.csv"], ["report", "--out", tmp_path / "r.html"]):
        assert call(*command, run, "--data", cohort, "--set", option, "--set", "data.budget=9", "-q") == 0
    found = configured(load_run(run), [option, "data.budget=9"])
    assert (found.config.data.budget, dict(found.options)) == (9, {"ignore": ["odd"]})
    assert found.config.data.options == load_run(run).config.data.options
    with pytest.raises(ConfigError, match=r"--set model\.width=3: a trained model keeps its configuration; expected"):
        configured(found, ["model.width=3"])
    with pytest.raises(ConfigError, match=r"data\.budget: .* got 0"):
        configured(found, ["data.budget=0"])
    capsys.readouterr()


def test_its_own_data_need_not_be_named(run: Path, tmp_path: Path) -> None:
    assert call("predict", run, "--split", "test", "--out", tmp_path / "p.csv", "-q") == 0
    assert lines(tmp_path / "p.csv") == evaluate(load_run(run), progress=False).bags
    assert call("predict", run, "--out", tmp_path / "p.csv", "-q") == 0
    assert lines(tmp_path / "p.csv") == 30
