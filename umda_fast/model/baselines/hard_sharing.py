"""Everything but the heads shared between the tasks."""

from __future__ import annotations

from torch import Tensor, nn

from umda_fast.model.baselines.gated_attention import AttentionPooling, GatedAttentionConfig

__all__ = ["HardSharing"]


class HardSharing(AttentionPooling):
    """One pooling and two hidden layers for all tasks, a head for each.

    Source: Caruana, "Multitask learning", Machine Learning 28, 1997.
    """

    architecture = "hard_sharing"

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        width = config.width
        self.trunk = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU())

    def share(self, pooled: Tensor) -> Tensor:
        shared: Tensor = self.trunk(pooled)
        return shared
