"""The HTML report of a run."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from tests.small import small_config
from tests.studies.test_maps import TASKS, VIEWS, bag
from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.studies.report import write_report
from umda_fast.train import Run, evaluate, load_run, make_config, train


class Structure(HTMLParser):
    """Headings, cells of tables and addresses of images; unclosed or crossed tags are an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: dict[str, list[str]] = {"h1": [], "h2": [], "h3": [], "td": [], "th": []}
        self.images: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.addresses += [values[key] or "" for key in ("src", "href") if key in values]
        if tag == "img":
            self.images.append(values["alt"] or "")
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.text:
            self.text[self.open[-1]].append(data)


def parse(path: Path) -> Structure:
    structure = Structure()
    structure.feed(path.read_text(encoding="utf-8"))
    assert structure.open == []
    return structure


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("report") / "run"
    train(small_config(), out, progress=False)
    return load_run(out)


def test_the_report_says_what_evaluate_says(digits_run: Run) -> None:
    path = write_report(digits_run, samples=50, progress=False)
    assert path == digits_run.directory / "report.html"
    found = parse(path)
    assert found.text["h2"] == ["Scores", "Curves", "Errors", "Calibration", "Training", "Configuration"]
    assert found.text["h3"] == ["has_nine", "largest", "present", "mean"]
    result = evaluate(digits_run, progress=False)
    expected = {"has_nine": "auroc", "largest": "accuracy", "present": "f1_macro", "mean": "r2"}
    for task, metric in expected.items():
        row = found.text["td"].index(task)
        assert found.text["td"][row + 3] == f"{result.tasks[task][metric]:.3f}"
        interval = re.fullmatch(r"(-?[\d.]+) to (-?[\d.]+)", found.text["td"][row + 4])
        assert interval is not None
        assert float(interval[1]) <= result.tasks[task][metric] + 5e-4
        assert float(interval[2]) >= result.tasks[task][metric] - 5e-4
    assert {"has_nine: confusion matrix", "largest: confusion matrix", "mean: prediction against label"} <= set(
        found.images
    )
    assert "influence" in found.images
    assert {f"{task}: ROC and precision-recall curves" for task in ("has_nine", "largest", "present")} <= set(
        found.images
    )
    # Of the number the bags furthest off come first, with their names.
    assert {"bag", "label", "predicted", "error"} <= set(found.text["th"])
    cells = found.text["td"]
    ends = [place for place, cell in enumerate(cells) if re.fullmatch(r"[+-][\d.]+(e-\d+)?", cell)][-16:]
    assert digits_run.record is not None
    assert {cells[end - 3] for end in ends} == set(digits_run.record.names("test"))
    off = [abs(float(cells[end])) for end in ends]
    assert off == sorted(off, reverse=True)


def test_nothing_is_loaded_from_elsewhere(digits_run: Run) -> None:
    path = write_report(digits_run, digits_run.directory / "other.html", samples=20, split="val", progress=False)
    found = parse(path)
    assert all(address.startswith("data:image/png;base64,") for address in found.addresses)
    assert "temperature, fitted on val" not in found.text["th"]  # val is what is measured
    assert "http" not in re.sub(r"base64,[^\"]*", "", path.read_text())


def test_bags_with_coordinates_are_drawn_and_names_are_escaped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    bags = [bag(f"<b>{n}", n) for n in range(3, 13)]
    data = {name: BagDataset(bags, VIEWS, TASKS, "<i>patches") for name in ("train", "test")}
    config = make_config({"model": {"width": 16, "heads": 2, "layers": 1}, "train": {"epochs": 1}, "device": "cpu"})
    train(config, tmp_path / "run", datasets=data, progress=False, plots=False)
    found = parse(write_report(load_run(tmp_path / "run"), datasets=data, maps=2, samples=20, progress=False))
    assert found.images[-4:] == ["<b>12", "<b>12, views", "<b>11", "<b>11, views"]
    assert "<i>patches, split test" in found.text["td"]


def test_an_unknown_split_is_named(digits_run: Run) -> None:
    with pytest.raises(DataError, match="expected a split among train, val, test, all, new, got 'other'"):
        write_report(digits_run, split="other", progress=False)


def test_patients_are_drawn_where_the_run_knows_them(digits_run: Run, tmp_path: Path) -> None:
    assert digits_run.record is not None
    bags = tuple(replace(bag, patient=f"P{place // 3}") for place, bag in enumerate(digits_run.record.bags))
    known = replace(digits_run, record=replace(digits_run.record, bags=bags))
    for run, unit in ((digits_run, "bags"), (known, "patients")):
        page = write_report(run, tmp_path / "r.html", maps=0, samples=20, progress=False).read_text()
        assert f"percentile bootstrap over {unit}, 20 draws" in page
