import pytest
import torch

from umda_fast.data import Bag, BagDataset
from umda_fast.data.adapt import adapt_dataset
from umda_fast.errors import DataError
from umda_fast.model import TaskSpec, ViewSpec

VIEWS = (ViewSpec("a", 3), ViewSpec("b", 2), ViewSpec("c", 1))
TASKS = (
    TaskSpec("grade", "multiclass", classes=3, labels=("low", "middle", "high")),
    TaskSpec("age", "regression", mean=50.0, std=10.0),
    TaskSpec("marks", "multilabel", classes=2, labels=("x", "y")),
)


def _dataset() -> BagDataset:
    """Views in another order and one more, classes in another order, no age."""
    mask = torch.tensor([[True, True, False], [True, False, True]])
    bag = Bag(
        "one",
        {"d": torch.ones(2, 4), "b": torch.full((2, 2), 2.0), "a": torch.full((2, 3), 3.0)},
        mask=mask[:, [0, 1, 2]] | torch.tensor([[False, True, False], [False, False, False]]),
        labels={"grade": torch.tensor(1), "marks": torch.tensor([1.0, 0.0])},
    )
    other = Bag("two", {"a": torch.zeros(1, 3)})
    tasks = (
        TaskSpec("grade", "multiclass", classes=2, labels=("high", "low")),
        TaskSpec("marks", "multilabel", classes=2, labels=("y", "x")),
        TaskSpec("unknown", "binary"),
    )
    return BagDataset([bag, other], (ViewSpec("d", 4), ViewSpec("b", 2), ViewSpec("a", 3)), tasks)


def test_views_tasks_and_classes_follow_the_model() -> None:
    adapted = adapt_dataset(_dataset(), VIEWS, TASKS)
    assert (adapted.views, adapted.tasks) == (VIEWS, TASKS)
    batch = adapted.collate([adapted[0], adapted[1]])
    assert batch.mask.tolist() == [[False, True, False], [True, False, False], [True, False, False]]
    assert batch.views["b"].tolist() == [[2.0, 2.0], [0.0, 0.0], [0.0, 0.0]]
    assert batch.views["c"].shape == (3, 1)
    assert batch.labels["grade"].tolist()[0] == 0  # "low"
    assert batch.labels["marks"].tolist()[0] == [0.0, 1.0]  # "y"
    assert {name: mask.tolist() for name, mask in batch.label_mask.items()} == {
        "grade": [True, False],
        "age": [False, False],
        "marks": [True, False],
    }


def test_what_fits_already_is_left_alone() -> None:
    dataset = _dataset()
    assert adapt_dataset(dataset, dataset.views, dataset.tasks) is dataset


@pytest.mark.parametrize(
    ("views", "tasks", "words"),
    [
        ((ViewSpec("z", 3),), TASKS, "expected views z as the model has, got d, b, a"),
        ((ViewSpec("a", 7),), TASKS, "view 'a': expected width 7 as the model has, got 3"),
        (
            VIEWS,
            (TaskSpec("grade", "binary"),),
            "task 'grade': expected kind binary as the model has, got multiclass",
        ),
        (
            VIEWS,
            (TaskSpec("grade", "multiclass", classes=2, labels=("low", "middle")),),
            "class 'high' is unknown to the model; expected one of low, middle",
        ),
        (VIEWS, (TaskSpec("marks", "multilabel", classes=3),), "expected 3 classes as the model has, got 2"),
    ],
)
def test_what_does_not_fit_is_named(
    views: tuple[ViewSpec, ...], tasks: tuple[TaskSpec, ...], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        adapt_dataset(_dataset(), views, tasks)


def test_an_instance_with_no_view_the_model_knows() -> None:
    adapted = adapt_dataset(_dataset(), (ViewSpec("b", 2),), TASKS)
    with pytest.raises(DataError, match="bag 'one': instance 1 has none of the views"):
        adapted[0]
