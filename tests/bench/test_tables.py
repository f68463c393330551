"""Tables of results: a run is kept at once and never repeated; figures in the Markdown are those of the JSON."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import results_ablation, results_mfeat, results_mil, results_plain, results_sgl, tables
from umda_fast.data import load_source
from umda_fast.train import make_config


def test_a_run_is_kept_at_once_and_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def measure(value: float) -> dict[str, float]:
        made.append(1)
        return {"score": value, "broken": math.nan}

    path = tmp_path / "t.json"
    table = tables.Table(path, "python -m bench.x", {"epochs": (1, 2)})
    table.run({"seed": 0}, lambda: measure(0.5))
    assert json.loads(path.read_text())["runs"][0]["score"] == 0.5
    again = tables.Table(path, "python -m bench.x", {"epochs": (1, 2)})
    assert again.run({"seed": 0}, lambda: measure(0.7))["score"] == 0.5
    assert again.run({"seed": 1}, lambda: measure(0.7))["score"] == 0.7
    assert len(made) == 2
    assert [run["key"]["seed"] for run in again.where(seed=1)] == [1]
    again.write("Title", "text")
    assert path.with_suffix(".md").read_text().startswith("# Title\n\nMade by `python -m bench.x`")
    with pytest.raises(SystemExit, match="other settings"):
        tables.Table(path, "python -m bench.x", {"epochs": (1, 3)})


def test_means_errors_and_differences() -> None:
    values = [0.1, 0.2, 0.6]
    mean, error = tables.mean_error([*values, None, math.nan])
    assert mean == statistics.fmean(values)
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert tables.plus_minus(values, 2) == f"{mean:.2f} ± {error:.2f}"
    assert (tables.plus_minus([0.5]), tables.plus_minus([])) == ("0.5000", "-")

    def runs(*pairs: tuple[int, float]) -> list[dict[str, Any]]:
        return [{"key": {"seed": seed}, "s": score} for seed, score in pairs]

    assert tables.paired(runs((0, 1.0), (1, 3.0), (7, 9.0)), runs((1, 1.0), (0, 0.5)), "s") == [0.5, 2.0]


def test_settings_are_laid_over_each_other_and_options_replaced() -> None:
    base = {"data": {"source": "a", "options": {"x": 1}}, "train": {"epochs": 2}}
    over = {"data": {"options": {"y": 2}}, "train": {"lr": 1.0}}
    assert tables.merged(base, over) == {
        "data": {"source": "a", "options": {"y": 2}},
        "train": {"epochs": 2, "lr": 1.0},
    }
    assert base["train"] == {"epochs": 2}


def test_every_configuration_is_one(tmp_path: Path) -> None:
    data = tables.sources(tmp_path)
    for section in data.values():
        for method in results_sgl.METHODS.values():
            make_config(results_sgl.configuration(section, method, 3, 0))
        for change in results_ablation.VARIANTS.values():
            make_config(tables.merged(results_ablation.COMMON, {"data": section}, change))
    for change in results_ablation.PLAIN_VARIANTS.values():
        make_config(tables.merged(results_plain.BASE, change))
    for candidate in results_mil.CANDIDATES:
        values = results_mil.configuration(candidate)
        assert values.pop("members", 1) >= 1
        make_config(values)
    for change in results_mfeat.MODELS.values():
        make_config(tables.merged(results_mfeat.COMMON, change))


def test_the_mean_of_one_model_is_that_model() -> None:
    datasets = dict(load_source("digits", seed=0, train_bags=30, val_bags=10, test_bags=20))
    values = {"model": {"width": 16, "heads": 2, "layers": 1}, "data": {"budget": 96}, "train": {"epochs": 1}}
    alone, mean = tables.fit({**values, "seed": 3}, datasets), tables.fit_ensemble(values, datasets, [3])
    for task, scores in alone["tasks"].items():
        assert mean["tasks"][task] == pytest.approx(scores, rel=1e-5)
    assert mean["data"]["bags"]["test"] == 20
    assert tables.fit_ensemble(values, datasets, [3, 4])["tasks"] != mean["tasks"]


def test_views_are_left_out_at_random_but_never_all() -> None:
    present = results_mfeat.holes(4000, 0.5, 0)
    assert present.any(axis=1).all()
    # Half of each, and an eighth of the rows got one of three back.
    assert present.mean() == pytest.approx(0.5 + 0.125 / 3, abs=0.02)
    assert results_mfeat.holes(100, 0.0, 0).all()


def test_the_sgl_table_shows_what_its_runs_hold(tmp_path: Path) -> None:
    table = tables.Table(tmp_path / "sgl.json", "command", {})
    for seed in (0, 1):
        for method, score, variance in (("SGL", 0.9, 1.0), ("equal", 0.7, 4.0)):
            entry = {
                "mean_score": score + 0.1 * seed,
                "variance": variance,
                "control_variance": 2.0 if method == "SGL" else None,
                "conflict_share": 0.5,
                "cpu_seconds": 1.0,
            }
            table.run({"data": "birds", "method": method, "seed": seed}, lambda entry=entry: entry)
    text = results_sgl.text(table, ["birds", "digits"])
    assert "## birds" in text
    assert "## digits" not in text
    row = next(line for line in text.splitlines() if line.startswith("| equal |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:6] == ["0.7500 ± 0.0500", "-0.2000 ± 0.0000", "2", "4.00 ± 0.00", "1.00"]
    ours = next(line for line in text.splitlines() if line.startswith("| SGL |"))
    assert "| 0.25 | 0.50 ± 0.00 |" in ours
