"""Which class of a binary task is label 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.slide_files import grid, write_clam
from umda_fast.data import BagDataset, inspect_source, load_source
from umda_fast.errors import DataError
from umda_fast.tasks import TaskSpec

LABELS = {
    "MSI": np.array(["MSS", "MSI-H", "", "MSS"]),
    "smoker": np.array(["no", "yes", "yes", ""]),
    "code": np.array([2, 1, 2, 1]),
    "grade": np.array(["a", "b", "c", "a"]),
}


def chosen(positive: Any, **more: Any) -> BagDataset:
    return BagDataset.from_arrays({"x": np.zeros((4, 2))}, None, LABELS, positive=positive, name="set", **more)


def names(data: BagDataset) -> list[tuple[str, ...] | None]:
    return [task.labels for task in data.tasks[:3]]


def test_the_later_class_is_positive_unless_another_is_chosen() -> None:
    usual = chosen(None)
    assert names(usual) == [("MSI-H", "MSS"), ("no", "yes"), ("1", "2")]
    for positive in ("MSI-H", {"MSI": "MSI-H"}):
        data = chosen(positive)
        assert names(data) == [("MSS", "MSI-H"), ("no", "yes"), ("1", "2")]
        np.testing.assert_array_equal(data.labels["MSI"], [0, 1, np.nan, 0])
        np.testing.assert_array_equal(data.labels["smoker"], usual.labels["smoker"])
    assert names(chosen({"MSI": "MSS", "code": 1})) == [("MSI-H", "MSS"), ("no", "yes"), ("2", "1")]
    assert names(chosen(False))[1] == ("yes", "no")  # what YAML makes of `no`
    whole = {"MSI": TaskSpec("MSI", "binary", labels=("MSI-H", "MSS"), class_weights=(3.0, 1.0))}
    assert chosen("MSI-H", kinds=whole).tasks[0].class_weights == (1.0, 3.0)


def test_a_model_s_own_classes_are_settled() -> None:
    tasks = chosen("MSI-H").tasks
    assert chosen("no", kinds=tasks).tasks == tasks


@pytest.mark.parametrize(
    ("positive", "message"),
    [
        ("MSI", "expected a class of a binary task, MSI: MSI-H, MSS; smoker: no, yes; code: 1, 2; got 'MSI'"),
        ({"MSI": "high"}, "expected MSI-H or MSS for MSI, got 'high'"),
        ({"grade": "a"}, "expected binary tasks, MSI, smoker, code; got 'grade'"),
        ({"mSI": "MSS"}, "expected binary tasks, MSI, smoker, code; got 'mSI'"),
    ],
)
def test_what_is_not_there_is_named(positive: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"^set: positive: {message}$"):
        chosen(positive)


def test_sources_take_it(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = ["slide_id,MSI"]
    for number in range(12):
        write_clam(tmp_path / "d", f"S{number}", rng.normal(size=(5, 4)), grid(rng, 5))
        rows.append(f"S{number},{['MSS', 'MSI-H'][number % 3 == 0]}")
    (tmp_path / "d" / "labels.csv").write_text("\n".join(rows))
    arrays = {"X": rng.normal(size=(12, 4)), "y_MSI": np.array(["MSS", "MSS", "MSI-H"] * 4)}
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    for source in ("d", "a.npz"):
        splits = load_source(tmp_path / source, positive="MSI-H")
        assert splits.tasks[0].labels == ("MSS", "MSI-H")
        assert sum(np.nansum(part.labels["MSI"]) for part in splits.values()) == 4
        report = inspect_source(tmp_path / source, positive={"MSI": "MSI-H"})
        assert [task.positive for task in report.tasks] == ["MSI-H"]
