"""Cross-validations that are gone on with after the data changed, and what they predict for the bags they test on."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import small_config, small_data
from tests.train.cohort import Cohort, cohort_config
from umda_fast.data import load_folds
from umda_fast.errors import DataError
from umda_fast.model import decode
from umda_fast.score.collect import Predictions
from umda_fast.studies.out_of_fold import FoldOutputs, pooled_metrics
from umda_fast.train import compare_models, cross_validate, evaluate, load_run
from umda_fast.train.split_record import SplitRecord

Begun = tuple[Cohort, Path, dict[str, Any]]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    """A cohort of 18 bags and a cross-validation in three folds, not to be changed."""
    place = tmp_path_factory.mktemp("begun")
    cohort = Cohort(place / "bags", 18)
    cohort.write()
    result = cross_validate(cohort_config(cohort.root), place / "cv", folds=3, progress=False)
    return cohort, place / "cv", result


def copied(begun: Begun, root: Path) -> tuple[Cohort, Path]:
    """Both, to be changed."""
    shutil.copytree(begun[1], root / "cv")
    return begun[0].copy(root / "bags"), root / "cv"


def again(cohort: Cohort, out: Path) -> dict[str, Any]:
    """Goes on in `out`, which was begun on the same data elsewhere."""
    settings = json.loads((out / "crossval.json").read_text())
    settings["source"] = settings["config"]["data"]["source"] = str(cohort.root)
    (out / "crossval.json").write_text(json.dumps(settings))
    return cross_validate(cohort_config(cohort.root), out, folds=3, progress=False)


def test_every_bag_is_predicted_by_the_run_that_was_tested_on_it(begun: Begun) -> None:
    cohort, out, result = begun
    with open(out / "out_of_fold.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert sorted(row["bag"] for row in rows) == sorted(cohort.bags)
    for fold in range(3):
        place = out / f"repeat-0-fold-{fold}"
        bags = [row["bag"] for row in rows if row["fold"] == str(fold)]
        assert bags == SplitRecord.read(place / "splits.csv").names("test")
        outputs = FoldOutputs.read(place / "test_outputs.json")
        expected = decode(outputs.tasks[0], outputs.found.logits["y"])[:, 0].tolist()
        found = [float(row["y_probability_b"]) for row in rows if row["fold"] == str(fold)]
        assert found == pytest.approx(expected, abs=1e-5)
        scores = json.loads((place / "metrics.json").read_text())["tasks"]
        assert evaluate(load_run(place), progress=False).tasks == scores
        assert pooled_metrics([outputs])["tasks"]["y"] == pytest.approx(scores["y"])
    right = sum(row["y_predicted"] == cohort.labels[row["bag"]] for row in rows)
    assert result["pooled"][0]["bags"] == 18
    assert result["pooled"][0]["tasks"]["y"]["accuracy"] == pytest.approx(right / 18)


def test_pooling_reads_each_run_s_outputs_by_its_own_specs() -> None:
    data = small_data()["test"]
    mean = next(task for task in data.tasks if task.name == "mean")
    target = torch.tensor(data.labels["mean"], dtype=torch.float32)

    def outputs(rows: slice, shift: float, scale: float) -> FoldOutputs:
        task = replace(mean, mean=shift, std=scale)
        labels = target[rows]
        logits = ((labels - shift) / scale)[:, None]
        found = {"logits": {"mean": logits}, "labels": {"mean": labels}, "masks": {"mean": labels == labels}}
        return FoldOutputs((task,), data.names[rows], [1] * len(labels), Predictions(**found))

    found = pooled_metrics([outputs(slice(0, 8), 4.0, 2.0), outputs(slice(8, 16), -1.0, 0.5)])
    assert found["tasks"]["mean"]["r2"] == pytest.approx(1.0)


def test_the_folds_stay_when_bags_come(begun: Begun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort, out = copied(begun, tmp_path)
    new = [cohort.add() for _ in range(4)]
    cohort.rename("S00", "Z00")
    cohort.write()
    shutil.rmtree(out / "repeat-0-fold-1")
    result = again(cohort, out)
    said = capsys.readouterr().err
    assert f"4 new, in no split: '{new[0]}'" in said
    assert "'Z00 (was S00)'" in said
    for key in ("tasks", "mean_score", "pooled"):
        assert result[key] == begun[2][key]
    bags = SplitRecord.read(out / "repeat-0-fold-1" / "splits.csv").names("train", "val", "test")
    assert sorted(bags) == sorted({*begun[0].bags} - {"S00"} | {"Z00"})


def test_folds_whose_bags_are_gone_are_refused(begun: Begun, tmp_path: Path) -> None:
    cohort, out = copied(begun, tmp_path)
    cohort.remove("S04")
    cohort.write()
    shutil.rmtree(out / "repeat-0-fold-2")
    with pytest.raises(DataError, match="1 bags of its folds are gone: 'S04'; put them back"):
        again(cohort, out)


def test_other_labels_make_no_other_folds_and_other_classes_are_refused(begun: Begun, tmp_path: Path) -> None:
    cohort, out = copied(begun, tmp_path)
    cohort.labels["S03"] = "a"
    cohort.write()
    shutil.rmtree(out / "repeat-0-fold-2")
    again(cohort, out)
    first, second = (SplitRecord.read(place / "repeat-0-fold-2" / "splits.csv") for place in (begun[1], out))
    assert first == second
    cohort.labels["S03"] = "c"
    cohort.write()
    with pytest.raises(DataError, match=r"holds a cross-validation with specs .*'binary', 'a', 'b'"):
        again(cohort, out)


def test_a_cross_validation_of_before_is_gone_on_with_on_the_same_bags(
    begun: Begun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, out = copied(begun, tmp_path)
    cohort.write()
    settings = json.loads((out / "crossval.json").read_text())
    for name in ("specs", "pooled"):
        del settings[name]
    del settings["config"]["data"]["paths"]
    (out / "crossval.json").write_text(json.dumps(settings))
    for file in ("folds.csv", "out_of_fold.csv", "repeat-0-fold-0/splits.csv", "repeat-0-fold-0/test_outputs.json"):
        (out / file).unlink()
    result = again(cohort, out)
    assert "has no folds.csv (an earlier version began it)" in capsys.readouterr().err
    assert result["pooled"] == begun[2]["pooled"]  # from the weights that are there
    assert not (out / "folds.csv").exists()
    cohort.add()
    cohort.write()
    with pytest.raises(DataError, match=r"repeat-0-fold-\d: .*bags: expected .* choose another --out"):
        again(cohort, out)


def test_bags_that_are_drawn_for_a_fold_are_not_taken_for_others(tmp_path: Path) -> None:
    options = {"train_bags": 20, "val_bags": 6, "test_bags": 6}
    config = small_config(data={"options": options}, train={"epochs": 1, "linear": "mix"})
    folds = list(load_folds("digits", folds=2, **options))
    cross_validate(config, tmp_path / "cv", folds=2, datasets=folds, progress=False)
    with pytest.raises(DataError, match=r"digits that it recorded are not drawn again from its configuration \(is it"):
        evaluate(load_run(tmp_path / "cv" / "repeat-0-fold-0"), progress=False)


def test_a_comparison_is_not_gone_on_with_on_other_bags(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path / "bags", 18)
    cohort.write()
    config = cohort_config(cohort.root)

    def compare(folds: int | None) -> None:
        out = tmp_path / f"{folds}"
        compare_models(config, out, models=("mean_pooling",), seeds=1, folds=folds, progress=False)

    compare(2)
    compare(None)
    cohort.add()
    cohort.write()
    compare(2)
    with pytest.raises(DataError, match=r"seed-0: train bags: expected the \d+ of its splits\.csv; \d+ differ: 'S"):
        compare(None)

