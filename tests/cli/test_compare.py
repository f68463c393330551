"""`umda-fast compare` as a user calls it."""

from pathlib import Path

import pytest

from tests.command_line import call
from tests.written import read_json

SMALL = "{train_bags: 20, val_bags: 12, test_bags: 12}"


def test_compare_prints_and_leaves_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--set", f"data.options={SMALL}", "--set", "train.keep=scores", "--epochs", 1, "--device", "cpu", "-q"]
    models = "mean_pooling, late_fusion"
    assert call("compare", "--models", models, "--seeds", 1, "--out", tmp_path / "c", *small) == 0
    shown = capsys.readouterr().out
    for text in ("mean_pooling", "late_fusion", "has_nine (auroc)", "parameters"):
        assert text in shown
    report = read_json(tmp_path / "c" / "compare.json", "compare")
    assert f"{report['models']['late_fusion']['mean_score']['mean']:.4f}" in shown
    assert (tmp_path / "c" / "compare.md").read_text().count("\n") == 4


def test_an_unknown_model_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("compare", "--models", "umda,resnet", "--out", tmp_path / "c") == 2
    assert "models: expected different names among umda, mean_pooling" in capsys.readouterr().err
