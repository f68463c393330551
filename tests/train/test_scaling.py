"""Features standardised inside the model: right figures, kept with the weights, invisible to other units."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.small import small_config
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.model import UMDA, FeatureEncoder, UMDAConfig
from umda_fast.train import load_run, train
from umda_fast.train.scaling import feature_moments, standardize_inputs


def make_bags(scale: float = 1.0, bags: int = 40) -> BagDataset:
    rng = np.random.default_rng(0)
    ptr = np.arange(bags + 1) * 3
    a, b = rng.normal(5.0, 2.0, (ptr[-1], 4)), rng.normal(size=(ptr[-1], 2))
    mask = rng.random((ptr[-1], 2)) < 0.8
    mask[:, 0] |= ~mask.any(1)
    views = {"a": a * [1.0, 1.0, 1.0, scale], "b": b}
    return BagDataset.from_arrays(views, ptr, {"y": rng.integers(0, 2, bags)}, mask=mask, name="made up")


def rows(data: BagDataset, view: str, column: int) -> torch.Tensor:
    return torch.cat([data[i].views[view][data[i].mask[:, column]] for i in range(len(data))]).double()


def test_moments_are_those_of_the_present_instances() -> None:
    data = make_bags()
    moments = feature_moments(data)
    for column, view in enumerate(("a", "b")):
        mean, std = moments[view]
        torch.testing.assert_close(mean, rows(data, view, column).mean(0))
        torch.testing.assert_close(std, rows(data, view, column).std(0, correction=0))


def test_no_more_is_read_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = make_bags(), []
    load = BagDataset.__getitem__
    monkeypatch.setattr(BagDataset, "__getitem__", lambda self, i: read.append(i) or load(self, i))
    feature_moments(data, instances=10)
    assert len(read) == 4  # of three instances each


def test_constant_features_are_centred_and_encoders_of_the_user_left_alone() -> None:
    data = make_bags(scale=0.0)
    config = UMDAConfig(data.views, data.tasks, width=16, heads=2)
    own = nn.Linear(2, 16)
    model = UMDA(config, {"b": own})
    standardize_inputs(model, data)
    encoder = model.encoders.encoders[0]
    assert isinstance(encoder, FeatureEncoder)
    scaled = (rows(data, "a", 0).float() - encoder.shift) / encoder.scale
    torch.testing.assert_close(scaled.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled[:, :3].std(0, correction=0), torch.ones(3))
    assert scaled[:, 3].abs().max() == 0


def test_units_of_a_feature_do_not_matter_and_the_scaling_is_kept(tmp_path: Path) -> None:
    scores = []
    for name, scale in (("metres", 1.0), ("millimetres", 1024.0)):
        config = small_config(train={"epochs": 2}, model={"width": 16, "heads": 2})
        data = make_bags(scale)
        result = train(config, tmp_path / name, datasets={"train": data}, progress=False, plots=False)
        model = load_run(tmp_path / name).model
        torch.testing.assert_close(model.encoders.encoders[0].shift, feature_moments(data)["a"][0].float())
        scores.append(result.metrics["tasks"])
    # 1024 is a power of two: nothing rounds otherwise, and the model is the same to the bit.
    assert scores[0] == scores[1]


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    config = small_config(data={"standardize": False}, train={"epochs": 1}, model={"width": 16, "heads": 2})
    train(config, tmp_path / "run", datasets={"train": make_bags()}, progress=False, plots=False)
    assert load_run(tmp_path / "run").model.encoders.encoders[0].shift.abs().max() == 0


def test_only_the_views_that_are_named() -> None:
    data = make_bags()
    model = UMDA(UMDAConfig(data.views, data.tasks, width=16, heads=2))
    standardize_inputs(model, data, only=["b"])
    first, second = model.encoders.encoders
    assert isinstance(first, FeatureEncoder)
    assert isinstance(second, FeatureEncoder)
    assert (first.shift == 0).all()
    assert (first.scale == 1).all()
    torch.testing.assert_close(second.shift, rows(data, "b", 1).mean(0).float())
    with pytest.raises(DataError, match=r"data.standardize: expected views among a, b, got 'c'"):
        standardize_inputs(model, data, only=["c"])
