"""Bags as awkward as a step can meet them, with three tasks of three kinds."""

import torch

from umda_fast.data import Bag, BagDataset
from umda_fast.model import TaskSpec, ViewSpec

VIEWS = (ViewSpec("a", 4), ViewSpec("b", 3))
TASKS = (
    TaskSpec("y", "binary", class_weights=(1.0, 3.0)),
    TaskSpec("k", "multiclass", classes=3),
    TaskSpec("rare", "regression", mean=1.0, std=2.0),
)
# Ratios over the whole batch: see `penalty_counts`.
INEXACT = {"dispersion": 0.0, "smoothness": 0.0}


def datasets() -> dict[str, BagDataset]:
    """Bags of 1 to 12 instances, one beyond the budget (the other processes have nothing then), and an empty one;
    views missing here and there; `rare` is known for few bags only."""
    rng = torch.Generator().manual_seed(0)
    bags = []
    for index, size in enumerate([40, 0, *([3, 7, 12, 1, 5, 9, 2] * 4)]):
        mask = torch.rand(size, 2, generator=rng) > 0.3
        mask[:, index % 2] = True
        labels = {"y": torch.tensor(float(index % 3 == 0)), "k": torch.tensor(index % 3)}
        if index % 9 == 4:
            labels = {"rare": torch.tensor(float(size))}
        views = {view.name: torch.randn(size, view.width, generator=rng) + 0.2 * (index % 3) for view in VIEWS}
        bags.append(Bag(f"bag {index}", views, mask, labels))
    return {
        "train": BagDataset(bags, VIEWS, TASKS),
        "val": BagDataset(bags[:17], VIEWS, TASKS),
        "test": BagDataset(bags[3:], VIEWS, TASKS),
    }
