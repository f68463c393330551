"""A small model and a batch with everything that is awkward: missing views, an empty bag, a bag of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from umda_fast import UMDA, TaskSpec, UMDAConfig, ViewSpec
from umda_fast.model import penalty_loss, task_losses
from umda_fast.model.config import BEFORE_2

VIEWS = (ViewSpec("a.b", 7), ViewSpec("type", 5), ViewSpec("forward", 9))
TASKS = (
    TaskSpec("is it", "binary"),
    TaskSpec("type", "multiclass", 3),
    TaskSpec("a.b", "multilabel", 4),
    TaskSpec("parameters", "regression", mean=2.0, std=3.0),
)


# Options that are off by default, beside those that are on.
MORE: dict[str, Any] = {"message_ffn": 1, "view_heads": True}


@dataclass
class Batch:
    views: dict[str, Tensor]
    ptr: Tensor
    mask: Tensor
    labels: dict[str, Tensor]

    def inputs(self) -> dict[str, Any]:
        return {"views": self.views, "ptr": self.ptr, "mask": self.mask}

    def double(self) -> Batch:
        return Batch({name: x.double() for name, x in self.views.items()}, self.ptr, self.mask, self.labels)


def make_config(**options: Any) -> UMDAConfig:
    """The defaults, but small, and gains as of a trained model: what a gain of 0 scales says nothing and has no
    gradient, so that no test would see it."""
    small = {"views": VIEWS, "tasks": TASKS, "width": 16, "heads": 2, "graph_k": 3, "layer_scale": 0.5}
    return UMDAConfig(**{**small, **options})


def make_batch(sizes: tuple[int, ...] = (5, 0, 1, 7, 4), seed: int = 0, views: Any = VIEWS) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    n, bags = sum(sizes), len(sizes)
    features = {view.name: torch.randn(n, view.width, generator=generator) for view in views}
    mask = torch.rand(n, len(views), generator=generator) < 0.7
    mask[:, 0] |= ~mask.any(1)
    labels = {
        "is it": torch.randint(2, (bags,), generator=generator).float(),
        "type": torch.randint(3, (bags,), generator=generator),
        "a.b": torch.randint(2, (bags, 4), generator=generator).float(),
        "parameters": torch.randn(bags, generator=generator),
    }
    return Batch(features, torch.tensor([0, *sizes]).cumsum(0), mask, labels)


def total_loss(model: UMDA, batch: Batch) -> Tensor:
    """All tasks and all penalties."""
    out = model(**batch.inputs())
    losses = task_losses(model.config.tasks, out.logits, batch.labels)
    return torch.stack(list(losses.values())).sum() + penalty_loss(out.penalties, dict.fromkeys(out.penalties, 0.1))


@pytest.fixture
def batch() -> Batch:
    return make_batch()


@pytest.fixture(params=[{}, BEFORE_2, MORE], ids=["default", "before version 2", "more"])
def model(request: pytest.FixtureRequest) -> UMDA:
    torch.manual_seed(0)
    return UMDA(make_config(**request.param)).eval()
