"""What is known of bags beside their instances: numbers that condition the model, and what coordinates mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from umda_fast.data.arrays import ArrayInput, FloatArray, IntArray, as_numpy
from umda_fast.errors import DataError
from umda_fast.model.specs import MetadataSpec


@dataclass(frozen=True)
class Metadata:
    """Numbers known of bags beside their instances.

    Attributes:
        names: of the M numbers, distinct.
        values: float64 [B, M], NaN where missing.
    """

    names: tuple[str, ...]
    values: FloatArray

    def take(self, rows: IntArray) -> Metadata:
        """Those of the bags at `rows`."""
        return Metadata(self.names, self.values[rows])

    def select(self, names: Sequence[str]) -> Metadata:
        """Those of `names`, missing everywhere where there is no such number."""
        columns = {name: self.values[:, column] for column, name in enumerate(self.names)}
        missing = np.full(len(self.values), np.nan)
        return Metadata(tuple(names), np.stack([columns.get(name, missing) for name in names], axis=1))

    def specs(self) -> tuple[MetadataSpec, ...]:
        """Names, and mean and deviation of the known values (1 where that is 0 or nothing is known)."""
        specs = []
        for name, column in zip(self.names, self.values.T, strict=True):
            known = column[~np.isnan(column)]
            mean, std = (float(known.mean()), float(known.std())) if len(known) else (0.0, 1.0)
            specs.append(MetadataSpec(name, mean, std if std > 0 else 1.0))
        return tuple(specs)


def metadata_columns(where: str, metadata: Mapping[str, ArrayInput], bags: int) -> Metadata:
    """Metadata out of arrays [B], NaN where missing. Raises DataError."""
    columns = []
    for name, value in metadata.items():
        array = as_numpy(f"{where}: metadata {name!r}", value)
        if array.shape != (bags,) or array.dtype.kind not in "fiub":
            raise DataError(
                f"{where}: metadata {name!r}: expected numbers [{bags}], one per bag, got {array.dtype} "
                f"{list(array.shape)}"
            )
        columns.append(array.astype(np.float64))
        if np.isinf(columns[-1]).any():
            raise DataError(f"{where}: metadata {name!r}: expected finite numbers, or NaN where missing, got inf")
    return Metadata(tuple(metadata), np.stack(columns, axis=1))


@dataclass(frozen=True)
class Positions:
    """What the coordinates of bags mean.

    Attributes:
        unit: "um", micrometres from the slide's corner, or "px", pixels of level 0.
        patch_size: edge of a patch in `unit`, float64 [B], NaN where not known.
        pixel_size: micrometres per level-0 pixel, float64 [B], NaN where not known.
    """

    unit: Literal["um", "px"]
    patch_size: FloatArray
    pixel_size: FloatArray

    def take(self, rows: IntArray) -> Positions:
        """Those of the bags at `rows`."""
        return Positions(self.unit, self.patch_size[rows], self.pixel_size[rows])


def concat_positions(parts: Sequence[Positions | None]) -> Positions | None:
    """Those of several datasets behind one another; None where one has none or units differ."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) or len({part.unit for part in known}) > 1:
        return None
    sizes = np.concatenate([part.patch_size for part in known])
    return Positions(known[0].unit, sizes, np.concatenate([part.pixel_size for part in known]))
