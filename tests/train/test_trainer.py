import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.small import small_config, small_data
from tests.written import read_json
from umda_fast.data import Bag, BagDataset
from umda_fast.errors import DataError
from umda_fast.model import UMDA, Mixture, TaskSpec, ViewSpec
from umda_fast.runtime.config import ARCHITECTURES
from umda_fast.runtime.fabric import make_fabric
from umda_fast.runtime.rundir import RunDirectory, read_metrics
from umda_fast.train import ConfigError, Trainer, evaluate, load_run, predict, train


def _epochs(directory: Path) -> list[dict[str, object]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if record["kind"] == "epoch"]


@pytest.mark.parametrize("scope", ["shared_parameters", "last_shared_layer", "representation"])
def test_training_lowers_the_losses_in_every_scope(scope: str, tmp_path: Path) -> None:
    config = small_config(train={"epochs": 6, "lr": 5e-3}, sgl={"scope": scope})
    train(config, tmp_path / "run", progress=False, plots=False)
    epochs = _epochs(tmp_path / "run")
    first, last = epochs[0]["train"], epochs[-1]["train"]
    for task in ("has_nine", "largest", "present", "mean"):
        assert last[f"loss/{task}"] < first[f"loss/{task}"]  # type: ignore[index]


def test_the_baseline_trains_in_the_same_trainer(tmp_path: Path) -> None:
    model = {"architecture": "gated_attention", "view": "pixels", "width": 16, "hidden": 8}
    config = small_config(train={"epochs": 6, "lr": 5e-3}, sgl={"balancer": "none"}, model=model)
    result = train(config, tmp_path / "run", progress=False)
    assert result.metrics["gradient_variance"] is None
    assert result.metrics["view_consistency"] is None
    epochs = _epochs(tmp_path / "run")
    assert epochs[-1]["train"]["loss/mean"] < epochs[0]["train"]["loss/mean"]  # type: ignore[index]
    run = load_run(tmp_path / "run")
    assert evaluate(run, split="test", progress=False).tasks == result.metrics["tasks"]
    assert predict(run, source="digits", split="val", out=tmp_path / "p.csv", progress=False) == 16


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "umda"])
def test_every_architecture_trains_evaluates_and_predicts(name: str, tmp_path: Path) -> None:
    config = small_config(model={"architecture": name, "width": 16}, train={"epochs": 1})
    result = train(config, tmp_path / "run", progress=False, plots=False)
    run = load_run(tmp_path / "run")
    assert evaluate(run, split="test", progress=False).tasks == result.metrics["tasks"]
    assert predict(run, source="digits", split="val", out=tmp_path / "p.csv", progress=False) == 16


def test_a_balancer_needs_a_model_that_names_its_shared_parameters(tmp_path: Path) -> None:
    config, run = small_config(), RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"sgl\.balancer: expected none .*, got 'sgl'"):
        Trainer(config, nn.Linear(3, 3), small_data(), run, make_fabric(config), progress=False)


def test_scores_alone_are_kept_if_asked(tmp_path: Path) -> None:
    config = small_config(train={"keep": "scores", "epochs": 1, "linear": "mix"})
    result = train(config, tmp_path / "run", progress=False)
    assert isinstance(result.model, Mixture)
    assert read_json(tmp_path / "run" / "metrics.json", "metrics")["linear"] == result.metrics["linear"] is not None
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == [
        "config.yaml",
        "metrics.json",
        "metrics.jsonl",
        "splits.csv",
    ]

def test_the_same_seed_gives_the_same_bits_and_another_seed_others(tmp_path: Path) -> None:
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = small_config(seed=seed, train={"epochs": 1}, data={"seed": 0})
        train(config, tmp_path / name, progress=False, plots=False)
        weights[name] = (tmp_path / name / "model.safetensors").read_bytes()
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]


def test_gradient_cosines_reach_the_influence_matrix(tmp_path: Path) -> None:
    config = small_config(model={"kappa_g": 1.0}, train={"epochs": 1})
    train(config, tmp_path / "run", datasets=small_data(), progress=False)
    model = UMDA.from_pretrained(tmp_path / "run")
    cosines = model.atsb.task_cosines
    assert torch.equal(cosines.diagonal(), torch.ones(len(cosines)))
    assert bool((cosines - torch.eye(len(cosines))).any())


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    # So small a learning rate that no score gets better than the first.
    # In an epoch labels are predicted from one half.
    config = small_config(train={"epochs": 40, "patience": 2, "lr": 1e-12, "thresholds": "half"})
    train(config, tmp_path / "run", progress=False, plots=False)
    epochs = _epochs(tmp_path / "run")
    assert [epoch["best_epoch"] for epoch in epochs] == [0, 0, 0]
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["finished"]
    saved = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(value, state["best_weights"][name]) for name, value in saved.items())
    again = evaluate(load_run(tmp_path / "run"), split="val", progress=False)
    assert again.mean_score == epochs[0]["val"]["mean_score"]  # type: ignore[index]


def test_the_running_mean_of_the_weights_is_what_is_saved(tmp_path: Path) -> None:
    config = small_config(train={"epochs": 1, "ema": 0.5})
    train(config, tmp_path / "run", progress=False, plots=False)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    saved = load_run(tmp_path / "run").model.state_dict()
    for name, value in saved.items():
        assert torch.equal(value, state["average"][f"module.{name}"]), name
    assert any(not torch.equal(value, state["model"][name]) for name, value in saved.items())


def test_without_a_validation_split_the_last_weights_are_kept(tmp_path: Path) -> None:
    data = {"train": small_data()["train"]}
    result = train(small_config(), tmp_path / "run", datasets=data, progress=False)
    assert result.split == "train"
    assert _epochs(tmp_path / "run")[-1]["best_epoch"] == 1
    with pytest.raises(DataError, match="expected a split 'train', got val"):
        train(small_config(), tmp_path / "other", datasets={"val": data["train"]}, progress=False)


def test_bfloat16_and_compactly_stored_features(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    bags = [
        Bag(
            f"bag {index}",
            {"a": torch.randn(5, 4, generator=rng).half()},
            labels={"y": torch.tensor(float(index % 2))},
        )
        for index in range(12)
    ]
    dataset = BagDataset(bags, (ViewSpec("a", 4),), (TaskSpec("y", "binary"),))
    config = small_config(precision="bf16-mixed", data={"budget": 20})
    result = train(config, tmp_path / "run", datasets={"train": dataset, "val": dataset}, progress=False)
    assert math.isfinite(result.metrics["mean_score"])
    assert all(value.dtype == torch.float32 for value in result.model.state_dict().values() if value.ndim)


def test_odd_bags_and_missing_labels(tmp_path: Path) -> None:
    """Empty bags, bags of one instance, a bag beyond the budget, and batches without a single label."""
    sizes = [0, 1, 1, 200, 3, 0, 2, 7]
    rng = torch.Generator().manual_seed(0)
    bags = [
        Bag(
            f"bag {index}",
            {"a": torch.randn(size, 4, generator=rng)},
            labels={"y": torch.tensor(float(index % 2))} if index > 3 else {},
        )
        for index, size in enumerate(sizes)
    ]
    dataset = BagDataset(bags, (ViewSpec("a", 4),), (TaskSpec("y", "binary"), TaskSpec("z", "regression")))
    config = small_config(data={"budget": 4}, train={"epochs": 2})
    result = train(config, tmp_path / "run", datasets={"train": dataset, "test": dataset}, progress=False)
    assert math.isfinite(result.metrics["tasks"]["y"]["auroc"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["tasks"]["z"] == {"mae": None, "r2": None}
