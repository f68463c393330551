"""`train.linear: mix`: what is measured, kept and read back is the mixture, whoever reads it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.processes import run_together
from tests.small import small_config, small_data
from tests.train.bags import TASKS, VIEWS, datasets
from umda_fast.errors import DataError
from umda_fast.model import UMDA, Mixture, UMDAConfig, decode
from umda_fast.runtime.config import DataConfig
from umda_fast.runtime.fabric import make_fabric
from umda_fast.score import inference
from umda_fast.score.calibration import Calibration
from umda_fast.score.collect import calibrate, collect
from umda_fast.studies.compare import model_config
from umda_fast.studies.maps import explain
from umda_fast.studies.readapt import readapt
from umda_fast.studies.report import write_report
from umda_fast.train import RunResult, evaluate, load_ensemble, load_run, make_config, predict, train
from umda_fast.train.linear import beside_linear, comparison_lines

DATA = small_data()
CONFIG = small_config(train={"steps": 1, "linear": "mix", "thresholds": "f1"})
FABRIC = make_fabric(CONFIG)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """After one update the linear model knows more."""
    place = tmp_path_factory.mktemp("mixture") / "run"
    return train(CONFIG, place, datasets=DATA, progress=False, plots=False)


def test_the_mixture_is_what_is_measured_and_kept(run: RunResult) -> None:
    loaded = load_run(run.directory)
    assert isinstance(run.model, Mixture)
    assert isinstance(loaded.model, Mixture)
    assert evaluate(loaded, datasets=DATA, progress=False).tasks == run.metrics["tasks"]
    told = run.metrics["linear"]["tasks"]
    assert max(task["weight"] for task in told.values()) > 0.5
    on_val = evaluate(loaded, datasets=DATA, split="val", progress=False)
    for name, task in told.items():
        assert task["losses"]["mixture"] <= task["losses"]["model"]
        assert on_val.calibrated_losses[name] == pytest.approx(task["losses"]["mixture"], rel=1e-4)
        assert on_val.tasks[name][task["metric"]] == pytest.approx(task["mixture"], rel=1e-4)
        assert 0 <= task["weight"] <= task["best"] <= 1
        assert task["gain"] == pytest.approx(task["losses"]["model"] - task["losses"]["mixture"], abs=1e-9)


def test_calibration_and_thresholds_are_of_the_mixture(run: RunResult) -> None:
    expected = calibrate(load_run(run.directory).model, DATA["val"], FABRIC, CONFIG.data)
    assert Calibration.load(run.directory / "calibration.json").temperatures == pytest.approx(expected.temperatures)
    assert json.loads((run.directory / "config.json").read_text())["tasks"][2]["thresholds"] is not None


def test_predictions_are_the_mixture_s(run: RunResult, tmp_path: Path) -> None:
    loaded = load_run(run.directory)
    predict(loaded, datasets=DATA, split="test", out=tmp_path / "p.csv", progress=False)
    with open(tmp_path / "p.csv", newline="") as stream:
        found = [float(line["mean"]) for line in csv.DictReader(stream)]
    task = DATA["test"].tasks[-1]
    models = loaded.model.model, loaded.model.members["linear"]
    own, other = (collect(model, DATA["test"], FABRIC, CONFIG.data) for model in models)
    first, second = loaded.model.coefficients[task.name]
    expected = decode(task, first * own.logits[task.name] + second * other.logits[task.name])[:, 0]
    assert second > 0
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    together = evaluate(load_ensemble([run.directory, run.directory]), datasets=DATA, progress=False)
    assert together.tasks["mean"] == pytest.approx(run.metrics["tasks"]["mean"])


def test_large_bags(run: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_run(run.directory)
    whole = evaluate(loaded, datasets=DATA, progress=False)
    monkeypatch.setattr(inference, "LARGE", 8)
    assert evaluate(loaded, datasets=DATA, progress=False).losses == pytest.approx(whole.losses, rel=1e-4)


def test_attention_says_what_it_does_not_tell(
    run: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = run.metrics["linear"]["tasks"]
    shares = ", ".join(f"{name} {task['weight']:.0%}" for name, task in told.items() if task["weight"] > 0)
    note = f"attention is that of the trained model alone; what is mixed in (linear) has a share in: {shares}"
    explain(load_run(run.directory), datasets=DATA, split="test", out=tmp_path / "maps", progress=False)
    assert capsys.readouterr().err.count(note) == 1
    loaded = load_run(run.directory)
    predict(loaded, datasets=DATA, split="test", out=tmp_path / "p.csv", progress=False)
    assert note not in capsys.readouterr().err
    predict(
        loaded, datasets=DATA, split="test", out=tmp_path / "p.csv", attention=tmp_path / "a.h5", progress=False
    )
    assert capsys.readouterr().err.count(note) == 1
    page = write_report(load_run(run.directory), tmp_path / "r.html", datasets=DATA, samples=20, progress=False)
    assert note in page.read_text()


def test_new_heads_are_on_the_trunk(run: RunResult, tmp_path: Path) -> None:
    readapt(load_run(run.directory), tmp_path / "new", datasets=DATA)
    assert type(load_run(tmp_path / "new").model).__name__ == "Readout"


def mixed() -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = UMDA(UMDAConfig(VIEWS, TASKS, width=16, heads=2, layers=1)).eval()
    data = datasets()
    made, told = beside_linear(model, data["train"], data["val"], make_fabric(CONFIG), DataConfig(), 0, mix=True)
    return (made.coefficients if isinstance(made, Mixture) else None), told


def test_all_processes_take_what_the_first_found() -> None:
    alone = mixed()
    assert alone[0] is not None
    assert run_together(mixed, 2) == [alone, alone]


def test_lines() -> None:
    scores = {"metric": "auroc", "model": 0.5, "linear": 0.75, "mixture": 0.8125, "weight": 0.25}
    told = {"y": scores, "z": {**scores, "weight": 0.0, "mixture": 0.5}}
    assert comparison_lines({"tasks": told, "below": ["z"]}) == [
        "y: auroc 0.5000, linear model 0.7500, mixed with weight 0.25 0.8125",
        "z: auroc 0.5000, linear model 0.7500, not mixed in",
        "warning: below a linear model of bag means on validation bags: z",
    ]
    assert comparison_lines({"tasks": {}, "below": [], "worse": ["y", "z"]}) == [
        "warning: the mixture's loss on validation bags is not greater than the model's, but its score is less: y, z "
        "(train.linear=beside leaves the model as it is)"
    ]


def test_a_mixture_that_scores_less_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights go by the loss, and thresholds make a score of it."""
    scores = iter([0.5, 0.3, 0.4, *[0.5, 0.3, 0.6] * 7])  # of every task the model, the linear one, the two together
    monkeypatch.setattr("umda_fast.train.linear.primary_score", lambda *_: next(scores))
    torch.manual_seed(0)
    model = UMDA(UMDAConfig(DATA["train"].views, DATA["train"].tasks, width=16, heads=2, layers=1)).eval()
    for worse in ([DATA["train"].tasks[0].name], []):
        _, told = beside_linear(model, DATA["train"], DATA["val"], FABRIC, DataConfig(), 0, mix=True)
        assert told["worse"] == worse


def test_plain_models_are_compared_as_they_are() -> None:
    assert model_config(CONFIG, "umda").train.linear == "mix"
    assert model_config(CONFIG, "max_pooling").train.linear == "beside"
    assert make_config().train.linear == "mix"


def test_a_mixture_that_cannot_be_read_is_said(run: RunResult, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    place.mkdir()
    for name in ("config.yaml", "config.json", "model.safetensors"):
        (place / name).write_bytes((run.directory / name).read_bytes())
    (place / "mixture.json").write_text("{}")
    with pytest.raises(DataError, match="copy: the model cannot be read: 'members'"):
        load_run(place)


def test_weights_that_are_trained_on_lose_the_mixture_of_the_old_ones(
    run: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last in this file: the run is resumed."""
    config = small_config(train={"steps": 2, "linear": "mix", "thresholds": "f1"})

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("umda_fast.train.run.Trainer.fit", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config, run.directory, resume=True, datasets=DATA, progress=False, plots=False)
    assert isinstance(load_run(run.directory).model, UMDA)
