"""Rows matched by place, against a dictionary from place to row."""

import numpy as np
import pytest

from umda_fast.data.files.matching import match_rows


def by_dictionary(parts):
    """Instances in the order of the first view, then of the others; the k-th row at a place is the k-th there."""
    instances: dict[tuple[float, ...], dict[int, int]] = {}
    for view, part in enumerate(parts):
        seen: dict[tuple[float, float], int] = {}
        for row, (x, y) in enumerate(part.tolist()):
            count = seen[x, y] = seen.get((x, y), -1) + 1
            instances.setdefault((x, y, count), {})[view] = row
    return np.array([[rows.get(view, -1) for view in range(len(parts))] for rows in instances.values()])


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_against_a_dictionary(tolerance):
    rng = np.random.default_rng(0)
    for _ in range(60):
        parts = [rng.integers(0, 5, (rng.integers(1, 12), 2)) * 4.0 for _ in range(rng.integers(2, 4))]
        moved = [part + rng.uniform(-0.49, 0.49, part.shape) * (tolerance > 0) for part in parts]
        # Duplicates at one place cannot be told apart when coordinates are only near.
        if tolerance and any(len(np.unique(part, axis=0)) < len(part) for part in parts):
            continue
        table = match_rows(moved, tolerance)
        expected = by_dictionary(parts)
        if table is None:
            assert (expected == expected[:, :1]).all()
        else:
            np.testing.assert_array_equal(table, expected)


def test_one_order_needs_no_table():
    places = np.arange(10.0).reshape(5, 2)
    assert match_rows([places, places.copy()], 0.0) is None
    assert match_rows([places, places + 0.5], 1.0) is None
    assert match_rows([places, places[::-1].copy()], 0.0).tolist() == [[0, 4], [1, 3], [2, 2], [3, 1], [4, 0]]


def test_tolerance_holds_at_the_edges_of_cells():
    rng = np.random.default_rng(1)
    lattice = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2) * 7.3
    order = rng.permutation(len(lattice))
    for shift in rng.uniform(-1, 1, (30, 2)):
        table = match_rows([lattice, lattice[order] + shift], 1.0)
        assert len(table) == len(lattice)
        assert (order[table[:, 1]] == np.arange(len(lattice))).all()
    apart = match_rows([lattice, lattice[order] + [2.01, 0.0]], 1.0)
    assert (apart >= 0).all(axis=1).sum() == 0


def test_an_empty_view():
    places = np.arange(6.0).reshape(3, 2)
    empty = np.zeros((0, 2))
    for tolerance in (0.0, 1.0):
        assert match_rows([places, empty], tolerance).tolist() == [[0, -1], [1, -1], [2, -1]]
        assert match_rows([empty, places], tolerance).tolist() == [[-1, 0], [-1, 1], [-1, 2]]
