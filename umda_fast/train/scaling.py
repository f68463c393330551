"""Mean and standard deviation of every feature over the training instances, put into the model's encoders."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.model import FeatureEncoder, ViewEncoders

__all__ = ["feature_moments", "standardize_inputs"]

INSTANCES = 50_000


def feature_moments(dataset: BagDataset, seed: int = 0, instances: int = INSTANCES) -> dict[str, tuple[Tensor, Tensor]]:
    """View -> mean and standard deviation (of the population) of its features, float64 [width].

    Over the instances that have the view, of bags in a random order until `instances` instances are read: a
    large source is not read twice. A view that none of them has gets mean 0 and standard deviation 1.

    Method: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
    1979.
    """
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    moments = {
        view.name: (0, torch.zeros(view.width).double(), torch.zeros(view.width).double()) for view in dataset.views
    }
    read = 0
    for index in order:
        bag = dataset[index]
        read += len(bag)
        for column, view in enumerate(dataset.views):
            if view.name not in bag.views:  # the whole bag lacks it
                continue
            rows = bag.views[view.name]
            rows = (rows if bag.mask is None else rows[bag.mask[:, column]]).double()
            if not len(rows):
                continue
            count, mean, square = moments[view.name]
            new, own = len(rows), rows.mean(0)
            apart = own - mean
            total = count + new
            moments[view.name] = (
                total,
                mean + apart * (new / total),
                square + (rows - own).square().sum(0) + apart.square() * (count * new / total),
            )
        if read >= instances:
            break
    return {
        name: (mean, (square / count).sqrt() if count else torch.ones_like(mean))
        for name, (count, mean, square) in moments.items()
    }


def standardize_inputs(
    model: nn.Module, dataset: BagDataset, seed: int = 0, only: Sequence[str] | None = None
) -> None:
    """Set the scaling of every default encoder of `model`, or with `only` of those of these views, from `dataset`;
    encoders of the user's own see the features as they are.

    Raises:
        DataError: `only` names a view that `dataset` does not have.
    """
    views = [view.name for view in dataset.views]
    for name in only or ():
        if name not in views:
            raise DataError(f"data.standardize: expected views among {', '.join(views)}, got {name!r}")
    encoders = [
        (view.name, encoder)
        for module in model.modules()
        if isinstance(module, ViewEncoders)
        for view, encoder in zip(module.views, module.encoders, strict=True)
        if isinstance(encoder, FeatureEncoder) and (only is None or view.name in only)
    ]
    if not encoders:
        return
    moments = feature_moments(dataset, seed)
    for name, encoder in encoders:
        encoder.set_scaling(*moments[name])
