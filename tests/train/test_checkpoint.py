"""A checkpoint by itself: written and read without a training."""

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from umda_fast.errors import DataError
from umda_fast.runtime.config import ConfigError, RunConfig, as_dict, make_config
from umda_fast.runtime.random_state import random_state
from umda_fast.train.checkpoint import CHECKPOINT_VERSION, Checkpoint, TrainingState, check_same_run


def checkpoint(config: RunConfig, **parts: Any) -> Checkpoint:
    """That of a model of one layer, after one step."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = TrainingState(epoch=2, step=7, step_in_epoch=1, instances=90, train_seconds=1.5, total_seconds=2.5)
    state.add({"loss/y": 0.5})
    state.offer(0.75, model.state_dict())
    values: dict[str, Any] = {
        "config": as_dict(config),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sgl": None,
        "average": None,
        "recent": {"os": [{"logits": torch.ones(2, 1)}]},
        "random": [random_state()],
        "sampler": {"seed": 0, "budget": 96},
        "state": state,
        "log_offset": 123,
    }
    return Checkpoint(**{**values, **parts})


def assert_equal(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_equal(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for here, there in zip(found, expected, strict=True):
            assert_equal(here, there)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_what_was_written_is_read(tmp_path: Path) -> None:
    config = make_config({"seed": 3})
    written = checkpoint(config)
    written.write(tmp_path / "checkpoint.pt")
    found = Checkpoint.read(tmp_path / "checkpoint.pt", config)
    for item in fields(Checkpoint):
        here, there = getattr(found, item.name), getattr(written, item.name)
        assert_equal(*((vars(here), vars(there)) if item.name == "state" else (here, there)))


def test_the_file_has_the_keys_of_its_version(tmp_path: Path) -> None:
    """Files written by other versions of the package have these; whoever changes them changes the version."""
    checkpoint(make_config()).write(tmp_path / "checkpoint.pt")
    found = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert found["version"] == CHECKPOINT_VERSION == 2
    assert set(found) == {
        "version", "config", "model", "optimizer", "sgl", "average", "recent", "random", "sampler", "log_offset",
        "epoch", "step", "step_in_epoch", "instances", "train_seconds", "total_seconds", "sums",
        "best_score", "best_epoch", "best_weights", "finished",
    }  # fmt: skip
    assert (found["epoch"], found["sums"], found["best_score"]) == (2, {"loss/y": [0.5, 1.0]}, 0.75)


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda path: path.write_bytes(b""), "not a checkpoint"),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "not a checkpoint"),
        (lambda path: torch.save([1, 2], path), "not a checkpoint"),
        (lambda path: torch.save({"weights": torch.zeros(2)}, path), "not a checkpoint: 'version'"),
        (edited(lambda content: content.update(version=1)), "version 1, expected 2"),
        (edited(lambda content: content.pop("sums")), "not a checkpoint: sums missing"),
    ],
)
def test_what_is_no_checkpoint_is_said(tmp_path: Path, edit: Callable[[Path], object], message: str) -> None:
    config = make_config()
    path = tmp_path / "checkpoint.pt"
    checkpoint(config).write(path)
    edit(path)
    with pytest.raises(DataError, match=rf"checkpoint\.pt: {message}"):
        Checkpoint.read(path, config)


def test_a_write_that_fails_leaves_the_last_one(tmp_path: Path) -> None:
    config, path = make_config(), tmp_path / "checkpoint.pt"
    checkpoint(config).write(path)
    before = path.read_bytes()
    with pytest.raises(AttributeError):  # no such thing can be pickled
        checkpoint(config, sampler={"order": lambda: None}).write(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoint(make_config()).write(tmp_path / "checkpoint.pt")
    for values in (
        {"train": {"epochs": 99, "patience": 3, "log_steps": 1, "checkpoint_steps": 0}},
        {"device": "cpu", "backend": "reference", "data": {"workers": 2}},
    ):
        assert Checkpoint.read(tmp_path / "checkpoint.pt", make_config(values)).state.step == 7
    other = make_config({"model": {"layers": 3}})
    with pytest.raises(ConfigError, match=r"^model\.layers: a resumed run keeps its configuration; expected 2, got 3$"):
        Checkpoint.read(tmp_path / "checkpoint.pt", other)
    with pytest.raises(ConfigError, match=r"^data\.options: .* expected None, got \{'x': 1\}"):
        check_same_run({"data": {"options": {"x": 1}}}, {"data": {}})


def test_keys_of_the_configuration_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint(make_config()).write(path)
    edited(lambda content: (content["config"]["model"].pop("layers"), content["config"]["train"].pop("clip")))(path)
    assert Checkpoint.read(path, make_config()).state.step == 7
    with pytest.raises(ConfigError, match=r"^train\.clip: .* expected 1\.0, got 2\.0$"):
        Checkpoint.read(path, make_config({"train": {"clip": 2.0}}))


def test_a_key_of_the_configuration_that_is_no_more_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint(make_config()).write(path)
    edited(lambda content: content["config"]["train"].update(gone=5))(path)
    with pytest.raises(ConfigError, match=r"^train\.gone: .* expected 5, got None$"):
        Checkpoint.read(path, make_config())


def test_each_process_goes_on_with_its_own_random_numbers(tmp_path: Path) -> None:
    config = make_config()
    states = []
    for seed in (11, 12):
        torch.manual_seed(seed)
        states.append(random_state())
    path = tmp_path / "checkpoint.pt"
    checkpoint(config, random=states).write(path)
    saved = Checkpoint.read(path, config)

    def draw(rank: int) -> float:
        saved.restore_random_state(config.seed, rank)
        return float(torch.rand(()))

    before = random_state()
    expected = [float(torch.rand((), generator=torch.Generator().manual_seed(seed))) for seed in (11, 12)]
    drawn = [draw(rank) for rank in range(4)]  # two more than wrote it
    assert drawn[:2] == expected
    assert len(set(drawn)) == 4
    assert drawn == [draw(rank) for rank in range(4)]
    torch.set_rng_state(before["torch"])


def test_the_best_weights_are_kept() -> None:
    state = TrainingState()
    weight = torch.zeros(1)
    assert state.offer(0.5, {"w": weight})
    weight += 1  # training goes on, on the same memory
    state.epoch = 1
    assert not state.offer(0.5, {"w": weight})
    assert (state.best_score, state.best_epoch, float(state.best_weights["w"])) == (0.5, 0, 0.0)
    assert state.offer(0.6, {"w": weight})
    assert (state.best_score, state.best_epoch, float(state.best_weights["w"])) == (0.6, 1, 1.0)
    state.epoch = 2
    assert state.offer(math.nan, {"w": weight + 1})  # nothing is known: the last are as good as any
    assert (state.best_score, state.best_epoch, float(state.best_weights["w"])) == (0.6, 2, 2.0)


def test_the_figures_of_an_epoch_are_means_over_the_steps_that_had_them() -> None:
    state = TrainingState()
    state.add({"loss/a": 1.0, "loss/b": 4.0})
    state.add({"loss/a": 2.0})
    assert state.means() == {"loss/a": 1.5, "loss/b": 4.0}
    state.instances, state.train_seconds = 30, 2.0
    assert state.instances_per_second == 15.0
