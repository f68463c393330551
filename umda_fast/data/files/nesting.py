"""Patches of several views brought together: at the same place where they are of one size, else the small ones inside
a large one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from umda_fast.data.arrays import FloatArray, IntArray
from umda_fast.data.files.matching import match_rows

SAME_SIZE = 0.01
"""Sizes that differ by less than this share are one."""

LEAST_RATIO = 1.5
"""From how many times the size on patches may hold others. Below it half of the small ones would lie across an edge."""


def match_views(
    coords: Sequence[FloatArray], sizes: Sequence[float], tolerance: float
) -> tuple[IntArray | None, list[int]]:
    """The instances of a bag and their row in every view, and the views from the finest on.

    Args:
        coords: of every view, the corner of each patch [n_v, 2], in one unit.
        sizes: edge of a patch of every view in that unit; all NaN where no view differs from another.
        tolerance: as of `match_rows`.

    Returns:
        int64 [n, V], row of each instance in each view, -1 where the view lacks it. An instance is a patch of the
        finest view there is at its place; a view of larger patches gives it the one that holds more than half of it,
        and so one row to several instances. A large patch that holds none is an instance by itself. None if all views
        have the same rows in the same order.
    """
    order = sorted(range(len(coords)), key=lambda view: sizes[view])
    levels: list[list[int]] = []
    for view in order:
        same = bool(levels) and not sizes[view] > sizes[levels[-1][0]] * (1.0 + SAME_SIZE)
        levels[-1].append(view) if same else levels.append([view])
    if len(levels) == 1:
        return match_rows(coords, tolerance), list(range(len(coords)))
    table = np.empty((0, len(coords)), dtype=np.int64)
    where, edge = np.empty((0, 2)), np.empty(0)
    for views in levels:
        views = sorted(views)
        level = match_rows([coords[view] for view in views], tolerance)
        if level is None:
            level = np.repeat(np.arange(len(coords[views[0]]))[:, None], len(views), axis=1)
        places, size = _places([coords[view] for view in views], level), sizes[views[0]]
        holder = np.full(len(table), -1, dtype=np.int64)
        for finer in np.unique(edge):
            rows = np.flatnonzero(edge == finer)
            holder[rows] = holders(where[rows], float(finer), places, size)
        held = holder >= 0
        table[np.flatnonzero(held)[:, None], np.array(views)] = level[holder[held]]
        alone = np.setdiff1d(np.arange(len(level)), holder)
        new = np.full((len(alone), len(coords)), -1, dtype=np.int64)
        new[:, views] = level[alone]
        table = np.concatenate([table, new])
        where, edge = np.concatenate([where, places[alone]]), np.concatenate([edge, np.full(len(alone), size)])
    return table, order


def _places(coords: Sequence[FloatArray], table: IntArray) -> FloatArray:
    """Where the instances of views of one size are, as the first view says that has them."""
    places = np.empty((len(table), 2))
    for part, rows in reversed(list(zip(coords, table.T, strict=True))):
        places[rows >= 0] = part[rows[rows >= 0]]
    return places


def holders(inner: FloatArray, size: float, outer: FloatArray, outer_size: float) -> IntArray:
    """For each of the patches `inner`, of edge `size`, the row of the one of `outer` that holds most of it and more
    than half, or -1. Of several that hold as much it is the first."""
    best = np.full(len(inner), -1, dtype=np.int64)
    covered = np.full(len(inner), 0.5 * size * size * (1.0 + 1e-9))
    if not len(inner) or not len(outer):
        return best
    # What holds more than half of a patch holds its centre, so its corner is at most `outer_size` left of and above it.
    corner = np.minimum(inner.min(axis=0), outer.min(axis=0)) - outer_size
    cells, centres = _cells(outer - corner, outer_size), _cells(inner + 0.5 * size - corner, outer_size)
    keys = cells[:, 0] * _STRIDE + cells[:, 1]
    order = np.argsort(keys, kind="stable")
    for step in ((0, 0), (1, 0), (0, 1), (1, 1)):
        wanted = (centres[:, 0] - step[0]) * _STRIDE + centres[:, 1] - step[1]
        first, last = (np.searchsorted(keys[order], wanted, side=side) for side in ("left", "right"))
        for number in range(int((last - first).max())):
            rows = np.flatnonzero(first + number < last)
            candidates = order[first[rows] + number]
            start = np.maximum(inner[rows], outer[candidates])
            stop = np.minimum(inner[rows] + size, outer[candidates] + outer_size)
            area = np.clip(stop - start, 0.0, None).prod(axis=1)
            better = (area > covered[rows]) | ((area == covered[rows]) & (candidates < best[rows]))
            covered[rows[better]], best[rows[better]] = area[better], candidates[better]
    return best


_STRIDE = 2**31


def _cells(points: FloatArray, size: float) -> IntArray:
    cells: IntArray = np.floor(points / size).astype(np.int64)
    return cells


def shared_share(table: IntArray, one: int, other: int, counts: Sequence[int], sizes: Sequence[float]) -> float:
    """How much of the view that covers less lies on the other: the area of patches matched, by the smaller of both
    areas. For patches of one size it is their number by that of the view with fewer."""
    if not counts[one] or not counts[other]:
        return 0.0
    fine, coarse = (one, other) if not sizes[one] > sizes[other] else (other, one)
    matched = len(np.unique(table[(table[:, one] >= 0) & (table[:, other] >= 0), fine]))
    ratio = (sizes[coarse] / sizes[fine]) ** 2 if sizes[coarse] > sizes[fine] else 1.0
    return matched / min(counts[fine], counts[coarse] * ratio)


def grid_step(coords: FloatArray) -> float:
    """The distance of neighbours in a grid of patches: what all distances are multiples of, or else the most usual one
    between neighbours of a row; NaN where there are too few."""
    if len(coords) < 3:
        return float("nan")
    whole = coords.astype(np.int64)
    if (whole == coords).all():
        common = int(np.gcd.reduce((whole - whole[0]).reshape(-1)))
        if common >= _LEAST_STEP:
            return float(common)
    ordered = coords[np.lexsort((coords[:, 0], coords[:, 1]))]
    gaps = np.diff(ordered, axis=0)
    along = gaps[(gaps[:, 1] == 0) & (gaps[:, 0] > 0), 0].round(3)
    if len(along) < 2:
        return float("nan")
    values, counts = np.unique(along, return_counts=True)
    return float(values[counts.argmax()])


_LEAST_STEP = 32  # pixels; no patch is smaller
