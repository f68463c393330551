"""How the features of every view are scaled, decided from the training instances and put into the model's encoders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from umda_fast.data import BagDataset
from umda_fast.errors import DataError
from umda_fast.train.sampling import feature_encoders, sampled_rows

__all__ = ["Scaling", "ViewScaling", "feature_moments", "scale_inputs", "view_scalings"]

Scaling: TypeAlias = bool | Sequence[str] | Literal["auto"]

INSTANCES = 50_000
SAMPLE = 1 << 22
"""Values of a view of which rows are taken: of its first instances read."""
SPARSE = 0.8
"""Share of zeros from which a view is taken for counts, hashed with signs perhaps."""
RESOLUTION = 1e-5  # of float32 sums, relative to the mean: smaller deviations are rounding


@dataclass(frozen=True)
class ViewScaling:
    """How the features x of a view are scaled: `(x - shift) / scale`.

    Attributes:
        view: its name.
        shift, scale: float64 [width]; 0 and 1 where they are left as they are.
        standardised: whether they are, feature by feature.
        sparse: whether it was taken for counts (or weights of words): most values zero. All its features are then
            divided by the root mean square of the values that are not zero, which keeps zeros zero and rare features
            as loud as frequent ones.
        constant: features that do not vary, of the others that are centred only.
        zeros: share of the values that are zero.
        rows: some of the instances, float32 [n, width], not scaled.
    """

    view: str
    shift: Tensor
    scale: Tensor
    standardised: bool
    sparse: bool
    constant: int
    zeros: float
    rows: Tensor

    def __str__(self) -> str:
        count = len(self.shift)
        features = f"view {self.view}: {count} {'feature' if count == 1 else 'features'}"
        if self.sparse:
            return f"{features}, {self.zeros:.0%} zeros: divided by {self.scale[0]:.3g}, not standardised"
        parts = ["standardised" if self.standardised else "as they are"]
        if self.constant:
            parts.append(f"{self.constant} constant")
        return f"{features} {', '.join(parts)}"


class _Seen:
    """Moments, zeros and the first rows of a view's features."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.mean = torch.zeros(width, dtype=torch.float64)
        self.square = torch.zeros(width, dtype=torch.float64)
        self.zeros = 0
        self.first: list[Tensor] = []
        self._missing = max(1, SAMPLE // width)

    def add(self, rows: Tensor) -> None:
        """rows: float64 [n, width], n at least 1.

        Method: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
        1979.
        """
        new, own = len(rows), rows.mean(0)
        apart, total = own - self.mean, self.count + new
        self.mean = self.mean + apart * (new / total)
        self.square = self.square + (rows - own).square().sum(0) + apart.square() * (self.count * new / total)
        self.count = total
        self.zeros += int((rows == 0).sum())
        if self._missing > 0:
            self.first.append(rows[: self._missing].float())
            self._missing -= new

    @property
    def rows(self) -> Tensor:
        """float32 [n, width]."""
        return torch.cat(self.first) if self.first else torch.zeros(0, len(self.mean))

    @property
    def zero_share(self) -> float:
        return self.zeros / max(1, self.count * len(self.mean))

    @property
    def std(self) -> Tensor:
        return (self.square / self.count).sqrt() if self.count else torch.ones_like(self.mean)


def _see(dataset: BagDataset, seed: int, instances: int) -> dict[str, _Seen]:
    """View -> what its instances are like, of those that `sampled_rows` gives."""
    seen = {view.name: _Seen(view.width) for view in dataset.views}
    for view, rows in sampled_rows(dataset, instances, seed):
        seen[view].add(rows.double())
    return seen


def feature_moments(dataset: BagDataset, seed: int = 0, instances: int = INSTANCES) -> dict[str, tuple[Tensor, Tensor]]:
    """View -> mean and standard deviation (of the population) of its features, float64 [width].

    Over the instances that have the view, of bags in a random order until `instances` instances are read. A view that
    none of them has gets mean 0 and standard deviation 1.
    """
    return {name: (seen.mean, seen.std) for name, seen in _see(dataset, seed, instances).items()}


def view_scalings(
    dataset: BagDataset, scaling: Scaling = "auto", seed: int = 0, instances: int = INSTANCES
) -> list[ViewScaling]:
    """How every view of `dataset` is scaled, from the instances that `feature_moments` takes.

    Args:
        scaling: True standardises every feature by its mean and standard deviation, a list of views those of them only,
            False none. With `auto`, a view of counts is divided by one number, see `ViewScaling`; the others are
            standardised, but a feature whose deviation is below the rounding of its mean is centred only.

    Raises:
        DataError: `scaling` names a view that `dataset` does not have.
    """
    views = [view.name for view in dataset.views]
    named = views if isinstance(scaling, bool | str) else scaling
    for name in named:
        if name not in views:
            raise DataError(f"data.standardize: expected views among {', '.join(views)}, got {name!r}")
    seen = _see(dataset, seed, instances)
    if scaling == "auto":
        return [_decide(name, own) for name, own in seen.items()]
    return [_plain(name, own, scaling is not False and name in named) for name, own in seen.items()]


def _plain(view: str, seen: _Seen, standardised: bool) -> ViewScaling:
    std = seen.std
    constant = std == 0
    shift = seen.mean if standardised else torch.zeros_like(std)
    scale = torch.where(constant, 1.0, std) if standardised else torch.ones_like(std)
    return ViewScaling(view, shift, scale, standardised, False, int(constant.sum()), seen.zero_share, seen.rows)


def _decide(view: str, seen: _Seen) -> ViewScaling:
    rows, zeros = seen.rows, seen.zero_share
    if seen.count and zeros >= SPARSE:
        total = float((seen.square + seen.count * seen.mean.square()).sum())
        size = (total / max(1, seen.count * len(seen.mean) - seen.zeros)) ** 0.5 or 1.0
        shift, scale = torch.zeros_like(seen.mean), torch.full_like(seen.mean, size)
        return ViewScaling(view, shift, scale, False, True, 0, zeros, rows)
    constant = seen.std <= RESOLUTION * seen.mean.abs()
    shift, scale = seen.mean, torch.where(constant, 1.0, seen.std)
    return ViewScaling(view, shift, scale, True, False, int(constant.sum()), zeros, rows)


def scale_inputs(model: nn.Module, dataset: BagDataset, scaling: Scaling = "auto", seed: int = 0) -> list[str]:
    """Set the scaling of every default encoder of `model` from `dataset`, as `view_scalings` decides, and that of the
    rows that it reads; encoders of the user's own see the features as they are.

    Returns:
        What was decided, a line for every view with a default encoder; none without such an encoder.

    Raises:
        DataError: `scaling` names a view that `dataset` does not have.
    """
    encoders = feature_encoders(model)
    if not encoders:
        return []
    found = {one.view: one for one in view_scalings(dataset, scaling, seed)}
    for name, encoder in encoders:
        one = found[name]
        if scaling is not False:
            encoder.set_scaling(one.shift, one.scale)
        if len(one.rows):
            encoder.set_row_scaling(one.rows)
    return list(dict.fromkeys(str(found[name]) for name, _ in encoders))
