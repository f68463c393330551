"""Quantiles of every feature over the training instances, put into the model's encoders that have bins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from umda_fast.data import BagDataset
from umda_fast.model import QuantileBins
from umda_fast.train.sampling import feature_encoders, sampled_rows

__all__ = ["feature_quantiles", "fit_bins"]

INSTANCES = 10_000
NARROWEST = 1e-3  # of a bin, in standard deviations of its feature


def feature_quantiles(
    dataset: BagDataset, view: str, bins: int, seed: int = 0, instances: int = INSTANCES
) -> tuple[Tensor, Tensor]:
    """Edges of the bins, float64 [width, bins + 1], and the least width of one, float64 [width].

    The quantiles 0, 1/bins, ..., 1 of the instances that have the view, of bags in a random order until `instances`
    instances are read; the least width is a thousandth of the standard deviation, of a constant feature 1. A view that
    none of them has gets edges 0.
    """
    parts = [found.float() for _, found in sampled_rows(dataset, instances, seed, view)]
    if not parts:
        width = {spec.name: spec.width for spec in dataset.views}[view]
        return torch.zeros(width, bins + 1).double(), torch.ones(width).double()
    rows = torch.cat(parts).double()
    edges = torch.from_numpy(np.quantile(rows.numpy(), np.linspace(0.0, 1.0, bins + 1), axis=0)).T
    spread = rows.std(0, correction=0) * NARROWEST
    return edges, torch.where(spread > 0, spread, torch.ones_like(spread))


def fit_bins(model: nn.Module, dataset: BagDataset, seed: int = 0) -> None:
    """Set the bins of every default encoder of `model` that has any from `dataset`."""
    for view, encoder in feature_encoders(model):
        bins = getattr(encoder, "bins", None)
        if isinstance(bins, QuantileBins):
            bins.set_edges(*feature_quantiles(dataset, view, bins.bins, seed))
