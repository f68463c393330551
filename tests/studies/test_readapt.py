"""New heads on a frozen trunk."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.small import small_config, small_data
from tests.train.cohort import Cohort, cohort_config
from tests.written import read_json
from umda_fast.data import SPLITS, BagDataset, collate
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec
from umda_fast.score.calibration import Calibration
from umda_fast.studies.readapt import fit_head, readapt
from umda_fast.train import Run, evaluate, load_run, predict, train
from umda_fast.train.split_record import SplitRecord


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("readapt") / "run"
    # The weights as they are after two epochs: their mean over so few updates is still near the first.
    config = small_config(train={"ema": 0.0})
    train(config, out, datasets=small_data(val_bags=24), progress=False, plots=False)
    return load_run(out)


def new_labels(run: Run) -> dict[str, BagDataset]:
    """The same bags with labels that its branches tell, to a part: a projection of them, and whether it is large."""
    result = {}
    for split, dataset in small_data(val_bags=24).items():
        bags = [dataset[i] for i in range(len(dataset))]
        with torch.no_grad():
            branches = run.model(**collate(bags, dataset.views, dataset.tasks).inputs()).branches
        light = 5 + branches[:, 0, :3].sum(1)
        for bag, value in zip(bags, light, strict=True):
            bright = (value > light.median()).float()
            bag.labels = {"light": value, "bright": bright, "size": torch.tensor(len(bag) % 3)}
        del bags[0].labels["bright"]  # a missing label
        tasks = (
            TaskSpec("light", "regression", mean=float(light.mean()), std=float(light.std())),
            TaskSpec("bright", "binary"),
            TaskSpec("size", "multiclass", 3),
        )
        result[split] = BagDataset(bags, dataset.views, tasks, "new labels")
    return result


def test_a_head_is_the_ridge_solution() -> None:
    task = TaskSpec("y", "regression", mean=1.0, std=2.0)
    x = torch.randn(40, 6) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0, 0.0]) + 3
    target = x[:, 0] - 0.2 * x[:, 1] + 0.1 * torch.randn(40)
    weight, bias, penalty = fit_head(task, x, target)
    scaled = ((x - x.mean(0)) / x.std(0, unbiased=False).where(x.std(0) > 0, torch.ones(6))).double()
    y = ((target - 1.0) / 2.0).double()
    solution = torch.linalg.solve(scaled.T @ scaled + penalty * torch.eye(6), scaled.T @ (y - y.mean()))
    expected = (scaled @ solution + y.mean()).float()[:, None]
    torch.testing.assert_close(x @ weight.T + bias, expected, atol=1e-4, rtol=1e-4)


KINDS = [TaskSpec("y", "binary"), TaskSpec("y", "multiclass", 3), TaskSpec("y", "multilabel", 2)]


@pytest.mark.parametrize("task", KINDS, ids=lambda task: task.kind)
def test_logits_above_zero_predict(task: TaskSpec) -> None:
    x = torch.randn(200, 5)
    scores = x[:, : task.outputs]
    target = scores.argmax(1) if task.kind == "multiclass" else (scores > 0).float()
    weight, bias, _ = fit_head(task, x, target[:, 0] if task.kind == "binary" else target)
    logits = x @ weight.T + bias
    predicted = logits.argmax(1) if task.kind == "multiclass" else (logits > 0).float()
    assert float((predicted == target).double().mean()) > 0.9


def test_the_adapted_run_is_a_run(run: Run, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    result = readapt(run, tmp_path / "adapted", datasets=new_labels(run))
    assert result is not None
    assert result.tasks["light"]["r2"] > 0.9
    assert result.tasks["bright"]["auroc"] > 0.9
    read_json(tmp_path / "adapted" / "metrics.json", "metrics")
    again = load_run(tmp_path / "adapted")
    for name, value in again.model.trunk.state_dict().items():
        assert torch.equal(value, before[name]), name
    repeated = evaluate(again, datasets=new_labels(run), progress=False)
    assert repeated.tasks == result.tasks
    predict(again, datasets=new_labels(run), out=tmp_path / "p.csv", refer_below=0.7, progress=False)
    header = (tmp_path / "p.csv").read_text().splitlines()[0].split(",")
    assert {"light", "bright_probability_1", "size_confidence", "light_low", "refer"} <= set(header)
    fitted = Calibration.load(tmp_path / "adapted" / "calibration.json")
    assert set(fitted.temperatures.values()) == {1.0}  # multiplied into the heads


def test_new_labels_have_thresholds_of_their_own(run: Run, tmp_path: Path) -> None:
    parts = new_labels(run)
    task = TaskSpec("tags", "multilabel", 2)
    for split, dataset in parts.items():
        bags = [dataset[i] for i in range(len(dataset))]
        for i, bag in enumerate(bags):
            bag.labels = {"tags": torch.tensor([float(i % 7 == 0), float(len(bag) % 2)])}
        parts[split] = BagDataset(bags, dataset.views, (task,), "tags")
    asked = dataclasses.replace(run, config=small_config(train={"ema": 0.0, "thresholds": "share"}))
    result = readapt(asked, tmp_path / "adapted", datasets=parts)
    again = load_run(tmp_path / "adapted")
    assert again.model.config.tasks[0].thresholds is not None
    assert result is not None
    assert evaluate(again, datasets=parts, progress=False).tasks == result.tasks


def test_what_cannot_be_adapted_is_said(run: Run, tmp_path: Path) -> None:
    data = new_labels(run)
    for bag_index in range(len(data["train"])):
        data["train"][bag_index].labels.pop("bright", None)
    rows = np.arange(len(data["train"]))
    bare = BagDataset([data["train"][int(row)] for row in rows], data["train"].views, data["train"].tasks, "bare")
    with pytest.raises(DataError, match="task 'bright': expected at least 2 labels to fit, got 0"):
        readapt(run, tmp_path / "a", datasets={"train": bare})
    with pytest.raises(DataError, match="already holds a run"):
        readapt(run, run.directory, datasets=new_labels(run))
    with pytest.raises(DataError, match="source: expected the data with the new labels"):
        readapt(run, tmp_path / "b")


def test_new_heads_are_not_tested_on_bags_of_the_trunk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort = Cohort(tmp_path / "bags", 24)
    cohort.write()
    train(cohort_config(cohort.root), tmp_path / "run", progress=False, plots=False)
    recorded = SplitRecord.read(tmp_path / "run" / "splits.csv")
    new = [cohort.add() for _ in range(8)]
    cohort.labels = {name: "pq"[number % 3 == 0] for name, number in cohort.bags.items()}
    cohort.write()
    readapt(load_run(tmp_path / "run"), tmp_path / "own", source=str(cohort.root))
    found = SplitRecord.read(tmp_path / "own" / "splits.csv")
    for split in SPLITS:
        assert found.names(split)[: len(recorded.names(split))] == recorded.names(split)
        assert {*found.names(split)} <= {*recorded.names(split), *new}
    assert sorted(found.names(*SPLITS)) == sorted(cohort.bags)
    assert "8 new, divided as they would be today: 'S24'" in capsys.readouterr().err
    # Elsewhere, with another split: what the trunk knows is left out of val and test, and remembered.
    other = cohort.copy(tmp_path / "other")
    other.remove(recorded.names("train")[0])
    for name in sorted(other.bags):
        other.rename(name, f"X{name}")
    other.write()
    options = {"val_share": 0.3, "test_share": 0.3}
    readapt(load_run(tmp_path / "run"), tmp_path / "adapted", source=str(other.root), options=options)
    found = SplitRecord.read(tmp_path / "adapted" / "splits.csv")
    known = {f"X{name}" for name in (*recorded.names("test"), *new)}
    assert found.names("test")
    assert {*found.names("val", "test")} <= known
    assert recorded.names("train")[0] in found.names("trunk")
    assert "left out, as it was trained or validated on them: " in capsys.readouterr().err
    result = evaluate(load_run(tmp_path / "adapted"), split="all", progress=False)
    assert result.bags == len(found.names("test"))
