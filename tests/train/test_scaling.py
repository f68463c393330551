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
from umda_fast.runtime.rundir import read_metrics
from umda_fast.train import load_run, train
from umda_fast.train.scaling import feature_moments, scale_inputs, view_scalings


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
    assert scale_inputs(model, data, True) == ["view a: 4 features standardised, 1 constant"]
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
    scale_inputs(model, data, ["b"])
    first, second = model.encoders.encoders
    assert isinstance(first, FeatureEncoder)
    assert isinstance(second, FeatureEncoder)
    assert (first.shift == 0).all()
    assert (first.scale == 1).all()
    torch.testing.assert_close(second.shift, rows(data, "b", 1).mean(0).float())
    with pytest.raises(DataError, match=r"data.standardize: expected views among a, b, got 'c'"):
        scale_inputs(model, data, ["c"])


def made_up(instances: int = 600, seed: int = 0) -> dict[str, np.ndarray]:
    """Views of every kind that is told apart."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.05, (instances, 30)) * rng.choice([-1.0, 1.0], 30)  # hashed words have signs
    counts /= np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1.0)
    plain = rng.normal(3.0, 2.0, (instances, 12))
    plain[:, 0] = 1e6 * (1 + 1e-8 * rng.normal(size=instances))  # varies by rounding only
    plain[:, 1] = np.exp(3 * rng.normal(size=instances))
    plain[:, 2] = rng.random(instances) < 0.01  # rare, and not negligible
    return {"counts": counts, "plain": plain, "pixels": (rng.random((instances, 9)) < 0.5) * rng.random((instances, 9))}


def bags_of(views: dict[str, np.ndarray], labels: np.ndarray | None = None) -> BagDataset:
    instances = len(next(iter(views.values())))
    labels = np.arange(instances) % 2 if labels is None else labels
    return BagDataset.from_arrays(views, None, {"y": labels}, name="made up")


def test_what_is_decided_by_the_features() -> None:
    views = made_up()
    counts, plain, pixels = view_scalings(bags_of(views))
    x = views["counts"]
    assert counts.sparse
    assert not counts.standardised
    np.testing.assert_allclose(counts.scale, np.sqrt((x[x != 0] ** 2).mean()), rtol=1e-6)
    assert (counts.shift == 0).all()
    assert str(counts) == f"view counts: 30 features, {(x == 0).mean():.0%} zeros: divided by {counts.scale[0]:.3g}, " \
        "not standardised"
    assert str(plain) == "view plain: 12 features standardised, 1 constant"
    y = views["plain"]
    np.testing.assert_allclose(plain.shift[1:], y[:, 1:].mean(0), rtol=1e-5)
    np.testing.assert_allclose(plain.scale[1:], y[:, 1:].std(0), rtol=1e-5)
    assert plain.scale[0] == 1
    assert str(pixels) == "view pixels: 9 features standardised"


def test_a_large_view_is_judged_by_some_of_its_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("umda_fast.train.scaling.SAMPLE", 120)
    (counts, plain, _) = view_scalings(bags_of(made_up()))
    assert (len(counts.rows), len(plain.rows)) == (4, 10)


def test_a_view_that_nobody_has() -> None:
    mask = np.ones((40, 2), dtype=bool)
    mask[:, 1] = False
    views = {"a": np.random.default_rng(0).normal(size=(40, 3)), "b": np.full((40, 4), np.nan)}
    data = BagDataset.from_arrays(views, None, {"y": np.arange(40) % 2}, mask=mask, name="made up")
    model = UMDA(UMDAConfig(data.views, data.tasks, width=16, heads=2, whole_inputs=True))
    assert scale_inputs(model, data)[1] == "view b: 4 features standardised"
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("rows", ["one length", "any length"])
def test_the_scaling_of_rows(rows: str) -> None:
    x = np.random.default_rng(0).normal(size=(300, 20))
    if rows == "one length":
        x = np.abs(x) * (np.random.default_rng(1).random(x.shape) < 0.15)
        x[:, 0] += 1e-3  # no row is empty
        x /= np.linalg.norm(x, axis=1, keepdims=True)
    data = bags_of({"x": x})
    model = UMDA(UMDAConfig(data.views, data.tasks, width=16, heads=2, whole_inputs=True))
    scale_inputs(model, data)
    (encoder,) = model.encoders.encoders
    read = (encoder.row_statistics(encoder.standardized(torch.from_numpy(x).float())) - encoder.row_shift)
    read = read / encoder.row_scale
    torch.testing.assert_close(read.mean(0), torch.zeros(2), atol=1e-3, rtol=0)
    if rows == "any length":
        torch.testing.assert_close(read.std(0), torch.ones(2), atol=0.01, rtol=0)
    else:
        assert read[:, 1].abs().max() < 0.01, "what differs by rounding only must not be blown up"


def test_the_run_says_what_was_decided(tmp_path: Path) -> None:
    config = small_config(data={"standardize": "auto"}, train={"epochs": 1}, model={"width": 16, "heads": 2})
    result = train(config, tmp_path / "run", datasets={"train": bags_of(made_up(60))}, progress=False, plots=False)
    (record,) = [line for line in read_metrics(tmp_path / "run" / "metrics.jsonl") if line["kind"] == "inputs"]
    assert record["scaling"] == result.metrics["data"]["scaling"]
    assert [line.split(":")[0] for line in record["scaling"]] == ["view counts", "view plain", "view pixels"]
