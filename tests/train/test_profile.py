"""Profiles of real steps: nothing of a training changes, and what is profiled is the step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.small import small_config, small_data
from tests.written import read_json
from umda_fast.errors import DataError
from umda_fast.profiling import RESULT, TRACE
from umda_fast.runtime.config import RunConfig
from umda_fast.runtime.rundir import read_metrics
from umda_fast.train import ConfigError, profile_steps, train

DATA = small_data()
TIMES = {"seconds", "instances_per_second"}
STEP = {"data", "encoders", "HCVA", "fusion", "GMIP", "pooling", "ATSB", "heads", "penalties", "losses", "optimiser"}


def config(scope: str = "shared_parameters", **sections: Any) -> RunConfig:
    return small_config(**{"sgl": {"scope": scope}, "data": {"bags": 8}, **sections})


def figures(run: Path) -> list[str]:
    """The log without what a clock says, as text: NaN equals itself there."""
    records = read_metrics(run / "metrics.jsonl")
    return [str({key: value for key, value in one.items() if key not in TIMES}) for one in records]


def blocks(run: Path) -> set[str]:
    return {row["block"] for row in read_json(run / RESULT, "profile")["blocks"]}


@pytest.mark.parametrize("scope", ["shared_parameters", "representation"])
def test_a_profiled_training_is_the_same_bit_for_bit(scope: str, tmp_path: Path) -> None:
    """Validation lies between its steps, and one is checkpointed."""
    plain, looked_at = tmp_path / "plain", tmp_path / "profiled"
    settings = config(scope)
    train(settings, plain, datasets=DATA, progress=False, plots=False)
    result = train(settings, looked_at, datasets=DATA, progress=False, plots=False, profile=2)
    first, second = (load_file(run / "model.safetensors") for run in (plain, looked_at))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    checkpoints = [torch.load(run / "checkpoint.pt", weights_only=False) for run in (plain, looked_at)]
    random = [checkpoint["random"] for checkpoint in checkpoints]
    assert str(random[0]) == str(random[1])
    assert figures(plain) == figures(looked_at)
    folder = looked_at / "profile"
    assert {path.name for path in folder.iterdir()} == {RESULT, TRACE}
    assert blocks(folder) >= STEP | {"SGL"}
    assert result.profile is not None
    assert result.profile["steps"] == {"warmup": 3, "timed": 2, "counted": 2}
    assert not (plain / "profile").exists()


def test_without_a_balancer_gradients_are_no_sgl(tmp_path: Path) -> None:
    profile_steps(config(sgl={"balancer": "none"}), tmp_path / "out", steps=1, datasets=DATA)
    found = blocks(tmp_path / "out")
    assert "gradients" in found
    assert "SGL" not in found


def test_a_training_that_is_too_short_is_refused_before_it_begins(tmp_path: Path) -> None:
    settings = config(train={"epochs": None, "steps": 6})
    with pytest.raises(DataError, match=r"at least 7 updates \(3 warmup, 2 timed, 2 counted\), got 6"):
        train(settings, tmp_path / "run", datasets=DATA, progress=False, profile=2)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    train(settings, tmp_path / "run", datasets=DATA, progress=False, plots=False, profile=1)
    more = config(train={"epochs": None, "steps": 10})
    with pytest.raises(DataError, match=r"at least 5 updates .*, got 4"):
        train(more, tmp_path / "run", datasets=DATA, progress=False, resume=True, profile=1)


def test_a_training_that_stops_early_keeps_its_weights(tmp_path: Path) -> None:
    settings = config(train={"epochs": 200, "patience": 1, "lr": 1e-12})
    with pytest.warns(UserWarning, match="profile: none, for the training ended [0-9]+ steps too early"):
        result = train(settings, tmp_path / "run", datasets=DATA, progress=False, plots=False, profile=50)
    assert result.profile is None
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_a_model_without_steps(tmp_path: Path) -> None:
    settings = small_config(model={"architecture": "linear"})
    with pytest.raises(DataError, match="got 0"):
        train(settings, tmp_path / "run", datasets=DATA, progress=False, profile=1)
    with pytest.raises(ConfigError, match="linear is fitted at once"):
        profile_steps(settings, tmp_path / "out", datasets=DATA)
    with pytest.raises(ConfigError, match="steps: expected at least 1, got 0"):
        profile_steps(config(), tmp_path / "out", steps=0, datasets=DATA)


def test_what_is_computed_again_in_the_backward_pass_counts_there(tmp_path: Path) -> None:
    """With `chunk` the encoders run twice."""

    def passes(chunk: int) -> dict[str, float]:
        model = {"width": 16, "heads": 2, "layers": 1, "chunk": chunk}
        table = profile_steps(config(model=model), tmp_path / str(chunk), steps=1, datasets=DATA)
        return {row["pass"]: row["calls"] for row in table["blocks"] if row["block"] == "encoders"}

    whole, chunked = passes(0), passes(8)
    assert chunked["backward"] > chunked["forward"] > whole["forward"]
