"""A linear model of bag means: what any more than that has to be better than."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umda_fast.model.baselines.base import Baseline, BaselineConfig, BaselineOutput
from umda_fast.model.gmip import bag_index
from umda_fast.model.specs import ViewSpec

__all__ = ["Linear", "LinearConfig"]

_ROWS = 1 << 16  # instances at a time whose features are brought to full precision


@dataclass(frozen=True)
class LinearConfig(BaselineConfig):
    """As `BaselineConfig`; there is nothing that `width` and `dropout` could be of."""


class Linear(Baseline):
    """`logits_t = W_t f + b_t`, f the mean of a bag's features over the instances that have the view, view after view,
    `(mean - shift) / scale`; 0 where no instance of the bag has the view.

    It is fitted to convergence (`umda_fast.train.linear.fit_linear`), not by steps on batches.
    """

    architecture = "linear"
    config_class = LinearConfig

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.used: tuple[ViewSpec, ...] = config.used
        self.columns = [index for index, view in enumerate(config.views) if view in config.used]
        features = sum(view.width for view in self.used)
        self.shift: Tensor
        self.scale: Tensor
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.heads = nn.ModuleList(nn.Linear(features, task.outputs) for task in config.tasks)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def means(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of every bag the means of its features, not scaled, float32 or float64 [B, F], and whether it has them, bool
        [B, F]."""
        bags = len(ptr) - 1
        means, present = [], []
        for column, view in zip(self.columns, self.used, strict=True):
            features = views[view.name]
            bag = bag_index(ptr, len(features))
            dtype = torch.promote_types(features.dtype, torch.float32)
            there = features.new_ones(len(features), dtype=dtype) if mask is None else mask[:, column].to(dtype)
            counts = there.new_zeros(bags).index_add(0, bag, there)
            total = there.new_zeros(bags, view.width)
            for start in range(0, len(features), _ROWS):  # no copy of all instances
                rows = slice(start, start + _ROWS)
                part = features[rows].to(dtype)
                part = part if mask is None else part.masked_fill(~mask[rows, column, None], 0.0)
                total = total.index_add(0, bag[rows], part)
            means.append(total / counts.clamp_min(1.0)[:, None])
            present.append((counts > 0)[:, None].expand(-1, view.width))
        return torch.cat(means, 1), torch.cat(present, 1)

    def scaled(self, means: Tensor, present: Tensor) -> Tensor:
        """f [B, F]."""
        return ((means - self.shift) / self.scale).masked_fill(~present, 0.0)

    def bag_logits(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """task -> [B, outputs], without the instances' own part of what `predict` returns."""
        f = self.scaled(*self.means(views, ptr, mask)).to(self.shift.dtype)
        return {task.name: head(f) for task, head in zip(self.config.tasks, self.heads, strict=True)}

    def predict(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None) -> BaselineOutput:
        """As of the other baselines; every instance counts alike, and `representation` [N, F] is its features."""
        logits = self.bag_logits(views, ptr, mask)
        dtype = self.shift.dtype
        sizes = ptr.diff().to(dtype)
        n = next(iter(views.values())).shape[0]
        attention = (1.0 / sizes.clamp_min(1.0))[bag_index(ptr, n)][:, None].expand(-1, len(self.heads))
        entropy = sizes.clamp_min(1.0).log()[:, None].expand(-1, len(self.heads))
        rows = [views[view.name].to(dtype) for view in self.used]
        if mask is not None:
            rows = [x.masked_fill(~mask[:, i, None], 0.0) for i, x in zip(self.columns, rows, strict=True)]
        return BaselineOutput(logits, attention, entropy, torch.cat(rows, 1), {})

    def task_parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.parameters())

    def last_shared_layer(self) -> list[nn.Parameter]:
        """There is none."""
        return []
