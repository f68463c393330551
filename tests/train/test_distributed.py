"""Runs of one, two and four processes: the same weights, one checkpoint for all, and an end when one is lost."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.processes import run_together
from tests.small import DATA, small_config
from tests.train.bags import INEXACT, TASKS, datasets
from umda_fast.data import BagBatch
from umda_fast.errors import DataError, ProcessLostError
from umda_fast.model import UMDA
from umda_fast.parity.rule import GRADIENT_FACTOR, allowed_error
from umda_fast.runtime.rundir import read_metrics
from umda_fast.runtime.together import label_counts, penalty_counts
from umda_fast.score import inference
from umda_fast.train import (
    NonFiniteError,
    RunConfig,
    cross_validate,
    load_run,
    run,
    step,
    train,
)
from umda_fast.train import evaluate as evaluate_run
from umda_fast.train.step import StepResult, TrainStep


def config(scope: str, **sgl: Any) -> RunConfig:
    return small_config(
        data={"budget": 24},
        model={"width": 16, "heads": 2, "layers": 1, "dropout": 0.0, "kappa_g": 1.0},
        train={"epochs": 2, "log_steps": 2, "checkpoint_steps": 3, "ema": 0.5, "linear": "mix"},
        penalties=INEXACT,
        sgl={"scope": scope, **sgl} if scope != "none" else {"balancer": "none"},
    )


CASES = {
    "shared_parameters": config("shared_parameters"),
    "last_shared_layer": config("last_shared_layer", every=2),
    "representation": config("representation"),
    "none": config("none"),
}
RUNS = {1: list(CASES), 2: list(CASES), 4: ["shared_parameters"]}  # by number of processes
EPOCH = 10  # batches


def in_float64() -> None:
    """Trains and evaluates in float64 in this process, where nothing hides behind rounding."""

    def wide(host: BagBatch, fabric: Any) -> BagBatch:
        host.views = {name: features.double() for name, features in host.views.items()}
        return host

    build = run.build_model
    run.build_model = lambda *args: build(*args).double()  # type: ignore[assignment]
    step.to_device = inference.to_device = wide  # type: ignore[assignment]


def runs(place: str, names: list[str], resume: bool, wide: bool = True) -> list[dict[str, Any]]:
    if wide:
        in_float64()
    results = []
    for name in names:
        result = train(CASES[name], Path(place) / name, resume=resume, datasets=datasets(), progress=False, plots=False)
        results.append(result.metrics)
    return results


def killed(place: str, name: str, last: int) -> str:
    """Process 1 kills itself before the step `last`; what the others say."""
    in_float64()
    original = TrainStep.__call__

    def train_step(self: TrainStep, host: BagBatch, progress: float, number: int) -> StepResult:
        if number == last and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, host, progress, number)

    TrainStep.__call__ = train_step  # type: ignore[method-assign]
    with pytest.raises(ProcessLostError) as caught:
        train(CASES[name], Path(place) / name, datasets=datasets(), progress=False, plots=False)
    return str(caught.value)


def dropout(place: str) -> dict[str, Tensor]:
    """In float32 with dropout: a run stopped and resumed; the weights, and those of a run never stopped."""
    weights = {}
    data = datasets()
    for name in ("straight", "resumed"):
        settings = small_config(
            data={"budget": 24}, model={"width": 16, "heads": 2, "layers": 1, "dropout": 0.3}, train={"epochs": 2}
        )
        out = Path(place) / name
        if name == "resumed":
            original = TrainStep.__call__

            def stop(self: TrainStep, host: BagBatch, progress: float, number: int, original: Any = original) -> Any:
                if number == EPOCH + 5:
                    raise KeyboardInterrupt
                return original(self, host, progress, number)

            TrainStep.__call__ = stop  # type: ignore[method-assign]
            with pytest.raises(KeyboardInterrupt):
                train(settings, out, datasets=data, progress=False, plots=False)
            TrainStep.__call__ = original  # type: ignore[method-assign]
        found = train(settings, out, resume=name == "resumed", datasets=data, progress=False, plots=False)
        weights[name] = found.model.state_dict()
    noise = torch.rand(1)
    assert all(torch.equal(value, weights["resumed"][name]) for name, value in weights["straight"].items())
    return {**weights["straight"], "noise": noise}


def errors(place: str) -> list[str]:
    """Mistakes that one process finds are errors of all, in time."""
    messages = []
    out = Path(place) / "errors"
    settings = config("representation")
    if dist.get_rank() == 0:
        out.mkdir()
        (out / "config.yaml").write_text("")
    with pytest.raises(DataError) as caught:
        train(settings, out, datasets=datasets(), progress=False)
    messages.append(str(caught.value))
    original = UMDA.forward

    def forward(self: UMDA, *args: Any, **options: Any) -> Any:
        found = original(self, *args, **options)
        if dist.get_rank() == 1:
            found.logits["y"] = found.logits["y"] * math.inf
        return found

    UMDA.forward = forward  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError) as stopped:
        train(settings, Path(place) / "infinite", datasets=datasets(), progress=False)
    messages.append(str(stopped.value))
    return messages


def folds(place: str) -> list[dict[str, Any]]:
    """A cross-validation of two folds, and the same once more: nothing is left to be done."""
    settings = small_config(data={"budget": 24}, train={"epochs": 1})
    reports = []
    for _ in range(2):
        parts = [datasets(), datasets()]
        reports.append(cross_validate(settings, place, folds=2, datasets=parts, progress=False))
    return reports


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def straight(place: Path) -> dict[int, dict[str, dict[str, Any]]]:
    """metrics.json of every case, by number of processes and name; all processes have the same."""
    found = {}
    for size, names in RUNS.items():
        results = run_together(runs, size, str(place / f"by {size}"), names, False)
        assert all(timeless(other) == timeless(results[0]) for other in results)
        found[size] = dict(zip(names, results[0], strict=True))
    return found


def timeless(value: Any) -> Any:
    times = ("time", "seconds", "instances_per_second", "peak_memory_mb", "processes", "backend")
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if key not in times}
    return value


def state_of(directory: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(directory / "checkpoint.pt", weights_only=True)
    return state


def assert_same_state(directory: Path, expected: Path) -> None:
    """Everything a float64 run is made of, to four float32 ulp of each tensor's largest value."""
    here, there = state_of(directory), state_of(expected)
    for part in ("model", "average", "best_weights"):
        assert_same(here[part], there[part], part)
    assert_same(here["optimizer"]["state"], there["optimizer"]["state"], "optimizer")
    if there["sgl"] is not None:
        assert_same(here["sgl"]["tensors"], there["sgl"]["tensors"], "sgl")
        assert_same(here["sgl"]["balancer"], there["sgl"]["balancer"], "balancer")
    for name in ("epoch", "step", "step_in_epoch", "instances", "best_epoch", "finished"):
        assert here[name] == there[name], name


def assert_same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, Tensor):
        allowed = allowed_error(expected, expected, torch.float32, GRADIENT_FACTOR)
        assert float((found.double() - expected.double()).abs().max()) <= allowed, where
    else:
        assert found == expected, where


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in (2, 4) for name in RUNS[size]])
def test_the_run_is_the_same_for_any_number_of_processes(
    name: str, size: int, place: Path, straight: dict[int, dict[str, dict[str, Any]]]
) -> None:
    assert_same_state(place / f"by {size}" / name, place / "by 1" / name)
    found, expected = (read_metrics(place / f"by {n}" / name / "metrics.jsonl") for n in (size, 1))
    assert len([record for record in expected if record["kind"] == "step"]) == EPOCH  # two epochs, every second step
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for part in ("losses", "train", "val", "lr", "gradient_norm"):
            assert (part in mine) == (part in theirs)
            if part in theirs:
                assert flat(mine[part]) == pytest.approx(flat(theirs[part]), rel=1e-6, nan_ok=True), part
        # The weighted means over processes of these two are not what one process makes of the whole batch.
        penalties = [dict(record.get("penalties", {}), **INEXACT) for record in (mine, theirs)]
        assert penalties[0] == pytest.approx(penalties[1], rel=1e-6)
    metrics, alone = straight[size][name], straight[1][name]
    assert metrics["processes"] == size
    assert flat(metrics["tasks"]) == pytest.approx(flat(alone["tasks"]), rel=1e-6, nan_ok=True)
    assert metrics["data"] == alone["data"]


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if not isinstance(value, dict):
        return {prefix: math.nan if value is None else value}
    return {key: number for name, item in value.items() for key, number in flat(item, f"{prefix}/{name}").items()}


def test_one_process_killed_and_the_run_resumed_with_another_number(
    place: Path, straight: dict[int, dict[str, dict[str, Any]]]
) -> None:
    for name in ("shared_parameters", "representation"):
        began = time.monotonic()
        message = run_together(killed, 2, str(place / "killed"), name, EPOCH + 5, lost=(1,))[0]
        assert time.monotonic() - began < 60
        assert message.startswith(f"step {EPOCH + 5}: process 0 of 2: another process of this group ended")
        # Every third step of an epoch.
        saved = state_of(place / "killed" / name)
        assert (saved["epoch"], saved["step"]) == (1, EPOCH + 5 - (EPOCH + 5) % 3)
        assert f"checkpoint.pt holds step {saved['step']}; continue with --resume" in message
        for record in read_metrics(place / "killed" / name / "metrics.jsonl"):
            assert record["step"] <= EPOCH + 5
    subprocess.run(["cp", "-r", str(place / "killed"), str(place / "more")], check=True)
    run_together(runs, 1, str(place / "killed"), ["shared_parameters", "representation"], True)
    run_together(runs, 4, str(place / "more"), ["shared_parameters"], True)
    for resumed, name in (("killed", "shared_parameters"), ("killed", "representation"), ("more", "shared_parameters")):
        assert_same_state(place / resumed / name, place / "by 1" / name)


def test_processes_draw_their_own_dropout_and_resume_bit_for_bit(tmp_path: Path) -> None:
    first, second = run_together(dropout, 2, str(tmp_path))
    assert first.keys() == second.keys()
    noise = first.pop("noise"), second.pop("noise")
    assert not torch.equal(*noise)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_a_cross_validation_by_two_processes(tmp_path: Path) -> None:
    first, second = run_together(folds, 2, str(tmp_path / "out"))
    assert first == second  # also when it was written
    assert timeless(first[0]) == timeless(first[1])
    assert first[1] == json.loads((tmp_path / "out" / "crossval.json").read_text())
    assert [result["fold"] for result in first[0]["results"]] == [0, 1]
    for fold in (0, 1):
        metrics = json.loads((tmp_path / "out" / f"repeat-0-fold-{fold}" / "metrics.json").read_text())
        assert metrics["processes"] == 2


def test_what_one_process_finds_stops_all(tmp_path: Path) -> None:
    first, second = run_together(errors, 2, str(tmp_path))
    assert "already holds a run" in first[0]
    assert second[0] == first[0]
    assert "logits of task 'y'" in second[1]
    assert "what is not finite came from another process" in first[1]


def test_what_shares_are_of() -> None:
    data = datasets()["train"]
    batch = data.collate([data[index] for index in (1, 3, 4, 5)])  # bags of 0, 7, 12 and 1 instances
    y, k = (batch.label_mask[name] for name in ("y", "k"))
    counts = label_counts(batch, TASKS)
    assert counts == {
        "y": float((1 + 2 * batch.labels["y"][y]).sum()), "k": float(k.sum()), "rare": 1.0
    }  # fmt: skip
    both = float(batch.mask.all(1).sum())
    names = dict.fromkeys(("entropy", "consistency", "smoothness", "diversity", "divergence", "cohesion", "other"), 1.0)
    assert penalty_counts(batch, names) == {
        "entropy": 2 * both, "consistency": 2 * both, "smoothness": 19.0, "diversity": 2.0, "divergence": 1.0,
        "cohesion": 3.0, "other": 20.0,
    }  # fmt: skip


def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    options = [f"data.options.{name}={count}" for name, count in DATA.items()]
    options += ["data.budget=96", "model.width=16", "model.heads=2", "model.layers=1"]
    arguments = [item for option in options for item in ("--set", option)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = subprocess.run(
        [*torchrun, "-m", "umda_fast.cli", "train", "--device", "cpu", "--epochs", "1", "--quiet", *arguments],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("mean_score") == 1
    (directory,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((directory / "metrics.json").read_text())
    assert metrics["processes"] == 2
    # What two processes measured, one measures.
    found = evaluate_run(load_run(directory), split="test", device="cpu", progress=False)
    assert flat(found.tasks) == pytest.approx(flat(metrics["tasks"]), rel=1e-5, nan_ok=True)
    refused = subprocess.run(
        [sys.executable, "-m", "umda_fast.cli", "predict", str(directory), "--data", "digits", "--out", "p.csv"],
        cwd=tmp_path,
        env={**os.environ, "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2
    assert refused.stderr == (
        "umda-fast: predict: runs in one process, got 2 of torchrun; several are for train, evaluate, crossval\n"
    )
