"""A split measured: what comes out does not depend on how its bags are put into batches."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.small import small_config
from tests.train.bags import TASKS, VIEWS, datasets
from umda_fast.errors import DataError
from umda_fast.model import UMDA, UMDAConfig, task_losses
from umda_fast.runtime.config import DataConfig
from umda_fast.runtime.fabric import make_fabric
from umda_fast.score.collect import collect
from umda_fast.score.evaluation import evaluate_dataset
from umda_fast.score.inference import evaluating
from umda_fast.tasks import kind_of

DATA = datasets()["train"]
FABRIC = make_fabric(small_config())


def make_model() -> UMDA:
    torch.manual_seed(0)
    return UMDA(UMDAConfig(VIEWS, TASKS, width=16, heads=2, layers=1, dropout=0.5))


def flat(value: Any, prefix: str = "") -> dict[str, float]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {key: number for name, item in value.items() for key, number in flat(item, f"{prefix}/{name}").items()}


@pytest.mark.parametrize("budget", [1, 24])
def test_batches_make_no_difference(budget: int) -> None:
    model = make_model()
    whole = evaluate_dataset(model, DATA, FABRIC, DataConfig(budget=10_000))
    found = evaluate_dataset(model, DATA, FABRIC, DataConfig(budget=budget))
    assert (found.bags, found.instances) == (whole.bags, whole.instances) == (len(DATA), int(DATA.sizes.sum()))
    assert flat(found.tasks) == pytest.approx(flat(whole.tasks), rel=1e-5, nan_ok=True)
    assert found.losses == pytest.approx(whole.losses, rel=1e-5)
    assert found.calibrated_losses == pytest.approx(whole.calibrated_losses, rel=1e-5)
    assert found.view_consistency == pytest.approx(whole.view_consistency, rel=1e-5)
    for name in ("view_mass", "influence"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-5, atol=1e-6)


def test_losses_are_those_of_all_bags_at_once() -> None:
    model = make_model()
    found = collect(model, DATA, FABRIC, DataConfig(budget=24))
    expected = task_losses(TASKS, found.logits, found.labels, found.masks)
    result = evaluate_dataset(model, DATA, FABRIC, DataConfig(budget=24))
    assert result.losses == pytest.approx({name: float(loss) for name, loss in expected.items()}, rel=1e-5)
    assert result.calibrated_losses["rare"] == result.losses["rare"]  # a regression
    for task in TASKS[:2]:
        logits, labels = found.of(task)
        grid = [kind_of(task).loss(task, logits / 1.02**power, labels, None) for power in range(-300, 300)]
        assert result.calibrated_losses[task.name] == pytest.approx(float(min(grid)), rel=1e-3)
        assert result.calibrated_losses[task.name] < result.losses[task.name]
    logits, labels = found.of(TASKS[2])
    assert len(logits) == len(labels) == int(found.masks["rare"].sum()) < len(DATA)


def test_a_task_without_labels_has_no_figures() -> None:
    labelled = [index for index in range(len(DATA)) if "rare" not in DATA[index].labels]
    result = evaluate_dataset(make_model(), DATA.subset(labelled), FABRIC, DataConfig())
    assert math.isnan(result.losses["rare"])
    assert math.isnan(result.calibrated_losses["rare"])
    assert all(math.isnan(value) for value in result.tasks["rare"].values())
    assert math.isfinite(result.mean_score)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_put_back(training: bool) -> None:
    model = make_model().train(training)
    evaluate_dataset(model, DATA.subset(range(4)), FABRIC, DataConfig())
    collect(model, DATA.subset(range(4)), FABRIC, DataConfig())
    assert model.training is training
    spoiled = datasets()["train"]
    bags = [spoiled[index] for index in range(4)]
    bags[3].views["a"][0, 1] = math.inf
    bad = type(DATA)(bags, VIEWS, TASKS)
    for measure in (evaluate_dataset, collect):
        with pytest.raises(DataError, match=r"bag 'bag 3', view 'a': instance 0, feature 1 is inf"):
            measure(model, bad, FABRIC, DataConfig())
        assert model.training is training
    with evaluating(layer := nn.Dropout().train(training)):
        assert not layer.training
    assert layer.training is training
