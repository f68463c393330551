"""Directories as CLAM, TRIDENT and STAMP write them, through every command."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.command_line import call
from tests.slide_files import grid, write_clam, write_labels, write_stamp, write_trident

NAMES = [f"slide-{index:02d}" for index in range(16)]


def write(root: Path, tool: str) -> Path:
    """Slides of which every second holds shifted patches."""
    for index, name in enumerate(NAMES):
        rng = np.random.default_rng(index)
        coords = grid(rng, 6 + index % 4)
        features = rng.normal(size=(len(coords), 6)).astype(np.float32) + 2 * (index % 2)
        if tool == "clam":
            write_clam(root, name, features, coords)
        elif tool == "trident":
            folder = root / "20x_256px_0px_overlap"
            write_trident(folder / "features_uni_v1", name, features, coords, "uni_v1")
            write_trident(folder / "features_conch_v15", name, features[::-1][1:, :4], coords[::-1][1:], "conch_v15")
        else:
            write_stamp(root / "uni-0123abcd", name, features, coords / 2)
    if tool == "trident":
        write_trident(folder / "features_uni_v1", "empty", np.empty((0,), np.float32), np.empty((0, 2)), "uni_v1")
    columns = {
        "case_id": [f"patient-{index // 2}" for index in range(16)],
        "slide_id": NAMES,
        "label": ["tumour" if index % 2 else "normal" for index in range(16)],
        "age": ["" if index == 3 else 50.5 + index for index in range(16)],
    }
    write_labels(root / "labels.csv", columns)
    return root


@pytest.mark.parametrize("tool", ["clam", "trident", "stamp"])
def test_every_command(tool: str, tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / tool, tool)
    assert call("inspect", root, "--json", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["format"] == "slides"
    assert sum(report["bags"].values()) == 16 + (tool == "trident")
    assert report["coords"]
    run = tmp_path / "run"
    assert call("train", "--data", root, "--config", config, "--out", run, "--set", "data.workers=1", "-q") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["data"]["skipped"] == []
    assert set(metrics["tasks"]) == {"label", "age"}
    assert len(metrics["data"]["views"]) == (2 if tool == "trident" else 1)
    assert call("evaluate", run, "--json", tmp_path / "scores.json", "-q") == 0
    assert json.loads((tmp_path / "scores.json").read_text())["tasks"] == metrics["tasks"]
    (root / "labels.csv").unlink()  # not needed to predict
    table, maps = tmp_path / "predicted.csv", tmp_path / "attention.h5"
    assert call("predict", run, "--data", root, "--out", table, "--attention", maps, "-q") == 0
    rows = list(csv.DictReader(table.open()))
    assert [row["bag"] for row in rows] == sorted([*NAMES, *(["empty"] if tool == "trident" else [])])
    assert {row["label_predicted"] for row in rows if row["bag"] != "empty"} <= {"normal", "tumour"}
    with h5py.File(maps) as file:
        places = file["slide-05"]["coords"][()]
        expected = grid(np.random.default_rng(5), 7) / (2 if tool == "stamp" else 1)
        assert sorted(map(tuple, places.tolist())) == sorted(map(tuple, expected.tolist()))
        assert file["slide-05"]["attention"].shape == (7, 2)
        about = dict(file["slide-05"]["coords"].attrs)
        assert about.pop("unit") == ("um" if tool == "stamp" else "px")
        assert about == {"clam": {}, "trident": {"patch_size": 512}, "stamp": {"patch_size": 256}}[tool]
    capsys.readouterr()


def test_cross_validation_on_the_splits_of_clam(tmp_path: Path, config: Path) -> None:
    root = write(tmp_path / "clam", "clam")
    (root / "splits").mkdir()
    for fold in range(2):
        test = NAMES[fold * 8 : fold * 8 + 8]
        rest = [name for name in NAMES if name not in test]
        columns = {"": list(range(8)), "train": [*rest[:6], "", ""], "val": rest[6:] + [""] * 6, "test": test}
        write_labels(root / "splits" / f"splits_{fold}.csv", columns)
    out = tmp_path / "cv"
    assert call("crossval", "--data", root, "--config", config, "--out", out, "--folds", 2, "-q") == 0
    result = json.loads((out / "crossval.json").read_text())
    assert [entry["bags"] for entry in result["results"]] == [{"train": 6, "val": 2, "test": 8}] * 2
    assert call("crossval", "--data", root, "--config", config, "--out", tmp_path / "cv3", "--folds", 3) == 2


def test_pack(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, packed = write(tmp_path / "trident", "trident"), tmp_path / "packed"
    bad = next(root.rglob("features_uni_v1")) / "slide-07.h5"
    bad.write_bytes(bad.read_bytes()[:3000])
    assert call("pack", root, packed) == 2
    assert str(bad) in capsys.readouterr().err
    assert call("pack", root, packed, "--skip-bad") == 0
    shown = capsys.readouterr()
    assert f"skipped: {bad}" in shown.err
    assert "17 bags, " in shown.out
    run = tmp_path / "run"
    assert call("train", "--data", packed, "--config", config, "--out", run, "-q") == 0
    assert call("predict", run, "--data", packed, "--out", tmp_path / "predicted.csv", "-q") == 0
    assert call("pack", packed, tmp_path / "again") == 2
    assert call("pack", root, tmp_path / "again", "--set", "data.options.kinds={}") == 2
    capsys.readouterr()


def test_bad_files(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each command stops with exit code 2 and the file's name; with --skip-bad it goes on and lists the file."""
    root, run = write(tmp_path / "clam", "clam"), tmp_path / "run"
    assert call("train", "--data", root, "--config", config, "--out", run, "-q") == 0
    bad = root / "h5_files" / f"{NAMES[2]}.h5"
    with h5py.File(bad, "r+") as file:
        file["features"][1, 1] = np.nan
    commands: dict[str, list[object]] = {
        "inspect": [root],
        "train": ["--data", root, "--config", config, "--out", tmp_path / "again", "-q"],
        "crossval": ["--data", root, "--config", config, "--folds", 2, "--out", tmp_path / "cv", "-q"],
        "predict": [run, "--data", root, "--out", tmp_path / "predicted.csv", "-q"],
        "evaluate": [run, "--split", "train", "-q"],
    }
    capsys.readouterr()
    for command, arguments in commands.items():
        assert call(command, *arguments) == 2, command
        assert str(bad) in capsys.readouterr().err, command
    for command in ("inspect", "train", "predict"):
        arguments = [tmp_path / "skipping" if item == tmp_path / "again" else item for item in commands[command]]
        assert call(command, *arguments, "--skip-bad") == 0, command
        shown = capsys.readouterr()
        assert f"skipped: {bad}" in shown.out.replace("\n", "") + shown.err, command
    metrics = json.loads((tmp_path / "skipping" / "metrics.json").read_text())
    assert str(bad) in metrics["data"]["skipped"][0]
    assert sum(metrics["data"]["bags"].values()) == 15
    assert len((tmp_path / "predicted.csv").read_text().splitlines()) == 16


def test_no_labels(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "stamp", "stamp")
    (root / "labels.csv").rename(tmp_path / "elsewhere.csv")
    assert call("train", "--data", root, "--config", config, "--out", tmp_path / "run") == 2
    assert "expected labels of at least one task, got none" in capsys.readouterr().err
    assert call("inspect", root, "--json", tmp_path / "report.json") == 2
    (problem,) = json.loads((tmp_path / "report.json").read_text())["faults"]
    assert f"the first: {problem}" in " ".join(capsys.readouterr().out.split())
    assert call("inspect", root, "--set", f"data.options.labels={tmp_path / 'elsewhere.csv'}") == 0
    shown = capsys.readouterr().out
    assert "labels from elsewhere.csv" in shown
    assert "normal 8, tumour 8" in shown
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines()]
    assert ["case_id", "patient", "its name"] in rows
    assert ["age", "task (regression)", "its values are numbers"] in rows


def test_a_split_that_parts_patients(tmp_path: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "stamp", "stamp")
    columns = {
        "case_id": [f"patient-{index // 2}" for index in range(16)],
        "slide_id": NAMES,
        "label": ["tumour" if index % 2 else "normal" for index in range(16)],
        "split": ["train", "test"] * 8,
    }
    write_labels(root / "labels.csv", columns)
    said = "patient patient-0: expected in one split, got train and test (8 of 8 are in several)"
    assert call("inspect", root) == 2
    assert said in " ".join(capsys.readouterr().out.split())
    for command in ("train", "crossval"):
        expected = 0 if command == "crossval" else 2  # its folds keep patients together
        arguments = ["--data", root, "--config", config, "--out", tmp_path / command, "-q"]
        assert call(command, *arguments, *(["--folds", 2] if command == "crossval" else [])) == expected
        assert (said in capsys.readouterr().err) == (expected == 2)


def test_the_example(tmp_path: Path) -> None:
    script = Path(__file__).parents[2] / "examples" / "slides.py"
    command = [sys.executable, str(script), "--out", str(tmp_path), "--epochs", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "patches of 512 px" in done.stdout
    assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 25
