"""Bags of patients, and predictions of patients out of those of slides, through the commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from tests.cli.test_slides import NAMES, write
from tests.command_line import call
from tests.slide_files import write_labels
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, decode
from umda_fast.score.patients import Patients, mean_of_bags
from umda_fast.train import load_run

PATIENTS = [f"patient-{index // 2}" for index in range(16)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen slides of eight patients, two views, a label and an age of the patient."""
    root = write(tmp_path_factory.mktemp("slides") / "job", "trident")
    columns: dict[str, list[Any]] = {
        "case_id": PATIENTS,
        "slide_id": NAMES,
        "label": ["tumour" if index // 2 % 2 else "normal" for index in range(16)],
        "age": [50.5 + index // 2 for index in range(16)],
    }
    write_labels(root / "labels.csv", columns)
    return root


@pytest.fixture(scope="module")
def by_slide(root: Path, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "by_slide"
    assert call("train", "--data", root, "--config", config, "--out", run, "-q") == 0
    return run


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_bag_for_each_patient(root: Path, config: Path, tmp_path: Path) -> None:
    run, table, maps = tmp_path / "run", tmp_path / "p.csv", tmp_path / "a.h5"
    options = ["--set", "data.options.bag=patient", "--set", "model.coords_k=2"]
    assert call("train", "--data", root, "--config", config, "--out", run, *options, "-q") == 0
    recorded = rows_of(run / "splits.csv")
    assert {row["bag"] for row in recorded} == {*PATIENTS, "empty"}
    assert all(row["patient"] == ("" if row["bag"] == "empty" else row["bag"]) for row in recorded)
    assert call("evaluate", run, "-q") == 0
    assert call("predict", run, "--out", table, "--attention", maps, "-q") == 0
    assert [row["bag"] for row in rows_of(table)] == ["empty", *dict.fromkeys(PATIENTS)]
    with h5py.File(maps) as file:
        group = file["patient-3"]
        assert list(group["slide"].attrs["names"]) == ["slide-06", "slide-07"]
        assert np.bincount(group["slide"][()]).tolist() == [6 + 6 % 4, 6 + 7 % 4]
        assert group["attention"][()].sum(0) == pytest.approx([1.0, 1.0], abs=1e-5)
        assert "slide" in file["empty"]
    out = tmp_path / "maps"
    assert call("explain", run, "--bag", "patient-3", "--out", out, "--top", 3, "-q") == 0
    assert {path.relative_to(out).as_posix() for path in out.rglob("*.*")} == {
        "top_instances.csv",
        *(
            f"patient-3/slide-0{number}/{file}"
            for number in (6, 7)
            for file in ("attention-label.png", "attention-age.png", "views.png", f"slide-0{number}.geojson")
        ),
    }
    top = rows_of(out / "top_instances.csv")
    assert len(top) == 6
    assert {row["slide"] for row in top} <= {"slide-06", "slide-07"}
    with h5py.File(maps) as file:  # the instance is that of its slide, its attention that of the bag
        for row in top:
            group = file["patient-3"]
            slide = list(group["slide"].attrs["names"]).index(row["slide"])
            at = np.flatnonzero(group["slide"][()] == slide)[int(row["instance"])]
            assert group["coords"][at].tolist() == [float(row["x"]), float(row["y"])]
            share = group["attention"][at, ["label", "age"].index(row["task"])]
            assert float(row["attention"]) == pytest.approx(float(share), rel=1e-4)
            assert float(row["relative_attention"]) == pytest.approx(len(group["coords"]) * float(share), rel=1e-4)
    assert call("report", run, "--split", "all", "-q") == 0
    largest = "patient-1"  # 6 + 2 and 6 + 3 instances, the first of those that have as many
    pictures = (run / "report.html").read_text()
    assert all(f'alt="{largest}, slide slide-0{number}"' in pictures for number in (2, 3))


def test_predictions_by_patient_are_means(root: Path, by_slide: Path, tmp_path: Path) -> None:
    slides, patients = tmp_path / "slides.csv", tmp_path / "patients.csv"
    assert call("predict", by_slide, "--out", slides, "-q") == 0
    assert call("predict", by_slide, "--out", patients, "--by", "patient", "-q") == 0
    one, by = {row["bag"]: row for row in rows_of(slides)}, rows_of(patients)
    assert [row["patient"] for row in by] == ["empty", *dict.fromkeys(PATIENTS)]
    assert (by[0]["bags"], by[0]["age"], by[0]["reason"]) == ("empty", "", "no instances")
    for row in by[1:]:
        bags = row["bags"].split(";")
        assert len(bags) == 2
        for column in ("label_probability_tumour", "age"):
            mean = np.mean([float(one[bag][column]) for bag in bags])
            assert float(row[column]) == pytest.approx(mean, rel=2e-5)
        chosen = "tumour" if float(row["label_probability_tumour"]) > 0.5 else "normal"
        if load_run(by_slide).model.config.tasks[0].thresholds is None:
            assert row["label_predicted"] == chosen


def test_measures_by_patient(root: Path, by_slide: Path, tmp_path: Path) -> None:
    scores, table = tmp_path / "scores.json", tmp_path / "p.csv"
    assert call("evaluate", by_slide, "--split", "train", "--by", "patient", "--json", scores, "-q") == 0
    report = json.loads(scores.read_text())
    assert report["data"]["bags"] == 2 * report["data"]["patients"]
    assert report["intervals"]["age"]["units"] == report["data"]["patients"]
    assert call("predict", by_slide, "--split", "train", "--by", "patient", "--out", table, "-q") == 0
    ages = {f"patient-{index}": 50.5 + index for index in range(8)}
    errors = [abs(float(row["age"]) - ages[row["patient"]]) for row in rows_of(table)]
    assert report["tasks"]["age"]["mae"] == pytest.approx(np.mean(errors), rel=1e-4)


def test_other_data_says_whose_its_bags_are(
    root: Path, by_slide: Path, tmp_path: Path, config: Path
) -> None:
    """Patients are those of the data that is measured, not of bags of the same names in the run's own."""
    other = write(tmp_path / "other", "trident")
    for index, name in enumerate(NAMES):  # other slides of the same names
        for file in other.rglob(f"{name}.h5"):
            with h5py.File(file, "r+") as store:
                store["features"][...] += 0.5 + index
    columns = {"slide_id": NAMES, "label": ["tumour", "normal"] * 8, "age": [50.5 + index for index in range(16)]}
    write_labels(other / "labels.csv", columns)
    scores = tmp_path / "scores.json"
    assert call("evaluate", by_slide, "--data", other, "--json", scores, "-q") == 0
    assert json.loads(scores.read_text())["intervals"]["age"]["unit"] == "bags"
    write_labels(other / "labels.csv", {"patient": [f"X{index // 4}" for index in range(16)], **columns})
    assert call("evaluate", by_slide, "--data", other, "--json", scores, "-q") == 0
    found = json.loads(scores.read_text())["intervals"]["age"]
    assert (found["unit"], found["units"]) == ("patients", 4)


def test_wrong_uses_are_one_line(
    root: Path, by_slide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write(tmp_path / "bare", "clam")
    (bare / "labels.csv").unlink()
    given = ["predict", by_slide, "--out", tmp_path / "p.csv", "-q"]
    for more, line in (
        (["--by", "slide"], "by: expected bag or patient, got 'slide'"),
        (["--by", "patient", "--refer-below", 0.5], "refer_below: expected predictions by bag"),
        (["--by", "patient", "--data", root.parent / "nobody"], "by patient: expected data that says whose the bags"),
    ):
        if "nobody" in str(more[-1]) and not (root.parent / "nobody").exists():
            other = write(root.parent / "nobody", "trident")
            write_labels(other / "labels.csv", {"slide_id": NAMES, "age": [50.5 + index for index in range(16)]})
        capsys.readouterr()
        assert call(*given, *more) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
    labels = rows_of(root / "labels.csv")
    text = (root / "labels.csv").read_text()
    first = labels[0]["label"]
    (root / "labels.csv").write_text(text.replace(f"slide-00,{first}", "slide-00,tumour", 1))
    capsys.readouterr()
    try:
        split = next(row["split"] for row in rows_of(by_slide / "splits.csv") if row["patient"] == "patient-0")
        assert call("evaluate", by_slide, "--split", split, "--by", "patient", "-q") == 2
        said = capsys.readouterr().err
    finally:
        (root / "labels.csv").write_text(text)
    assert "task 'label': expected one label for all bags of patient 'patient-0'" in said


@pytest.mark.parametrize(
    "task",
    [
        TaskSpec("b", "binary"),
        TaskSpec("m", "multiclass", 3),
        TaskSpec("l", "multilabel", 4),
        TaskSpec("r", "regression", mean=3.0, std=2.0),
        TaskSpec("o", "ordinal", 4),
    ],
)
def test_the_mean_is_of_what_is_predicted(task: TaskSpec) -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, task.outputs)
    names = [f"s{row}" for row in range(6)]
    groups = ["patient A", "patient B", "patient A", "slide s3", "patient B", "patient A"]
    patients = Patients.of("data", names, groups)
    assert patients.names == ["A", "B", "s3"]
    joined = decode(task, mean_of_bags(task, logits, patients, [3, 1, 0, 2, 5, 1]))
    each = decode(task, logits.double())
    expected = torch.stack([(each[0] + each[5]) / 2, (each[1] + each[4]) / 2, each[3]])  # s2 has no instances
    torch.testing.assert_close(joined, expected, rtol=1e-9, atol=1e-9)


def test_a_bag_of_nobody_with_the_name_of_a_patient_is_refused() -> None:
    with pytest.raises(DataError, match="data: bag 'A' has no patient and is named like one"):
        Patients.of("data", ["A", "s1"], ["slide A", "patient A"])


def test_a_run_by_slide_knows_patients_without_its_table(root: Path, by_slide: Path, tmp_path: Path) -> None:
    text = (root / "labels.csv").read_text()
    (root / "labels.csv").unlink()
    try:
        assert call("predict", by_slide, "--out", tmp_path / "p.csv", "--by", "patient", "-q") == 0
    finally:
        (root / "labels.csv").write_text(text)
    assert load_run(by_slide).record is not None
    assert [row["patient"] for row in rows_of(tmp_path / "p.csv")] == ["empty", *dict.fromkeys(PATIENTS)]
