"""Numbers known of a bag beside its instances: from arrays and files to batches and models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from umda_fast.data import BagDataset, Metadata, concat, load_source
from umda_fast.data.adapt import adapt_dataset
from umda_fast.errors import DataError
from umda_fast.model import MetadataSpec
from umda_fast.train import evaluate, load_run, make_config, train

BAGS = 24
AGE = np.where(np.arange(BAGS) % 5 == 4, np.nan, 40.0 + np.arange(BAGS))


def arrays(seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    ptr = np.arange(BAGS + 1) * 3
    return {"x": rng.normal(size=(3 * BAGS, 4)).astype(np.float32)}, ptr, {"y": np.arange(BAGS) % 2}


def dataset(**metadata: np.ndarray) -> BagDataset:
    views, ptr, labels = arrays()
    return BagDataset.from_arrays(views, ptr, labels, metadata=metadata, name="made up")


def test_they_follow_the_bags() -> None:
    data = dataset(age=AGE, site=np.arange(BAGS) % 3)
    part = data.subset([7, 4, 0]).subset([1, 0])
    assert part.metadata is not None
    assert part.metadata.names == ("age", "site")
    np.testing.assert_array_equal(part.metadata.values, [[np.nan, 1], [47, 1]])
    batch = part.collate([part[0], part[1]])
    assert batch.metadata is not None
    torch.testing.assert_close(batch.metadata, torch.tensor([[torch.nan, 1], [47, 1]]), equal_nan=True)
    assert torch.equal(batch.inputs()["metadata"][1], batch.metadata[1])
    whole = concat([part, data.subset([2])], "both")
    assert whole.metadata is not None
    np.testing.assert_array_equal(whole.metadata.values[:, 0], [np.nan, 47, 42])
    assert concat([part, part.subset([]).with_metadata(None)], "mixed").metadata is None


def test_without_metadata_models_are_not_given_any() -> None:
    views, ptr, labels = arrays()
    data = BagDataset.from_arrays(views, ptr, labels)
    assert data.metadata is None
    assert "metadata" not in data.collate([data[0]]).inputs()


def test_means_are_those_of_what_is_known() -> None:
    given = dataset(age=AGE, same=np.full(BAGS, 7.0), nothing=np.full(BAGS, np.nan)).metadata
    assert given is not None
    known = AGE[~np.isnan(AGE)]
    expected = (MetadataSpec("age", known.mean(), known.std()), MetadataSpec("same", 7.0, 1.0), MetadataSpec("nothing"))
    assert given.specs() == expected


def test_another_order_and_missing_ones_are_made_to_fit() -> None:
    data = dataset(site=np.arange(BAGS), age=AGE)
    wanted = (MetadataSpec("age"), MetadataSpec("weight"))
    for views in (data.views, data.views[:1]):
        adapted = adapt_dataset(data, views, data.tasks, wanted).metadata
        assert adapted is not None
        np.testing.assert_array_equal(adapted.values[:, 0], AGE)
        assert np.isnan(adapted.values[:, 1]).all()
    assert adapt_dataset(data, data.views, data.tasks).metadata is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros(3), r"metadata 'age': expected numbers \[24\], one per bag, got float64 \[3\]"),
        (np.array(["a"] * BAGS), r"metadata 'age': expected numbers \[24\]"),
        (np.full(BAGS, np.inf), "metadata 'age': expected finite numbers"),
    ],
)
def test_bad_values_are_named(value: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataset(age=value)
    with pytest.raises(ValueError, match="metadata: expected 24 rows, one per bag, got 2"):
        dataset(age=AGE).with_metadata(Metadata(("age",), np.zeros((2, 1))))


def save(path: Path, **more: np.ndarray) -> str:
    views, ptr, labels = arrays()
    np.savez(path, X=views["x"], ptr=ptr, y=labels["y"], **more)
    return str(path)


def test_a_file_may_hold_them(tmp_path: Path) -> None:
    matrix = np.stack([AGE, np.arange(BAGS)], 1)
    source = save(tmp_path / "a.npz", metadata=matrix, metadata_names=np.array(["age", "site"]))
    whole = load_source(source).whole.metadata
    assert whole is not None
    assert whole.names == ("age", "site")
    np.testing.assert_array_equal(whole.values, matrix)
    unnamed = load_source(save(tmp_path / "b.npz", metadata=matrix)).train.metadata
    assert unnamed is not None
    assert unnamed.names == ("metadata 0", "metadata 1")
    with pytest.raises(DataError, match=r"metadata_names: expected \[2\]"):
        load_source(save(tmp_path / "c.npz", metadata=matrix, metadata_names=np.array(["age"])))
    with pytest.raises(DataError, match="metadata_names: expected beside metadata"):
        load_source(save(tmp_path / "d.npz", metadata_names=np.array(["age"])))


def test_a_run_uses_and_remembers_them(tmp_path: Path) -> None:
    """The label is in the metadata and nowhere else."""
    views, ptr, labels = arrays()
    told = np.where(labels["y"] > 0, 3.0, -3.0)
    data = BagDataset.from_arrays(views, ptr, labels, metadata={"told": told})
    parts = {"train": data, "test": data}
    options = {"width": 16, "heads": 2, "layers": 1, "dropout": 0.0}
    config = make_config({"model": options, "train": {"epochs": 40, "lr": 0.01}, "device": "cpu"})
    result = train(config, tmp_path / "run", datasets=parts, progress=False, plots=False)
    assert result.metrics["tasks"]["y"]["auroc"] == 1.0
    again = load_run(tmp_path / "run")
    assert again.model.config.metadata == (MetadataSpec("told", float(told.mean()), float(told.std())),)
    lying = data.with_metadata(Metadata(("told",), -told[:, None]))
    assert evaluate(again, datasets={"test": lying}, progress=False).tasks["y"]["auroc"] < 0.5
    unknown = data.with_metadata(None)  # all missing: the model says so, and predicts
    assert 0.0 <= evaluate(again, datasets={"test": unknown}, progress=False).tasks["y"]["auroc"] <= 1.0
