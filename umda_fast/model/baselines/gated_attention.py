"""Gated attention pooling, of each task or of all."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from umda_fast.model.baselines.base import BaselineConfig, OneEncoder, Pooled
from umda_fast.model.gmip import BagPooling

__all__ = ["GatedAttention", "GatedAttentionConfig", "OneAttention"]


@dataclass(frozen=True)
class GatedAttentionConfig(BaselineConfig):
    """`hidden`: units of the attention."""

    hidden: int = 64

    def _counts(self) -> tuple[str, ...]:
        return ("width", "hidden")


class GatedAttention(OneEncoder):
    """Gated attention pooling, one per task over shared hidden units.

    Source: Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML 2018.
    """

    architecture = "gated_attention"
    config_class = GatedAttentionConfig
    _own = ("attention.score", "heads")

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        self.attention = BagPooling(config.width, len(config.tasks), config.hidden)

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        found = self.attention(z, ptr)
        return Pooled(found.pooled, found.attention, found.entropy)


class OneAttention(OneEncoder):
    """Gated attention pooling into one vector that all tasks share."""

    config_class = GatedAttentionConfig

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        self.attention = BagPooling(config.width, 1, config.hidden)

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        found = self.attention(z, ptr)
        return Pooled(found.pooled, found.attention, found.entropy)
