"""`umda-fast profile` and `train --profile` as a user calls them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from tests.command_line import call
from tests.written import read_json

SMALL = ["--device", "cpu", "--set", "data.options={train_bags: 40, val_bags: 16, test_bags: 16}"]
SMALL += ["--set", "model.width=16", "--set", "model.heads=2", "--set", "model.layers=1", "--set", "data.bags=8"]


def test_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call("profile", "--data", "digits", *SMALL, "--steps", 2, "--seed", 3, "--out", out) == 0
    shown = capsys.readouterr().out
    for word in ("encoders", "HCVA", "GMIP", "pooling", "ATSB", "SGL", "optimiser", "share of floor", "total", "GB/s"):
        assert word in shown
    assert str(out / "trace.json.gz") in shown
    result = read_json(out / "profile.json", "profile")
    assert result["steps"]["timed"] == 2
    assert {path.name for path in out.iterdir()} == {"profile.json", "trace.json.gz"}
    with gzip.open(out / "trace.json.gz", "rt") as stream:
        assert json.load(stream)["traceEvents"]
    named = [row["operation"] for row in result["operations"] if row["operation"].startswith("umda_fast::")]
    assert named == [] or "umda_fast::bag_pool" in named
    assert all(name in shown for name in named)


def test_train_with_a_profile(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert call("train", *SMALL, "--epochs", 2, "--quiet", "--profile", 1, "--out", run) == 0
    shown = capsys.readouterr().out
    assert "share of floor" in shown
    assert "mean_score" in shown
    assert read_json(run / "profile" / "profile.json", "profile")["steps"]["timed"] == 1
    assert call("profile", *SMALL, "--out", run) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert call("train", *SMALL, "--epochs", 1, "--quiet", "--profile", 9, "--out", tmp_path / "short") == 2
    assert "profile: expected a training of at least 21 updates" in capsys.readouterr().err


def test_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("profile", "--steps", 0) == 2
    assert "--steps" in capsys.readouterr().err
