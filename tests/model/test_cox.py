"""Cox's partial likelihood: against a formula in loops, torchsurv and Newton; baseline, mixtures, a run."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from tests.command_line import call
from umda_fast.data import BagDataset, collate, split_bags
from umda_fast.data.labels import fit_tasks
from umda_fast.model import TaskSpec, decode, task_losses, view_losses
from umda_fast.model.baselines.linear import Linear, LinearConfig
from umda_fast.runtime.config import DataConfig
from umda_fast.score.calibration import Calibration, fit_calibration
from umda_fast.tasks import kind_of
from umda_fast.tasks.cox import breslow, efron_losses
from umda_fast.tasks.survival_scores import harrell, kaplan_meier
from umda_fast.train import make_config, train
from umda_fast.train.linear import fit_linear

CUTS = (2.0, 4.0, 6.0)
OS = TaskSpec("os", "survival", classes=3, cuts=CUTS, hazards=(0.2, 0.3, 0.4), loss="cox")


def _drawn(bags: int = 40, seed: int = 0, features: int = 4) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, whole times, so that there are many ties, and events."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(bags, features))
    life = 12 * rng.exponential(size=bags) * np.exp(-x @ np.linspace(1.0, -0.6, features))
    seen = rng.uniform(2, 20, bags)
    return x, np.ceil(np.minimum(life, seen)), (life <= seen).astype(float)


def _in_loops(s: Tensor, time: Tensor, event: Tensor) -> Tensor:
    total = s.new_zeros(())
    for moment in time[event == 1].unique():
        at_risk, own = s[time >= moment].exp().sum(), s[(time == moment) & (event == 1)]
        for rank in range(len(own)):
            total = total + torch.log(at_risk - rank / len(own) * own.exp().sum())
        total = total - own.sum()
    return total


def _tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


# ---- the likelihood


def test_the_formula_and_its_gradient() -> None:
    x, *label = _drawn()
    time, event = _tensors(*label)
    s = torch.from_numpy(x[:, 0]).requires_grad_()
    losses = efron_losses(s, time, event)
    assert max(np.bincount(label[0][label[1] == 1].astype(int))) >= 3  # ties
    assert (losses[event == 0] == 0).all()
    expected = _in_loops(s, time, event)
    torch.testing.assert_close(losses.sum(), expected)
    torch.testing.assert_close(torch.autograd.grad(losses.sum(), s), torch.autograd.grad(expected, s))
    assert torch.autograd.gradcheck(lambda s: efron_losses(s, time, event), s)
    torch.testing.assert_close(efron_losses(s + 7, time, event), losses)
    order = torch.randperm(len(s))
    torch.testing.assert_close(efron_losses(s[order], time[order], event[order]), losses[order])


def test_it_agrees_with_torchsurv() -> None:
    cox = pytest.importorskip("torchsurv.loss.cox")
    x, *label = _drawn(seed=1)
    s, time, event = _tensors(x[:, 0], *label)
    with pytest.warns(UserWarning, match="Ties"):
        expected = cox.neg_partial_log_likelihood(s[:, None], event.bool(), time, ties_method="efron", reduction="sum")
    torch.testing.assert_close(efron_losses(s, time, event).sum(), expected.double(), rtol=1e-6, atol=0)


def test_nothing_overflows_and_no_bags_have_no_loss() -> None:
    x, *label = _drawn()
    s, time, event = (part.float() for part in _tensors(200 * x[:, 0], *label))
    s.requires_grad_()
    losses = efron_losses(s, time, event)
    losses.sum().backward()
    assert losses.isfinite().all()
    assert losses.sum() > 0
    assert s.grad is not None
    assert s.grad.isfinite().all()
    assert len(efron_losses(s[:0], time[:0], event[:0])) == 0
    assert efron_losses(s, time, torch.zeros_like(event)).sum() == 0


def test_a_bag_without_a_label_is_at_no_risk() -> None:
    x, *label = _drawn(9)
    s, (time, event) = torch.from_numpy(x[:, :1]), _tensors(*label)
    target = torch.stack([time, event], 1)
    target[3], target[5, 0] = math.nan, 0.0  # a label that is missing, and the earliest time there may be
    keep = ~target.isnan().any(1)
    found = task_losses([OS], {"os": s}, {"os": target}, {"os": keep})["os"]
    expected = kind_of(OS).loss(OS, s[keep], target[keep], None)
    torch.testing.assert_close(found, expected)


def test_views_are_compared_with_their_like() -> None:
    x, *label = _drawn(12)
    logits, target = torch.from_numpy(x[:, :2, None]), torch.stack(_tensors(*label), 1)
    present = torch.ones(12, 2, dtype=torch.bool)
    present[4, 1] = present[7, 0] = False
    found = view_losses([OS], {"os": logits}, present, {"os": target})["os"]
    count, each = present.sum(1), torch.zeros(12, dtype=torch.float64)
    for view in range(2):
        own = present[:, view]
        each[own] += efron_losses(logits[own, view, 0], target[own, 0], target[own, 1]) / count[own]
    torch.testing.assert_close(found, each.mean())


# ---- a linear model


def _newton(x: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """The coefficients at which the likelihood in loops is highest."""
    rows, label = torch.from_numpy(x), _tensors(time, event)

    def loss(weight: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.from_numpy(weight).requires_grad_()
        value = _in_loops(rows @ w, *label)
        value.backward()
        assert w.grad is not None
        return float(value.detach()), w.grad.numpy()

    found: np.ndarray = minimize(loss, np.zeros(x.shape[1]), jac=True, tol=1e-10).x
    return found


def _fitted(x: np.ndarray, time: np.ndarray, event: np.ndarray) -> np.ndarray:
    """Those of the fit of the package, without a penalty, in units of `x`."""
    from umda_fast.train import linear

    target = np.stack([time, event], 1)
    ((weight, _),) = linear._path(OS, torch.from_numpy(x), target, [0.0])
    return weight[0].numpy()


def test_linear_coefficients_agree_with_newton_to_three_digits() -> None:
    data = _drawn(300, seed=2)
    np.testing.assert_allclose(_fitted(*data), _newton(*data), atol=5e-4)


def test_linear_coefficients_and_baseline_agree_with_lifelines_to_three_digits() -> None:
    lifelines, pandas = pytest.importorskip("lifelines"), pytest.importorskip("pandas")
    x, time, event = _drawn(300, seed=2)
    table = pandas.DataFrame(x, columns=list("abcd")).assign(time=time, event=event)
    model = lifelines.CoxPHFitter().fit(table, "time", "event")
    weight = _fitted(x, time, event)
    np.testing.assert_allclose(weight, model.params_.to_numpy(), atol=5e-4)
    baseline = model.baseline_cumulative_hazard_.iloc[:, 0]
    at = baseline.index.to_numpy()
    found = breslow(x @ weight - (x @ weight).mean(), time, event, at)
    np.testing.assert_allclose(found, baseline.to_numpy(), atol=2e-3)


# ---- predictions


def test_the_baseline() -> None:
    time, event = np.array([1.0, 2.0, 2.0, 5.0]), np.array([1.0, 1.0, 0.0, 1.0])
    s = np.log([1.0, 2.0, 3.0, 4.0])
    found = breslow(s, time, event, np.array([0.5, 1.0, 2.0, 4.0, 5.0]))
    np.testing.assert_allclose(found, np.cumsum([0.0, 1 / 10, 1 / 9, 0.0, 1 / 4]))
    np.testing.assert_allclose(breslow(s + 600, time, event, np.array([5.0])) * np.exp(600.0), found[-1:], rtol=1e-9)
    # Nelson and Aalen's, whose survival is near that of Kaplan and Meier.
    _, many, had = _drawn(2000)
    times, share = kaplan_meier(many, had)
    np.testing.assert_allclose(np.exp(-breslow(np.zeros(2000), many, had, times)), share, atol=0.02)


def test_survival_follows_from_baseline_and_risk() -> None:
    logits = torch.tensor([[0.0], [math.log(2.0)]], dtype=torch.float64)
    expected = torch.tensor([0.8, 0.56, 0.336], dtype=torch.float64)  # by the hazards, before it is trained
    torch.testing.assert_close(decode(OS, logits), torch.stack([expected, expected**2]))
    trained = TaskSpec("os", "survival", classes=3, cuts=CUTS, loss="cox", baseline=(0.1, 0.1, 0.5))
    torch.testing.assert_close(decode(trained, logits)[1], torch.tensor([-0.2, -0.2, -1.0]).double().exp())
    target = torch.tensor([[1.0, 1.0], [3.0, 1.0]])
    completed = kind_of(OS).complete_trained(OS, logits.float(), target)
    assert completed.baseline == pytest.approx((1 / 3, 1 / 3 + 1 / 2, 1 / 3 + 1 / 2))
    assert kind_of(OS).complete_trained(OS, logits[:0], target[:0]) == OS


def test_the_mean_of_several_has_the_mean_risk() -> None:
    other = TaskSpec("os", "survival", classes=2, cuts=(3.0, 9.0), loss="cox", baseline=(0.4, 1.0))
    logits = [torch.linspace(-3, 3, 7).double()[:, None], torch.linspace(2, -2, 7).double()[:, None]]
    kind: Any = kind_of(OS)
    torch.testing.assert_close(kind.mean_logits([OS], logits[:1]), logits[0])
    found = kind.risk(decode(OS, kind.mean_logits([OS, other], logits)))
    # Of the other under constant hazards between its cuts, at those of the first: .4 / 3 a unit of time, then .1.
    at = torch.tensor([0.4 / 3 * 2, 0.4 + 0.1, 0.4 + 0.3], dtype=torch.float64)
    risks = torch.stack([kind.risk(decode(OS, logits[0])), 1 - (-logits[1].exp() * at).exp().mean(1)])
    torch.testing.assert_close(found, risks.mean(0))


def test_a_temperature_keeps_what_is_predicted_on_the_whole() -> None:
    x, *label = _drawn(2000, seed=3)
    right = x @ np.linspace(1.0, -0.6, 4)
    logits, target = torch.from_numpy(5.0 + 3.0 * right)[:, None], torch.stack(_tensors(*label), 1)
    there = torch.ones(len(target), dtype=torch.bool)
    found = fit_calibration([OS], {"os": logits}, {"os": target}, {"os": there})
    assert found.temperatures["os"] == pytest.approx(3.0, rel=0.1)
    assert found.centres["os"] == pytest.approx(float(logits.mean()))
    calm = found.apply({"os": logits})["os"]
    assert float(calm.mean()) == pytest.approx(float(logits.mean()), rel=1e-5)
    assert float(calm.std()) == pytest.approx(float(logits.std()) / found.temperatures["os"], rel=1e-5)
    # One that ranks all without a mistake is not believed without bounds.
    time = torch.arange(1.0, 31.0)
    perfect = {"os": torch.stack([time, torch.ones(30)], 1)}
    found = fit_calibration([OS], {"os": -time[:, None]}, perfect, {"os": torch.ones(30, dtype=torch.bool)})
    assert float((found.apply({"os": -time[:, None]})["os"]).std()) < 20


def test_a_calibration_of_before_has_no_centres(tmp_path: Path) -> None:
    Calibration(temperatures={"y": 2.0}).save(tmp_path / "c.json")
    plain = json.loads((tmp_path / "c.json").read_text())
    del plain["centres"]
    (tmp_path / "c.json").write_text(json.dumps(plain))
    assert Calibration.load(tmp_path / "c.json").apply({"y": torch.tensor([[4.0]])})["y"] == 2.0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss": "breslow"}, "loss: expected hazards or cox, got 'breslow'"),
        ({"baseline": (0.1, 0.2)}, "baseline: belongs to the loss cox, got it for hazards"),
        ({"loss": "cox", "baseline": (0.1,)}, "baseline: expected 2 numbers of at least 0, none less"),
        ({"loss": "cox", "baseline": (0.2, 0.1)}, "baseline: expected 2 numbers of at least 0, none less"),
        ({"kind": "multiclass", "loss": "cox"}, "loss: belongs to survival tasks, got it for a multiclass task"),
    ],
)
def test_what_does_not_belong_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSpec(**{"name": "os", "kind": "survival", "classes": 2, **fields})


# ---- a cohort whose hazard is known


@pytest.fixture(scope="module")
def parts() -> dict[str, tuple[BagDataset, np.ndarray]]:
    """train, val and test with the true log hazards: in one of two views, of bags of one to three instances."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 4, 700)
    ptr = np.concatenate([[0], sizes.cumsum()])
    hidden = rng.normal(size=(700, 2))
    hazard = hidden[:, 0] - 0.7 * hidden[:, 1]
    x = rng.normal(size=(ptr[-1], 6)).astype(np.float32)
    x[:, :2] = np.repeat(hidden, sizes, axis=0) + 0.05 * x[:, :2]
    life, seen = 24 * (rng.exponential(size=700) * np.exp(-hazard)) ** (1 / 1.3), rng.exponential(60, 700)
    label = np.stack([np.minimum(life, seen).round(2), (life <= seen).astype(float)], axis=1)
    kinds = {"os": {"kind": "survival", "loss": "cox"}}
    bags = BagDataset.from_arrays({"one": x[:, :3], "two": x[:, 3:]}, ptr, {"os": label}, kinds=kinds)
    rows = split_bags(bags, {"train": 0.5, "val": 0.1, "test": 0.4}, seed=0)
    train = bags.subset(rows["train"])
    tasks = fit_tasks(train.tasks, train.labels)
    return {name: (bags.subset(own).with_tasks(tasks), hazard[own]) for name, own in rows.items()}


def test_the_linear_model_is_cox_regression(parts: dict[str, tuple[BagDataset, np.ndarray]]) -> None:
    (train, _), (test, hazard) = parts["train"], parts["test"]
    assert train.tasks[0].outputs == 1
    model = Linear(LinearConfig(train.views, train.tasks))
    fit_linear(model, train, DataConfig())
    batch = collate([test[row] for row in range(len(test))], test.views, test.tasks)
    with torch.no_grad():
        logits = model.bag_logits(batch.views, batch.ptr, batch.mask)["os"]
    label = test.labels["os"]
    true = harrell(hazard, label[:, 0], label[:, 1])
    assert harrell(logits[:, 0].numpy(), label[:, 0], label[:, 1]) > true - 0.03


@pytest.mark.parametrize("bags", ["auto", 1])
def test_umda_finds_the_hazard(bags: Any, parts: dict[str, tuple[BagDataset, np.ndarray]], tmp_path: Path) -> None:
    settings = {
        "device": "cpu",
        "data": {"bags": bags},
        "model": {"width": 16, "heads": 2, "layers": 1},
        "train": {"steps": 150 if bags == "auto" else 600, "linear": "off", "keep": "scores"},
    }
    datasets = {name: dataset for name, (dataset, _) in parts.items()}
    result = train(make_config(settings), tmp_path / "run", datasets=datasets, progress=False, plots=False)
    test, hazard = parts["test"]
    found, label = result.metrics["tasks"]["os"], test.labels["os"]
    assert found["c_index"] > harrell(hazard, label[:, 0], label[:, 1]) - 0.03
    # What is predicted for all on average is what Kaplan and Meier see.
    (task,) = result.model.config.tasks
    assert task.baseline is not None
    batch = collate([test[row] for row in range(len(test))], test.views, test.tasks)
    with torch.no_grad():
        predicted = decode(task, result.model(**batch.inputs()).logits["os"]).mean(0).numpy()
    times, share = kaplan_meier(label[:, 0], label[:, 1])
    seen = share[np.searchsorted(times, task.cuts, side="right") - 1]
    np.testing.assert_allclose(predicted[:-1], seen[:-1], atol=0.08)


def test_the_commands_take_it(tmp_path: Path) -> None:
    x, time, event = _drawn(240, seed=4)
    path = tmp_path / "cohort.npz"
    np.savez(path, X=x.astype(np.float32), y_os_months=time, y_os_status=event, y_sign=(x[:, 3] > 0).astype(int))
    said = ["--set", "data.options.kinds={os: {kind: survival, loss: cox}}"]
    small = ["--set", "model.width=16", "--set", "model.heads=2", "--set", "model.layers=1", "--device", "cpu"]
    small += ["--quiet", "--set", "train.steps=20"]
    run = tmp_path / "run"
    assert call("train", "--data", path, *said, *small, "--out", run) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["tasks"]["os"]["c_index"] > 0.6
    (task,) = (task for task in json.loads((run / "config.json").read_text())["tasks"] if task["name"] == "os")
    assert len(task["baseline"]) == len(task["cuts"])
    assert "os" in json.loads((run / "calibration.json").read_text())["centres"]

    assert call("evaluate", run, run, "--json", tmp_path / "scores.json", "--quiet") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())["tasks"]["os"]
    assert scores == pytest.approx(metrics["tasks"]["os"], abs=1e-4)
    assert call("predict", run, "--data", path, "--times", "4,8", "--out", tmp_path / "p.csv", "--quiet") == 0
    header, *lines = (tmp_path / "p.csv").read_text().splitlines()
    assert header.split(",")[:4] == ["bag", "os_risk", "os_survival_4", "os_survival_8"]
    risk, first, second = np.array([line.split(",")[1:4] for line in lines], dtype=float).T
    assert ((first > second) & (second > 0) & (first < 1)).all()
    assert harrell(risk, time, event) > 0.6
    assert call("report", run, "--samples", 20, "--quiet") == 0
    assert call("adapt", run, "--data", path, *said, "--out", tmp_path / "adapted") == 0
    adapted = json.loads((tmp_path / "adapted" / "metrics.json").read_text())["tasks"]["os"]
    assert adapted["c_index"] > 0.6
    assert adapted["ibs"] < 0.25
    both = ["--models", "linear,mean_pooling", "--seeds", "1"]
    assert call("compare", "--data", path, *said, *small[-5:], *both, "--out", tmp_path / "compared") == 0
    compared = json.loads((tmp_path / "compared" / "compare.json").read_text())["models"]
    assert compared["linear"]["tasks"]["os"]["c_index"]["mean"] > 0.7
    mean = ["--set", "model.architecture=mean_pooling", "--set", "model.width=16", *small[-5:], "--folds", "2"]
    assert call("crossval", "--data", path, *said, *mean, "--out", tmp_path / "cv") == 0
    pooled = json.loads((tmp_path / "cv" / "crossval.json").read_text())["pooled"]
    assert 0 < pooled[0]["tasks"]["os"]["ibs"] < 0.3
