"""Small patches inside large ones, against every pair of them."""

import math

import numpy as np
import pytest

from umda_fast.data.files.nesting import grid_step, holders, match_views, shared_share

NAN = math.nan


def area(one, size, other, other_size):
    """The area that two patches share."""
    start, stop = np.maximum(one, other), np.minimum(one + size, other + other_size)
    return float(np.clip(stop - start, 0, None).prod())


def by_pairs(inner, size, outer, outer_size):
    found = []
    for one in inner:
        areas = [area(one, size, other, outer_size) for other in outer]
        best = int(np.argmax(areas)) if areas else -1
        found.append(best if areas and areas[best] > 0.5 * size * size else -1)
    return found


def grid(step, side, origin=0.0):
    return np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="ij"), -1).reshape(-1, 2) * step + origin


@pytest.mark.parametrize("outer_size", [96, 128, 300])
def test_against_every_pair(outer_size):
    rng = np.random.default_rng(outer_size)
    for _ in range(40):
        inner, outer = (rng.integers(-500, 500, (rng.integers(0, 40), 2)).astype(float) for _ in range(2))
        assert holders(inner, 64, outer, outer_size).tolist() == by_pairs(inner, 64, outer, outer_size)


def test_overlapping_large_patches():
    """Of several large patches that hold a small one the first is taken."""
    outer = grid(64, 8)
    found = holders(grid(64, 16), 64, outer, 256)
    assert found.tolist() == by_pairs(grid(64, 16), 64, outer, 256)


def test_grids_of_two_sizes():
    rng = np.random.default_rng(0)
    small, large = grid(512, 8), grid(1024, 4)
    small, large = rng.permutation(small)[:60], rng.permutation(large)[:15]
    table, order = match_views([large, small], [1024, 512], 0.0)
    assert order == [1, 0]
    inside = table[(table >= 0).all(axis=1)]
    assert (large[inside[:, 0]] == small[inside[:, 1]] // 1024 * 1024).all()
    assert sorted(table[table[:, 1] >= 0, 1]) == list(range(60))
    assert set(table[:, 0]) >= set(range(15))
    assert shared_share(table, 0, 1, [15, 60], [1024, 512]) == pytest.approx(len(inside) / 60)
    assert match_views([small, small.copy()], [512, 512], 0.0)[0] is None
    assert match_views([small, small.copy()], [NAN, NAN], 0.0)[0] is None


def test_grids_of_three_sizes_and_two_views_of_one():
    small, middle, large = grid(10, 8), grid(20, 3), grid(40, 2)
    table, order = match_views([middle, large, small, small[::-1]], [20, 40, 10, 10.05], 0.0)
    assert order == [2, 3, 0, 1]
    assert len(table) == 64
    assert (table[:, 3] == 63 - table[:, 2]).all()
    corner = small[table[:, 2]]
    held = table[:, 0] >= 0
    assert held.tolist() == (corner < 60).all(axis=1).tolist()
    assert (middle[table[held, 0]] == corner[held] // 20 * 20).all()
    assert (large[table[:, 1]] == corner // 40 * 40).all()


def test_a_large_patch_that_holds_no_small_one_stands_alone():
    table, _ = match_views([grid(10, 2), np.array([[0.0, 0.0], [40.0, 0.0]])], [10, 20], 0.0)
    assert table.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [-1, 1]]
    assert match_views([np.zeros((0, 2)), grid(20, 1)], [10, 20], 0.0)[0].tolist() == [[-1, 0]]


def test_small_patches_across_an_edge_are_in_none():
    small, large = grid(64, 6), grid(96, 4)
    found = holders(small, 64, large, 96)
    across = ((small + 32) % 96 == 0).any(axis=1)  # as much on one side of an edge as on the other
    assert ((found == -1) == across).all()


def test_steps():
    rng = np.random.default_rng(0)
    sparse = rng.permutation(grid(512, 20))[:12]
    assert grid_step(sparse) == 512
    jittered = grid(256.0, 6) + 0.25
    assert grid_step(jittered) == 256.0
    contours = np.concatenate([grid(256, 4), grid(256, 4, 3001)])  # each with an origin of its own
    assert grid_step(contours) == 256
    assert math.isnan(grid_step(sparse[:2]))
    assert math.isnan(grid_step(np.array([[0.5, 0.0], [3.0, 7.0], [9.0, 30.0]])))
