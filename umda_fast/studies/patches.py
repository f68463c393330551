"""How large patches are drawn: as the data or the user says, or guessed from where they lie, and then so called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from umda_fast.data import BagDataset
from umda_fast.data.arrays import FloatArray
from umda_fast.errors import DataError

__all__ = ["PatchSizes", "commonest_step", "neighbour_steps", "patch_sizes"]

_BAGS_READ = 32  # for a guess; a slide may take seconds
_OWN_STEPS = 20  # that a bag must have for a guess of its own


@dataclass(frozen=True)
class PatchSizes:
    """Edges of the patches of B bags, in the coordinates' unit.

    Attributes:
        edge: float64 [B], NaN where nothing can be told.
        guessed: bool [B].
    """

    edge: FloatArray
    guessed: npt.NDArray[np.bool_]


def neighbour_steps(coords: npt.NDArray[Any]) -> FloatArray:
    """Distances between neighbouring patches of one row or column.

    Args:
        coords: [n, 2].
    """
    steps = []
    for along, across in ((0, 1), (1, 0)):
        order = np.lexsort((coords[:, along], coords[:, across]))
        ordered = coords[order].astype(np.float64)
        same = np.diff(ordered[:, across]) == 0
        steps.append(np.diff(ordered[:, along])[same])
    distances = np.concatenate(steps)
    return distances[distances > 0].round(3)


def commonest_step(steps: FloatArray) -> tuple[float, float]:
    """The commonest of `neighbour_steps`, the smallest of several, and its share of them; NaN and 0 of none."""
    values, counts = np.unique(steps, return_counts=True)
    if not len(values):
        return float("nan"), 0.0
    best = int(counts.argmax())
    return float(values[best]), float(counts[best] / len(steps))


def patch_sizes(dataset: BagDataset, rows: npt.NDArray[np.int64], given: float | None = None) -> PatchSizes:
    """Edges of the patches of the bags at `rows`.

    What the data does not say is guessed over the whole dataset: the size that all of its other bags have, or else the
    commonest distance between neighbouring patches, in up to 32 bags. A bag with 20 or more such distances, most of
    them one other value, was cut otherwise and is drawn by its own. Patches that overlap or lie apart have another
    edge than that, which nothing but `given` can tell.

    Args:
        given: the edge of all patches, in the coordinates' unit.

    Raises:
        DataError: `given` is not a positive number.
    """
    if given is not None:
        if not (np.isfinite(given) and given > 0):
            raise DataError(f"patch_size: expected a positive number, got {given}")
        return PatchSizes(np.full(len(rows), float(given)), np.zeros(len(rows), dtype=np.bool_))
    positions = dataset.positions
    said = np.full(len(dataset), np.nan) if positions is None else positions.patch_size
    guessed = np.isnan(said[rows])
    edge = said[rows].copy()
    if guessed.any():
        # A bag is read once, whether for the cohort or for itself.
        steps = {int(row): _steps(dataset, int(row)) for row in {*_some(dataset.sizes), *rows[guessed].tolist()}}
        known = np.unique(said[~np.isnan(said)])
        pooled = np.concatenate([steps[row] for row in _some(dataset.sizes)] or [np.empty(0)])
        cohort = float(known[0]) if len(known) == 1 else commonest_step(pooled)[0]
        for place in np.flatnonzero(guessed):
            own = steps[int(rows[place])]
            step, share = commonest_step(own)
            edge[place] = step if len(own) >= _OWN_STEPS and share > 0.5 else cohort
    return PatchSizes(edge, guessed)


def _some(sizes: npt.NDArray[np.int64]) -> list[int]:
    """Rows of up to 32 bags with instances, evenly from the smallest to the largest."""
    order = sizes.argsort(kind="stable")
    order = order[sizes[order] > 1]
    places = np.linspace(0, len(order) - 1, min(len(order), _BAGS_READ)).astype(np.int64)
    return [int(row) for row in order[places]]


def _steps(dataset: BagDataset, row: int) -> FloatArray:
    coords = dataset[row].coords if dataset.sizes[row] else None
    return np.empty(0) if coords is None else neighbour_steps(coords.numpy())
