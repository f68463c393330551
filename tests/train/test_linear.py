"""The linear model of bag means: its solution against scikit-learn's, missing views, and as a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from tests.small import small_config, small_data
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.model.baselines import Linear, LinearConfig
from umda_fast.runtime.config import DataConfig
from umda_fast.train import evaluate, load_run, train
from umda_fast.train import linear as module
from umda_fast.train.linear import comparison_lines, fit_linear

BAGS, WIDTH = 120, 5


def _arrays(seed: int = 0) -> dict[str, Any]:
    """Bags of 0 to 3 instances with two dense views and a sparse one; labels that follow from the first two."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, BAGS)
    ptr = np.concatenate([[0], sizes.cumsum()])
    views = {
        "a": 3.0 + 2.0 * rng.standard_normal((ptr[-1], WIDTH)),
        "b": rng.standard_normal((ptr[-1], 2)) * (100.0, 0.01),
        "words": rng.random((ptr[-1], 40)) * (rng.random((ptr[-1], 40)) < 0.1),
    }
    means = {name: np.add.reduceat(x, ptr[:-1]) / sizes[:, None] for name, x in views.items()}
    score = means["a"][:, 0] - 3.0 + means["b"][:, 0] / 100.0
    labels = {
        "up": (score + 0.3 * rng.standard_normal(BAGS) > 0).astype(float),
        "third": np.digitize(score + 0.3 * rng.standard_normal(BAGS), (-1.0, 1.0)),
        "tags": np.stack([score > 1.5, means["a"][:, 1] > 3.0], 1).astype(float),
        "size": 10.0 * score + rng.standard_normal(BAGS),
    }
    labels["up"][:7] = np.nan
    return {"views": views, "ptr": ptr, "labels": labels, "means": means}


def _dataset(seed: int = 0) -> BagDataset:
    arrays = _arrays(seed)
    views = {name: x.astype(np.float32) for name, x in arrays["views"].items()}
    return BagDataset.from_arrays(views, arrays["ptr"], arrays["labels"])


def _fitted(data: BagDataset) -> tuple[Linear, dict[str, float]]:
    model = Linear(LinearConfig(data.views, data.tasks))
    return model, fit_linear(model, data, DataConfig())


def _features(model: Linear) -> np.ndarray:
    x = np.concatenate(list(_arrays()["means"].values()), 1)
    return (x - model.shift.double().numpy()) / model.scale.double().numpy()


def test_scaling() -> None:
    model, _ = _fitted(_dataset())
    x = _features(model)
    np.testing.assert_allclose(x.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(x[:, : WIDTH + 2].std(0), 1.0, rtol=1e-4)
    filled = (_arrays()["means"]["words"] != 0).mean()
    assert 0.05 < filled < 0.5
    np.testing.assert_allclose(x[:, WIDTH + 2 :].std(0), np.sqrt(filled), rtol=1e-4)  # rare or not


def test_a_view_of_zeros_says_nothing() -> None:
    x = np.zeros((30, 3), np.float32)
    labels = {"y": np.arange(30) % 2.0}
    model, _ = _fitted(BagDataset.from_arrays({"a": x, "b": x + 2.0}, np.arange(31), labels))
    assert model.scale.tolist() == [1.0] * 6
    assert model.heads[0].weight.abs().max() == 0


def test_a_rare_word_counts() -> None:
    """A label that one word in thirty bags gives away, among words that every bag is full of."""
    rng = np.random.default_rng(0)
    words = rng.poisson(1.0, (900, 60)) * rng.exponential(20.0, 60)
    words[:, 0] = 0.0
    labels = np.zeros(900)
    labels[::30] = words[::30, 0] = 1.0
    data = BagDataset.from_arrays({"words": words.astype(np.float32)}, np.arange(901), {"y": labels})
    model, _ = _fitted(data.subset(np.arange(600)))
    batch = data.collate([data[index] for index in range(600, 900)])
    found = model(**batch.inputs()).logits["y"][:, 0].detach()
    assert found[::30].min() > found[labels[600:] == 0].max()


def test_the_solution_is_scikit_learn_s() -> None:
    data = _dataset()
    model, penalties = _fitted(data)
    x, columns = _features(model), data.labels
    heads = {task.name: head for task, head in zip(data.tasks, model.heads, strict=True)}
    weights = {name: head.weight.detach().double().numpy() for name, head in heads.items()}
    assert set(penalties.values()) <= set(module._PENALTIES)

    def logistic(column: np.ndarray, name: str, **options: Any) -> np.ndarray:
        known = ~np.isnan(column)
        found = LogisticRegression(C=1.0 / penalties[name], tol=1e-8, max_iter=10_000, **options)
        return np.asarray(found.fit(x[known], column[known]).coef_)

    np.testing.assert_allclose(weights["up"], logistic(columns["up"], "up"), atol=2e-3)
    third = weights["third"] - weights["third"].mean(0)  # softmax does not tell a shift of all classes
    np.testing.assert_allclose(third, logistic(columns["third"], "third"), atol=2e-3)
    # A mean over labels, negatives / positives times the loss of positives: penalty / labels for each label.
    for index in range(2):
        column = columns["tags"][:, index]
        ratio = (column == 0).sum() / column.sum()
        found = LogisticRegression(C=1.0 / (2 * penalties["tags"]), tol=1e-8, max_iter=10_000)
        found.fit(x, column, sample_weight=np.where(column == 1, ratio, 1.0))
        np.testing.assert_allclose(weights["tags"][index], found.coef_[0], atol=2e-3)
    task = next(task for task in data.tasks if task.name == "size")
    ridge = Ridge(alpha=penalties["size"] / 2).fit(x, (columns["size"] - task.mean) / task.std)
    np.testing.assert_allclose(weights["size"][0], ridge.coef_, atol=2e-3)


def test_more_features_than_bags() -> None:
    """Solved among the bags' inner products, which all tasks share; the same minimum as among the features."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((50, 300)).astype(np.float32)
    x[7] = x[8]  # inner products without full rank
    labels = {name: (x[:, i] + rng.standard_normal(50) > 0).astype(float) for i, name in enumerate(("y", "rare"))}
    labels["rare"][::4] = np.nan
    model, penalties = _fitted(BagDataset.from_arrays({"a": x}, np.arange(51), labels, kinds={"rare": "binary"}))
    scaled = (x - model.shift.numpy()) / model.scale.numpy()
    for (name, column), head in zip(labels.items(), model.heads, strict=True):
        known = ~np.isnan(column)
        found = LogisticRegression(C=1.0 / penalties[name], tol=1e-8, max_iter=10_000).fit(scaled[known], column[known])
        np.testing.assert_allclose(head.weight.detach().numpy(), found.coef_, atol=2e-4)


def test_what_is_missing_is_not_read() -> None:
    arrays = _arrays()
    views = {name: x.astype(np.float32) for name, x in arrays["views"].items()}
    mask = np.random.default_rng(1).random((len(views["a"]), 3)) < 0.6
    mask[:, 2] |= ~mask.any(1)

    def fitted(filled: float) -> dict[str, torch.Tensor]:
        own = {name: np.where(mask[:, i, None], x, np.float32(filled)) for i, (name, x) in enumerate(views.items())}
        data = BagDataset.from_arrays(own, arrays["ptr"], arrays["labels"], mask=mask)
        model, _ = _fitted(data)
        batch = data.collate([data[index] for index in range(20)])
        return {**model.state_dict(), **model(**batch.inputs()).logits}

    first, second = fitted(0.0), fitted(1e6)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(bool(value.isfinite().all()) for value in first.values())


def test_many_bags_are_drawn_from(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _dataset()
    monkeypatch.setattr(module, "NUMBERS", 60 * (WIDTH + 2 + 40))
    read: list[int] = []
    original = module.batches_in_order

    def counted(dataset: BagDataset, *further: Any) -> Any:
        read.append(len(dataset))
        return original(dataset, *further)

    monkeypatch.setattr(module, "batches_in_order", counted)
    _fitted(data)
    assert read == [60]


def test_too_few_labels_leave_the_constant() -> None:
    arrays = _arrays()
    labels = {"up": arrays["labels"]["up"].copy(), "size": arrays["labels"]["size"]}
    labels["up"][5 + 7 :] = np.nan
    views = {"a": arrays["views"]["a"].astype(np.float32)}
    data = BagDataset.from_arrays(views, arrays["ptr"], labels, kinds={"up": "binary"})
    model, penalties = _fitted(data)
    assert penalties["up"] == float("inf")
    assert model.heads[0].weight.abs().max() == 0


def test_as_a_run(tmp_path: Path) -> None:
    """Default `sgl`, which it has no gradients for; finished, read back, resumed as it is."""
    data = small_data()
    config = small_config(model={"architecture": "linear"})
    result = train(config, tmp_path / "run", datasets=data, progress=False, plots=True)
    assert result.metrics["linear"] is None
    run = load_run(tmp_path / "run")
    assert isinstance(run.model, Linear)
    again = evaluate(run, datasets=data, progress=False)
    assert again.tasks == result.metrics["tasks"]
    assert result.metrics["skill"]["mean"] > 0.0
    resumed = train(config, tmp_path / "run", resume=True, datasets=data, progress=False, plots=False)
    assert resumed.metrics["tasks"] == result.metrics["tasks"]
    log = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["kind"] for record in log if record["kind"] != "inputs"] == ["epoch"]


def test_beside_every_training(tmp_path: Path) -> None:
    data = small_data()
    config = small_config(train={"linear": "beside"})
    result = train(config, tmp_path / "run", datasets=data, progress=False, plots=False)
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())["linear"]
    assert found == result.metrics["linear"]
    assert set(found["tasks"]) == {task.name for task in data["train"].tasks}
    train(small_config(model={"architecture": "linear"}), tmp_path / "alone", datasets=data, progress=False)
    on_val = evaluate(load_run(tmp_path / "alone"), datasets=data, split="val", progress=False).tasks
    assert not (tmp_path / "run" / "mixture.json").exists()
    for task, scores in found["tasks"].items():
        assert set(scores) == {"metric", "model", "linear"}
        assert scores["linear"] == pytest.approx(on_val[task][scores["metric"]], rel=1e-5)
    assert found["below"] == [t for t, scores in found["tasks"].items() if scores["model"] < scores["linear"]]
    lines = comparison_lines({"tasks": {"y": {"metric": "auroc", "model": 0.5, "linear": 0.75}}, "below": ["y"]})
    assert lines == [
        "y: auroc 0.5000, linear model 0.7500",
        "warning: below a linear model of bag means on validation bags: y",
    ]
    assert len(comparison_lines({"tasks": {}, "below": []})) == 0


def test_bad_features_are_named() -> None:
    arrays = _arrays()
    views = {"a": arrays["views"]["a"].astype(np.float32)}
    views["a"][3, 2] = np.nan
    with pytest.raises(DataError, match="view 'a'"):
        _fitted(BagDataset.from_arrays(views, arrays["ptr"], arrays["labels"]))
