"""A model for each view, their predictions averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from umda_fast.model.baselines.base import Baseline, BaselineOutput
from umda_fast.model.baselines.gated_attention import GatedAttention, GatedAttentionConfig
from umda_fast.model.gmip import bag_index
from umda_fast.model.specs import ViewSpec

__all__ = ["LateFusion", "LateFusionConfig"]


@dataclass(frozen=True)
class LateFusionConfig(GatedAttentionConfig):
    """As `GatedAttentionConfig`, of every view's model; takes all views."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.view is not None:
            raise ValueError(f"view: late fusion takes all views, expected None, got {self.view!r}")

    def of_view(self, view: ViewSpec) -> GatedAttentionConfig:
        """The configuration of the model of `view`."""
        return GatedAttentionConfig((view,), self.tasks, width=self.width, dropout=self.dropout, hidden=self.hidden)


class LateFusion(Baseline):
    """A `GatedAttention` for every view, over the instances that have it; the logits of the views that a bag has are
    averaged, and the loss is that of the average."""

    architecture = "late_fusion"
    config_class = LateFusionConfig

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__(config)
        self.models = nn.ModuleList(GatedAttention(config.of_view(view)) for view in config.views)

    def predict(self, views: Mapping[str, Tensor], ptr: Tensor, mask: Tensor | None) -> BaselineOutput:
        """As of the other baselines; `representation` [N, V * D]."""
        models, names = self._gated(), [view.name for view in self.config.views]
        z = torch.cat([model.encoder({name: views[name]}, None) for name, model in zip(names, models, strict=True)], 1)
        n, bags, bag = len(z), len(ptr) - 1, bag_index(ptr, len(z))
        outputs, present, attention = [], [], []
        for column, (model, own) in enumerate(zip(models, z.split(self.config.width, dim=1), strict=True)):
            rows = torch.arange(n, device=ptr.device) if mask is None else mask[:, column].nonzero().flatten()
            own_ptr = torch.searchsorted(rows, ptr)
            out = model.from_instances(own[rows], own_ptr)
            outputs.append(out)
            present.append((own_ptr.diff() > 0).to(z.dtype))
            attention.append(out.attention.new_zeros(n, len(self.config.tasks)).index_copy(0, rows, out.attention))
        share = torch.stack(present)  # [V, B]
        share = share / share.sum(0).clamp_min(1.0)
        logits = {
            task.name: (torch.stack([out.logits[task.name] for out in outputs]) * share[..., None]).sum(0)
            for task in self.config.tasks
        }
        weights = (torch.stack(attention) * share[:, bag, None]).sum(0)
        entropy = weights.new_zeros(bags, weights.shape[1]).index_add(0, bag, -torch.xlogy(weights, weights))
        return BaselineOutput(logits, weights, entropy, z, {})

    def task_parameters(self) -> list[nn.Parameter]:
        """Those of the views' models."""
        return [parameter for model in self._gated() for parameter in model.task_parameters()]

    def last_shared_layer(self) -> list[nn.Parameter]:
        """The last layers of the views' encoders."""
        return [parameter for model in self._gated() for parameter in model.last_shared_layer()]

    def _gated(self) -> list[GatedAttention]:
        return [model for model in self.models if isinstance(model, GatedAttention)]
