"""Two columns that are one task of kind survival."""

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umda_fast.data import BagDataset, load_source
from umda_fast.data.event_columns import event_columns, perhaps
from umda_fast.data.labels import label_columns
from umda_fast.errors import DataError
from umda_fast.tasks import TaskSpec

NAN = float("nan")


def pairs(*columns: str, kinds: Any = None) -> list[tuple[str, str, str, tuple[str, ...]]]:
    return [(one.task, one.time, one.event, one.others) for one in event_columns(columns, kinds, "table")]


def test_columns_by_their_names() -> None:
    assert pairs("os_months", "age", "os_event") == [("os", "os_months", "os_event", ())]
    assert pairs("OS_STATUS", "OS_MONTHS") == [("OS", "OS_MONTHS", "OS_STATUS", ())]
    assert pairs("pfs.time", "pfs.event", "os_days", "os_status") == [
        ("pfs", "pfs.time", "pfs.event", ()),
        ("os", "os_days", "os_status", ()),
    ]
    for alone in (["os_months"], ["os_event"], ["os_months", "pfs_event"], ["time", "event"], ["msi_status", "age"]):
        assert pairs(*alone) == []


def test_columns_that_someone_names() -> None:
    said = {"os": {"kind": "survival", "time": "days_to_death", "event": "vital_status"}}
    assert pairs("days_to_death", "vital_status", kinds=said) == [("os", "days_to_death", "vital_status", ())]
    said = {"os": {"kind": "survival", "time": "os_days", "event": "os_event"}}
    assert pairs("os_months", "os_days", "os_event", kinds=said) == [("os", "os_days", "os_event", ("os_months",))]
    assert pairs("os_months", "os_event", kinds={"os": "survival"}) == [("os", "os_months", "os_event", ())]
    assert pairs("os_months", "os_event", kinds={"os_months": "regression"}) == []


def test_an_event_that_is_called_as_its_task() -> None:
    """As the TCGA's clinical data resource has it: OS and OS.time."""
    (line,) = perhaps(["age", "OS", "OS.time"], event_columns(["age", "OS", "OS.time"], None, "table"), None)
    assert line.startswith(
        "columns 'OS' and 'OS.time' are two tasks, in which who was censored counts as dead; if they"
    )
    said = {"OS": {"kind": "survival", "time": "OS.time", "event": "OS"}}
    assert line.endswith("kinds={OS: {kind: survival, time: OS.time, event: OS}}'")
    assert pairs("age", "OS", "OS.time", kinds=said) == [("OS", "OS.time", "OS", ())]
    labels = {"OS": np.array([1, 0]), "OS.time": np.array([3.0, 4.0]), "age": np.array([1.5, 2.5])}
    specs, columns = label_columns(labels, 2, said, where="set")
    assert [(spec.name, spec.kind) for spec in specs] == [("OS", "survival"), ("age", "regression")]
    np.testing.assert_array_equal(columns["OS"], [[3, 1], [4, 0]])
    again, _ = label_columns(labels, 2, specs, where="set")
    assert again == specs
    for kinds in (said, {"OS": "binary"}, specs):
        assert perhaps(["OS", "OS.time"], event_columns(["OS", "OS.time"], kinds, "table"), kinds) == []


def test_a_model_finds_its_own_and_no_others() -> None:
    spec = TaskSpec("os", "survival", columns=("days_to_death", "vital_status"))
    assert pairs("days_to_death", "vital_status", "pfs_time", "pfs_event", kinds=[spec]) == [
        ("os", "days_to_death", "vital_status", ())
    ]
    assert pairs("os_months", "os_event", kinds=[spec]) == [("os", "os_months", "os_event", ())]
    assert pairs("os_months", "os_days", "os_event", kinds=[spec]) == []
    assert pairs("os_months", "os_event", kinds=[TaskSpec("os_months", "regression")]) == []


@pytest.mark.parametrize(
    ("columns", "kinds", "message"),
    [
        (
            ["os_months", "os_days", "os_event"],
            None,
            "table: task 'os': expected one column of times, got os_months, os_days; which? "
            "--set 'data.options.kinds={os: {kind: survival, time: os_months, event: os_event}}'",
        ),
        (["os_time", "os_event", "os_status"], None, "expected one column of events, got os_event, os_status; which?"),
        (["os", "os_time", "os_event"], None, "os_time and os_event are a task 'os', of kind survival, but a column"),
        (["a", "b"], {"os": "survival"}, "kinds['os']: expected the columns os_time and os_event, or their names"),
        (
            ["a", "b"],
            {"os": {"kind": "survival", "time": "a", "event": "c"}},
            "table: kinds['os']: event: expected a column among a, b, got 'c'",
        ),
        (
            ["os", "b"],
            {"os": {"kind": "survival", "time": "c", "event": "os"}},
            "table: kinds['os']: time: expected a column among os, b, got 'c'",
        ),
        (
            ["a", "b"],
            {"os": {"kind": "survival", "time": "a"}},
            "table: kinds['os']: event: expected a column among a, b, got None",
        ),
    ],
)
def test_what_is_asked(columns: list[str], kinds: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        pairs(*columns, kinds=kinds)


def _one(times: Any, events: Any) -> tuple[TaskSpec, np.ndarray]:
    labels = {"os_time": np.array(times), "os_event": np.array(events)}
    (spec,), columns = label_columns(labels, len(times), None, where="set")
    return spec, columns["os"]


@pytest.mark.parametrize(
    "events",
    [
        [1, 0, 1, NAN],
        ["dead", "Alive", "DECEASED", ""],
        ["1:DECEASED", "0:LIVING", "1:DECEASED", ""],
        ["true", "false", "True", ""],
        ["1.0", "0.0", "1", ""],
    ],
)
def test_events_as_people_write_them(events: list[Any]) -> None:
    spec, column = _one([3.5, 2.0, 4.0, 7.0], events)
    np.testing.assert_array_equal(column, [[3.5, 1], [2, 0], [4, 1], [NAN, NAN]])
    assert (spec.kind, spec.columns, spec.cuts) == ("survival", ("os_time", "os_event"), (3.5, 4.0))


def test_booleans_are_events() -> None:
    np.testing.assert_array_equal(_one([3.5, 2.0], [True, False])[1], [[3.5, 1], [2, 0]])


@pytest.mark.parametrize(
    ("times", "events", "message"),
    [
        (
            [1.0, 2.0],
            [1, 2],
            "set: labels 'os': events: expected 0 or 1, true or false, alive or dead, censored or event",
        ),
        ([1.0, 2.0], ["stable", "progressive"], "got 'stable': which of them is the event must be clear"),
        ([1.0, -2.0], [1, 0], "set: labels 'os': times: expected at least 0, got -2 in row 1"),
        (["1", "long"], [1, 0], "times: expected numbers for survival, got text such as 'long'"),
    ],
)
def test_bad_labels(times: list[Any], events: list[Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        _one(times, events)


def test_a_matrix_is_times_and_events_where_someone_says_so() -> None:
    label = np.array([[3.0, 1], [5.0, 0]])
    bags = BagDataset.from_arrays({"x": np.ones((2, 2))}, None, {"os": label}, kinds={"os": "survival"})
    np.testing.assert_array_equal(bags.labels["os"], label)
    assert bags[0].labels["os"].tolist() == [3.0, 1.0]
    with pytest.raises(DataError, match=r"expected times and events, \[B, 2\], got \[2, 3\]"):
        label_columns({"os": np.ones((2, 3))}, 2, {"os": "survival"}, where="set")
    with pytest.raises(DataError, match=r"expected \[B, C\] for survival, got \[2\]"):
        label_columns({"os": np.ones(2)}, 2, {"os": "survival"}, where="set")


@pytest.fixture
def slides(tmp_path: Path) -> Path:
    """A directory of 60 bags beside a table as a clinic keeps it."""
    rng = np.random.default_rng(0)
    root = tmp_path / "slides"
    root.mkdir()
    with open(root / "labels.csv", "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["slide", "OS_MONTHS", "OS_STATUS", "stage", "OS_DAYS"])
        for number in range(60):
            torch.save(torch.from_numpy(rng.normal(size=(3, 4))).float(), root / f"s{number}.pt")
            months, dead = rng.exponential(20), rng.random() < 0.6
            status = "" if number == 5 else "1:DECEASED" if dead else "0:LIVING"
            writer.writerow([f"s{number}", f"{months:.1f}", status, "I" if number % 2 else "II", f"{30 * months:.0f}"])
    return root


def test_a_table(slides: Path) -> None:
    with pytest.raises(DataError, match=r"expected one column of times, got OS_MONTHS, OS_DAYS; which\?"):
        load_source(slides)
    loaded = load_source(slides, ignore=["OS_DAYS"])
    assert [(task.name, task.kind) for task in loaded.train.tasks] == [("OS", "survival"), ("stage", "binary")]
    uses = {use.name: use.use for use in loaded.about.columns}
    assert uses["OS_MONTHS"] == "time of task OS"
    assert uses["OS_STATUS"] == "event of task OS"
    assert "OS_MONTHS and OS_STATUS are one task, 'OS' (survival), by their names" in loaded.about.notes
    assert "task 'OS': 1 bags have a OS_MONTHS or a OS_STATUS only: no label" in loaded.about.doubts
    train = loaded.train.labels["OS"]
    cuts = loaded.train.tasks[0].cuts
    assert cuts is not None
    assert max(cuts) == train[train[:, 1] == 1, 0].max()  # of training bags alone
    said = load_source(slides, kinds={"OS": {"kind": "survival", "time": "OS_DAYS", "event": "OS_STATUS"}})
    assert [task.name for task in said.train.tasks] == ["stage", "OS"]  # where the time stands
    assert {use.name: use.use for use in said.about.columns}["OS_MONTHS"] == "left out"
    # And a model that was trained on it finds the same columns, wherever they stand.
    again = load_source(slides, kinds=said.train.tasks)
    np.testing.assert_array_equal(again.whole.labels["OS"], said.whole.labels["OS"])
