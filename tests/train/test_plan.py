"""How long a training is: the rule, what is said, and that a run keeps to it, stopped or not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small import small_config, small_data
from umda_fast.runtime.config import ConfigError, RunConfig, make_config
from umda_fast.runtime.rundir import read_metrics
from umda_fast.train import train
from umda_fast.train.optim import WeightAverage
from umda_fast.train.plan import Plan, batch_bags, default_updates, make_plan


def plan(bags: int, size: int = 3, **sections: Any) -> Plan:
    config = make_config(sections)
    return make_plan(config.train, config.data, np.full(bags, size, dtype=np.int64))


def test_the_rule_goes_through_what_was_measured() -> None:
    counts = (1, 62, 100, 150, 200, 500, 1000, 2500, 4000, 10**6)
    updates = [default_updates(bags) for bags in counts]
    assert updates == sorted(updates)
    assert updates[0] == updates[3] == 400
    assert 600 <= default_updates(1000) <= 1200
    assert updates[-1] == 1200
    assert [batch_bags(bags) for bags in (1, 160, 200, 640, 10**6)] == [16, 16, 20, 64, 64]


def test_by_default_the_number_of_bags_decides() -> None:
    found = plan(100)
    assert (found.bags, found.per_epoch, found.epochs, found.steps) == (16, 7, 58, None)
    assert 400 <= found.updates == 58 * 7 < 407
    assert found.warning() is None
    assert "406 updates, 58 epochs, in batches of 16 bags (at most 4,096 instances): 100 training" in found.describe()
    # Every bag is seen five times, however many there are.
    assert plan(50_000).epochs == 5
    # Memory comes first.
    assert plan(100, size=5000).per_epoch == 100


def test_what_is_said_counts() -> None:
    assert plan(100, train={"epochs": 3}).updates == 21
    by_steps = plan(100, train={"steps": 10})
    assert (by_steps.epochs, by_steps.updates, by_steps.why) == (None, 10, "train.steps = 10")
    both = plan(100, train={"steps": 10, "epochs": 1})
    assert (both.updates, both.why) == (7, "train.epochs = 1 and train.steps = 10")
    assert plan(100, data={"bags": 50}, train={"epochs": 3}).updates == 6
    assert plan(100, data={"bags": None, "budget": 90}, train={"epochs": 1}).updates == 4
    assert "10 updates are few" in str(by_steps.warning())
    assert plan(100, train={"steps": 200}).warning() is None
    with pytest.raises(ConfigError, match=r"data\.bags"):
        plan(100, data={"bags": "some"})
    with pytest.raises(ConfigError, match=r"train\.steps"):
        plan(100, train={"steps": 0})


def test_progress() -> None:
    found = plan(100, train={"steps": 20, "epochs": 4})  # 7 an epoch: the steps end first
    assert found.progress(0.0, 0) == 0.0
    assert found.progress(1.0, 7) == 7 / 20
    assert not found.done(2, 19)
    assert found.done(2, 20)
    assert found.done(4, 0)
    assert plan(100, train={"epochs": 4}).progress(1.5, 10) == 1.5 / 4
    assert found.progress(3.0, 21) == 1.0


def _config(**train_options: Any) -> RunConfig:
    options = {"epochs": None, "log_steps": 1, "checkpoint_steps": 2, **train_options}
    return small_config(train=options, data={"bags": 8, "budget": 512}, model={"width": 16, "heads": 2, "layers": 1})


def _records(directory: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if record["kind"] == kind]


def test_a_run_ends_after_so_many_updates_in_mid_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = small_data()
    train(_config(steps=8), tmp_path / "run", datasets=data, plots=False)  # 40 bags: 5 updates an epoch
    said = capsys.readouterr().err
    assert "train: 8 updates, 1.6 epochs, in batches of 8 bags (at most 512 instances): train.steps = 8" in said
    assert "warning: 8 updates are few" in said
    assert [record["step"] for record in _records(tmp_path / "run", "step")] == list(range(8))
    assert [(r["epoch"], r["step"]) for r in _records(tmp_path / "run", "epoch")] == [(0, 5), (1, 8)]
    assert (tmp_path / "run" / "metrics.json").exists()

    # A finished run stays as it is, and with more updates goes on, with the next epoch.
    train(_config(steps=8), tmp_path / "run", resume=True, datasets=data, progress=False, plots=False)
    assert len(_records(tmp_path / "run", "step")) == 8
    train(_config(steps=11), tmp_path / "run", resume=True, datasets=data, progress=False, plots=False)
    assert [(r["epoch"], r["step"]) for r in _records(tmp_path / "run", "epoch")] == [(0, 5), (1, 8), (2, 11)]


def test_stopped_and_resumed_by_updates_is_bit_identical(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from umda_fast.train.step import TrainStep

    data, config = small_data(), _config(steps=13)
    train(config, tmp_path / "straight", datasets=data, progress=False, plots=False)
    step = TrainStep.__call__

    def stops(self: TrainStep, host: Any, progress: float, number: int) -> Any:
        if number == 9:
            raise KeyboardInterrupt
        return step(self, host, progress, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stops)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped", datasets=data, progress=False, plots=False)
    train(config, tmp_path / "stopped", resume=True, datasets=data, progress=False, plots=False)
    straight, stopped = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("straight", "stopped")
    )
    assert straight["step"] == stopped["step"] == 13
    for part in ("model", "average", "best_weights"):
        assert straight[part].keys() == stopped[part].keys()
        assert all(torch.equal(straight[part][name], stopped[part][name]) for name in straight[part])


def test_the_running_mean_of_the_weights() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    average, by_hand = WeightAverage(model, "auto"), 0.0
    fixed, fixed_by_hand = WeightAverage(model, 0.75), 0.0
    for done in range(1000):
        with torch.no_grad():
            model.weight.fill_(float(done % 7))
        average.update_parameters(model)
        fixed.update_parameters(model)
        decay = min(0.98, (1 + done) / (10 + done))
        by_hand = done % 7 if done == 0 else decay * by_hand + (1 - decay) * (done % 7)
        fixed_by_hand = done % 7 if done == 0 else 0.75 * fixed_by_hand + 0.25 * (done % 7)
    assert float(average.module.weight.detach()) == pytest.approx(by_hand, rel=1e-4)
    assert float(fixed.module.weight.detach()) == pytest.approx(fixed_by_hand, rel=1e-4)
    assert WeightAverage(model, "auto").state_dict().keys() == average.state_dict().keys()
