"""Bins of features from the training instances: the right edges, kept with the weights, invisible to other units."""

from pathlib import Path

import numpy as np
import torch

from tests.small import small_config
from umda_fast.data import BagDataset
from umda_fast.model import UMDA, UMDAConfig
from umda_fast.train import load_run, train
from umda_fast.train.quantiles import feature_quantiles, fit_bins


def make_bags(scale: float = 1.0, bags: int = 40) -> BagDataset:
    rng = np.random.default_rng(0)
    ptr = np.arange(bags + 1) * 3
    a, b = rng.normal(5.0, 2.0, (ptr[-1], 4)), rng.normal(size=(ptr[-1], 2))
    a[:, 3] = 7.0
    mask = rng.random((ptr[-1], 2)) < 0.8
    mask[:, 0] |= ~mask.any(1)
    b[~mask[:, 1]] = np.nan
    return BagDataset.from_arrays({"a": a * scale, "b": b}, ptr, {"y": rng.integers(0, 2, bags)}, mask=mask)


def test_edges_are_quantiles_of_the_present_instances() -> None:
    data = make_bags()
    for column, view in enumerate(("a", "b")):
        rows = torch.cat([data[i].views[view][data[i].mask[:, column]] for i in range(len(data))]).double()
        edges, least = feature_quantiles(data, view, 4)
        torch.testing.assert_close(edges[:, 0], rows.amin(0))
        torch.testing.assert_close(edges[:, 2], torch.quantile(rows, 0.5, dim=0))
        torch.testing.assert_close(edges[:, 4], rows.amax(0))
        assert (least > 0).all()


def test_no_more_is_read_than_asked() -> None:
    data = make_bags()
    few, _ = feature_quantiles(data, "a", 2, instances=10)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()[:4]  # of three each
    rows = torch.cat([data[i].views["a"][data[i].mask[:, 0]] for i in order]).double()
    torch.testing.assert_close(few[:, 2], rows.amax(0))


def test_an_encoder_of_the_user_is_left_alone() -> None:
    data = make_bags()
    model = UMDA(UMDAConfig(data.views, data.tasks, width=16, heads=2, bins=3), {"a": torch.nn.Linear(4, 16)})
    fit_bins(model, data)
    own = model.encoders.encoders[1].bins
    torch.testing.assert_close(own.lower, feature_quantiles(data, "b", 3)[0][:, :3].float())


def test_units_of_a_feature_do_not_matter_and_the_bins_are_kept(tmp_path: Path) -> None:
    scores = []
    for name, scale in (("metres", 1.0), ("millimetres", 1024.0)):
        config = small_config(train={"epochs": 2}, model={"width": 16, "heads": 2, "bins": 4})
        data = make_bags(scale)
        result = train(config, tmp_path / name, datasets={"train": data}, progress=False, plots=False)
        bins = load_run(tmp_path / name).model.encoders.encoders[0].bins
        torch.testing.assert_close(bins.lower, feature_quantiles(data, "a", 4)[0][:, :4].float())
        scores.append(result.metrics["tasks"])
    # 1024 is a power of two: nothing rounds otherwise, and the model is the same to the bit, but for the constant
    # feature, whose bins are of width 1 in any unit.
    assert scores[0] == scores[1]
