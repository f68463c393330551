import re

import numpy as np
import pytest

from umda_fast.data.labels import fit_tasks, label_columns
from umda_fast.errors import DataError
from umda_fast.tasks import TaskSpec, kind_of

NAN = float("nan")


def one(values, kind=None):
    kinds = None if kind is None else {"y": kind}
    (spec,), columns = label_columns({"y": values}, len(values), kinds, where="set")
    return spec, columns["y"]


@pytest.mark.parametrize(
    ("values", "kind", "labels"),
    [
        ([0, 1, 1, 0], "binary", ("0", "1")),
        ([1, 1, 1], "binary", ("0", "1")),
        ([False, True], "binary", ("0", "1")),
        ([0.0, 1.0, NAN], "binary", ("0", "1")),
        ([-1, 1, -1], "binary", ("-1", "1")),
        (["sick", "well", "", "sick"], "binary", ("sick", "well")),
        (["0", "1", ""], "binary", ("0", "1")),
        ([0, 1, 2] * 3, "multiclass", ("0", "1", "2")),
        ([10, 2, 7] * 3, "multiclass", ("2", "7", "10")),
        (["c", "a", "b"], "multiclass", ("a", "b", "c")),
        ([1.5, 2.0, NAN], "regression", None),
        (list(range(100)), "regression", None),
        ([3, 1, 2], "regression", None),
    ],
)
def test_kinds_are_inferred(values, kind, labels):
    spec, column = one(values)
    assert spec.kind == kind
    assert spec.labels == labels
    assert column.dtype == np.float64
    assert column.shape == (len(values),)


def test_values_become_class_numbers_and_blanks_are_missing():
    _, column = one(["b", "", "c", None, "a", "b"])
    np.testing.assert_array_equal(column, [1, NAN, 2, NAN, 0, 1])
    _, column = one([-1, 1, NAN])
    np.testing.assert_array_equal(column, [0, 1, NAN])
    _, column = one(np.array([b"x", b"y"]))
    np.testing.assert_array_equal(column, [0, 1])


def test_a_matrix_is_multilabel():
    spec, column = one([[0, 1, 1], [NAN, NAN, NAN]])
    assert (spec.kind, spec.classes) == ("multilabel", 3)
    np.testing.assert_array_equal(column, [[0, 1, 1], [NAN, NAN, NAN]])


def test_regressions_are_standardised_by_the_labels_there_are():
    spec, _ = one([1.5, NAN, 4.5])
    assert (spec.mean, spec.std) == (3.0, 1.5)
    assert one([2.5, 2.5])[0].std == 1.0
    assert one([NAN, NAN], "regression")[0].mean == 0.0


def test_kinds_can_be_given():
    assert one([0, 1, 0], "regression")[0].kind == "regression"
    assert one([0, 1, 0, 1], "multiclass")[0].classes == 2
    assert one([5, 6, 7], "multiclass")[0].labels == ("5", "6", "7")
    given = TaskSpec("y", "multiclass", 5)
    spec, column = one([4, NAN, 0], given)
    assert spec is given
    np.testing.assert_array_equal(column, [4, NAN, 0])
    assert one([0, 2], {"kind": "multiclass", "classes": 3})[0] == TaskSpec("y", "multiclass", 3)


def test_given_class_names_are_looked_up():
    given = TaskSpec("y", "multiclass", 3, labels=("low", "mid", "high"))
    np.testing.assert_array_equal(one(["high", "", "low"], given)[1], [2, NAN, 0])
    np.testing.assert_array_equal(one([2, 0], given)[1], [2, 0])
    signed = TaskSpec("y", "binary", labels=("-1", "1"))
    np.testing.assert_array_equal(one([1, -1, 1], signed)[1], [1, 0, 1])


def test_a_sequence_of_specs_chooses_tasks_and_allows_absent_ones():
    wanted = [TaskSpec("b", "binary"), TaskSpec("m", "multilabel", 2), TaskSpec("r", "regression")]
    specs, columns = label_columns({"r": [1.0, 2.0], "other": [0, 1]}, 2, wanted, where="set")
    assert specs == tuple(wanted)
    assert np.isnan(columns["b"]).all()
    assert columns["m"].shape == (2, 2)
    assert columns["r"].tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([0, 1, 2], "binary", "set: labels 'y': expected two distinct values for binary, got 3 (0, 1, 2)"),
        (["a", "a"], None, "expected at least two distinct values for multiclass, got 1 (a)"),
        ([0.5, 1], "multiclass", "expected whole numbers for multiclass, got 0.5"),
        (["a", "1"], "regression", "expected numbers for regression, got text such as 'a'"),
        (["a", "1"], TaskSpec("y", "regression"), "expected numbers for regression"),
        ([0.0, float("inf")], None, "expected finite numbers, got inf"),
        ([0, 7], TaskSpec("y", "multiclass", 5), "expected a class in 0..4, got 7 in row 1"),
        ([0, -1], TaskSpec("y", "multiclass", 5), "expected a class in 0..4, got -1 in row 1"),
        ([0, 0.5], TaskSpec("y", "binary"), "expected a class in 0..1, got 0.5 in row 1"),
        (["a", "b"], TaskSpec("y", "binary"), "expected class numbers, got text such as 'a'"),
        (["no", "x"], TaskSpec("y", "binary", labels=("no", "yes")), "expected one of no, yes, got 'x'"),
        ([[0, 2], [1, 0]], None, "expected values of 0 or 1, got 2 in row 0"),
        ([[0, 1], [1, NAN]], None, "all there or all missing, got both in row 1"),
        (
            [[0, 1, 1], [1, 0, 1]],
            TaskSpec("y", "multilabel", 2),
            "expected 2 columns, one for each label, got 3",
        ),
        ([0, 1], "multilabel", "expected [B, C] for multilabel, got [2]"),
        ([[0, 1], [1, 1]], "binary", "expected [B] for binary, got [2, 2]"),
        ([["a", "b"], ["c", "d"]], None, "expected values of 0 or 1 for multilabel"),
        ([0, 1], "graded", "kinds['y']: expected one of binary, multiclass"),
        ([0, 1], {"kind": "multiclass"}, "kinds['y']: TaskSpec('y').classes: expected at least 2"),
        ([0, 1], TaskSpec("z", "binary"), "kinds['y']: expected a TaskSpec of that name, got 'z'"),
        ([1j, 2j], None, "expected numbers or text, got dtype complex128"),
    ],
)
def test_bad_labels(values, kind, message):
    with pytest.raises(DataError, match=re.escape(message)):
        one(values, kind)


def test_bad_kinds():
    with pytest.raises(DataError, match="kinds: expected tasks among y, got 'z'"):
        label_columns({"y": [0, 1]}, 2, {"z": "binary"}, where="set")
    with pytest.raises(DataError, match="kinds: expected a mapping or a sequence of TaskSpec"):
        label_columns({"y": [0, 1]}, 2, ["binary"], where="set")


def test_fitting_to_a_training_split():
    tasks = (
        TaskSpec("b", "binary"),
        TaskSpec("c", "multiclass", 3),
        TaskSpec("m", "multilabel", 2),
        TaskSpec("r", "regression"),
    )
    labels = {
        "b": np.array([0, 0, 0, 1, NAN]),
        "c": np.array([0, 0, 1, NAN, 0]),
        "m": np.array([[0, 1], [0, 1], [1, 1], [0, 0], [NAN, NAN]]),
        "r": np.array([1.0, 3.0, NAN, NAN, NAN]),
    }
    assert kind_of(tasks[2]).counts(tasks[2], labels["m"]) == [1, 3]
    plain = fit_tasks(tasks, labels)
    assert plain[:3] == tasks[:3]
    assert (plain[3].mean, plain[3].std) == (2.0, 1.0)
    balanced = fit_tasks(tasks, labels, "balanced")
    assert balanced[0].class_weights == pytest.approx((4 / 6, 2.0))
    assert balanced[1].class_weights == pytest.approx((4 / 9, 4 / 3, 1.0))
    assert balanced[2].class_weights == pytest.approx((3.0, 1 / 3))
    with pytest.raises(DataError, match="class_weights"):
        fit_tasks(tasks, labels, "sqrt")
