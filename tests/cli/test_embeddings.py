"""Features of whole slides through the commands: alone, and beside patches."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from tests.cli.test_slides import NAMES, write
from tests.command_line import call
from tests.data.test_embeddings import write_whole


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Sixteen slides in two views, and vectors that tell the label of all but two of them."""
    root = write(tmp_path / "job", "trident")
    for index, name in enumerate(NAMES[:14]):
        vector = np.random.default_rng(index).normal(size=5).astype(np.float32) + 3 * (index % 2)
        folder = root / "20x_256px_0px_overlap"
        with h5py.File(folder / "features_uni_v1" / f"{name}.h5") as file:
            coords = file["coords"][()]
        write_whole(folder / "slide_features_titan", name, vector, coords)
    return root


@pytest.mark.parametrize("architecture", ["umda", "linear"])
def test_alone(job: Path, config: Path, tmp_path: Path, architecture: str) -> None:
    for folder in ("features_uni_v1", "features_conch_v15"):
        shutil.rmtree(job / "20x_256px_0px_overlap" / folder)
    run, table = tmp_path / "run", tmp_path / "p.csv"
    options = ["--set", "data.options.partial=true", "--set", f"model.architecture={architecture}"]
    own = ["--config", config] if architecture == "umda" else ["--epochs", 1, "--set", "device=cpu"]
    assert call("train", "--data", job, *own, "--out", run, *options, "-q") == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["data"]["views"]) == ["titan"]
    assert call("predict", run, "--out", table, "-q") == 0
    with open(table, newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["bag"] for row in rows] == NAMES[:14]
    if architecture == "linear":  # the label is a step of 3 in each of five features
        right = [row["label_predicted"] == ("tumour" if index % 2 else "normal") for index, row in enumerate(rows)]
        assert sum(right) >= 12


def test_beside_patches(job: Path, config: Path, tmp_path: Path) -> None:
    run, maps, out = tmp_path / "run", tmp_path / "a.h5", tmp_path / "maps"
    views = ["--set", "data.options.views=[uni_v1,conch_v15,titan]", "--set", "model.coords_k=2"]
    assert call("train", "--data", job, "--config", config, "--out", run, *views, "-q") == 0
    assert call("evaluate", run, "-q") == 0
    assert call("predict", run, "--out", tmp_path / "p.csv", "--attention", maps, "-q") == 0
    with h5py.File(maps) as file:
        both, patches = file["slide-05"], file["slide-15"]
        assert len(both["coords"]) == 6 + 5 % 4 + 1
        assert np.isnan(both["coords"][()]).all(axis=1).tolist() == [False] * 7 + [True]
        assert both["view_weights"][-1].tolist() == [0.0, 0.0, 1.0]
        assert not np.isnan(patches["coords"][()]).any()
    assert call("explain", run, "--bag", "slide-05", "--out", out, "--top", 100, "-q") == 0
    with open(out / "top_instances.csv", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["task"] == "label"]
    assert len(rows) == 8
    assert [row["instance"] for row in rows if row["x"] == ""] == ["7"]
    tiles = json.loads((out / "slide-05" / "slide-05.geojson").read_text())["features"]
    assert len(tiles) == 7
    assert call("report", run, "--split", "all", "-q") == 0
