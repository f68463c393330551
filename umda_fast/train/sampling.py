"""What the statistics of features are taken from, and where they go: some training instances, and the encoders."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from umda_fast.data import BagDataset
from umda_fast.model import FeatureEncoder, ViewEncoders

__all__ = ["feature_encoders", "sampled_rows"]


def sampled_rows(
    dataset: BagDataset, instances: int, seed: int = 0, only: str | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Bags in a random order until `instances` instances are read, so that a large source is not read twice: for every
    view of every bag (or the view `only`) its name and the features [n, width] of the instances that have it, n at
    least 1."""
    read = 0
    for index in torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist():
        bag = dataset[index]
        for column, view in enumerate(dataset.views):
            if view.name not in bag.views or only not in (None, view.name):  # the whole bag lacks it, or unasked
                continue
            rows = bag.views[view.name]
            rows = rows if bag.mask is None else rows[bag.mask[:, column]]
            if len(rows):
                yield view.name, rows
        read += len(bag)
        if read >= instances:
            return


def feature_encoders(model: nn.Module) -> list[tuple[str, FeatureEncoder]]:
    """The default encoders of `model`, by view; encoders of the user's own are left alone."""
    return [
        (view.name, encoder)
        for module in model.modules()
        if isinstance(module, ViewEncoders)
        for view, encoder in zip(module.views, module.encoders, strict=True)
        if isinstance(encoder, FeatureEncoder)
    ]
