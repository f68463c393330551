"""The data of a run by itself: what it trains on, what its configuration keeps of that, and what it is measured on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.small import DATA, small_config, small_data
from umda_fast.data import BagDataset, load_folds, load_source
from umda_fast.errors import DataError
from umda_fast.model import UMDA, UMDAConfig
from umda_fast.train import Run, RunConfig
from umda_fast.train.data import (
    check_same_split,
    data_seed,
    load_configured_folds,
    load_data,
    model_data,
    training_data,
)


def same_bags(found: BagDataset, expected: BagDataset) -> bool:
    assert found.names == expected.names
    return all(
        torch.equal(found[i].views[view], value) for i in range(len(found)) for view, value in expected[i].views.items()
    )


def test_the_seed_of_the_data_is_the_run_s_unless_it_has_its_own() -> None:
    assert data_seed(small_config(seed=3)) == 3
    assert data_seed(small_config(seed=3, data={"seed": 5})) == 5
    first, same, other = (load_data(small_config(seed=seed, data={"seed": data})) for seed, data in
                          ((0, 7), (1, 7), (0, 8)))  # fmt: skip
    for split in first:
        assert same_bags(same[split], first[split])
    assert not same_bags(other["train"], first["train"])


def test_a_run_keeps_what_its_source_had_to_choose() -> None:
    source = replace(load_source("digits", seed=0, **DATA), fixed={"chosen": "b"})
    config, datasets = training_data(small_config(), source)
    assert datasets is source
    assert config.data.options == {**DATA, "chosen": "b"}
    config, datasets = training_data(small_config(), dict(source))  # plain datasets say nothing of the kind
    assert config == small_config()


def test_what_cannot_be_trained_on_is_said() -> None:
    data = small_data()
    with pytest.raises(DataError, match="datasets: expected a split 'train', got val, test"):
        training_data(small_config(), {"val": data["val"], "test": data["test"]})
    unlabelled = BagDataset.from_arrays({"a": np.zeros((6, 2))}, [0, 3, 6], {}, name="plain")
    with pytest.raises(DataError, match="plain: expected labels of at least one task, got none"):
        training_data(small_config(), {"train": unlabelled})


def test_folds_are_those_of_the_configured_source(capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(seed=4, data={"seed": 2})
    found = list(load_configured_folds(config, 3, repeats=2))
    expected = list(load_folds("digits", folds=3, repeats=2, seed=2, **DATA))
    assert len(found) == len(expected) == 6
    for here, there in zip(found, expected, strict=True):
        assert same_bags(here["test"], there["test"])
    assert capsys.readouterr().err == ""


def test_what_was_left_out_is_told_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BagDataset, "skipped", ("bag 3: no such file",))
    load_data(small_config())
    assert capsys.readouterr().err == "skipped: bag 3: no such file\n"
    assert len(list(load_configured_folds(small_config(), 2))) == 2
    assert capsys.readouterr().err == "skipped: bag 3: no such file\n"


def make_run(config: RunConfig, name: str = "one", members: tuple[Run, ...] = ()) -> Run:
    data = small_data()["train"]
    return Run(Path(name), config, UMDA(UMDAConfig(data.views, data.tasks, width=16, heads=2)), members)


def test_a_model_is_given_the_splits_of_its_run() -> None:
    run, data = make_run(small_config()), load_data(small_config())
    where: dict[str, Any] = {"source": None, "format": None, "device": "cpu"}
    for split in ("train", "val", "test"):
        assert same_bags(model_data(run, datasets=None, split=split, **where)[0], data[split])
    assert same_bags(model_data(run, datasets=None, split=None, **where)[0], data.whole)
    with pytest.raises(DataError, match="digits: expected a split among train, val, test, all, new, got 'dev'"):
        model_data(run, datasets=None, split="dev", **where)
    mine = {"a": data["val"], "b": data["test"].subset(range(3))}
    found, fabric = model_data(run, datasets=mine, split=None, **where)
    assert found.names == [*data["val"].names, *data["test"].names[:3]]
    assert fabric.device.type == "cpu"
    with pytest.raises(DataError, match="datasets: expected a split among a, b, got 'test'"):
        model_data(run, datasets=mine, split="test", **where)


@pytest.mark.parametrize(
    ("name", "data"), [("seed", {"seed": 9}), ("options", {"options": {**DATA, "train_bags": 41}})]
)
def test_members_of_an_ensemble_must_share_their_split(name: str, data: dict[str, Any]) -> None:
    first = make_run(small_config(seed=1, data={"seed": 0}))
    same = make_run(small_config(seed=2, data={"seed": 0}), "two")
    other = make_run(small_config(seed=3, data={"seed": 0, **data}), "three")
    check_same_split(make_run(first.config, members=(first, same)))
    with pytest.raises(DataError, match=rf"^three: data\.{name}: expected .* as in one"):
        check_same_split(make_run(first.config, members=(first, same, other)))


def test_what_was_guessed_of_a_source_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["who,image,y"]
    for index in range(24):
        torch.save(torch.full((2, 3), float(index)), tmp_path / f"s{index}.pt")
        rows.append(f"P{index // 2},s{index},{'ab'[index % 2]}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    config = small_config(data={"source": str(tmp_path), "options": {}})
    for use in (lambda: load_data(config), lambda: next(load_configured_folds(config, 2))):
        use()
        said = capsys.readouterr().err
        assert "note: bags are named by the column 'image', whose values are their names" in said
        assert "note: column 'who' looks like an identifier; " in said
