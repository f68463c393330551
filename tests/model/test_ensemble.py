"""The mean of several models' predictions."""

from __future__ import annotations

import pytest
import torch

from umda_fast.model import UMDA, Ensemble, MetadataSpec, TaskSpec, UMDAConfig, ViewSpec, decode

VIEWS = (ViewSpec("a", 5), ViewSpec("b", 3))
TASKS = (
    TaskSpec("yes", "binary"),
    TaskSpec("kind", "multiclass", classes=3),
    TaskSpec("tags", "multilabel", classes=2, thresholds=(0.2, 0.4)),
    TaskSpec("age", "regression", mean=50.0, std=10.0),
)
OTHER = (*TASKS[:2], TaskSpec("tags", "multilabel", classes=2, thresholds=(0.4, 0.8)), TaskSpec("age", "regression"))


def model(seed: int, tasks: tuple[TaskSpec, ...] = TASKS, views: tuple[ViewSpec, ...] = VIEWS) -> UMDA:
    torch.manual_seed(seed)
    return UMDA(UMDAConfig(views=views, tasks=tasks, width=16, heads=2, layers=1)).eval()


def inputs() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    views = {view.name: torch.randn(20, view.width, generator=generator) for view in VIEWS}
    return views, torch.tensor([0, 8, 8, 20])  # an empty bag among them


@torch.no_grad()
def test_predictions_and_reports_are_means() -> None:
    members = [model(0), model(1, OTHER), model(2)]
    ensemble = Ensemble(members)
    found, own = ensemble(*inputs()), [member(*inputs()) for member in members]
    for position, task in enumerate(ensemble.config.tasks):
        parts = [decode(m.config.tasks[position], out.logits[task.name]) for m, out in zip(members, own, strict=True)]
        assert not torch.allclose(parts[0], parts[1])
        torch.testing.assert_close(decode(task, found.logits[task.name]), torch.stack(parts).mean(0))
    for name in ("attention", "view_weights", "view_mass", "view_consistency", "influence"):
        expected = torch.stack([getattr(out, name) for out in own]).mean(0)
        torch.testing.assert_close(getattr(found, name), expected)


@torch.no_grad()
def test_of_one_is_that_one() -> None:
    member = model(0)
    found, own = Ensemble([member])(*inputs()), member(*inputs())
    for task in TASKS:
        torch.testing.assert_close(decode(task, found.logits[task.name]), decode(task, own.logits[task.name]))


@torch.no_grad()
def test_sure_members_stay_finite() -> None:
    """Where a probability rounds to 0 or 1, its logarithm is still known."""
    members = [model(0), model(1)]
    outputs = [member(*inputs()) for member in members]
    for sign, out in zip((1.0, -1.0), outputs, strict=True):
        for name in ("yes", "kind", "tags"):
            out.logits[name] = torch.full_like(out.logits[name], 300.0 * sign)
            out.logits[name][0] = 300.0
    logits = Ensemble(members).combine(outputs).logits
    assert all(value.isfinite().all() for value in logits.values())
    torch.testing.assert_close(logits["yes"][0], torch.tensor([300.0]))  # both sure: sure
    torch.testing.assert_close(logits["yes"][1], torch.tensor([0.0]))  # of opposite mind: one half


def test_thresholds_are_means_and_one_half_of_those_that_have_none() -> None:
    assert Ensemble([model(0), model(1, OTHER)]).config.tasks[2].thresholds == pytest.approx((0.3, 0.6))
    none = (*TASKS[:2], TaskSpec("tags", "multilabel", classes=2), TASKS[3])
    assert Ensemble([model(0), model(1, none)]).config.tasks[2].thresholds == pytest.approx((0.35, 0.45))
    assert Ensemble([model(0, none), model(1, none)]).config.tasks[2].thresholds is None


def test_other_views_tasks_or_metadata() -> None:
    with pytest.raises(ValueError, match="members: expected at least one"):
        Ensemble([])
    with pytest.raises(ValueError, match=r"members\[1\]: expected the views of the first"):
        Ensemble([model(0), model(1, views=VIEWS[::-1])])
    with pytest.raises(ValueError, match=r"members\[1\]: expected the tasks of the first"):
        Ensemble([model(0), model(1, TASKS[:3])])
    config = UMDAConfig(views=VIEWS, tasks=TASKS, width=16, heads=2, layers=1, metadata=(MetadataSpec("dose"),))
    with pytest.raises(ValueError, match=r"members\[1\]: expected the metadata of the first"):
        Ensemble([model(0), UMDA(config)])
