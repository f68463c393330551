"""Who computes: `--backend`, `UMDA_FAST_BACKEND` and what `metrics.json` says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import call
from umda_fast.cli.app import COMMANDS
from umda_fast.ops import _dispatch, backends_used, get_backend, set_backend
from umda_fast.train import make_config, train

SMALL = {
    "device": "cpu",
    "backend": "cpp",
    "data": {"options": {"train_bags": 12, "val_bags": 6, "test_bags": 6}},
    "model": {"width": 16, "heads": 2, "layers": 1},
    "train": {"epochs": 1},
}
TRAIN = [
    "--device", "cpu", "--epochs", "1", "--quiet", "--set", "model.width=16", "--set", "model.heads=2", "--set",
    "train.keep=scores", "--set", "data.options={train_bags: 12, val_bags: 6, test_bags: 6}",
]  # fmt: skip


def served(directory: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((directory / "metrics.json").read_text())["backend"]
    return found


@pytest.fixture(scope="module")
def cpp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("backends") / "cpp"
    _dispatch._used.clear()  # of other tests
    train(make_config(SMALL), directory, progress=False, plots=False)
    return directory


def test_cpp_serves_all_of_a_training(cpp: Path, tmp_path: Path) -> None:
    """A strict run too: nothing is left to library calls but products and layer norms that no operation takes along."""
    assert set(served(cpp).values()) == {"cpp"}
    strict = ["--backend", "cpp", "--set", "strict_backend=true", "--out", tmp_path / "run"]
    assert call("train", *TRAIN, *strict) == 0
    assert set(served(tmp_path / "run").values()) == {"cpp"}


def test_the_process_default_is_used_by_every_command(cpp: Path, tmp_path: Path) -> None:
    """It starts as UMDA_FAST_BACKEND. `--backend` comes before it, also where that is `auto`."""
    data = ["--data", "digits", "--quiet"]
    commands = {
        "train": [*TRAIN, "--out", tmp_path / "run"],
        "evaluate": [cpp, "--quiet"],
        "predict": [cpp, *data, "--split", "test", "--out", tmp_path / "p.csv"],
        "explain": [cpp, "--split", "test", "--no-heatmaps", "--quiet", "--out", tmp_path / "maps"],
    }
    try:
        for name, arguments in commands.items():
            _dispatch._used.clear()
            set_backend("reference")
            assert call(name, *arguments) == 0, name
            assert set(backends_used().values()) == {"reference"}, name
            assert get_backend() == "reference"
        assert call("evaluate", cpp, "--quiet", "--backend", "auto") == 0
        assert backends_used()["bag_pool"] == "cpp"
        set_backend("cuda")
        assert call("evaluate", cpp, "--quiet", "--device", "cpu") == 2
        assert call("evaluate", cpp, "--quiet", "--backend", "cpp") == 0
    finally:
        set_backend("auto")


ARGUMENTS = {
    "report": ["run"],
    "evaluate": ["run"],
    "predict": ["run", "--data", "digits", "--out", "p.csv"],
    "explain": ["run", "--out", "maps"],
    "adapt": ["run", "--data", "digits", "--out", "new"],
}


@pytest.mark.parametrize("command", ["train", "info"])
def test_a_wrong_variable_is_one_line(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "umda_fast.cli", command, *ARGUMENTS.get(command, [])],
        env={**os.environ, "UMDA_FAST_BACKEND": "fast"}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    expected = "umda-fast: UMDA_FAST_BACKEND must be one of auto, reference, cpp, triton, cuda, got 'fast'\n"
    assert done.stderr == expected


@pytest.mark.parametrize("command", ["train", "evaluate", "predict", "explain", "report", "adapt", "crossval"])
def test_a_wrong_option_is_one_line(
    command: str, cpp: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command in COMMANDS
    places = {"run": cpp, "p.csv": tmp_path / "p.csv", "maps": tmp_path / "maps", "new": tmp_path / "new"}
    arguments = [places.get(argument, argument) for argument in ARGUMENTS.get(command, [])]
    assert call(command, *arguments, "--backend", "fast") == 2
    *_, line = capsys.readouterr().err.splitlines()  # adapt first says what it knows of its bags
    assert line.startswith("umda-fast: ")
    assert "auto" in line
    assert "fast" in line
