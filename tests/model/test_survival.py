"""The time to an event: likelihood, scores against torchsurv, and a made cohort whose hazard is known."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.command_line import call
from umda_fast.data import BagDataset, load_source, split_bags
from umda_fast.data.batch import collate
from umda_fast.data.labels import fit_tasks
from umda_fast.model import TaskSpec, decode, task_losses
from umda_fast.model.baselines.linear import Linear, LinearConfig
from umda_fast.runtime.config import DataConfig
from umda_fast.score.calibration import best_temperature, fit_calibration
from umda_fast.score.intervals import bootstrap_interval
from umda_fast.score.metrics import TaskMetrics
from umda_fast.score.mixing import mix_task
from umda_fast.tasks import kind_of
from umda_fast.tasks.intervals import choose_cuts, marginal_hazards
from umda_fast.tasks.survival_scores import (
    auc_at,
    censored_later,
    harrell,
    integrated_brier,
    kaplan_meier,
    mean_auc,
    uno,
)
from umda_fast.train import make_config, train
from umda_fast.train.linear import fit_linear

NAN = float("nan")
CUTS, HAZARDS = (2.0, 5.0, 6.0, 12.0), (0.1, 0.3, 0.25, 0.6)
OS = TaskSpec("os", "survival", classes=4, cuts=CUTS, hazards=HAZARDS)


def _logits(bags: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(bags, 5, generator=generator, dtype=torch.float64)


def _slowly(logits: list[float], time: float, event: float) -> float:
    """The negative log likelihood of one bag, number by number."""
    starts, total = (0.0, *CUTS[:-1]), 0.0
    for own, usual, start, end in zip(logits[1:], HAZARDS, starts, CUTS, strict=True):
        hazard = 1.0 / (1.0 + math.exp(-(logits[0] + own)) * (1.0 - usual) / usual)
        if time > end:
            total -= math.log(1.0 - hazard)
        elif event == 1.0:
            return total - math.log(hazard)
        else:
            return total - (time - start) / (end - start) * math.log(1.0 - hazard)
    return total


# ---- the likelihood


def test_the_likelihood() -> None:
    times = [0.0, 1.0, 2.0, 2.5, 5.0, 5.5, 6.0, 11.0, 12.0, 40.0]
    target = torch.tensor([[time, event] for time in times for event in (0.0, 1.0)], dtype=torch.float64)
    logits = _logits(len(target))
    found = kind_of(OS).losses(OS, logits, target)
    expected = [_slowly(own, *label) for own, label in zip(logits.tolist(), target.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_a_missing_label_counts_nothing_and_the_gradient_is_right() -> None:
    target = torch.tensor([[3.0, 1.0], [NAN, NAN], [7.0, 0.0]], dtype=torch.float64)
    logits, keep = _logits(3).requires_grad_(), torch.tensor([True, False, True])
    loss = task_losses([OS], {"os": logits}, {"os": target}, {"os": keep})["os"]
    whole = kind_of(OS).losses(OS, logits[keep], target[keep])
    assert loss.item() == pytest.approx(whole.mean().item(), rel=1e-12)
    loss.backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[1] == 0).all()
    assert torch.autograd.gradcheck(lambda x: kind_of(OS).losses(OS, x, target[keep]), (_logits(2).requires_grad_(),))


def test_nothing_said_is_what_all_bags_have() -> None:
    expected = torch.tensor(HAZARDS, dtype=torch.float64).neg().add(1).cumprod(0)
    torch.testing.assert_close(decode(OS, torch.zeros(1, 5, dtype=torch.float64))[0], expected)
    # And, against what is usual, nothing is better.
    kind, none = kind_of(OS), torch.zeros(1, 5, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(kind.undecided_loss(OS, none), none)
    torch.testing.assert_close(gradient, torch.zeros(1, 5, dtype=torch.float64), rtol=0, atol=1e-15)


def test_survival_falls_and_nothing_overflows() -> None:
    logits = (40.0 * _logits(30)).float().requires_grad_()
    survival = decode(OS, logits)
    assert (survival.diff(dim=1) <= 0).all()
    target = torch.tensor([[7.0, 1.0], [1.0, 0.0], [30.0, 0.0]]).repeat(10, 1)
    loss = task_losses([OS], {"os": logits}, {"os": target})["os"]
    loss.backward()
    assert torch.isfinite(loss)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_the_mean_of_predictions() -> None:
    first, second = _logits(6, 1), _logits(6, 2)
    kind = kind_of(OS)
    mean = decode(OS, kind.mean_logits([OS, OS], [first, second]))
    torch.testing.assert_close(mean, (decode(OS, first) + decode(OS, second)) / 2)
    # Of other cuts: by 5 the other has lived through 3/7 of the interval from 2 to 9.
    other = TaskSpec("os", "survival", classes=2, cuts=(2.0, 9.0), hazards=(0.2, 0.5))
    alone = decode(OS, kind.mean_logits([OS, other], [first, torch.zeros(6, 3, dtype=torch.float64)]))
    survival = torch.tensor([0.8, 0.8 * 0.5 ** (3 / 7), 0.8 * 0.5 ** (4 / 7), 0.8 * 0.5 ** (10 / 7)])
    torch.testing.assert_close(alone, (decode(OS, first) + survival.double()) / 2, rtol=1e-6, atol=1e-7)


# ---- intervals


def test_cuts_are_events_that_divide_the_events_evenly() -> None:
    times = np.arange(1.0, 101.0)
    column = np.stack([times, (times % 2 == 0).astype(float)], axis=1)
    column[[3, 9]] = np.nan  # events at 4 and at 10
    assert choose_cuts(column, None) == (28.0, 52.0, 76.0, 100.0)
    assert choose_cuts(column, 2) == (52.0, 100.0)
    assert choose_cuts(np.array([[3.0, 1.0]] * 5 + [[8.0, 0.0]]), None) == (3.0,)
    assert choose_cuts(np.array([[3.0, 0.0], [8.0, 0.0]]), None) == (8.0,)


def test_hazards_of_all_bags_together() -> None:
    column = np.array([[1.0, 1], [2.0, 1], [1.0, 0], [3.0, 1], [4.0, 0], [9.0, 1], [NAN, NAN]])
    # Up to 2: two events, half a bag (censored at 1), three that live on; up to 4: one event, two that live on.
    expected = (2.5 / (2.5 + 3.5 + 0.5), 1.5 / (1.5 + 2 + 0.5))
    assert marginal_hazards((2.0, 4.0), column) == pytest.approx(expected)


def test_specs_are_fitted_to_training_bags() -> None:
    rng = np.random.default_rng(0)
    column = np.stack([rng.exponential(10, 200), rng.integers(0, 2, 200)], axis=1)
    kind = kind_of(OS)
    task, _ = kind.read("here", "os", column)
    (fitted,) = fit_tasks([task], {"os": column[:100]})
    assert fitted.cuts == choose_cuts(column[:100], None)
    assert fitted.hazards == marginal_hazards(fitted.cuts, column[:100])
    said = TaskSpec("os", "survival", classes=2, cuts=(5.0, 10.0))
    (kept,) = fit_tasks([kind.complete(said, column)], {"os": column[:100]})
    assert kept.cuts == (5.0, 10.0)
    assert kept.hazards == marginal_hazards((5.0, 10.0), column[:100])
    constant = torch.from_numpy(kind.constant(fitted, column[:100]))[None]
    torch.testing.assert_close(constant, torch.zeros_like(constant), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"cuts": (1.0, 1.0)}, "cuts: expected rising numbers above 0"),
        ({"cuts": (1.0,)}, "cuts: expected 2, one for each interval, got 1"),
        ({"hazards": (0.5, 1.0)}, "hazards: expected 2 numbers between 0 and 1"),
        ({"columns": ("a",)}, "columns: expected the column of times and that of events"),
        ({"labels": ("a", "b")}, "a survival task has no classes"),
        ({"kind": "multiclass", "times": (1.0,)}, "times: belongs to survival tasks, got it for a multiclass task"),
    ],
)
def test_bad_specs(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSpec(**{"name": "os", "kind": "survival", "classes": 2, **fields})  # type: ignore[arg-type]


# ---- scores


def _labels(bags: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 30, bags).astype(float), rng.integers(0, 2, bags).astype(float)  # with ties


@pytest.mark.parametrize("bags", [25, 150])
def test_scores_agree_with_torchsurv(bags: int) -> None:
    library = pytest.importorskip("torchsurv.metrics.cindex")
    brier, weights = pytest.importorskip("torchsurv.metrics.brier_score"), pytest.importorskip("torchsurv.stats.ipcw")
    time, event = _labels(bags)
    rng = np.random.default_rng(1)
    risk, survival = rng.normal(size=bags).round(1), np.sort(rng.random((bags, 4)))[:, ::-1].copy()
    times = np.array([4.0, 9.0, 15.0, 22.0])
    t, e, s, at = (
        torch.tensor(time).float(),
        torch.tensor(event).bool(),
        torch.tensor(survival).float(),
        torch.tensor(times),
    )
    own, then = weights.get_ipcw(e, t), weights.get_ipcw(e, t, at.float())
    concordance = library.ConcordanceIndex()
    assert harrell(risk, time, event) == pytest.approx(float(concordance(torch.tensor(risk).float(), e, t)), abs=1e-6)
    weighted = float(concordance(torch.tensor(risk).float(), e, t, weight=own))
    assert uno(risk, time, event) == pytest.approx(weighted, abs=1e-6)
    score = brier.BrierScore()
    score(s, e, t, new_time=at.float(), weight=own, weight_new_time=then)
    assert integrated_brier(survival, time, event, times) == pytest.approx(float(score.integral()), abs=1e-6)
    auc = pytest.importorskip("torchsurv.metrics.auc").Auc()
    expected = auc(1.0 - s, e, t, weight=own, new_time=at.float(), weight_new_time=then).numpy()
    found = auc_at(1.0 - s.numpy(), time, event, times)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert mean_auc(s.numpy(), time, event, times) == pytest.approx(found.mean(), abs=1e-6)


def test_an_auc_is_of_both_sides_or_none() -> None:
    time, event = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0, 0.0])
    risk = np.array([[0.3], [0.2], [0.2], [0.1]])
    # By 1, one of one before three; by 2, two (the censoring at 2 is neither), before one.
    found = auc_at(np.tile(risk, (1, 4)), time, event, np.array([0.5, 1.0, 2.0, 3.0]))
    np.testing.assert_array_equal(found, [np.nan, 1.0, 1.0, np.nan])
    assert auc_at(np.zeros((4, 1)), time, event, np.array([1.0])) == 0.5
    assert math.isnan(mean_auc(np.zeros((4, 0)), time, event, np.zeros(0)))


def test_concordance_by_hand() -> None:
    time, event = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0, 0.0])
    # Pairs: 1 with 2, 2 (censored) and 3; the event at 2 with who was censored then and with 3.
    assert harrell(np.array([4.0, 3.0, 2.0, 1.0]), time, event) == 1.0
    assert harrell(np.array([4.0, 1.0, 2.0, 1.0]), time, event) == pytest.approx((3 + 0 + 0.5) / 5)
    assert math.isnan(harrell(np.zeros(2), np.array([1.0, 2.0]), np.array([0.0, 1.0])))


def test_kaplan_meier_by_hand() -> None:
    time, event = np.array([1.0, 2.0, 2.0, 3.0]), np.array([1.0, 1.0, 0.0, 1.0])
    times, share = kaplan_meier(time, event)
    np.testing.assert_array_equal(times, [1.0, 2.0, 3.0])
    np.testing.assert_allclose(share, [3 / 4, 3 / 4 * 2 / 3, 0.0])
    np.testing.assert_allclose(censored_later(time, event, np.array([0.5, 2.0, 9.0])), [1.0, 0.5, 0.5])


def test_metrics_do_not_depend_on_batches_and_folds_have_cuts_of_their_own() -> None:
    time, event = _labels(60)
    target, ones = torch.from_numpy(np.stack([time, event], axis=1)).float(), torch.ones(60, dtype=torch.bool)
    logits = _logits(60).float()
    whole, parts, folds = TaskMetrics([OS]), TaskMetrics([OS]), TaskMetrics([OS])
    whole.update({"os": logits}, {"os": target}, {"os": ones})
    other = TaskSpec("os", "survival", classes=5, cuts=(1.0, *CUTS), hazards=(0.05, *HAZARDS))
    for rows in (slice(0, 13), slice(13, 60)):
        parts.update({"os": logits[rows]}, {"os": target[rows]}, {"os": ones[rows]})
        seen = torch.cat([logits[rows], logits[rows, :1]], 1)
        folds.update({"os": seen}, {"os": target[rows]}, {"os": ones[rows]}, tasks=[other])
    assert whole.compute() == parts.compute()
    survival = decode(other, torch.cat([logits, logits[:, :1]], 1))[:, 1:4].double().numpy()
    expected = integrated_brier(survival, time, event, np.array(CUTS[:3]))
    assert folds.compute()["os"]["ibs"] == pytest.approx(expected, abs=1e-5)


def test_scores_where_they_are_not_defined() -> None:
    metrics, ones = TaskMetrics([OS]), torch.ones(4, dtype=torch.bool)
    metrics.update({"os": _logits(4).float()}, {"os": torch.tensor([[3.0, 0.0]] * 4)}, {"os": ones})
    assert all(math.isnan(value) for value in metrics.compute()["os"].values())
    assert all(map(math.isnan, bootstrap_interval(OS, _logits(4), torch.tensor([[3.0, 0.0]] * 4), samples=20)))


def test_a_perfect_score_of_few_bags_is_no_certainty() -> None:
    time = torch.arange(1.0, 9.0)
    target = torch.stack([time, torch.ones(8)], 1)
    logits = torch.zeros(8, 5, dtype=torch.float64)
    logits[:, 0] = -time
    low, high = bootstrap_interval(OS, logits, target, samples=50)
    assert low < 0.8
    assert high == 1.0


def test_a_temperature_makes_good_what_is_too_sure() -> None:
    rng, calm = np.random.default_rng(0), _logits(4000, scale=0.7)
    survival = np.concatenate([np.ones((4000, 1)), decode(OS, calm).numpy()], axis=1)
    drawn = (rng.random((4000, 1)) < survival).sum(axis=1)  # 1 to 5: in which interval, or after the last
    ends = np.array([0.0, *CUTS, 13.0])
    target = torch.from_numpy(np.stack([ends[drawn], (drawn < 5).astype(float)], axis=1))
    assert best_temperature(OS, calm, target) == pytest.approx(1.0, abs=0.06)
    assert best_temperature(OS, 3.0 * calm, target) == pytest.approx(3.0, abs=0.2)
    assert mix_task(OS, [_logits(4000, 9, 0.05), calm], target).additions[0].weight > 0.9
    few = {"os": target[:30] * torch.tensor([1.0, 0.0])}
    found = fit_calibration([OS], {"os": calm[:30]}, few, {"os": torch.ones(30, dtype=torch.bool)})
    assert found.left == {"os": "0 events, expected 5"}


# ---- a cohort whose hazard is known


def _cohort(bags: int = 900, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Features of bags of 1 to 3 instances, offsets, the log hazard, and times and events [B, 2]: Weibull times,
    proportional hazards in two features of the first view, censoring that depends on nothing."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, bags)
    ptr = np.concatenate([[0], sizes.cumsum()])
    hidden = rng.normal(size=(bags, 2))
    hazard = hidden[:, 0] - 0.7 * hidden[:, 1]
    x = rng.normal(size=(ptr[-1], 6)).astype(np.float32)
    x[:, :2] = np.repeat(hidden, sizes, axis=0) + 0.05 * x[:, :2]
    life = 24 * (rng.exponential(size=bags) * np.exp(-hazard)) ** (1 / 1.3)
    seen = rng.exponential(60, bags)
    label = np.stack([np.minimum(life, seen).round(2), (life <= seen).astype(float)], axis=1)
    return {"one": x[:, :3], "two": x[:, 3:], "both": x}, ptr, hazard, label


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[BagDataset, np.ndarray]]:
    """train, val and test with the true log hazards."""
    views, ptr, hazard, label = _cohort()
    bags = BagDataset.from_arrays(
        {view: views[view] for view in ("one", "two")}, ptr, {"os": label}, kinds={"os": "survival"}
    )
    rows = split_bags(bags, {"train": 0.5, "val": 0.1, "test": 0.4}, seed=0)
    train = bags.subset(rows["train"])
    tasks = fit_tasks(train.tasks, train.labels)
    return {name: (bags.subset(own).with_tasks(tasks), hazard[own]) for name, own in rows.items()}


def test_a_training_split_may_have_fewer_intervals_than_all_bags() -> None:
    views, ptr, _, label = _cohort(90)
    bags = BagDataset.from_arrays({"both": views["both"]}, ptr, {"os": label}, kinds={"os": "survival"})
    train = bags.subset(split_bags(bags, {"train": 0.7, "test": 0.3}, seed=0)["train"])
    (task,) = fit_tasks(train.tasks, train.labels)
    assert task.classes < bags.tasks[0].classes
    assert bags.with_tasks([task]).tasks == (task,)
    with pytest.raises(ValueError, match="expected the names, kinds and classes"):
        bags.with_tasks([replace(task, name="pfs")])


def _risk(task: TaskSpec, logits: Tensor) -> np.ndarray:
    risk: np.ndarray = (1.0 - decode(task, logits.double()).mean(1)).numpy()
    return risk


def test_splits_balance_events_and_times(parts: dict[str, tuple[BagDataset, np.ndarray]]) -> None:
    shares = [dataset.labels["os"][:, 1].mean() for dataset, _ in parts.values()]
    assert max(shares) - min(shares) < 0.02
    medians = [np.median(dataset.labels["os"][:, 0]) for dataset, _ in parts.values()]
    assert max(medians) < 1.1 * min(medians)


def test_the_linear_model_finds_the_hazard(parts: dict[str, tuple[BagDataset, np.ndarray]]) -> None:
    (train, _), (test, hazard) = parts["train"], parts["test"]
    model = Linear(LinearConfig(train.views, train.tasks))
    fit_linear(model, train, DataConfig())
    batch = collate([test[row] for row in range(len(test))], test.views, test.tasks)
    with torch.no_grad():
        logits = model.bag_logits(batch.views, batch.ptr, batch.mask)["os"]
    label = test.labels["os"]
    true = harrell(hazard, label[:, 0], label[:, 1])
    found = harrell(_risk(test.tasks[0], logits), label[:, 0], label[:, 1])
    assert true > 0.74
    assert found > true - 0.03
    # What is predicted for all on average is what Kaplan and Meier see.
    times, share = kaplan_meier(label[:, 0], label[:, 1])
    seen = share[np.searchsorted(times, test.tasks[0].cuts, side="right") - 1]
    np.testing.assert_allclose(decode(test.tasks[0], logits).mean(0).numpy()[:-1], seen[:-1], atol=0.06)


def test_umda_finds_the_hazard_which_is_in_one_of_two_views(
    parts: dict[str, tuple[BagDataset, np.ndarray]], tmp_path: Path
) -> None:
    settings = {
        "device": "cpu",
        "model": {"width": 16, "heads": 2, "layers": 1},
        "train": {"steps": 150, "linear": "off", "keep": "scores"},
    }
    datasets = {name: dataset for name, (dataset, _) in parts.items()}
    result = train(make_config(settings), tmp_path / "run", datasets=datasets, progress=False, plots=False)
    test, hazard = parts["test"]
    found, label = result.metrics["tasks"]["os"], test.labels["os"]
    assert found["c_index"] > harrell(hazard, label[:, 0], label[:, 1]) - 0.03
    assert found["c_index_uno"] > uno(hazard, label[:, 0], label[:, 1]) - 0.03


@pytest.fixture
def file(tmp_path: Path) -> Path:
    views, ptr, _, label = _cohort(500)
    path = tmp_path / "cohort.npz"
    event = np.where(label[:, 1] == 1, "dead", "alive")
    event[7] = ""
    np.savez(path, X=views["both"], ptr=ptr, y_os_months=label[:, 0], y_os_status=event,
             y_sign=(views["both"][ptr[:-1], 2] > 0).astype(int))  # fmt: skip
    return path


def test_a_run(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    small = ["--set", "model.width=16", "--device", "cpu", "--quiet"]
    mean = ["--set", "model.architecture=mean_pooling", "--set", "train.lr=0.01"]
    assert call("inspect", file) == 0
    shown = capsys.readouterr().out
    assert "survival" in shown
    assert "events" in shown
    assert call("train", "--data", file, *small, *mean, "--set", "train.steps=60", "--out", run) == 0
    assert "os_months and os_status are one task, 'os' (survival), by their names" in capsys.readouterr().err
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"os", "sign"}
    assert metrics["tasks"]["os"]["c_index"] > 0.65
    assert 0 < metrics["tasks"]["os"]["ibs"] < 0.2
    assert "os" in json.loads((run / "calibration.json").read_text())["temperatures"]

    # Read back: the same task, from the same columns.
    assert call("evaluate", run, run, "--json", tmp_path / "scores.json", "--quiet") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]["os"]
    assert scores == pytest.approx(metrics["tasks"]["os"], abs=1e-5)

    table = tmp_path / "predicted.csv"
    assert call("predict", run, "--data", file, "--times", "12,6", "--out", table, "--refer-below", 0.6, "--quiet") == 0
    with open(table, newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert list(lines[0])[:4] == ["bag", "os_risk", "os_survival_6", "os_survival_12"]
    assert "os_confidence" not in lines[0]
    values = np.array([[float(line[f"os_{name}"]) for name in ("risk", "survival_6", "survival_12")] for line in lines])
    assert ((values[:, 1] > values[:, 2]) & (values[:, 2] > 0) & (values[:, 1] < 1)).all()
    assert np.corrcoef(values[:, 0], values[:, 2])[0, 1] < -0.8
    capsys.readouterr()
    assert call("predict", run, "--data", file, "--times", "12,999", "--out", table, "--quiet") == 2
    assert "the last event of os in training, got 12, 999" in capsys.readouterr().err

    assert call("report", run, "--samples", 20, "--quiet") == 0
    page = (run / "report.html").read_text()
    assert "os (survival)" in page
    assert "observed / predicted (at risk)" in page
    assert "os: survival by risk" in page
    assert "Log-rank test of low against high risk: p = " in page


def test_adapt_and_crossval(file: Path, tmp_path: Path) -> None:
    small = ["--set", "model.width=16", "--device", "cpu", "--quiet", "--set", "train.steps=4"]
    layers = ["--set", "model.heads=2", "--set", "model.layers=1"]
    assert call("train", "--data", file, *small, *layers, "--out", tmp_path / "whole") == 0
    assert call("adapt", tmp_path / "whole", "--data", file, "--out", tmp_path / "adapted") == 0
    adapted = json.loads((tmp_path / "adapted" / "metrics.json").read_text())
    assert adapted["tasks"]["os"]["c_index"] > 0.6
    mean = ["--set", "model.architecture=mean_pooling", "--folds", 2]
    assert call("crossval", "--data", file, *small, *mean, "--out", tmp_path / "cv") == 0
    pooled = json.loads((tmp_path / "cv" / "crossval.json").read_text())["pooled"]
    assert 0 < pooled[0]["tasks"]["os"]["ibs"] < 0.3


def test_a_run_of_before_goes_on_with_its_two_tasks(file: Path, tmp_path: Path) -> None:
    """Tasks that were recorded are found under their names, and are not joined."""
    old = (
        TaskSpec("os_months", "regression", mean=20.0, std=10.0),
        TaskSpec("os_status", "binary", labels=("alive", "dead")),
    )
    again = load_source(file, kinds=old)
    assert again.train.tasks == old
    assert not np.isnan(again.train.labels["os_months"]).any()
