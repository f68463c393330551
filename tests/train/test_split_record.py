"""A run keeps its split: whatever becomes of the data, it is measured on the bags that it was not trained on."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.command_line import call
from tests.train.cohort import Cohort, cohort_config, moved_run
from umda_fast.data import BagDataset, load_source
from umda_fast.data.content import batch_contents, same_content
from umda_fast.errors import DataError
from umda_fast.runtime.config import load_run_config
from umda_fast.train import evaluate, load_ensemble, load_run, predict, run_config, train
from umda_fast.train import measure as measuring
from umda_fast.train.split_record import MatchedBags, RecordedBag, SplitRecord

Trained = tuple[Cohort, Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A cohort of 24 bags and a run on it, not to be changed."""
    place = tmp_path_factory.mktemp("trained")
    cohort = Cohort(place / "bags", 24)
    cohort.write()
    train(cohort_config(cohort.root), place / "run", progress=False, plots=False)
    return cohort, place / "run"


@pytest.fixture
def moved(trained: Trained, tmp_path: Path) -> Trained:
    """Copies of both that may be changed."""
    cohort = trained[0].copy(tmp_path / "bags")
    return cohort, moved_run(trained[1], trained[0], cohort, tmp_path / "run")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Names of the bags of every measurement."""
    found: list[list[str]] = []
    plain = measuring.evaluate_dataset

    def noted(model: object, dataset: BagDataset, *args: object, **options: object) -> object:
        found.append(dataset.names)
        return plain(model, dataset, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(measuring, "evaluate_dataset", noted)
    return found


def recorded(run: Path, *splits: str) -> list[str]:
    return SplitRecord.read(run / "splits.csv").names(*splits)


def test_splits_csv_names_every_bag(trained: Trained) -> None:
    cohort, run = trained
    with open(run / "splits.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["bag", "split", "content"]
    assert {row["bag"] for row in rows} == cohort.bags.keys()
    data = load_source(cohort.root, seed=0)
    for split in ("train", "val", "test"):
        assert [row["bag"] for row in rows if row["split"] == split] == data[split].names


def test_bags_in_no_split_are_not_new_later(tmp_path: Path, measured: list[list[str]]) -> None:
    cohort = Cohort(tmp_path / "bags", 20)
    cohort.write()
    names = sorted(cohort.bags)
    lines = ["train,val,test", *(f"{names[k]},{names[10 + k]},{names[14 + k]}" for k in range(4))]
    (cohort.root / "splits_0.csv").write_text("\n".join([*lines, *(f"{names[k]},," for k in range(4, 10))]) + "\n")
    train(cohort_config(cohort.root), tmp_path / "run", progress=False, plots=False)
    assert recorded(tmp_path / "run", "none") == names[18:]
    run = load_run(tmp_path / "run")
    evaluate(run, split="all", progress=False)
    assert measured == [names[14:]]
    with pytest.raises(DataError, match="split 'new' holds no bags"):
        evaluate(run, split="new", progress=False)
    assert not any("new" in said for said in run.told)


def test_patients_have_a_column(tmp_path: Path) -> None:
    cohort = Cohort(tmp_path / "bags", 12)
    table = ["patient,slide_id,y", *(f"P{k // 2},S{k:02},{'ab'[k // 2 % 2]}" for k in range(12) if k != 3)]
    (cohort.root / "labels.csv").write_text("\n".join(table) + "\n")
    train(cohort_config(cohort.root), tmp_path / "run", progress=False, plots=False)
    with open(tmp_path / "run" / "splits.csv", newline="") as stream:
        rows = {row["bag"]: row for row in csv.DictReader(stream)}
    assert (rows["S04"]["patient"], rows["S03"]["patient"]) == ("P2", "")
    assert rows["S04"]["split"] == rows["S05"]["split"]


def test_new_bags_of_a_patient_that_was_trained_on_are_not_measured(
    tmp_path: Path, measured: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = Cohort(tmp_path / "bags", 24)

    def write(new: dict[str, str]) -> None:
        of = {f"S{k:02}": f"P{k // 2}" for k in range(24)} | new
        table = ["patient,slide_id,y", *(f"{of[name]},{name},{label}" for name, label in cohort.labels.items())]
        (cohort.root / "labels.csv").write_text("\n".join(table) + "\n")

    write({})
    train(cohort_config(cohort.root), tmp_path / "run", progress=False, plots=False)
    test = recorded(tmp_path / "run", "test")
    names = [cohort.add() for _ in range(3)]
    # Of a patient of the training, of one of the test split, of nobody's yet.
    known = [f"P{int(name[1:]) // 2}" for name in (recorded(tmp_path / "run", "train")[0], test[0])]
    write(dict(zip(names, [*known, "Q"], strict=True)))
    capsys.readouterr()
    copy = str(cohort.copy(tmp_path / "copy").root)
    for source, split in ((None, "new"), (None, "all"), (copy, None)):
        evaluate(load_run(tmp_path / "run"), source=source, split=split, progress=False)
        assert measured[-1] == [*(test if split != "new" else []), *names[1:]]
        assert f"on other bags of their patients: 1 bags: '{names[0]}'" in capsys.readouterr().err
    predict(load_run(tmp_path / "run"), split="new", out=tmp_path / "p.csv", progress=False)
    assert [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]] == names


def test_the_test_split_is_that_of_the_training(
    moved: Trained, measured: list[list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cohort, run = moved
    test = recorded(run, "test")
    before = evaluate(load_run(run), progress=False).tasks
    new = [cohort.add() for _ in range(5)]
    cohort.rename(test[0], "A renamed bag")
    gone = recorded(run, "train")[0]
    cohort.remove(gone)
    cohort.labels[test[1]] = {"a": "b", "b": "a"}[cohort.labels[test[1]]]
    cohort.write()
    capsys.readouterr()
    assert call("evaluate", run, "--json", tmp_path / "found.json", "-q") == 0
    said = capsys.readouterr().err
    [note] = json.loads((tmp_path / "found.json").read_text())["notes"]
    assert note in said
    assert said.count("\n") == 1
    for text in (
        f"5 new, in no split: {', '.join(map(repr, new[:3]))} and 2 more",
        f"1 gone: '{gone} (train)'",
        f"1 under another name: 'A renamed bag (was {test[0]})'",
    ):
        assert text in said
    cohort.labels[test[1]] = {"a": "b", "b": "a"}[cohort.labels[test[1]]]
    cohort.write()
    assert evaluate(load_run(run), progress=False).tasks == before
    assert measured == [test, ["A renamed bag", *test[1:]], ["A renamed bag", *test[1:]]]
    for split, bags in (("new", new), ("all", ["A renamed bag", *test[1:], *new]), ("val", recorded(run, "val"))):
        evaluate(load_run(run), split=split, progress=False)
        assert sorted(measured[-1]) == sorted(bags), split
    assert call("predict", run, "--data", cohort.root, "--split", "test", "--out", tmp_path / "p.csv", "-q") == 0
    assert [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]] == measured[1]


def test_labels_of_bags_that_are_gone_are_no_fault(
    moved: Trained, measured: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, run = moved
    test = recorded(run, "test")
    (cohort.root / f"{test[0]}.npz").unlink()  # its line in labels.csv is still there
    evaluate(load_run(run), progress=False)
    assert measured == [test[1:]]
    assert f"1 gone: '{test[0]} (test)'" in capsys.readouterr().err
    assert call("predict", run, "--data", cohort.root, "--out", tmp_path / "p.csv", "-q") == 0
    with pytest.raises(DataError, match=r"labels\.csv: labels for missing slides"):
        load_source(cohort.root)
    assert len(load_source(cohort.root, partial=True).whole) == 23


def test_a_trained_bag_under_a_test_bag_s_name_is_not_measured(
    moved: Trained, measured: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, run = moved
    test, seen = recorded(run, "test"), recorded(run, "train")[0]
    cohort.remove(test[0])
    cohort.rename(seen, test[0])
    cohort.write()
    evaluate(load_run(run), progress=False)
    assert measured == [test[1:]]
    assert f"'{test[0]} (was {seen})'" in capsys.readouterr().err


def test_a_copy_counts_once() -> None:
    record = SplitRecord((RecordedBag("a", "train", "1"), RecordedBag("b", "test", "2"), RecordedBag("c", "test", "3")))

    def matched(own: bool, **bags: str) -> MatchedBags:
        contents = list(bags.values())
        return record.match(list(bags), lambda rows: [contents[row] for row in rows], own=own, wanted=("test",))

    found = matched(True, a="1", b="2", b_again="2", c="3")
    assert found.rows("test").tolist() == [1, 3]
    assert "1 twice, counted once" in found.describe()
    # b has become a, and another bag is called b.
    found = matched(True, b="4", a="2", c="3")
    assert found.splits == ["new", "test", "test"]
    assert found.rows("test").tolist() == [1, 2]
    # A record without contents goes by names.
    plain = SplitRecord((RecordedBag("a", "train"), RecordedBag("b", "test")))
    found = plain.match(["a", "b", "c"], lambda rows: ["1" for _ in rows], own=True, wanted=("test",))
    assert (found.splits, found.changed) == (["train", "test", "new"], ())
    # Elsewhere names say nothing; an empty bag is known by its name alone.
    assert matched(False, a="7", b="1").splits == ["new", "train"]
    assert (matched(True, b="").splits, matched(False, b="").splits) == (["test"], ["new"])


def test_other_features_under_a_name_are_the_same_bag(
    moved: Trained, measured: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, run = moved
    test = recorded(run, "test")
    np.savez(cohort.root / f"{test[0]}.npz", features=np.ones((4, 5), np.float32))
    evaluate(load_run(run), progress=False)
    assert measured == [test]
    assert f"1 with other features: '{test[0]}'" in capsys.readouterr().err


def test_other_data_is_measured_whole_but_for_bags_that_were_trained_on(
    trained: Trained, tmp_path: Path, measured: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    cohort, run = trained
    fresh = Cohort(tmp_path / "fresh")
    fresh.made = 100
    names = [fresh.add(f"S{k:02}") for k in range(6)]  # names of bags of the run
    fresh.write()
    evaluate(load_run(run), source=str(fresh.root), progress=False)
    assert measured == [names]
    assert "have names of bags that it was trained or validated on and other features" in capsys.readouterr().err
    grown = cohort.copy(tmp_path / "grown")
    grown.rename(recorded(run, "train")[0], "AA")
    new = grown.add()
    grown.write()
    evaluate(load_run(run), source=str(grown.root), progress=False)
    assert measured[-1] == [*recorded(run, "test"), new]
    seen = len(recorded(run, "train", "val"))
    assert f"left out, as it was trained or validated on them: {seen} bags: 'AA', " in capsys.readouterr().err
    grown.write(split="test")
    evaluate(load_run(run), source=str(grown.root), split="test", progress=False)
    assert sorted(measured[-1]) == sorted([*recorded(run, "test"), new])
    with pytest.raises(DataError, match="expected a split among train, val, test, all, new, got 'tset'"):
        evaluate(load_run(run), split="tset", progress=False)


def test_a_run_of_before_says_that_its_split_is_computed_again(
    moved: Trained, measured: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = moved
    test = recorded(run, "test")
    (run / "splits.csv").unlink()
    evaluate(load_run(run), progress=False)
    evaluate(load_run(run), split="all", progress=False)
    assert measured == [test, test]
    assert capsys.readouterr().err.count("has no splits.csv (an earlier version made it): the split is computed") == 2
    with pytest.raises(DataError, match=r"has no splits\.csv, so it is not known which bags are new"):
        evaluate(load_run(run), split="new", progress=False)


def test_an_ensemble_needs_one_test_split(trained: Trained, tmp_path: Path) -> None:
    cohort, run = trained
    for name, seed in (("same", 0), ("other", 5)):
        config = cohort_config(cohort.root, seed=seed, options={"class_weights": "balanced"})
        train(replace(config, seed=3), tmp_path / name, progress=False, plots=False)
    assert evaluate(load_ensemble([run, tmp_path / "same"]), progress=False).bags == len(recorded(run, "test"))
    with pytest.raises(DataError, match=r"other: test bags: expected those of .*run, .* \d+ differ: 'S"):
        evaluate(load_ensemble([run, tmp_path / "other"]), progress=False)


def test_another_run_may_have_its_split(trained: Trained, tmp_path: Path) -> None:
    cohort, run = trained[0].copy(tmp_path / "bags"), trained[1]
    cohort.labels["S03"] = "a"
    cohort.add()
    cohort.write()
    config = cohort_config(cohort.root, seed=7, options={"splits": str(run)})
    train(config, tmp_path / "other", progress=False, plots=False)
    for split in ("train", "val", "test"):
        assert recorded(tmp_path / "other", split) == recorded(run, split)
    shutil.copytree(run, tmp_path / "first")
    config = cohort_config(cohort.root, seed=8, options={"splits": str(tmp_path / "first")})
    train(config, tmp_path / "third", progress=False, plots=False)
    shutil.rmtree(tmp_path / "first")  # the third one has its split now
    assert evaluate(load_run(tmp_path / "third"), progress=False).bags == len(recorded(run, "test"))
    assert evaluate(load_ensemble([tmp_path / "other", run]), progress=False).bags == len(recorded(run, "test"))
    with pytest.raises(DataError, match="or one such file, or a run directory, got none"):
        load_source(cohort.root, splits=str(cohort.root))


def test_a_run_is_resumed_on_its_bags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cohort, run, plain = Cohort(tmp_path / "bags", 24), tmp_path / "run", tmp_path / "plain"
    cohort.write()
    train(cohort_config(cohort.root), run, progress=False, plots=False)
    shutil.copytree(run, plain)

    def resume(place: Path, epochs: int) -> bytes:
        train(run_config(place, {"train": {"epochs": epochs}}), place, resume=True, progress=False, plots=False)
        return (place / "model.safetensors").read_bytes()

    expected, splits = resume(plain, 2), (run / "splits.csv").read_bytes()
    cohort.add()
    cohort.rename(recorded(run, "train")[0], "Z")  # the last by name
    cohort.write()
    assert resume(run, 2) == expected
    assert (run / "splits.csv").read_bytes() == splits
    assert "since it was begun, of its bags: 1 new, in no split: 'S24'; 1 under another name" in capsys.readouterr().err
    cohort.write(stage="I")
    table = (cohort.root / "labels.csv").read_text().splitlines()
    table[1:] = [line.replace(",I", ",II" if number % 2 else ",I") for number, line in enumerate(table[1:])]
    (cohort.root / "labels.csv").write_text("\n".join(table) + "\n")  # another task, which this run has not
    resume(run, 3)
    cohort.labels[recorded(run, "val")[0]] = "c"
    cohort.write()
    with pytest.raises(DataError, match="labels 'y': expected one of a, b, got 'c'"):
        resume(run, 4)
    cohort.remove(recorded(run, "val")[0])
    cohort.write()
    with pytest.raises(DataError, match="cannot be resumed: 1 bags that it trains or validates on are gone: 'S"):
        resume(run, 4)


def test_data_is_found_from_anywhere(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cohort = trained[0].copy(tmp_path / "project" / "bags")
    (cohort.root / "labels.csv").rename(tmp_path / "project" / "table.csv")
    monkeypatch.chdir(tmp_path / "project")
    config = cohort_config("bags", options={"labels": "table.csv"})
    result = train(config, "runs/first", progress=False, plots=False).metrics["tasks"]
    assert load_run_config("runs/first/config.yaml").data.source == "bags"
    monkeypatch.chdir(tmp_path)
    assert evaluate(load_run("project/runs/first"), progress=False).tasks == result
    assert capsys.readouterr().err == ""
    (tmp_path / "project").rename(tmp_path / "elsewhere")
    assert evaluate(load_run("elsewhere/runs/first"), progress=False).tasks == result
    assert f"bags: taken from elsewhere/bags (it was {tmp_path}/project/bags)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "elsewhere" / "bags")
    missing = f"first: its data, 'bags' ({tmp_path}/project/bags), is not there; say with --data"
    with pytest.raises(DataError) as caught:
        evaluate(load_run("elsewhere/runs/first"), progress=False)
    assert missing in str(caught.value)


def test_content_is_that_of_the_features_alone() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(9, 4)).astype("f4"), rng.normal(size=(9, 2)).astype("f4")
    ptr = [0, 4, 4, 9]

    def contents(first: np.ndarray, second: np.ndarray | None, mask: np.ndarray | None = None) -> list[str]:
        views = {"a": first} if second is None else {"a": first, "b": second}
        data = BagDataset.from_arrays(views, ptr, {"y": [0, 1, 0]}, mask=mask)
        return batch_contents(data.collate([data[index] for index in range(3)]))

    found = contents(a, b)
    assert found[1] == ";"
    assert len(set(found)) == 3
    order = np.array([2, 0, 3, 1, 8, 7, 6, 5, 4])
    assert contents(a[order], b[order]) == found
    assert [text.split(";")[0] for text in found] == contents(a, None)
    assert same_content(found[0], contents(a, None)[0])
    mask = np.ones((9, 2), bool)
    mask[:4, 1] = False
    blank = contents(a, b * mask[:, 1:], mask)
    assert blank[0].endswith(";")
    assert same_content(blank[0], found[0])
    assert not same_content(";", ";")
    other = a.copy()
    other[1, 3] = torch.nextafter(torch.tensor(a[1, 3]), torch.tensor(9.0)).item()
    assert contents(other, None)[0] != contents(a, None)[0]
    # The same rows in other numbers are another bag.
    assert len({text for text in contents(np.ones((9, 4), "f4"), None) if text}) == 2


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "splits.csv").write_text("name,part\nS01,train\n")
    with pytest.raises(DataError, match=r"splits\.csv: line 2: expected a bag and its split, got None, None"):
        SplitRecord.read(tmp_path / "splits.csv")
    (tmp_path / "splits.csv").write_text("bag,split\n")
    with pytest.raises(DataError, match=r"splits\.csv: expected the columns bag and split"):
        SplitRecord.read(tmp_path / "splits.csv")
