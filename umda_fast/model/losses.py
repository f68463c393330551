"""Losses of the tasks, their predictions, and the weighted sum of the penalties."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from umda_fast.model._numerics import wide
from umda_fast.tasks import TaskSpec, kind_of

__all__ = ["decode", "penalty_loss", "task_losses", "view_losses"]


def task_losses(
    tasks: Sequence[TaskSpec],
    logits: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    label_mask: Mapping[str, Tensor] | None = None,
    labelled: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """Mean loss of every task over the bags that carry its label.

    Binary: cross entropy of the sigmoid; multiclass: of the softmax; multilabel: of the sigmoids, mean over
    labels; regression: squared error against `(label - mean) / std`; ordinal: `-log P(grade)` of cumulative logits;
    survival: `-log P(interval of the event)` or of living as long as was seen, from hazards of intervals, or Cox's
    partial likelihood among these bags.
    With class weights, losses of tasks with one class for a bag are weighted means (weight of the label's class,
    divided by the sum of weights); for a multilabel task the weight multiplies the loss of a label's positives.

    Args:
        tasks: of the model.
        logits: task -> [B, outputs].
        labels: task -> [B] (binary, multiclass, ordinal, regression in original units), [B, classes] (multilabel) or
            [B, 2], times and events (survival).
        label_mask: task -> bool [B], True where the label is present; a task not in it has all of its labels.
            Labels elsewhere are never used (they may be NaN).
        labelled: names of the tasks with at least one label, where that is known already; others are left out.

    Returns:
        task -> scalar, float32 (float64 for float64). A task without a single label is absent. Finding out
        which are, without `labelled`, reads the masks: one synchronisation with a GPU.

    Raises:
        ValueError: labels, logits or a mask of another shape.
    """
    masks = label_mask or {}
    wanted = [task for task in tasks if task.name in labels and (labelled is None or task.name in labelled)]
    for task in wanted:
        _check(task, logits, labels[task.name], masks.get(task.name))
    if labelled is None:
        bounded = [masks[task.name].any() for task in wanted if task.name in masks]
        some = iter(torch.stack(bounded).tolist() if bounded else [])
        wanted = [task for task in wanted if (next(some) if task.name in masks else len(labels[task.name]) > 0)]
    return {
        task.name: kind_of(task).loss(task, wide(logits[task.name]), labels[task.name], masks.get(task.name))
        for task in wanted
    }


def view_losses(
    tasks: Sequence[TaskSpec],
    view_logits: Mapping[str, Tensor],
    present: Tensor,
    labels: Mapping[str, Tensor],
    label_mask: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The losses of what every view alone says: of a bag, the mean of their losses over the views that it has; of a
    task, the mean of that over the bags that carry its label, weighted as in `task_losses`.

    A bag without any view (an empty one) adds 0 to the sum and its weight to what that is divided by, so that shares of
    a batch are put together for these losses as they are for those of the tasks.

    Args:
        tasks: with a label in the batch, such as those that `task_losses` returns.
        view_logits: task -> [B, V, outputs]. present: bool [B, V]. Both as `UMDAOutput` has them.
        labels, label_mask: as of `task_losses`.

    Returns:
        task -> scalar, float32 (float64 for float64). Nothing is read back from a GPU.

    Raises:
        ValueError: labels, logits or a mask of another shape.
    """
    views = present.shape[1]
    count = present.sum(1).clamp_min(1)
    losses = {}
    for task in tasks:
        target, keep = labels[task.name], (label_mask or {}).get(task.name)
        _check(task, view_logits, target, keep, views=views)
        each, weight = _of_views(task, wide(view_logits[task.name]), present, target, keep)
        loss = each.masked_fill(~present, 0.0).sum(1) / count
        losses[task.name] = (loss * weight).sum() / weight.sum()
    return losses


def _of_views(
    task: TaskSpec, logits: Tensor, present: Tensor, target: Tensor, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Loss of every view of every bag, [B, V], of logits [B, V, outputs], and weight of every bag, [B]."""
    kind, (bags, views) = kind_of(task), present.shape
    if kind.joint(task):  # views are not compared with each other, nor with one that is not there
        of = [present[:, view] if keep is None else keep & present[:, view] for view in range(views)]
        each = [kind.bag_losses(task, logits[:, view], target, of[view])[0] for view in range(views)]
        return torch.stack(each, 1), kind.bag_losses(task, logits[:, 0], target, keep)[1]
    target = target.repeat_interleave(views, 0, output_size=bags * views)
    keep = None if keep is None else keep.repeat_interleave(views, output_size=bags * views)
    losses, weight = kind.bag_losses(task, logits.flatten(0, 1), target, keep)
    return losses.view(bags, views), weight.view(bags, views)[:, 0]


def _check(
    task: TaskSpec, logits: Mapping[str, Tensor], target: Tensor, keep: Tensor | None, views: int | None = None
) -> None:
    """Shapes of a task's logits [B, outputs], or with `views` [B, V, outputs], and of its labels."""
    where = f"task {task.name!r}"
    if task.name not in logits:
        raise ValueError(f"{where}: expected logits, got {', '.join(logits) or 'none'}")
    bags = logits[task.name].shape[0]
    between = () if views is None else (views,)
    if logits[task.name].shape != (bags, *between, task.outputs):
        expected = ", ".join(map(str, ("B", *between, task.outputs)))
        raise ValueError(f"{where}: logits: expected shape [{expected}], got {list(logits[task.name].shape)}")
    shape = (bags, *task.label_shape)
    if target.shape != shape:
        raise ValueError(f"{where}: labels: expected shape {list(shape)}, got {list(target.shape)}")
    if keep is not None and (keep.shape != (bags,) or keep.dtype != torch.bool):
        raise ValueError(f"{where}: label_mask: expected bool [{bags}], got {keep.dtype} {list(keep.shape)}")


def decode(task: TaskSpec, logits: Tensor) -> Tensor:
    """Predictions from a task's logits [B, outputs]: probabilities (of label 1, of the classes, of every label)
    or values in original units; same shape, float32 (float64 for float64).
    """
    return kind_of(task).decode(task, wide(logits))


def penalty_loss(penalties: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """`sum_p weights[p] * penalties[p]`, a scalar; a penalty without a weight (or with weight 0) is left out.

    Raises:
        ValueError: no penalties, or a weight for a penalty that does not exist.
    """
    if not penalties:
        raise ValueError("penalties: expected at least one, got none")
    for name in weights:
        if name not in penalties:
            raise ValueError(f"weights: expected penalties among {', '.join(penalties)}, got {name!r}")
    factors = {name: float(weights[name]) for name in penalties if weights.get(name, 0.0) != 0.0}
    if not factors:
        return next(iter(penalties.values())).new_zeros(())
    terms = torch._foreach_mul([penalties[name] for name in factors], list(factors.values()))
    return torch.stack(list(terms)).sum()
