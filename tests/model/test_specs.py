import dataclasses
import json
import re

import pytest

from umda_fast.model.specs import TaskSpec, ViewSpec, check_distinct


def test_specs_survive_json():
    task = TaskSpec("genre", "multilabel", 3, labels=["a", "b", "c"], class_weights=[1, 2, 3.5])
    assert TaskSpec(**json.loads(json.dumps(dataclasses.asdict(task)))) == task
    view = ViewSpec("pixels", 64)
    assert ViewSpec(**json.loads(json.dumps(dataclasses.asdict(view)))) == view
    assert hash(task) != hash(view)


@pytest.mark.parametrize(
    ("kind", "classes", "outputs"),
    [("binary", 1, 1), ("regression", 1, 1), ("multiclass", 4, 4), ("multilabel", 3, 3)],
)
def test_outputs(kind, classes, outputs):
    assert TaskSpec("t", kind, classes).outputs == outputs


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": ""}, ValueError, "TaskSpec.name"),
        ({"name": 3}, TypeError, "TaskSpec.name"),
        ({"name": " t"}, ValueError, "surrounding blanks"),
        ({"kind": "ranking"}, ValueError, "kind: expected one of binary, multiclass"),
        ({"kind": "multiclass"}, ValueError, "classes: expected at least 2"),
        ({"kind": "multilabel", "classes": 0}, ValueError, "classes: expected at least 1"),
        ({"classes": 2}, ValueError, "classes: expected 1 for a binary task"),
        ({"classes": 1.0}, TypeError, "classes: expected an int"),
        ({"classes": True}, TypeError, "classes: expected an int"),
        ({"kind": "regression", "std": 0.0}, ValueError, "std: expected a positive"),
        ({"kind": "regression", "mean": float("nan")}, ValueError, "mean: expected a finite"),
        ({"kind": "regression", "mean": "0"}, TypeError, "mean: expected a number"),
        ({"mean": 1.0}, ValueError, "belong to regression"),
        ({"labels": ("no",)}, ValueError, "labels: expected 2 values"),
        ({"labels": ("no", "no")}, ValueError, "distinct"),
        ({"labels": (0, 1)}, TypeError, "labels: expected strings"),
        ({"labels": "no"}, TypeError, "labels: expected a sequence"),
        ({"kind": "regression", "labels": ("a",)}, ValueError, "has no classes"),
        ({"class_weights": (1.0,)}, ValueError, "class_weights: expected 2 values"),
        ({"class_weights": (1.0, 0.0)}, ValueError, "class_weights: expected positive"),
        ({"class_weights": ("a", "b")}, TypeError, "class_weights: expected a number"),
    ],
)
def test_bad_task(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        TaskSpec(**{"name": "t", "kind": "binary", **arguments})


@pytest.mark.parametrize(
    ("name", "width", "error"),
    [("", 3, ValueError), (None, 3, TypeError), ("x", 0, ValueError), ("x", 2.0, TypeError)],
)
def test_bad_view(name, width, error):
    with pytest.raises(error, match="ViewSpec"):
        ViewSpec(name, width)


def test_names_are_distinct():
    check_distinct("views", [ViewSpec("a", 1), ViewSpec("b", 1)])
    with pytest.raises(ValueError, match=r"views: .* got a more than once"):
        check_distinct("views", [ViewSpec("a", 1), ViewSpec("b", 1), ViewSpec("a", 2)])
