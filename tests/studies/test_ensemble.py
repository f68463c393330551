"""Several runs evaluated and predicting as one."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_line import call
from tests.small import small_config, small_data
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.model import decode
from umda_fast.runtime.fabric import make_fabric
from umda_fast.score import inference
from umda_fast.score.collect import collect
from umda_fast.score.metrics import TaskMetrics
from umda_fast.train import Run, evaluate, load_ensemble, load_run, predict, train


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two members of other seeds on one split, and a run on another."""
    place = tmp_path_factory.mktemp("ensemble")
    found = []
    for name, seed, split in (("first", 0, 0), ("second", 1, 0), ("elsewhere", 2, 2)):
        config = small_config(seed=seed, data={"seed": split})
        train(config, place / name, progress=False, plots=False)
        found.append(place / name)
    return found


def predicted(run: Run, out: Path) -> list[dict[str, str]]:
    predict(run, datasets=small_data(), split="test", out=out, progress=False)
    with open(out, newline="") as stream:
        return list(csv.DictReader(stream))


def test_predictions_are_means(runs: list[Path], tmp_path: Path) -> None:
    both = predicted(load_ensemble(runs[:2]), tmp_path / "both.csv")
    parts = [predicted(load_run(run), tmp_path / f"{run.name}.csv") for run in runs[:2]]
    numbers = [key for key in both[0] if "probability" in key or key == "mean"]
    assert len(numbers) > 5
    for line, first, second in zip(both, *parts, strict=True):
        assert line["bag"] == first["bag"]
        for key in numbers:
            assert float(line[key]) == pytest.approx((float(first[key]) + float(second[key])) / 2, rel=1e-3, abs=1e-5)


def test_evaluate_measures_the_mean(runs: list[Path], tmp_path: Path) -> None:
    ensemble = load_ensemble(runs[:2])
    test = small_data()["test"]
    fabric = make_fabric(ensemble.config)
    parts = [collect(member.model, test, fabric, ensemble.config.data) for member in ensemble.members]
    metrics = TaskMetrics(ensemble.model.config.tasks)
    logits = {}
    for task in ensemble.model.config.tasks:
        mean = torch.stack([decode(task, part.logits[task.name]) for part in parts]).mean(0)
        logits[task.name] = {
            "regression": (mean - task.mean) / task.std,
            "multiclass": mean.log(),
        }.get(task.kind, mean.logit())
    metrics.update(logits, parts[0].labels, parts[0].masks)
    expected = metrics.compute()
    found = evaluate(ensemble, progress=False)
    for name, values in expected.items():
        both = [dict(values), dict(found.tasks[name])]
        for one in both:
            if "r2" in one:  # near 0 it is the ratio in 1 - ratio that is known to so many digits
                one["r2"] = 1.0 - one["r2"]
        assert both[1] == pytest.approx(both[0], rel=1e-4), name
    assert found.tasks != evaluate(ensemble.members[0], progress=False).tasks
    scores = tmp_path / "scores.json"
    assert call("evaluate", *runs[:2], "--json", scores, "--quiet") == 0
    assert json.loads(scores.read_text())["tasks"] == found.tasks


def test_large_bags_go_through_members_in_chunks(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    ensemble = load_ensemble(runs[:2])
    whole = evaluate(ensemble, progress=False)
    monkeypatch.setattr(inference, "LARGE", 8)
    called = []
    chunked = inference.forward_chunked
    monkeypatch.setattr(
        inference, "forward_chunked", lambda model, **kwargs: called.append(model) or chunked(model, **kwargs)
    )
    assert evaluate(ensemble, progress=False).losses == pytest.approx(whole.losses, rel=1e-4)
    assert {id(model) for model in called} == {id(member.model) for member in ensemble.members}


def test_members_of_other_splits_are_not_measured_together(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", runs[0], runs[2], "--quiet") == 2
    assert "elsewhere: test bags: expected those of" in capsys.readouterr().err
    assert call("predict", runs[0], runs[2], "--data", "digits", "--out", tmp_path / "out.csv", "--quiet") == 0


def test_confidences_need_one_run(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refer_below: expected one run"):
        predict(load_ensemble(runs[:2]), datasets=small_data(), out=tmp_path / "x.csv", refer_below=0.5, progress=False)
    assert not (tmp_path / "x.csv").exists()


def test_runs_for_other_tasks(runs: list[Path], tmp_path: Path) -> None:
    first = small_data()["train"]
    generator = np.random.default_rng(0)
    views = {view.name: generator.normal(size=(60, view.width)) for view in first.views}
    data = BagDataset.from_arrays(views, np.arange(0, 61, 3), {"age": generator.normal(size=20)}, name="ages")
    train(small_config(), tmp_path / "ages", datasets={"train": data}, progress=False, plots=False)
    with pytest.raises(DataError, match=r"ages: members\[1\]: expected the tasks of the first"):
        load_ensemble([runs[0], tmp_path / "ages"])
