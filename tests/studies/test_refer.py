"""Selective prediction: a run writes its calibration, `predict` adds confidences and names what to refer."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from tests.small import small_config, small_data
from umda_fast.errors import DataError
from umda_fast.model import decode
from umda_fast.score.calibration import Calibration
from umda_fast.train import Run, load_run, predict, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("refer") / "run"
    train(small_config(), out, datasets=small_data(val_bags=32), progress=False, plots=False)
    return load_run(out)


def predicted(run: Run, out: Path, refer_below: float | None) -> list[dict[str, str]]:
    predict(run, datasets=small_data(val_bags=32), split="test", out=out, refer_below=refer_below, progress=False)
    with open(out, newline="") as stream:
        return list(csv.DictReader(stream))


def test_training_leaves_a_calibration(run: Run) -> None:
    fitted = Calibration.load(run.directory / "calibration.json")
    assert set(fitted.temperatures) == {"has_nine", "largest", "present"}
    assert set(fitted.half_widths) == {"mean"}
    assert set(fitted.bags.values()) == {32}


def test_the_tasks_below_are_named(run: Run, tmp_path: Path) -> None:
    plain = predicted(run, tmp_path / "plain.csv", None)
    lines = predicted(run, tmp_path / "referred.csv", 0.6)
    shown = [key for key in plain[0] if key not in ("refer", "reason")]
    for line, before in zip(lines, plain, strict=True):
        assert {key: line[key] for key in shown} == {key: before[key] for key in shown}
    assert {line["refer"] + line["reason"] for line in plain} == {""}
    added = [key for key in lines[0] if key not in plain[0]]
    classified = ["has_nine", "largest", "present"]
    assert added == [*(f"{task}_confidence" for task in classified), "mean_low", "mean_high"]
    fitted = Calibration.load(run.directory / "calibration.json")
    referred = set()
    for line in lines:
        below = [task for task in classified if float(line[f"{task}_confidence"]) < 0.6]
        assert line["refer"] == ";".join(below)
        assert line["reason"] == ("confidence below 0.6" if below else "")
        referred |= set(below)
        probability = torch.tensor(float(line["has_nine_probability_yes"]), dtype=torch.float64)
        calm = decode(run.model.config.tasks[0], (probability.logit() / fitted.temperatures["has_nine"])[None, None])
        assert float(line["has_nine_confidence"]) == pytest.approx(max(float(calm), 1 - float(calm)), abs=1e-4)
        middle = (float(line["mean_low"]) + float(line["mean_high"])) / 2
        assert middle == pytest.approx(float(line["mean"]), abs=1e-4)
    assert referred  # or nothing was tested
    assert {line["refer"] for line in predicted(run, tmp_path / "none.csv", 0.0)} == {""}


def test_bad_thresholds_and_runs_without_calibration(run: Run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"refer_below: expected a number between 0 and 1, got 1\.5"):
        predicted(run, tmp_path / "a.csv", 1.5)
    data = small_data(val_bags=32)
    del data["val"]
    train(small_config(), tmp_path / "run", datasets=data, progress=False, plots=False)
    with pytest.raises(DataError, match=r"calibration\.json: holds no calibration"):
        predicted(load_run(tmp_path / "run"), tmp_path / "b.csv", 0.5)
    assert not (tmp_path / "b.csv").exists()
