"""Rows of several views matched by where they lie on the slide, not by their order in a file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from umda_fast.data.arrays import FloatArray, IntArray


def match_rows(coords: Sequence[FloatArray], tolerance: float) -> IntArray | None:
    """The instances of a bag and their row in every view.

    Args:
        coords: of every view, [n_v, 2], in one unit.
        tolerance: 0 matches equal coordinates. Otherwise two rows are the same instance if they are at most this
            far apart along each axis; rows more than twice as far apart never are.

    Returns:
        int64 [n, V], row of each instance in each view, -1 where the view lacks it; instances in the order of the
        first view, then those that only later views have. None if all views have the same rows in the same order.
        A place that occurs several times in a view is that many instances.
    """
    first = coords[0]
    if all(part.shape == first.shape and np.abs(part - first).max(initial=0.0) <= tolerance for part in coords[1:]):
        return None
    if tolerance == 0.0:
        return _match_cells([part.astype(np.int64) for part in coords])
    table = np.arange(len(first))[:, None]
    where = first
    for part in coords[1:]:
        partner = _nearby(where, part, tolerance)
        found = partner >= 0
        column = np.full(len(where), -1, dtype=np.int64)
        column[partner[found]] = np.flatnonzero(found)
        new = np.flatnonzero(~found)
        table = np.block(
            [[table, column[:, None]], [np.full((len(new), table.shape[1]), -1, dtype=np.int64), new[:, None]]]
        )
        where = np.concatenate([where, part[new]])
    return table


def _nearby(where: FloatArray, part: FloatArray, tolerance: float) -> IntArray:
    """For every row of `part` the row of `where` it is the same as, or -1; each is used once.

    Two points less than half a cell apart share a cell of at least one of four grids shifted by half a cell; a
    point and its neighbour more than a cell away share none.
    """
    partner = np.full(len(part), -1, dtype=np.int64)
    free = np.ones(len(where), dtype=np.bool_)
    cell = 2.0 * tolerance * (1.0 + 1e-9)
    for shift in ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5), (0.5, 0.5)):
        ours, theirs = np.flatnonzero(free), np.flatnonzero(partner < 0)
        if not len(ours) or not len(theirs):
            break
        cells = [np.floor(points / cell + shift).astype(np.int64) for points in (where[ours], part[theirs])]
        table = _match_cells(cells)
        both = table[(table >= 0).all(axis=1)]
        partner[theirs[both[:, 1]]] = ours[both[:, 0]]
        free[ours[both[:, 0]]] = False
    return partner


def _match_cells(parts: Sequence[IntArray]) -> IntArray:
    """`match_rows` for integer coordinates."""
    points = np.concatenate(parts)
    view = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    row = np.concatenate([np.arange(len(part)) for part in parts])
    occurrence = np.concatenate([_occurrence(part) for part in parts])
    order = np.lexsort((occurrence, points[:, 1], points[:, 0]))  # stable: earlier views first
    keys = np.column_stack([points, occurrence])[order]
    starts = np.concatenate([[True], (np.diff(keys, axis=0) != 0).any(axis=1)])[: len(keys)]
    group = np.cumsum(starts) - 1
    # Numbered by where each first appears.
    rank = np.argsort(np.argsort(order[starts], kind="stable"), kind="stable")
    table = np.full((len(rank), len(parts)), -1, dtype=np.int64)
    table[rank[group], view[order]] = row[order]
    return table


def _occurrence(points: IntArray) -> IntArray:
    """How many equal rows come before each row."""
    order = np.lexsort((points[:, 1], points[:, 0]))
    ordered = points[order]
    starts = np.concatenate([[True], (np.diff(ordered, axis=0) != 0).any(axis=1)])[: len(points)]
    first = np.flatnonzero(starts)[np.cumsum(starts) - 1] if len(points) else starts.astype(np.int64)
    occurrence = np.empty(len(points), dtype=np.int64)
    occurrence[order] = np.arange(len(points)) - first
    return occurrence
