"""Losses over whole batches and those before: gradients, memory, resume, and one, two and four processes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.processes import run_together
from tests.small import small_config
from tests.train.test_distributed import assert_same_state, flat, in_float64
from umda_fast.data import Bag, BagDataset
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, ViewSpec
from umda_fast.runtime.rundir import read_metrics
from umda_fast.tasks.cox import breslow, efron_losses
from umda_fast.train import RunConfig, risk_sets, train
from umda_fast.train.risk_sets import RiskSets
from umda_fast.train.share import OneProcess
from umda_fast.train.step import TrainStep

VIEWS = (ViewSpec("a", 4), ViewSpec("b", 3))
TIMED = {"cuts": (3.0, 6.0, 9.0), "hazards": (0.2, 0.3, 0.4), "classes": 3}
TASKS = (
    TaskSpec("os", "survival", **TIMED),
    TaskSpec("pfs", "survival", loss="cox", **TIMED),
    TaskSpec("y", "binary"),
)


def datasets() -> dict[str, BagDataset]:
    """Bags of 1 to 12 instances, one beyond the budget, and an empty one; few have `pfs`, some views are missing."""
    rng = torch.Generator().manual_seed(0)
    bags = []
    for index, size in enumerate([40, 0, *([3, 7, 12, 1, 5, 9, 2] * 4)]):
        mask = torch.rand(size, 2, generator=rng) > 0.3
        mask[:, index % 2] = True
        time = torch.tensor([float(1 + index * 7 % 10), float(index % 3 > 0)])
        labels = {"os": time, "pfs": time.clone(), "y": torch.tensor(float(index % 2))}
        if index % 5 == 4:
            del labels["pfs"]
        views = {view.name: torch.randn(size, view.width, generator=rng) + 0.1 * (index % 10) for view in VIEWS}
        bags.append(Bag(f"bag {index}", views, mask, labels))
    return {
        "train": BagDataset(bags, VIEWS, TASKS),
        "val": BagDataset(bags[:17], VIEWS, TASKS),
        "test": BagDataset(bags[3:], VIEWS, TASKS),
    }


def config(scope: str, **train: Any) -> RunConfig:
    return small_config(
        data={"budget": 24},
        model={"width": 16, "heads": 2, "layers": 1, "dropout": 0.0, "view_heads": True},
        train={"epochs": 2, "log_steps": 2, "checkpoint_steps": 3, "ema": 0.5, "linear": "mix", **train},
        penalties={"dispersion": 0.0, "smoothness": 0.0},  # ratios over the whole batch, see `penalty_counts`
        sgl={"scope": scope} if scope != "none" else {"balancer": "none"},
    )


def runs(place: str, scopes: list[str]) -> list[dict[str, Any]]:
    in_float64()
    risk_sets.FEWEST = 8  # so that batches are forgotten again
    return [
        train(config(scope), Path(place) / scope, datasets=datasets(), progress=False, plots=False).metrics
        for scope in scopes
    ]


SCOPES = ["none", "shared_parameters", "representation"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("survival")


@pytest.fixture(scope="module")
def alone(place: Path) -> dict[str, dict[str, Any]]:
    (found,) = run_together(runs, 1, str(place / "by 1"), SCOPES)
    return dict(zip(SCOPES, found, strict=True))


@pytest.mark.parametrize(("size", "scopes"), [(2, SCOPES), (4, SCOPES[:2])])
def test_survival_is_the_same_for_any_number_of_processes(
    size: int, scopes: list[str], place: Path, alone: dict[str, dict[str, Any]]
) -> None:
    by_rank = run_together(runs, size, str(place / f"by {size}"), scopes)
    for scope, metrics in zip(scopes, by_rank[0], strict=True):
        mine, theirs = place / f"by {size}" / scope, place / "by 1" / scope
        assert_same_state(mine, theirs)
        for here, there in zip(*(read_metrics(path / "metrics.jsonl") for path in (mine, theirs)), strict=True):
            for part in ("losses", "view_losses", "train", "val", "gradient_norm"):
                assert flat(here.get(part, {})) == pytest.approx(flat(there.get(part, {})), rel=1e-6, nan_ok=True), part
        assert metrics["processes"] == size
        assert flat(metrics["tasks"]) == pytest.approx(flat(alone[scope]["tasks"]), rel=1e-6, nan_ok=True)
        states = [torch.load(path / "checkpoint.pt", weights_only=True)["recent"]["pfs"] for path in (mine, theirs)]
        assert [len(rows["logits"]) for rows in states[0]] == [len(rows["logits"]) for rows in states[1]]
        assert 8 <= sum(len(rows["logits"]) for rows in states[0]) < 24


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, settings = datasets(), config("shared_parameters")
    train(settings, tmp_path / "straight", datasets=data, progress=False, plots=False)
    original = TrainStep.__call__

    def stop(self: TrainStep, host: Any, progress: float, number: int) -> Any:
        if number == 14:
            raise KeyboardInterrupt
        return original(self, host, progress, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainStep, "__call__", stop)
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "stopped", datasets=data, progress=False, plots=False)
    train(settings, tmp_path / "stopped", resume=True, datasets=data, progress=False, plots=False)
    straight, resumed = (
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("straight", "stopped")
    )
    for name, value in straight["model"].items():
        assert torch.equal(value, resumed["model"][name]), name
    for here, there in zip(straight["recent"]["pfs"], resumed["recent"]["pfs"], strict=True):
        assert all(torch.equal(value, there[name]) for name, value in here.items())
    assert (tmp_path / "straight" / "model.safetensors").read_bytes() == (
        tmp_path / "stopped" / "model.safetensors"
    ).read_bytes()


# ---- by itself


COX = TaskSpec("pfs", "survival", loss="cox", **TIMED)


def batch(time: np.ndarray, event: np.ndarray) -> Any:
    labels = torch.from_numpy(np.stack([time, event], 1))
    mask = ~labels.isnan().any(1)
    labels = labels.nan_to_num()
    ptr = torch.arange(len(labels) + 1)
    return SimpleNamespace(labels={"pfs": labels}, label_mask={"pfs": mask}, ptr=ptr)


def step(sets: RiskSets, logits: Tensor, time: np.ndarray, event: np.ndarray) -> tuple[Tensor, Tensor]:
    """The loss and its gradient."""
    own = logits.detach().requires_grad_()
    host = batch(time, event)
    losses, alone = sets.losses(host, host, SimpleNamespace(logits={"pfs": own[:, None]}))
    assert alone == {}
    return losses["pfs"].detach(), torch.autograd.grad(losses["pfs"], own)[0]


def drawn(bags: int = 100) -> tuple[Tensor, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.normal(size=bags)), rng.integers(1, 30, bags).astype(float), rng.integers(0, 2, bags)


def anchor(logits: Tensor) -> Tensor:
    return risk_sets.ANCHOR * logits.mean() / len(logits)


def test_a_large_batch_is_compared_with_itself_alone() -> None:
    logits, time, event = drawn()
    sets = RiskSets([COX], OneProcess())
    step(sets, logits[:70] + 3, time[:70], event[:70])
    loss, gradient = step(sets, logits, time, event)
    own = logits.clone().requires_grad_()
    expected = efron_losses(own, *map(torch.from_numpy, (time, event))).mean()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, own)[0] + anchor(logits))


def test_a_bag_alone_has_the_residual_that_it_has_among_those_before() -> None:
    logits, time, _ = drawn()
    time, event = time + np.arange(100) / 1000, np.arange(100) % 2.0  # no ties
    sets = RiskSets([COX], OneProcess())
    for number in range(100):
        one = slice(number, number + 1)
        _, gradient = step(sets, logits[one], time[one], event[one])
    recent = slice(100 - risk_sets.FEWEST, 100)
    at = breslow(logits[recent].numpy(), time[recent], event[recent], time[99:])
    residual = event[99] - at[0] * float(logits[99].exp())
    assert float(gradient) == pytest.approx(-residual + float(anchor(logits[99:])))


def test_bags_without_the_label_are_left_out() -> None:
    logits, time, event = drawn()
    known = time.copy()
    known[::3] = np.nan
    sets, others = RiskSets([COX], OneProcess()), RiskSets([COX], OneProcess())
    there = ~np.isnan(known)
    loss, gradient = step(sets, logits, known, event)
    expected, own = step(others, logits[torch.from_numpy(there)], time[there], event[there])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[torch.from_numpy(there)], own)
    assert (gradient[torch.from_numpy(~there)] == 0).all()


def test_a_batch_without_a_label_or_an_event_teaches_nothing() -> None:
    logits, time, event = drawn(5)
    sets = RiskSets([COX], OneProcess())
    host = batch(time * np.nan, event)
    assert sets.losses(host, host, SimpleNamespace(logits={"pfs": logits[:, None]})) == ({}, {})
    assert sets.state_dict() == {"pfs": []}
    loss, gradient = step(sets, logits - logits.mean(), time, np.zeros(5))
    assert loss == 0
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_what_is_remembered_is_of_the_same_tasks() -> None:
    sets = RiskSets([COX, TASKS[0]], OneProcess())
    assert [task.name for task in sets.tasks] == ["pfs"]
    with pytest.raises(DataError, match=r"recent bags: expected of \['pfs'\], got of \[\]"):
        sets.load_state_dict({})
