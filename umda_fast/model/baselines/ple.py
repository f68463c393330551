"""A mixture of shared experts and one of its own for each task."""

from __future__ import annotations

from umda_fast.model.baselines.mmoe import MMoE

__all__ = ["PLE"]


class PLE(MMoE):
    """As `MMoE`, with one further expert of each task's own (see `ExpertGates`)."""

    architecture = "ple"
    _private = 1
