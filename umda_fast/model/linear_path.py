"""The wide part of a wide-and-deep model: a linear path from a bag's features to the logits of all tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model.encoders import FeatureEncoder, ViewEncoders
from umda_fast.model.specs import TaskSpec, ViewSpec
from umda_fast.ops import bag_attention_pool

__all__ = ["LinearPath"]


# A step of Adam moves every weight alike, so that longer features learn faster; chosen on part of the films' training
# table.
LENGTH = 10.0


class LinearPath(nn.Module):
    """`logits_t[b] = sum_v mean_{i in b} W[v,t] u[i,v]`, u the features of a view, standardised as its encoder does it
    and scaled to length `LENGTH`, so that no view is loud because it is wide; the mean is over the instances that have
    the view. W begins at 0.

    Many weak features (words) each say a little about a label, and a regularised sum of them is hard to beat with few
    bags; the path leaves to the rest of the model what is not a sum. `penalty` regularises it, as the ridge of a
    logistic regression does.

    Method: Cheng et al., "Wide & Deep Learning for Recommender Systems", 2016.

    Args:
        views, tasks: of the model. A view with an encoder of the user's own is left out: what its features are only
            that encoder knows.
    """

    def __init__(self, views: Sequence[ViewSpec], tasks: Sequence[TaskSpec]) -> None:
        super().__init__()
        self.views = tuple(views)
        self.tasks = tuple(tasks)
        outputs = sum(task.outputs for task in tasks)
        self.maps = nn.ModuleList(nn.Linear(view.width, outputs, bias=False) for view in views)
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def scores(self, encoders: ViewEncoders, views: Mapping[str, Tensor], mask: Tensor | None = None) -> Tensor:
        """What every instance adds, [N, V, outputs + 1]: a view's scores and a 1, or zeros where it is missing.

        `encoders` have checked `views` before.
        """
        parts = []
        for position, (view, encoder) in enumerate(zip(self.views, encoders.encoders, strict=True)):
            features, weight = views[view.name], self.get_parameter(f"maps.{position}.weight")
            present = features.new_ones(len(features)) if mask is None else mask[:, position].to(features.dtype)
            if not isinstance(encoder, FeatureEncoder):
                parts.append(weight.new_zeros(len(present), len(weight) + 1))
                continue
            if mask is not None:
                features = features.masked_fill(~mask[:, position, None], 0)
            unit = F.normalize(encoder.standardized(features), dim=1)
            y = F.linear(LENGTH * unit, weight)
            parts.append(torch.cat([y, y.new_ones(len(y), 1)], 1) * present.to(y.dtype)[:, None])
        return torch.stack(parts, 1)

    def penalty(self) -> Tensor:
        """`sum W^2`, a scalar."""
        return torch.stack([weight.square().sum() for weight in self.parameters()]).sum()

    def pool(self, scores: Tensor, ptr: Tensor) -> dict[str, Tensor]:
        """Task -> logits [B, outputs] from `scores` of all instances."""
        n, count, width = scores.shape
        # Equal scores of the attention: a mean.
        mean = bag_attention_pool(scores.reshape(n, count * width), scores.new_zeros(n, 1), ptr)[0]
        total, share = mean.view(-1, count, width).split([width - 1, 1], 2)
        logits = (total / share.clamp_min(torch.finfo(share.dtype).tiny)).sum(1)
        parts = logits.split([task.outputs for task in self.tasks], 1)
        return {task.name: part for task, part in zip(self.tasks, parts, strict=True)}
