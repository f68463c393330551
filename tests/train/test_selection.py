"""What `train.select` makes of an evaluation, and which weights a run therefore keeps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torchmetrics import MeanSquaredError, SumMetric

from tests.small import small_config
from umda_fast.model import TaskSpec
from umda_fast.runtime.config import ConfigError
from umda_fast.runtime.rundir import read_metrics
from umda_fast.score.evaluation import SplitResult
from umda_fast.score.skill import Skill
from umda_fast.tasks import Regression, kind
from umda_fast.train import train
from umda_fast.train.selection import Selection

TASKS = (TaskSpec("b", "binary"), TaskSpec("r", "regression", mean=10.0, std=4.0))


def test_scores() -> None:
    tasks = {"b": {"auroc": 0.8, "accuracy": 0.7}, "r": {"mae": 2.5, "r2": 0.3}}
    losses = {"b": 0.25, "r": 1.5, "without labels": math.nan}
    result = SplitResult(tasks, 0.4, losses, losses, 9, 9, None, None, None)
    skill = Skill({"b": 0.7, "r": 0.5}, 0.6)
    selects = ("skill", "mean_score", "loss", "r/mae", "r/r2", "b/accuracy")
    found = {name: Selection(name, TASKS).score(result, skill) for name in selects}
    assert found == {
        "skill": 0.6, "mean_score": 0.4, "loss": -1.75, "r/mae": -2.5, "r/r2": 0.3, "b/accuracy": 0.7
    }  # fmt: skip
    assert math.isnan(Selection("last", TASKS).score(result, skill))


def test_a_score_is_shown_as_it_is_known() -> None:
    shown = [Selection(name, TASKS).show(-2.5) for name in ("r/mae", "loss", "r/r2")]
    assert shown == ["r/mae 2.5000", "loss 2.5000", "r/r2 -2.5000"]


@pytest.mark.parametrize("wrong", ["skil", "r/auroc", "x/r2", "r"])
def test_what_is_no_measure_is_named(wrong: str) -> None:
    with pytest.raises(ConfigError, match=rf"train.select: expected one of skill, .*r/r2, got '{wrong}'"):
        Selection(wrong, TASKS)


@pytest.mark.parametrize("select", ["skill", "mean_score", "loss", "mean/mae", "last"])
def test_the_epoch_that_is_kept(select: str, tmp_path: Path) -> None:
    config = small_config(train={"select": select, "epochs": 4})
    train(config, tmp_path / "run", progress=False, plots=False)
    epochs = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "epoch"]
    values = {
        "skill": [record["val"]["skill"]["mean"] for record in epochs],
        "mean_score": [record["val"]["mean_score"] for record in epochs],
        "loss": [-sum(record["val"]["losses"].values()) for record in epochs],
        "mean/mae": [-record["val"]["tasks"]["mean"]["mae"] for record in epochs],
        "last": [0.0, 0.0, 0.0, 1.0],
    }[select]
    assert epochs[-1]["best_epoch"] == values.index(max(values))
    kept = json.loads((tmp_path / "run" / "metrics.json").read_text())["kept"]
    assert (kept["select"], kept["epoch"]) == (select, epochs[-1]["best_epoch"])
    if select == "last":
        assert kept["split"] is kept["score"] is None
    else:
        assert kept["split"] == "val"
        assert kept["score"] == pytest.approx(max(values) * (-1 if select in ("loss", "mean/mae") else 1))
    for record in epochs:
        assert set(record["val"]["skill"]["tasks"]) == set(record["val"]["tasks"])
        assert 0.0 <= record["val"]["skill"]["mean"] <= 1.0


def test_a_wrong_name_leaves_nothing(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match=r"train.select: expected one of skill, .* got 'mean/auroc'"):
        train(small_config(train={"select": "mean/auroc"}), out, progress=False, plots=False)
    assert not list(out.iterdir())
    train(small_config(train={"select": "mean/r2", "epochs": 1}), out, progress=False, plots=False)


def test_patience_goes_by_what_selects(tmp_path: Path) -> None:
    config = small_config(train={"select": "mean/mae", "epochs": 9, "patience": 1, "lr": 0.3})
    train(config, tmp_path, progress=False, plots=False)
    epochs = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "epoch"]
    found = [record["val"]["tasks"]["mean"]["mae"] for record in epochs]
    assert len(epochs) < 9
    assert found[-1] >= min(found[:-1])
    assert epochs[-1]["best_epoch"] == len(epochs) - 2


class _Errors(Regression):
    name = "errors"

    def metrics(self, task: TaskSpec) -> dict[str, Any]:
        return {**super().metrics(task), "mse": MeanSquaredError(), "unsaid": SumMetric()}


def test_a_metric_from_outside_says_whether_less_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(kind._KINDS, "errors", _Errors())
    task = TaskSpec("e", "errors")
    assert Selection("e/mse", [task]).show(-2.5) == "e/mse 2.5000"
    with pytest.raises(ConfigError, match="e/unsaid: whether more of it is better is not known"):
        Selection("e/unsaid", [task])
