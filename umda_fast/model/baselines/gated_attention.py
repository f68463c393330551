"""Gated attention pooling, of each task or of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from umda_fast.model.baselines.base import BaselineConfig, OneEncoder, Pooled
from umda_fast.model.gmip import BagPooling

__all__ = ["AttentionPooling", "GatedAttention", "GatedAttentionConfig"]


@dataclass(frozen=True)
class GatedAttentionConfig(BaselineConfig):
    """`hidden`: units of the attention."""

    hidden: int = 64

    def _counts(self) -> tuple[str, ...]:
        return ("width", "hidden")


class AttentionPooling(OneEncoder):
    """Gated attention pooling, into one vector that all tasks share or into one for each.

    Source: Ilse, Tomczak and Welling, "Attention-based deep multiple instance learning", ICML 2018.
    """

    config_class = GatedAttentionConfig
    _by_task: ClassVar[bool] = False

    def __init__(self, config: GatedAttentionConfig) -> None:
        super().__init__(config)
        self.attention = BagPooling(config.width, len(config.tasks) if self._by_task else 1, config.hidden)

    def pool(self, z: Tensor, ptr: Tensor) -> Pooled:
        found = self.attention(z, ptr)
        return Pooled(found.pooled, found.attention, found.entropy)


class GatedAttention(AttentionPooling):
    """Gated attention pooling, one per task over shared hidden units."""

    architecture = "gated_attention"
    _own = ("attention.score", "heads")
    _by_task = True
