"""metrics.json without a training: from a log, a result and a state that are made up."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.small import small_config, small_data
from umda_fast.files import write_json
from umda_fast.runtime.rundir import RunDirectory
from umda_fast.score.evaluation import SplitResult
from umda_fast.sgl import SelfGuided
from umda_fast.tasks import kind_of
from umda_fast.train.checkpoint import TrainingState
from umda_fast.train.summary import outliers, summary, versions

DATA = small_data()
TASKS = DATA["train"].tasks
RESULT = SplitResult(
    tasks={task.name: {kind_of(task).primary: 0.75, "other": float("nan")} for task in TASKS},
    mean_score=0.75,
    losses={task.name: 9.0 for task in TASKS},
    calibrated_losses={task.name: 0.1 for task in TASKS},
    bags=16,
    instances=100,
    view_consistency=0.5,
    view_mass=None,
    influence=None,
)
LINEAR = {"mean_score": 0.25}
KEPT = {"select": "skill", "epoch": 2, "split": "val", "score": 0.5}


def made(run: RunDirectory, guided: SelfGuided | None = None) -> dict[str, Any]:
    state = TrainingState(instances=300, train_seconds=2.0, total_seconds=3.0)
    more: dict[str, Any] = {"scaling": ["view a: as it is"], "guided": guided, "linear": LINEAR, "kept": KEPT}
    found = summary(
        small_config(seed=5), DATA, "test", RESULT, run, state, **more, processes=2, peak_memory=123.0
    )
    write_json(run.metrics, found)
    content: dict[str, Any] = json.loads(run.metrics.read_text())
    return content


def test_figures_of_the_steps_are_averaged_over_the_log(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    records = [
        {"kind": "step", "sgl": {"gradient_variance": None, "conflict_share": 0.5}},
        {"kind": "step", "sgl": {"gradient_variance": 2.0, "conflict_share": 0.25}},
        {"kind": "step", "sgl": {"gradient_variance": 4.0}},
        {"kind": "step"},
        {"kind": "epoch", "val": {}},
    ]
    run.log.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = made(run)
    assert (found["gradient_variance"], found["conflict_share"]) == (3.0, 0.375)
    assert (found["seconds"], found["instances_per_second"]) == (3.0, 150.0)
    assert (found["seed"], found["processes"], found["peak_memory_mb"]) == (5, 2, 123.0)
    assert found["tasks"]["has_nine"] == {"auroc": 0.75, "other": None}
    assert found["linear"] == LINEAR
    assert found["skill"]["tasks"].keys() == {task.name for task in TASKS}
    assert 0 < found["skill"]["mean"] < 1
    assert found["data"]["scaling"] == ["view a: as it is"]
    assert found["data"]["bags"] == {"train": 40, "val": 16, "test": 16}
    assert found["data"]["instances"] == {name: int(part.sizes.sum()) for name, part in DATA.items()}
    assert found["data"]["views"] == {view.name: view.width for view in DATA["train"].views}
    assert found["versions"]["torch"] == torch.__version__


def test_a_run_without_task_gradients_has_no_figures_of_them(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log.write_text('{"kind": "step"}\n')
    found = made(run)
    assert found["gradient_variance"] is found["conflict_share"] is found["outlier_tasks"] is None


def test_the_task_that_pulls_against_all_others_is_named() -> None:
    shared = nn.Parameter(torch.zeros(4))
    tasks = ("a", "b", "c", "d")
    guided = SelfGuided([shared], tasks=tasks, beta=0.0, variance_window=0)
    for _ in range(3):
        direction = torch.ones(4)
        losses = {name: (shared * direction * (1.0 if name != "d" else -1.0)).sum() for name in tasks}
        guided.backward(losses)
    assert outliers(guided) == ["d"]
    assert outliers(SelfGuided([shared], tasks=tasks, balancer="equal")) is None
    assert outliers(None) is None


def test_versions_name_what_a_result_depends_on() -> None:
    found = versions()
    assert {"python", "umda_fast", "torch", "numpy"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


def test_it_always_has_the_same_keys(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.log.write_text("")
    assert list(made(run)) == [
        "schema", "versions", "commit", "machine", "time",
        "seed", "data", "tasks", "mean_score", "skill", "view_consistency", "gradient_variance", "conflict_share",
        "outlier_tasks", "linear", "kept", "seconds", "instances_per_second", "peak_memory_mb",
        "processes", "backend",
    ]  # fmt: skip
