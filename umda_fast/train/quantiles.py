"""Quantiles of every feature over the training instances, put into the model's encoders that have bins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from umda_fast.data import BagDataset
from umda_fast.model import FeatureEncoder, QuantileBins, ViewEncoders

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
    column = [spec.name for spec in dataset.views].index(view)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    parts = [torch.zeros(0, dataset.views[column].width)]
    read = 0
    for index in order:
        bag = dataset[index]
        read += len(bag)
        if view in bag.views:
            rows = bag.views[view].float()
            parts.append(rows if bag.mask is None else rows[bag.mask[:, column]])
        if read >= instances:
            break
    rows = torch.cat(parts).double()
    if not len(rows):
        return torch.zeros(rows.shape[1], bins + 1).double(), torch.ones(rows.shape[1]).double()
    edges = torch.from_numpy(np.quantile(rows.numpy(), np.linspace(0.0, 1.0, bins + 1), axis=0)).T
    spread = rows.std(0, correction=0) * NARROWEST
    return edges, torch.where(spread > 0, spread, torch.ones_like(spread))


def fit_bins(model: nn.Module, dataset: BagDataset, seed: int = 0) -> None:
    """Set the bins of every default encoder of `model` that has any from `dataset`."""
    for module in model.modules():
        if not isinstance(module, ViewEncoders):
            continue
        for view, encoder in zip(module.views, module.encoders, strict=True):
            bins = getattr(encoder, "bins", None)
            if isinstance(encoder, FeatureEncoder) and isinstance(bins, QuantileBins):
                bins.set_edges(*feature_quantiles(dataset, view.name, bins.bins, seed))
