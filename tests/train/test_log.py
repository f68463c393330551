from pathlib import Path
from typing import Any

import pytest

from umda_fast.errors import DataError
from umda_fast.runtime.rundir import RunDirectory, read_metrics
from umda_fast.train.log import TrainingLog, tensorboard_events


class Scalars:
    """Stands for TensorBoard's writer."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self.seen[tag, global_step] = scalar_value


RECORD: dict[str, Any] = {
    "kind": "step",
    "step": 4,
    "epoch": 1,
    "lr": 0.5,
    "losses": {"y": 2, "z": float("nan")},
    "val": {"tasks": {"y": {"auroc": 0.75}}},
    "early": True,
    "note": "text",
}


def test_numbers_go_to_tensorboard_by_their_place_in_the_record(tmp_path: Path) -> None:
    log = TrainingLog(RunDirectory(tmp_path), writes=True)
    log.events = events = Scalars()
    log.begin()
    log.write(RECORD, 4)
    log.close()
    assert events.seen.keys() == {("lr", 4), ("losses/y", 4), ("losses/z", 4), ("val/tasks/y/auroc", 4)}
    assert events.seen["val/tasks/y/auroc", 4] == 0.75
    assert read_metrics(tmp_path / "metrics.jsonl") == [{**RECORD, "losses": {"y": 2, "z": None}}]


def test_only_one_process_writes(tmp_path: Path) -> None:
    log = TrainingLog(RunDirectory(tmp_path), writes=False)
    log.events = events = Scalars()
    log.begin()
    log.write(RECORD, 4)
    assert log.sync() == 0
    log.close()
    assert not events.seen
    assert not list(tmp_path.iterdir())


def test_it_goes_on_behind_a_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    log = TrainingLog(run, writes=True)
    assert not log.begun
    log.begin()
    assert log.begun
    log.write({"step": 0}, 0)
    offset = log.sync()
    log.write({"step": 1}, 1)
    log.begin(offset)
    log.write({"step": 2}, 2)
    log.close()
    assert [record["step"] for record in read_metrics(run.log)] == [0, 2]
    with pytest.raises(DataError, match="was it edited"):
        log.begin(10_000)


def test_tensorboard_is_given_what_it_reads(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with tensorboard_events(run, 0) as writer:
        writer.add_scalar("lr", 0.5, 0)
    assert list(run.events.glob("events.out.tfevents.*"))
