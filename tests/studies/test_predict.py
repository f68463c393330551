"""predictions.csv and the file of attention: every column says what it is of, and a bag without instances nothing."""

from __future__ import annotations

import csv
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.small import small_config
from umda_fast.data import BagDataset
from umda_fast.model import TaskSpec
from umda_fast.studies.predict import PredictionTable
from umda_fast.train import Run, load_run, predict, train

SIZES = np.array([3, 0, 4, 2, 1, 0, 5, 3] * 4)
EMPTY = [index for index, size in enumerate(SIZES) if size == 0]


def bags(rows: slice = slice(None)) -> BagDataset:
    rng = np.random.default_rng(0)
    ptr = np.concatenate([[0], SIZES.cumsum()])
    labels = {
        "MSI": np.array(["MSS", "MSI-H", "MSS", "MSS"] * 8),
        "grade": np.array(["low", "mid", "high"] * 10 + ["low", "mid"]),
        "age": rng.normal(60, 9, 32),
    }
    whole = BagDataset.from_arrays(
        {"x": rng.normal(size=(ptr[-1], 6))}, ptr, labels, coords=rng.normal(size=(ptr[-1], 2)), name="slides"
    )
    return whole.subset(np.arange(32)[rows])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("predict") / "run"
    datasets = {"train": bags(slice(16)), "val": bags(slice(16, 32))}
    train(small_config(data={"budget": 64, "options": {}}), out, datasets=datasets, progress=False, plots=False)
    return load_run(out)


def test_every_column_says_of_which_class_it_is() -> None:
    tasks = (
        TaskSpec("MSI", "binary", labels=("MSI-H", "MSS")),
        TaskSpec("tumour", "binary"),
        TaskSpec("grade", "multiclass", 3, labels=("high", "low", "mid")),
        TaskSpec("age", "regression"),
    )
    assert PredictionTable(tasks).header() == [
        "bag", "MSI_probability_MSS", "MSI_predicted", "tumour_probability_1", "tumour_predicted",
        "grade_probability_high", "grade_probability_low", "grade_probability_mid", "grade_predicted", "age",
        "refer", "reason",
    ]  # fmt: skip


@pytest.mark.parametrize("refer_below", [None, 0.0, 1.0])
def test_a_bag_without_instances_is_blank_and_referred(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], refer_below: float | None
) -> None:
    predict(
        run, datasets={"all": bags()}, out=tmp_path / "p.csv", attention=tmp_path / "a.h5",
        refer_below=refer_below, progress=False,
    )  # fmt: skip
    *uncalibrated, last = capsys.readouterr().err.splitlines()
    assert last == "8 of 32 bags have no instances: not predicted, but referred"
    assert [line.partition(":")[0] for line in uncalibrated] == ([] if refer_below is None else ["MSI", "grade"])
    with open(tmp_path / "p.csv", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 32
    for index, line in enumerate(lines):
        said = [value for key, value in line.items() if key not in ("bag", "refer", "reason")]
        if index in EMPTY:
            assert set(said) == {""}
            assert (line["refer"], line["reason"]) == ("MSI;grade;age", "no instances")
        else:
            assert "" not in said
            assert line["refer"] == ("MSI;grade" if refer_below == 1.0 else "")
    with h5py.File(tmp_path / "a.h5") as store:
        assert [len(store[f"bag {index}"]["attention"]) for index in range(32)] == SIZES.tolist()


def test_all_bags_may_be_without_instances(run: Run, tmp_path: Path) -> None:
    predict(run, datasets={"all": bags().subset(EMPTY)}, out=tmp_path / "p.csv", attention=tmp_path / "a.h5")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert len(lines) == 1 + len(EMPTY)
    assert all(line.endswith("MSI;grade;age,no instances") for line in lines[1:])
