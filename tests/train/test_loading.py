"""Run directories that were never trained, read back."""

import re
from pathlib import Path

import pytest
import torch

from tests.small import small_config, small_data
from umda_fast.errors import DataError
from umda_fast.model import Ensemble
from umda_fast.runtime.config import dump_config
from umda_fast.runtime.rundir import RunDirectory, save_model
from umda_fast.train import RunConfig, build_model, load_ensemble, load_run, run_config

BASELINE = {"architecture": "gated_attention", "view": "pixels", "width": 16, "hidden": 8}


def make_run(path: Path, config: RunConfig, split: str = "train") -> Path:
    path.mkdir()
    run = RunDirectory(path)
    dump_config(config, run.config)
    save_model(build_model(config, small_data()[split]), path)
    return path


@pytest.mark.parametrize("model", [{}, BASELINE])
def test_configuration_and_weights_come_back(model: dict[str, object], tmp_path: Path) -> None:
    config = small_config(seed=4, model=model, sgl={"balancer": "none"})
    place = make_run(tmp_path / "run", config)
    torch.manual_seed(0)
    expected = build_model(config, small_data()["train"])
    torch.manual_seed(0)
    save_model(build_model(config, small_data()["train"]), place)
    run = load_run(place)
    assert run.config == config
    assert run.directory == place
    assert type(run.model) is type(expected)
    assert not run.model.training
    found = run.model.state_dict()
    assert found.keys() == expected.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none: no such run directory"):
        load_run(tmp_path / "none")
    place = make_run(tmp_path / "run", small_config())
    (place / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(DataError, match="run: the model cannot be read"):
        load_run(place)
    (place / "config.json").unlink()
    with pytest.raises(DataError, match=r"run: the model cannot be read: .*config\.json"):
        load_run(place)
    (place / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"is not a finished run directory \(model\.safetensors is missing\)"):
        load_run(place)


def test_several_runs_are_one(tmp_path: Path) -> None:
    places = [make_run(tmp_path / name, small_config()) for name in ("a", "b")]
    run = load_ensemble(places)
    assert isinstance(run.model, Ensemble)
    assert [member.directory for member in run.members] == places
    assert run.directory == places[0]
    other = make_run(tmp_path / "c", small_config(model=BASELINE, sgl={"balancer": "none"}))
    config = other / "config.json"
    text = re.sub(r'"has_nine"', '"has_ten"', config.read_text())
    assert text != config.read_text()
    config.write_text(text)
    with pytest.raises(DataError, match=r"a, .*c: "):
        load_ensemble([places[0], other])


def test_a_run_is_resumed_as_it_was_configured_but_for_what_is_said(tmp_path: Path) -> None:
    place = make_run(tmp_path / "run", small_config(seed=4, train={"lr": 0.5}))
    found = run_config(place, {"train": {"epochs": 9}})
    assert (found.seed, found.train.lr, found.train.epochs) == (4, 0.5, 9)
    with pytest.raises(DataError, match=r"none: holds no run to resume \(no config\.yaml\)"):
        run_config(tmp_path / "none", {})
