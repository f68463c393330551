"""A search: what is tried, by which bags is chosen, what it leaves, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import call
from tests.small import small_config
from tests.train.cohort import Cohort, cohort_config
from tests.written import read_json
from umda_fast.cli.render import make_console, search_table
from umda_fast.data import BagDataset, Splits, load_folds
from umda_fast.errors import DataError
from umda_fast.runtime.config import ConfigError, RunConfig, as_dict, dump_config, make_config
from umda_fast.runtime.guard import NonFiniteError
from umda_fast.studies import search as run_search
from umda_fast.studies.search import CHOICES, choices_of, inner_folds
from umda_fast.studies.trials import Chosen, Value, choose
from umda_fast.train import load_config, load_data
from umda_fast.train.split_record import SplitRecord

GRID: dict[str, tuple[Value, ...]] = {"a": (1.0, 2.0, 3.0, 4.0), "b": ("auto", False), "c": (True, False)}


def found(values: Mapping[str, Value]) -> float | None:
    """Best at a=3, b off, c off; a=4 diverges."""
    if values["a"] == 4.0:
        return None
    return 0.3 * (values["a"] == 3.0) + 0.3 * (values["b"] is False) + 0.3 * (values["c"] is False)


class TestTrials:
    def chosen(self, place: Path, trials: int, score: Any = found, seed: int = 0, told: Any = None) -> Chosen:
        tell = (lambda *_: None) if told is None else lambda *said: told.append(said)
        return choose(score, GRID, trials, journal=place / "log", study="s", seed=(seed, 1), tell=tell)

    def test_what_is_given_is_tried_first_and_nothing_twice(self, tmp_path: Path) -> None:
        told: list[Any] = []
        result = self.chosen(tmp_path, 12, told=told)
        assert result.given == {"a": 1.0, "b": "auto", "c": True}
        assert [dict(values) for _, values, _ in told] == [dict(values) for values, _ in result.trials]
        assert [number for number, _, _ in told] == list(range(1, 13))
        assert len({tuple(values.values()) for values, _ in result.trials}) == 12
        assert all(score == found(values) for values, score in result.trials)
        assert [score for _, score in result.trials].index(max(s or 0.0 for _, s in result.trials)) == next(
            at for at, (values, _) in enumerate(result.trials) if values == result.best
        )

    def test_a_grid_that_is_tried_out_ends_it(self, tmp_path: Path) -> None:
        result = self.chosen(tmp_path, 40)
        assert len(result.trials) == 16
        assert result.best == {"a": 3.0, "b": False, "c": False}

    def test_a_search_that_is_killed_goes_on_as_if_it_had_not_been(self, tmp_path: Path) -> None:
        whole = self.chosen(tmp_path / "whole", 12)
        calls = 0

        def killed(values: Mapping[str, Value]) -> float | None:
            nonlocal calls
            calls += 1
            if calls % 3 == 0:
                raise KeyboardInterrupt
            return found(values)

        for _ in range(20):
            try:
                again = self.chosen(tmp_path / "parts", 12, killed)
                break
            except KeyboardInterrupt:
                with open(tmp_path / "parts" / "log", "ab") as journal:
                    journal.write(b'{"op_code":5,"wor')  # the half of a line
        assert again == whole
        assert calls > 12
        assert self.chosen(tmp_path / "parts", 12, score=None) == whole  # nothing is scored again
        assert self.chosen(tmp_path / "other", 12, seed=1) != whole

    def test_equal_scores_choose_the_first(self, tmp_path: Path) -> None:
        assert (result := self.chosen(tmp_path, 5, lambda _: 0.5)).best == result.given
        assert (result := self.chosen(tmp_path / "none", 2, lambda _: None)).best == result.given


Searched = tuple[RunConfig, Path, dict[str, Any]]
OVER = ("train.lr", "model.graph")


def again(config: RunConfig, out: Path, **more: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"trials": 2, "folds": 2, "inner": 2, "over": OVER, "progress": False}
    return run_search(config, out, **{**options, **more})


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Searched:
    place = tmp_path_factory.mktemp("search")
    cohort = Cohort(place / "bags", 24)
    cohort.write()
    values = as_dict(cohort_config(cohort.root))
    config = make_config({**values, "train": {**values["train"], "linear": "off"}})
    return config, place / "out", again(config, place / "out")


def bags(run: Path, *splits: str) -> set[str]:
    return {*SplitRecord.read(run / "splits.csv").names(*splits)}


def test_no_bag_is_measured_that_had_a_say(searched: Searched) -> None:
    config, out, _ = searched
    whole = {*load_data(config).whole.names}
    for number, fold in enumerate(load_folds(config.data.source, folds=2, seed=config.seed)):
        tested = {*fold.test.names}
        inner = sorted((out / f"fold-{number}" / "inner").glob("*/inner-*"))
        assert len(inner) == 4
        for run in inner:
            assert bags(run, "train", "val", "test") == whole - tested
        first = [run for run in inner if run.parent == inner[0].parent]
        assert bags(first[0], "test") | bags(first[1], "test") == whole - tested
        assert not bags(first[0], "test") & bags(first[1], "test")
        for run in (out / f"fold-{number}" / "outer").iterdir():
            assert bags(run, "test") == tested
    tested = {*load_data(config).test.names}
    assert tested
    for run in (out / "final" / "inner").glob("*/inner-*"):
        assert bags(run, "train", "val", "test") == whole - tested


def test_what_was_chosen_is_what_was_measured(searched: Searched) -> None:
    config, out, result = searched
    for entry in result["results"]:
        scores = [trial["score"] for trial in entry["trials"]]
        assert entry["trials"][0]["values"] == {"train.lr": config.train.lr, "model.graph": True}
        assert entry["chosen"] == entry["trials"][scores.index(max(scores))]["values"]
        for trial in entry["trials"]:
            lr, graph = trial["values"]["train.lr"], trial["values"]["model.graph"]
            runs = out / f"fold-{entry['fold']}" / "inner" / f"lr-{lr}_graph-{graph}"
            skills = []
            for run in sorted(runs.iterdir()):
                assert (load_config(run / "config.yaml").train.lr, load_config(run / "config.yaml").model["graph"]) == (
                    lr,
                    graph,
                )
                skills.append(json.loads((run / "metrics.json").read_text())["skill"]["mean"])
            assert trial["score"] == pytest.approx(sum(skills) / 2)
        for name, values in (("searched", entry["chosen"]), ("given", entry["trials"][0]["values"])):
            at = out / f"fold-{entry['fold']}" / "outer" / f"lr-{values['train.lr']}_graph-{values['model.graph']}"
            metrics = json.loads((at / "metrics.json").read_text())
            assert entry[name]["tasks"] == metrics["tasks"]
            assert load_config(at / "config.yaml").train.lr == values["train.lr"]
    assert result["searched"]["pooled"]["bags"] == result["given"]["pooled"]["bags"] == 24
    assert read_json(out / "search.json", "search") == result


def test_best_is_a_configuration_that_train_takes(searched: Searched, tmp_path: Path) -> None:
    config, out, result = searched
    best = load_config(out / "best.yaml")
    chosen = result["best"]["chosen"]
    assert (best.train.lr, best.model["graph"]) == (chosen["train.lr"], chosen["model.graph"])
    expected = replace(config.train, lr=best.train.lr)
    assert best.train == expected
    assert call("train", "--config", out / "best.yaml", "--seed", "7", "--out", tmp_path / "run", "-q") == 0
    assert bags(tmp_path / "run", "test") == {*load_data(config).test.names}  # which had no say, whatever the seed


def test_it_is_gone_on_with(searched: Searched, tmp_path: Path) -> None:
    config, out, result = searched
    place = tmp_path / "out"
    shutil.copytree(out, place)
    times = {path: path.stat().st_mtime_ns for path in place.glob("fold-0/**/metrics.json")}
    for gone in ("optuna.log", "best.yaml"):
        (place / gone).unlink()
    shutil.rmtree(place / "final")
    found = again(config, place)
    for key in ("results", "searched", "given"):
        assert found[key] == result[key]
    assert found["best"] == result["best"]
    assert times == {path: path.stat().st_mtime_ns for path in times}
    with pytest.raises(DataError, match="holds a search with trials 2; choose another --out"):
        again(config, place, trials=3)
    with pytest.raises(DataError, match="holds a search with another configuration"):
        again(replace(config, seed=3), place)


def test_a_training_that_diverges_is_no_choice(
    searched: Searched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from importlib import import_module

    module: Any = import_module("umda_fast.studies.search")
    run = module.finished_run

    def diverging(config: RunConfig, place: Path, *rest: Any) -> Any:
        if "inner" in place.parts and config.model["graph"] is True:
            raise NonFiniteError("loss")
        return run(config, place, *rest)

    monkeypatch.setattr(module, "finished_run", diverging)
    result = again(searched[0], tmp_path / "out", over=["model.graph"], progress=True)
    assert [trial["score"] is None for trial in result["best"]["trials"]] == [True, False]
    assert result["best"]["chosen"] == {"model.graph": False}
    said = capsys.readouterr().err
    assert "final: 1 of 2: graph-True: diverged" in said
    assert "final: 2 of 2: graph-False: skill 0." in said


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--over", "train.lr,train.lr"], "over: expected different keys among train.lr, "),
        (["--over", "train.warmup"], "got train.warmup"),
        (["--over", "model.hcva"], "train.weight_decay, model.graph (for umda with 1 view), got model.hcva"),
        (["--over", ","], "got none"),
        (["--set", "model.architecture=ple", "--over", "model.graph"], "(for ple with 1 view), got model.graph"),
        (["--inner", "30"], "inner: folds: expected 2 to "),
        (["--folds", "30"], "folds: expected 2 to 24, got 30"),
    ],
)
def test_wrong_options_are_one_line(
    searched: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    assert call("search", "--data", searched[0].data.source, *options, "--out", tmp_path / "out", "-q") == 2
    said = capsys.readouterr().err.splitlines()
    assert line in said[-1]
    assert not list((tmp_path / "out").glob("**/*.json"))


@pytest.mark.parametrize("name", ["trials", "folds", "inner"])
def test_numbers_out_of_range_are_named(searched: Searched, tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: expected at least 2, got 1$"):
        again(searched[0], tmp_path / "out", **{name: 1})
    assert not (tmp_path / "out").exists()


def test_patients_are_never_on_both_sides_and_test_bags_nowhere() -> None:
    groups = [f"patient {row // 2}" for row in range(60)]
    labels = {"y": [row // 2 % 2 for row in range(60)]}
    whole = BagDataset.from_arrays({"x": np.ones((60, 2))}, labels=labels, name="made").with_groups(groups)
    train, val, test = (whole.subset(np.arange(*part)) for part in ((0, 30), (30, 40), (40, 60)))
    patient = dict(zip(whole.names, groups, strict=True))
    folds = inner_folds(Splits("made", "", train, val, test, whole, groups=groups), make_config(), 4, 0)
    assert sorted(name for fold in folds for name in fold.test.names) == sorted([*train.names, *val.names])
    for fold in folds:
        parts = [{patient[name] for name in part.names} for part in fold.values()]
        assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]
        assert set.union(*parts) == {patient[name] for name in [*train.names, *val.names]}
        assert len(fold.val) == pytest.approx(30 / 4, abs=2)  # a quarter of what is not left out, as of the whole


@pytest.mark.parametrize(
    ("given", "choices"), [("auto", ("auto", False)), (True, (True, False)), (False, (False, True))]
)
def test_what_is_configured_is_the_first_choice(given: Value, choices: tuple[Value, ...]) -> None:
    config = make_config({"model": {"hcva": given, "dropout": 0.3}, "train": {"weight_decay": 0.05}})
    found = choices_of(config, None, 2)
    assert [*found] == [*CHOICES]
    assert found["model.hcva"] == choices
    assert found["model.dropout"] == (0.3, 0.0, 0.1, 0.25, 0.5)
    assert found["train.weight_decay"] == (0.05, 0.0, 0.01, 0.2)
    assert "model.hcva" not in choices_of(config, None, 1)


def test_bags_of_a_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="search: expected data of files, got bags drawn by a seed"):
        again(small_config(), tmp_path / "out")


def test_the_command(searched: Searched, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out, result = searched
    shutil.copytree(out, tmp_path / "out")
    dump_config(config, tmp_path / "config.yaml")
    small = ("--trials", 2, "--folds", 2, "--inner", 2, "--over", ",".join(OVER))
    assert call("search", "--config", tmp_path / "config.yaml", *small, "--out", tmp_path / "out") == 0
    said = capsys.readouterr().out
    chosen = result["best"]["chosen"]
    assert f"chosen on the training bags: train.lr={chosen['train.lr']}, model.graph={chosen['model.graph']}\n" in said
    assert "mean_score" in said
    assert str(tmp_path / "out" / "best.yaml") in said


def test_the_table(searched: Searched, capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print(search_table(searched[2]))
    said = capsys.readouterr().out
    assert "2 outer folds" in said
    (line,) = (line for line in said.splitlines() if "skill" in line)
    figures = [searched[2][name]["skill"]["mean"] for name in ("given", "searched")]
    assert [f"{value:.4f}" for value in figures] == [cell.strip()[:6] for cell in line.split("│")[3:5]]
