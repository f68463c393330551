"""A run killed with SIGKILL in mid-epoch and resumed equals one that was never killed, bit for bit."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small import small_config
from tests.train.killed import RESUMED_RUN
from umda_fast.errors import DataError
from umda_fast.model import Mixture
from umda_fast.runtime.rundir import MetricsLog, read_metrics
from umda_fast.train import ConfigError, load_run, train

TIMES = {"seconds", "instances_per_second", "peak_memory_mb", "time"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMES}
    return value


def test_killed_and_resumed_is_bit_identical(tmp_path: Path) -> None:
    config = small_config(**RESUMED_RUN)
    straight = train(config, tmp_path / "straight", progress=False, plots=False)

    killed = tmp_path / "killed"
    steps = [
        record for record in read_metrics(tmp_path / "straight" / "metrics.jsonl") if record["kind"] == "step"
    ]
    per_epoch = sum(record["epoch"] == 0 for record in steps)
    assert per_epoch > 6
    # In the second epoch, two steps after a checkpoint, which those two steps are then missing from.
    step = next(step for step in range(per_epoch + 4, 2 * per_epoch) if step % 3 == 2)
    process = subprocess.run(
        [sys.executable, "-m", "tests.train.killed", str(killed), str(step)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert not (killed / "metrics.json").exists()
    state = torch.load(killed / "checkpoint.pt", weights_only=True)
    assert (state["epoch"], state["step_in_epoch"] > 0) == (1, True)
    assert state["step"] == step - 2

    resumed = train(config, killed, resume=True, progress=False, plots=False)

    expected = torch.load(tmp_path / "straight" / "checkpoint.pt", weights_only=True)
    found = torch.load(killed / "checkpoint.pt", weights_only=True)
    for part in ("model", "average", "best_weights"):
        assert expected[part].keys() == found[part].keys()
        for name in expected[part]:
            assert torch.equal(expected[part][name], found[part][name]), f"{part}: {name}"
    assert isinstance(straight.model, Mixture)
    for name in ("model.safetensors", "linear.safetensors", "mixture.json"):
        assert (killed / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert torch.equal(expected["random"][0]["torch"], found["random"][0]["torch"])

    def log(directory: Path) -> list[Any]:
        return [_timeless(record) for record in read_metrics(directory / "metrics.jsonl")]

    assert log(killed) == log(tmp_path / "straight")
    assert _timeless(resumed.metrics) == _timeless(straight.metrics)


def test_a_finished_run_stays_as_it_is_and_goes_on_with_more_epochs(tmp_path: Path) -> None:
    config = small_config(train={"epochs": 1, "linear": "mix"})
    first = train(config, tmp_path / "run", progress=False, plots=False)
    again = train(config, tmp_path / "run", resume=True, progress=False, plots=False)
    assert again.metrics["tasks"] == first.metrics["tasks"]
    assert again.metrics["linear"] == first.metrics["linear"]
    assert isinstance(load_run(tmp_path / "run").model, Mixture)
    longer = small_config(train={"epochs": 2, "linear": "mix"})
    train(longer, tmp_path / "run", resume=True, progress=False, plots=False)
    epochs = [r["epoch"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "epoch"]
    assert epochs == [0, 1]


def test_what_cannot_be_resumed_is_said(tmp_path: Path) -> None:
    config = small_config(train={"epochs": 1})
    with pytest.raises(DataError, match="holds no run to resume"):
        train(config, tmp_path / "none", resume=True, progress=False)
    train(config, tmp_path / "run", progress=False, plots=False)
    with pytest.raises(DataError, match="already holds a run"):
        train(config, tmp_path / "run", progress=False)
    with pytest.raises(ConfigError, match=r"train\.lr.*0\.5"):
        train(small_config(train={"epochs": 1, "lr": 0.5}), tmp_path / "run", resume=True, progress=False)
    (tmp_path / "run" / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(DataError, match=r"checkpoint\.pt: not a checkpoint"):
        train(config, tmp_path / "run", resume=True, progress=False)


def test_the_log_is_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write({"kind": "step", "step": 0})
    offset = log.sync()
    log.write({"kind": "step", "step": 1})
    log.close()
    with open(path, "ab") as stream:
        stream.write(b'{"kind": "st')  # a kill in the middle of a line
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    log = MetricsLog(path, offset=offset)
    log.write({"kind": "step", "step": 1})
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [0, 1]
    with pytest.raises(DataError, match="was it edited"):
        MetricsLog(path, offset=10_000)
