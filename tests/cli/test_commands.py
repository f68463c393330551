"""The commands as a user calls them: in this process, through `main`; exit code, output and files."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import yaml

from tests.command_line import call
from tests.written import read_json
from umda_fast.cli import main
from umda_fast.cli.app import COMMANDS
from umda_fast.errors import DataError
from umda_fast.runtime.rundir import read_metrics

SMALL = {
    "device": "cpu",
    "data": {"options": {"train_bags": 40, "val_bags": 16, "test_bags": 16}, "budget": 128},
    "model": {"width": 16, "heads": 2, "layers": 1},
    "train": {"epochs": 2, "log_steps": 2},
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "first"
    assert call("train", "--config", config, "--out", directory, "--quiet") == 0
    return directory


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """An .npz with two views, a task with text labels and a hole, positions."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(2, 6, 30)
    ptr = np.concatenate([[0], sizes.cumsum()])
    grade = np.array(["low", "high", "middle"] * 10)
    grade[4] = ""
    path = tmp_path / "slides.npz"
    np.savez(
        path,
        X_stain=rng.normal(size=(ptr[-1], 6)).astype(np.float32),
        X_texture=rng.normal(size=(ptr[-1], 4)).astype(np.float32),
        ptr=ptr,
        y_grade=grade,
        y_age=rng.normal(50, 10, 30),
        coords=rng.normal(size=(ptr[-1], 2)),
        names=np.array([f"case/{index}" for index in range(30)]),
    )
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(command, "--help") == 0
    assert f"umda-fast {command}" in capsys.readouterr().out.split("Example:")[1]


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys\nfrom umda_fast.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'heavy imports'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_run_directory_holds_what_it_should(run: Path) -> None:
    files = {path.name for path in run.iterdir()}
    assert {
        "config.yaml",
        "splits.csv",
        "metrics.jsonl",
        "metrics.json",
        "model.safetensors",
        "config.json",
        "mixture.json",  # after so short a training the linear model knows more
        "linear.safetensors",
        "calibration.json",
        "checkpoint.pt",
        "plots",
        "tensorboard",
    } == files
    plots = {path.stem for path in (run / "plots").iterdir()}
    expected = {"losses", "metrics", "task_weights", "task_gradient_cosines", "view_mass", "influence"}
    assert plots == expected
    assert any(path.name.startswith("events.out.tfevents") for path in (run / "tensorboard").iterdir())

    written = yaml.safe_load((run / "config.yaml").read_text())
    assert written["model"]["width"] == 16
    assert written["train"]["clip"] == 1.0  # a default
    records = read_metrics(run / "metrics.jsonl")
    assert {record["kind"] for record in records} == {"inputs", "step", "epoch"}

    metrics = read_json(run / "metrics.json", "metrics")
    keys = "seed data tasks mean_score skill view_consistency gradient_variance conflict_share outlier_tasks seconds"
    keys += " instances_per_second peak_memory_mb processes versions backend linear schema commit machine time kept"
    assert set(metrics) == set(keys.split())
    assert set(metrics["tasks"]) == {"has_nine", "largest", "present", "mean"}
    of_two = "auroc accuracy balanced_accuracy f1 auprc sensitivity_90 cohen_kappa"
    assert set(metrics["tasks"]["has_nine"]) == set(of_two.split())
    assert set(metrics["tasks"]["present"]) == {"f1_macro", "f1_micro", "map"}
    assert set(metrics["tasks"]["mean"]) == {"mae", "r2"}
    assert metrics["data"]["bags"] == {"train": 40, "val": 16, "test": 16}
    assert metrics["backend"]["bag_pool"] in ("reference", "cpp")
    assert metrics["gradient_variance"] > 0
    assert 0 <= metrics["conflict_share"] <= 1
    assert metrics["peak_memory_mb"] > 10


def test_evaluate_repeats_the_run_s_own_figures(run: Path, tmp_path: Path) -> None:
    assert call("evaluate", run, "--json", tmp_path / "scores.json", "--quiet") == 0
    scores = read_json(tmp_path / "scores.json", "evaluate")
    metrics = json.loads((run / "metrics.json").read_text())
    assert scores["tasks"] == metrics["tasks"]
    assert scores["mean_score"] == metrics["mean_score"]
    for task, found in scores["intervals"].items():
        assert found["low"] <= scores["tasks"][task][found["metric"]] <= found["high"]
        others = found["others"]
        assert {found["metric"], *others} == set(scores["tasks"][task])
        assert all(ends["low"] <= scores["tasks"][task][name] <= ends["high"] for name, ends in others.items())
        assert (found["unit"], found["units"], found["level"]) == ("bags", 16, 0.95)


def test_train_predict_and_attention_on_a_file(slides: Path, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    own = ["--set=data.options={val_share: 0.2}", "--set=data.budget=64", "--epochs", 1, "--quiet"]
    assert call("train", "--data", slides, "--config", config, *own, "--out", run) == 0
    out, attention = tmp_path / "predictions.csv", tmp_path / "attention.h5"
    assert call("predict", run, "--data", slides, "--out", out, "--attention", attention, "--quiet") == 0
    with open(out, newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["bag"] for line in lines] == [f"case/{index}" for index in range(30)]
    for line in lines:
        probabilities = {name: float(line[f"grade_probability_{name}"]) for name in ("high", "low", "middle")}
        assert sum(probabilities.values()) == pytest.approx(1.0, abs=1e-4)
        assert line["grade_predicted"] == max(probabilities, key=lambda name: probabilities[name])
        assert 0 < float(line["age"]) < 100  # in the label's units
    with h5py.File(attention) as store:
        assert list(store.attrs["tasks"]) == ["grade", "age"]
        assert len(store) == 30
        group = store["case%2F3"]
        assert group.attrs["name"] == "case/3"
        n = len(group["coords"])
        assert group["attention"].shape == (n, 2)
        np.testing.assert_allclose(group["attention"][:].sum(axis=0), 1.0, rtol=1e-5)
        assert group["view_weights"].shape == (n, 2)
        np.testing.assert_allclose(group["view_weights"][:].sum(axis=1), 1.0, rtol=1e-5)


def test_crossval_keeps_finished_folds(slides: Path, config: Path, tmp_path: Path) -> None:
    own = ["--data", slides, "--config", config, "--folds", 2, "--repeats", 2, "--epochs", 1]
    own += ["--set=data.options={}", "--out", tmp_path / "cv", "--quiet"]
    assert call("crossval", *own) == 0
    report = read_json(tmp_path / "cv" / "crossval.json", "crossval")
    assert [(entry["repeat"], entry["fold"]) for entry in report["results"]] == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
    ]
    assert sum(entry["bags"]["test"] for entry in report["results"][:2]) == 30
    scores = [entry["tasks"]["grade"]["accuracy"] for entry in report["results"]]
    assert report["tasks"]["grade"]["accuracy"]["mean"] == pytest.approx(np.mean(scores))
    assert report["tasks"]["grade"]["accuracy"]["std"] == pytest.approx(np.std(scores, ddof=1))

    kept = tmp_path / "cv" / "repeat-0-fold-1" / "model.safetensors"
    before = kept.stat().st_mtime_ns
    (tmp_path / "cv" / "repeat-1-fold-1" / "metrics.json").unlink()  # as if stopped before it was written
    assert call("crossval", *own) == 0
    assert kept.stat().st_mtime_ns == before
    again = json.loads((tmp_path / "cv" / "crossval.json").read_text())
    assert again["tasks"] == report["tasks"]
    assert call("crossval", *own, "--seed", 5) == 2


def test_inspect(slides: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("inspect", slides, "--json", tmp_path / "report.json") == 0
    shown = capsys.readouterr().out
    for word in ("stain", "texture", "grade", "multiclass", "age", "regression", "coordinates"):
        assert word in shown
    report = read_json(tmp_path / "report.json", "inspect")
    assert sum(report["bags"].values()) == 30


def test_info(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("info", "--json", tmp_path / "info.json") == 0
    assert "backend reference" in capsys.readouterr().out
    report = read_json(tmp_path / "info.json", "info")
    assert report["backends"]["reference"] is None
    assert report["versions"]["torch"]


FEW = ("--epochs", "1", "--quiet", "--set", "data.options={train_bags: 9, val_bags: 9, test_bags: 9}")
MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown key": (["train", "--set", "model.layer=3", "--out", "OUT"], "did you mean 'model.layers'"),
    "wrong value": (["train", "--set", "train.epochs=many", "--out", "OUT"], "train.epochs"),
    "unknown balancer": (["train", "--set", "sgl.balancer=sgll", "--out", "OUT"], "did you mean 'sgl'"),
    "balancer option": (["train", "--set", "sgl.options={clip: 0.1}", "--out", "OUT"], "clip"),
    "data option": (["train", "--set", "data.options={bags: 3}", "--out", "OUT"], "train_bags"),
    "no such data": (["train", "--data", "TMP/nothing", "--out", "OUT"], "no such file or directory"),
    "broken data": (["inspect", "TMP/text.npz"], "text.npz"),
    "unknown format": (["inspect", "TMP/text.npz", "--format", "hdf"], "format"),
    "no run": (["evaluate", "TMP/nothing"], "no such run directory"),
    "not a run": (["evaluate", "TMP"], "config.yaml is missing"),
    "no run to resume": (["train", "--resume", "--out", "OUT"], "no run to resume"),
    "resume without out": (["train", "--resume"], "--out DIR"),
    "resume with another seed": (
        ["train", "--resume", "--out", "OUT", "--seed", "3"],
        "keeps its configuration",
    ),
    "bad device": (["train", "--device", "tpu", "--out", "OUT"], "device"),
    "unknown option": (["train", "--frobnicate"], "--frobnicate"),
    "unknown command": (["frobnicate"], "frobnicate"),
    "no predictions without --out": (["predict", "OUT", "--data", "digits"], "--out"),
    "backend": (["train", "--backend", "cuda", "--device", "cpu", *FEW, "--out", "OUT"], "cuda"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gets_clear_words_and_exit_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    arguments, words = MISTAKES[name]
    places = {"TMP": str(tmp_path), "OUT": str(tmp_path / "out")}
    filled = [argument.replace("TMP", places["TMP"]).replace("OUT", places["OUT"]) for argument in arguments]
    assert call(*filled) == 2
    shown = capsys.readouterr().err
    assert words in shown
    assert "Traceback" not in shown


def test_a_run_is_not_overwritten(run: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--config", config, "--out", run, "--quiet") == 2
    assert "already holds a run" in capsys.readouterr().err


def test_data_that_does_not_fit_the_model(
    run: Path, slides: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("evaluate", run, "--data", slides, "--quiet") == 2
    assert "expected views pixels" in capsys.readouterr().err
    assert call("evaluate", run, "--split", "tset", "--quiet") == 2
    assert "'tset'" in capsys.readouterr().err


def test_debug_shows_the_traceback_wherever_it_stands(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        main(["--debug", "evaluate", str(tmp_path)])
    with pytest.raises(DataError):
        main(["evaluate", str(tmp_path), "--debug"])


def test_a_missing_extra_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)  # what an import of a package that is not there meets
    own = ["--data", "digits", "--out", tmp_path / "p.csv", "--attention", tmp_path / "a.h5", "--quiet"]
    assert call("predict", run, *own) == 4
    assert "pip install 'umda_fast[io]'" in capsys.readouterr().err
    assert not (tmp_path / "p.csv").exists()
