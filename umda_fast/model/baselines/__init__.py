"""Plain models to compare with, in the same trainer: one way each to fuse views, pool a bag and share between tasks.

All standardise and encode views as `UMDA` does; `view=None` takes all views, each encoded and then concatenated, or
one by name. They name their shared parameters, so every balancer works with them; penalties there are none.
"""

from __future__ import annotations

from typing import Any

from umda_fast.model.baselines.base import Baseline, BaselineConfig, BaselineOutput
from umda_fast.model.baselines.gated_attention import GatedAttention, GatedAttentionConfig
from umda_fast.model.baselines.hard_sharing import HardSharing
from umda_fast.model.baselines.late_fusion import LateFusion, LateFusionConfig
from umda_fast.model.baselines.linear import Linear, LinearConfig
from umda_fast.model.baselines.max_pooling import MaxPooling
from umda_fast.model.baselines.mean_pooling import MeanPooling
from umda_fast.model.baselines.mmoe import ExpertsConfig, MMoE
from umda_fast.model.baselines.ple import PLE
from umda_fast.model.baselines.transmil import TransMIL, TransMILConfig

__all__ = [
    "BASELINES",
    "PLE",
    "Baseline",
    "BaselineConfig",
    "BaselineOutput",
    "ExpertsConfig",
    "GatedAttention",
    "GatedAttentionConfig",
    "HardSharing",
    "LateFusion",
    "LateFusionConfig",
    "Linear",
    "LinearConfig",
    "MMoE",
    "MaxPooling",
    "MeanPooling",
    "TransMIL",
    "TransMILConfig",
]

BASELINES: dict[str, Any] = {
    model.architecture: model
    for model in (MeanPooling, MaxPooling, GatedAttention, TransMIL, HardSharing, MMoE, PLE, LateFusion, Linear)
}
"""Architecture -> class."""
