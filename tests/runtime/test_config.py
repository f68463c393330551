from pathlib import Path

import pytest
import yaml

from umda_fast.errors import DataError
from umda_fast.model.config import BEFORE_2
from umda_fast.runtime.config import (
    ConfigError,
    RunConfig,
    as_dict,
    complete_run_config,
    dump_config,
    load_config,
    load_run_config,
    make_config,
)


def test_an_empty_configuration_is_whole() -> None:
    config = make_config()
    assert config.data.source == "digits"
    assert config.model["architecture"] == "umda"
    assert "views" not in config.model
    assert "tasks" not in config.model


def test_yaml_then_values_then_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: 3\nmodel: {layers: 4}\ntrain:\n  lr: 1e-3\n  epochs: 7\nsgl:\n")
    config = load_config(
        file, ["model.layers=3", "train.clip=0", "data.options={train_bags: 5}"], {"train": {"epochs": 9}}
    )
    assert (config.seed, config.model["layers"], config.train.lr) == (3, 3, 1e-3)
    assert (config.train.epochs, config.train.clip) == (9, 0.0)
    assert config.data.options == {"train_bags": 5}
    assert config.sgl == RunConfig().sgl


def test_every_value_is_written_and_read_back(tmp_path: Path) -> None:
    assert load_config(overrides=["train.linear=off"]).train.linear == "off"  # which YAML reads as false
    config = load_config(overrides=["model.layers=3", "penalties.entropy=0.5"])
    dump_config(config, tmp_path / "config.yaml")
    written = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert written == as_dict(config)
    assert written["train"]["weight_decay"] == config.train.weight_decay
    assert load_config(tmp_path / "config.yaml") == config


def test_a_run_of_an_earlier_version_goes_on_as_it_began(tmp_path: Path) -> None:
    older = as_dict(make_config({"train": {"epochs": 20, "ema": 0.0}, "data": {"budget": 512}}))
    missing = (("train", "select"), ("train", "steps"), ("train", "linear"), ("train", "thresholds"), ("data", "bags"))
    for section, key in missing:
        del older[section][key]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(older))
    run = load_run_config(file, {"train": {"epochs": 30}})
    assert (run.train.select, run.train.epochs, run.train.steps) == ("mean_score", 30, None)
    assert (run.train.linear, run.train.thresholds) == ("beside", "half")
    assert (run.train.ema, run.data.bags, run.data.budget) == (0.0, None, 512)
    assert load_config(file).train.select == "skill"  # a user's file that leaves out the key means the default
    assert complete_run_config(older)["train"]["select"] == "mean_score"
    dump_config(run, file)
    assert load_run_config(file) == run


def test_a_model_of_an_earlier_version_is_that_model(tmp_path: Path) -> None:
    """Options that came later had one value then, whatever is their default now; other architectures have none."""
    older = as_dict(make_config({"model": {"layers": 3}}))
    for name in BEFORE_2:
        del older["model"][name]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(older))
    found = load_run_config(file).model
    assert {name: found[name] for name in BEFORE_2} == BEFORE_2
    assert found["layers"] == 3
    assert complete_run_config(older)["model"] == found
    assert load_config(file) == make_config({"model": {"layers": 3}})
    plain = {"model": {"architecture": "mean_pooling"}}
    assert set(complete_run_config(plain)["model"]) == set(make_config(plain).model)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.layer=3", ["model.layer", "unknown key", "'model.layers'"]),
        ("lr=0.1", ["lr", "unknown key", "'train.lr'"]),
        ("train.epochs=many", ["train.epochs", "integer", "'many'"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "got 0"]),
        ("train.lr=-1", ["train.lr", "greater than 0", "got -1"]),
        ("train.lr=.nan", ["train.lr", "finite", "nan"]),
        ("penalties.entropi=1", ["penalties.entropi", "unknown key", "'penalties.entropy'"]),
        ("device=gpu", ["device", "'auto', 'cpu' or 'cuda'", "'gpu'"]),
        ("precision=16-mixed", ["precision", "'bf16-mixed'", "'16-mixed'"]),
        ("model.architecture=umd", ["model.architecture", "one of umda, mean_pooling", "'umd'"]),
        ("train=3", ["train", "got 3"]),
        ("seed.x=3", ["seed", "dict"]),
        ("model.layers", ["KEY=VALUE"]),
        ("model.layers=[", ["not YAML"]),
        ("seed=-1", ["seed", "greater than or equal to 0"]),
    ],
)
def test_what_is_wrong_is_named(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=[override])
    for part in parts:
        assert part in str(caught.value)


def test_all_problems_at_once_and_the_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("seed: x\ntrain: {epochs: -1}\nmodel: {width: wide}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert str(file) in message
    for key in ("seed", "train.epochs", "model.width"):
        assert key in message


@pytest.mark.parametrize("content", ["a: [", "- 1\n- 2\n", b"\xff\xfe\x00"])
def test_a_file_that_is_no_configuration(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(file)
    with pytest.raises(DataError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")


def test_the_baseline_has_its_own_options() -> None:
    config = load_config(overrides=["model.architecture=gated_attention", "model.view=pixels"])
    assert config.model["view"] == "pixels"
    with pytest.raises(ConfigError, match=r"model\.layers: unknown key"):
        load_config(overrides=["model.architecture=gated_attention", "model.layers=3"])
