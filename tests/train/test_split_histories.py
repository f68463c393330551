"""Whatever happens to a directory of bags after a run was trained on it, no test figure has a trained bag in it.

Histories are drawn; of every bag it is known which one it was at first, so that names say nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.train.cohort import Cohort, cohort_config, moved_run
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.studies import predict, report
from umda_fast.studies.readapt import readapt
from umda_fast.train import Run, evaluate, load_run, train
from umda_fast.train import measure as measuring
from umda_fast.train.split_record import SplitRecord

HISTORIES = 16


class Measured(Exception):
    """What was about to be measured."""

    def __init__(self, names: list[str]) -> None:
        super().__init__("measured")
        self.names = names


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Cohort, Path]:
    place = tmp_path_factory.mktemp("trained")
    cohort = Cohort(place / "bags", 20)
    cohort.write()
    train(cohort_config(cohort.root), place / "run", progress=False, plots=False)
    return cohort, place / "run"


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop where a figure would be made."""

    def stop(model: object, dataset: BagDataset, *args: object, **options: object) -> None:
        raise Measured(dataset.names)

    monkeypatch.setattr(measuring, "evaluate_dataset", stop)
    monkeypatch.setattr(report, "collect", stop)


def happen(cohort: Cohort, rng: np.random.Generator) -> None:
    """Some changes; names are taken from each other as readily as not."""
    for _ in range(int(rng.integers(1, 12))):
        names = sorted(cohort.bags)
        first, second = (names[k] for k in rng.choice(len(names), 2, replace=False))
        what = rng.choice(["add", "remove", "rename", "swap", "relabel", "replace", "succeed"])
        if what == "add":
            cohort.add(f"{rng.choice(['A', 'S', 'Z'])}-{cohort.made}")
        elif what == "remove" and len(names) > 8:
            cohort.remove(first)
        elif what == "rename":
            cohort.rename(first, f"{rng.choice(['A', 'Z'])}{first}")
        elif what == "swap":
            cohort.swap(first, second)
        elif what == "replace":
            cohort.replace(first)
        elif what == "succeed" and len(names) > 8:  # it takes the name of one that goes
            cohort.remove(second)
            cohort.rename(first, second)
        else:
            cohort.labels[first] = {"a": "b", "b": "a"}[cohort.labels[first]]
    cohort.write()


def figures(run: Run, cohort: Cohort, own: bool) -> Iterator[Callable[[], object]]:
    """Everything that makes a test figure."""
    source = None if own else str(cohort.root)
    for split in (None, "test", "all", "new"):
        yield lambda split=split: evaluate(run, source=source, split=split, progress=False)
    yield lambda: report.write_report(run, source=source, progress=False)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_no_test_figure_has_a_bag_of_the_training_in_it(
    trained: tuple[Cohort, Path], tmp_path: Path, seed: int
) -> None:
    original, run_directory = trained
    record = SplitRecord.read(run_directory / "splits.csv")
    seen = {original.bags[name] for name in record.names("train", "val")}
    test = {original.bags[name] for name in record.names("test")}
    cohort = original.copy(tmp_path / "bags")
    own = seed % 2 == 0
    if own:
        run_directory = moved_run(run_directory, original, cohort, tmp_path / "run")
    happen(cohort, np.random.default_rng(seed))
    run = load_run(run_directory)
    for number, figure in enumerate(figures(run, cohort, own)):
        with pytest.raises((Measured, DataError)) as stopped:
            figure()
        names = stopped.value.names if isinstance(stopped.value, Measured) else []
        assert names or "holds no bags" in str(stopped.value)
        measured = {cohort.bags[name] for name in names}
        assert len(measured) == len(names)
        assert not measured & seen, f"figure {number}"
        if number != 3:  # all of the run's test bags that are still there, under whatever name
            assert test & {*cohort.bags.values()} <= measured, f"figure {number}"
    predict(run, source=str(cohort.root), split="test", out=tmp_path / "p.csv", progress=False)
    predicted = [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert not {cohort.bags[name] for name in predicted} & seen


@pytest.mark.parametrize("seed", range(100, 103))
def test_nor_has_one_of_new_heads(trained: tuple[Cohort, Path], tmp_path: Path, seed: int) -> None:
    original, run_directory = trained
    record = SplitRecord.read(run_directory / "splits.csv")
    seen = {original.bags[name] for name in record.names("train", "val")}
    cohort = original.copy(tmp_path / "bags")
    rng = np.random.default_rng(seed)
    happen(cohort, rng)
    try:
        readapt(load_run(run_directory), tmp_path / "heads", source=str(cohort.root))
    except DataError as error:
        assert "expected at least 2 labels" in str(error)  # noqa: PT017
        return
    found = SplitRecord.read(tmp_path / "heads" / "splits.csv")
    assert not {cohort.bags[name] for name in found.names("test")} & seen
    seen |= {cohort.bags[name] for name in found.names("train", "val")}
    happen(cohort, rng)
    with pytest.raises(Measured) as measured:
        evaluate(load_run(tmp_path / "heads"), split="all", progress=False)
    assert not {cohort.bags[name] for name in measured.value.names} & seen
