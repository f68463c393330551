"""Few-shot studies: which bags are drawn, and what comes of them."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.command_line import call
from tests.small import small_config
from tests.train.cohort import Cohort, cohort_config
from tests.written import read_json
from umda_fast.cli.render import make_console, shots_table
from umda_fast.data import BagDataset, Splits, load_folds
from umda_fast.errors import DataError
from umda_fast.runtime.config import RunConfig
from umda_fast.studies import few_shot
from umda_fast.studies.shots import draw_shots


def made(labels: dict[str, Any], groups: list[str] | None = None, **more: Any) -> Splits:
    """All bags are for training."""
    count = len(next(iter(labels.values())))
    whole = BagDataset.from_arrays({"x": np.ones((count, 2))}, labels=labels, name="made", **more).with_groups(groups)
    empty = whole.subset([])
    return Splits("made", "", whole, empty, empty, whole, groups=groups)


class TestDraw:
    def test_so_many_of_each_class(self) -> None:
        grade = np.array(list("aabbbbcccccccc"))
        split = made({"grade": grade})
        for count in (1, 2):
            rows = draw_shots(split, count, seed=0)
            assert {name: int((grade[rows] == name).sum()) for name in "abc"} == dict.fromkeys("abc", count)
        assert [int((grade[draw_shots(split, 5, 0)] == name).sum()) for name in "abc"] == [2, 4, 5]

    def test_a_smaller_draw_is_part_of_a_larger_one(self) -> None:
        split = made({"y": [0, 1] * 20})
        draws = [set(draw_shots(split, count, 3, fold=1).tolist()) for count in (1, 2, 4, 8)]
        assert draws[0] < draws[1] < draws[2] < draws[3]

    def test_other_seeds_and_folds_draw_others(self) -> None:
        split = made({"y": [0, 1] * 50})
        draws = {tuple(draw_shots(split, 4, seed, fold).tolist()) for seed in range(3) for fold in range(3)}
        assert len(draws) == 9
        assert draw_shots(split, 4, 2, 1).tolist() == draw_shots(split, 4, 2, 1).tolist()

    def test_patients_first(self) -> None:
        """Bags of one patient are not two shots as long as there are others."""
        groups = [f"patient {row // 4}" for row in range(32)]
        split = made({"y": [row // 16 for row in range(32)]}, groups)
        rows = draw_shots(split, 4, 0)
        assert len({groups[row] for row in rows}) == 8
        assert len(draw_shots(split, 6, 0)) == 12

    def test_several_tasks_and_labels(self) -> None:
        rng = np.random.default_rng(0)
        genes = (rng.random((60, 3)) < 0.3).astype(float)
        labels = {"y": rng.integers(0, 2, 60), "genes": genes, "age": rng.random(60)}
        split = made(labels, kinds={"genes": "multilabel", "age": "regression"})
        rows = draw_shots(split, 2, 0)
        assert len(rows) <= 2 * (2 + 3)
        assert all(int((labels["y"][rows] == c).sum()) >= 2 for c in (0, 1))
        assert (labels["genes"][rows].sum(0) >= 2).all()

    def test_a_label_that_is_missing_is_of_no_class(self) -> None:
        split = made({"y": [0.0, 1.0, np.nan, np.nan]})
        assert draw_shots(split, 4, 0).tolist() == [0, 1]

    def test_nothing_but_numbers(self) -> None:
        with pytest.raises(DataError, match=r"made: shots: expected a task with classes .*, got regression"):
            draw_shots(made({"age": np.arange(30) + 0.5}), 1, 0)


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, dict[str, Any]]:
    place = tmp_path_factory.mktemp("shots")
    cohort = Cohort(place / "bags", 24)
    cohort.write()
    config = cohort_config(cohort.root)
    return config, place / "out", few_shot(config, place / "out", [4, 1], folds=3, progress=False)


def test_every_run_is_trained_on_its_draw(study: tuple[RunConfig, Path, dict[str, Any]]) -> None:
    config, out, result = study
    assert [found["shots"] for found in result["results"]] == [1, 4]
    assert [found["bags"] for found in result["results"]] == [{"min": 2, "max": 2}, {"min": 8, "max": 8}]
    assert read_json(out / "shots.json", "shots")["results"] == result["results"]
    tested = {}
    for shots in (1, 4):
        for number, fold in enumerate(load_folds(config.data.source, folds=3, seed=config.seed)):
            with open(out / f"shots-{shots}" / f"repeat-0-fold-{number}" / "splits.csv", newline="") as stream:
                said = {row["bag"]: row["split"] for row in csv.DictReader(stream)}
            trained = [bag for bag, split in said.items() if split == "train"]
            assert sorted(int(bag[1:]) % 2 for bag in trained) == [0] * shots + [1] * shots
            assert "val" not in said.values()
            tested[shots, number] = sorted(bag for bag, split in said.items() if split == "test")
            assert tested[shots, number] == sorted(fold.test.names)
        figures = result["results"][shots // 4]["tasks"]["y"]["auroc"]
        assert figures["folds"] == 3
    assert [tested[1, number] for number in range(3)] == [tested[4, number] for number in range(3)]


def test_it_is_gone_on_with(study: tuple[RunConfig, Path, dict[str, Any]]) -> None:
    config, out, result = study
    weights = out / "shots-1" / "repeat-0-fold-0" / "metrics.json"
    before = weights.stat().st_mtime_ns
    assert few_shot(config, out, [1, 4], folds=3, progress=False)["results"] == result["results"]
    assert weights.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"holds a few-shot study with shots \[1, 4\]; choose another --out"):
        few_shot(config, out, [1, 2], folds=3, progress=False)
    with pytest.raises(DataError, match="holds a few-shot study with another configuration"):
        few_shot(replace(config, seed=9), out, [1, 4], folds=3, progress=False)


@pytest.mark.parametrize(
    ("shots", "line"),
    [
        ("0", "shots: expected distinct whole numbers of at least 1, got 0"),
        ("inf", "shots: expected whole numbers, got inf"),
        ("2,2", "shots: expected distinct whole numbers of at least 1, got 2, 2"),
        ("1.5", "shots: expected whole numbers, got 1.5"),
        ("one", "shots: expected numbers with commas between them, got 'one'"),
    ],
)
def test_wrong_numbers_are_one_line(
    study: tuple[RunConfig, Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    shots: str,
    line: str,
) -> None:
    source = study[0].data.source
    assert call("crossval", "--data", source, "--shots", shots, "--out", tmp_path / "out", "-q") == 2
    assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_bags_of_a_seed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shots: expected data of files"):
        few_shot(small_config(), tmp_path / "out", [1], folds=2, progress=False)


def test_the_table(study: tuple[RunConfig, Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    make_console().print(shots_table(study[2]))
    said = capsys.readouterr().out
    assert "bags of each class, 3 folds x 1 repeats" in " ".join(said.split())
    assert "±" in said
    (line,) = (line for line in said.splitlines() if "training bags" in line)
    assert [cell.strip() for cell in line.split("│")[3:5]] == ["2", "8"]
