"""Comparison of models: what is kept, resumed and refused, and the figures in the table."""

import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import umda_fast.studies.crossval as crossval
from tests.small import small_config, small_data
from umda_fast.errors import DataError
from umda_fast.studies.compare import comparison_markdown, model_config
from umda_fast.train import ConfigError, compare_models

MODELS = ("umda", "mean_pooling")


def config(**sections: Any) -> Any:
    return small_config(train={"epochs": 1, "keep": "scores", "linear": "mix"}, **sections)


def test_the_table_is_of_the_runs_and_a_second_call_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = compare_models(config(), tmp_path, models=MODELS, seeds=2, progress=False)
    scores = [
        json.loads((tmp_path / "umda" / f"seed-{seed}" / "metrics.json").read_text())["mean_score"] for seed in (0, 1)
    ]
    umda = report["models"]["umda"]
    assert umda["mean_score"]["mean"] == statistics.fmean(scores)
    assert umda["mean_score"]["std"] == statistics.stdev(scores)
    assert list(report["models"]) == list(MODELS)
    assert umda["parameters"] > report["models"]["mean_pooling"]["parameters"] > 0
    written = (tmp_path / "compare.md").read_text()
    assert f"{statistics.fmean(scores):.4f}" in written
    assert written == comparison_markdown(report)
    monkeypatch.setattr(crossval, "train", None)  # called, it would raise
    again = compare_models(config(), tmp_path, models=MODELS, seeds=2, progress=False)
    assert {**again, "time": report["time"]} == report
    with pytest.raises(DataError, match="holds a comparison with another configuration"):
        compare_models(config(seed=5), tmp_path, models=MODELS, seeds=2, progress=False)


def test_folds_instead_of_seeds(tmp_path: Path) -> None:
    report = compare_models(config(), tmp_path, models=["max_pooling"], folds=2, progress=False)
    assert report["models"]["max_pooling"]["mean_score"]["folds"] == 2
    assert (tmp_path / "max_pooling" / "fold-1" / "metrics.json").is_file()


def test_data_from_python(tmp_path: Path) -> None:
    parts = small_data()
    report = compare_models(config(), tmp_path, models=["mean_pooling"], datasets=[parts], progress=False)
    assert len(report["models"]["mean_pooling"]["runs"]) == 1


def test_every_model_keeps_what_it_understands() -> None:
    given = config(model={"width": 24, "dropout": 0.2})
    for name in ("umda", "transmil", "late_fusion"):
        made = model_config(given, name)
        assert (made.model["architecture"], made.model["width"], made.model["dropout"]) == (name, 24, 0.2)
        assert made.train == (given.train if name == "umda" else replace(given.train, linear="beside"))
        assert made.sgl.balancer == ("sgl" if name == "umda" else "none")
    one_view = config(model={"architecture": "mean_pooling", "view": "pixels"})
    assert model_config(one_view, "late_fusion").model["view"] is None


@pytest.mark.parametrize("models", [(), ("umda", "umda"), ("umda", "resnet")])
def test_models_that_cannot_be_are_refused(models: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="models: expected different names among umda, mean_pooling"):
        compare_models(config(), tmp_path, models=models, progress=False)
    assert not list(tmp_path.iterdir())
