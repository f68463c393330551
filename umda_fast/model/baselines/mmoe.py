"""A mixture of shared experts for each task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from umda_fast.model.baselines.gated_attention import AttentionPooling, GatedAttentionConfig
from umda_fast.model.experts import ExpertGates

__all__ = ["ExpertsConfig", "MMoE"]


@dataclass(frozen=True)
class ExpertsConfig(GatedAttentionConfig):
    """`experts`: shared ones; PLE adds one of each task's own."""

    experts: int = 4

    def _counts(self) -> tuple[str, ...]:
        return ("width", "hidden", "experts")


class MMoE(AttentionPooling):
    """One pooling, experts for all tasks, a gate per task (see `ExpertGates`)."""

    architecture = "mmoe"
    config_class = ExpertsConfig
    _private = 0

    def __init__(self, config: ExpertsConfig) -> None:
        super().__init__(config)
        self.experts = ExpertGates(config.width, len(config.tasks), config.experts, self._private)

    def share(self, pooled: Tensor) -> Tensor:
        shared: Tensor = self.experts(pooled)
        return shared

    def task_parameters(self) -> list[nn.Parameter]:
        """Heads, gates and private experts."""
        return [*super().task_parameters(), self.experts.gate, *self.experts.private.parameters()]
