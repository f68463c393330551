"""knn against every pair in exact sums, with ties, zero vectors, tiles and broken values."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tests.reference._checks import largest_tensor, leaf
from umda_fast.reference import knn as module
from umda_fast.reference.knn import knn

METRICS = ["cosine", "euclidean"]


def pairs(x: Tensor, metric: str) -> list[list[float]]:
    """The similarity of every pair, summed exactly and rounded once to float32."""
    rows = x.double().tolist()
    if metric == "cosine":
        norms = [max(math.sqrt(math.fsum(a * a for a in row)), 1e-8) for row in rows]
        exact = [
            [
                math.fsum(a * b for a, b in zip(r, s, strict=True)) / (m * n)
                for s, n in zip(rows, norms, strict=True)
            ]
            for r, m in zip(rows, norms, strict=True)
        ]
    else:
        exact = [[-math.fsum((a - b) ** 2 for a, b in zip(r, s, strict=True)) for s in rows] for r in rows]
    return torch.tensor(exact, dtype=torch.float64).float().tolist()


def brute(x: Tensor, ptr: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    neighbors = torch.full((len(x), k), -1, dtype=torch.int32)
    similarity = torch.full((len(x), k), -math.inf)
    bounds = ptr.tolist()
    for start, end in pairwise(bounds):
        table = pairs(x[start:end], metric)
        for i, row in enumerate(table):
            best = sorted((-s, j) for j, s in enumerate(row) if j != i)[:k]
            for place, (s, j) in enumerate(best):
                neighbors[start + i, place], similarity[start + i, place] = start + j, -s
    return neighbors, similarity


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("width", "k"), [(1, 3), (5, 1), (7, 8), (3, 40)])
def test_equals_every_pair(metric: str, width: int, k: int) -> None:
    ptr = torch.tensor([0, 0, 1, 3, 3, 20, 52, 52])
    x = leaf(52, width, dtype=torch.float32).detach()
    got, want = knn(x, ptr, k, metric), brute(x, ptr, k, metric)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])
    assert got[0].dtype == torch.int32
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("k", [1, 4, 9, 60])
@pytest.mark.parametrize("tile", [1, 200, 1 << 21])
def test_ties_go_to_the_lower_index(monkeypatch: pytest.MonkeyPatch, metric: str, k: int, tile: int) -> None:
    """Small integers: duplicates, zero vectors, equal directions and equal distances everywhere."""
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    x = torch.randint(-1, 2, (60, 3), generator=torch.Generator().manual_seed(1)).float()
    x[10:20] = x[0]
    x[30:33] = 0
    ptr = torch.tensor([0, 25, 60])
    got, want = knn(x, ptr, k, metric), brute(x, ptr, k, metric)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_tie_to_the_last_bit(metric: str, dtype: torch.dtype) -> None:
    """Copies of irrational rows, at columns that a matrix product may well treat differently."""
    generator = torch.Generator().manual_seed(2)
    distinct = torch.randn(7, 37, generator=generator, dtype=dtype)
    which = torch.randint(0, 7, (131,), generator=generator)
    k = 40
    neighbors, similarity = knn(distinct[which], torch.tensor([0, 131]), k, metric)
    assert similarity.dtype == dtype
    for i in range(131):
        # Each of the seven groups is one run of equal similarities, its members in ascending order.
        found = neighbors[i].tolist()
        groups = which[found].tolist()
        for place in range(1, k):
            if groups[place] == groups[place - 1]:
                assert similarity[i, place] == similarity[i, place - 1]
                assert found[place] > found[place - 1]
        assert len(set(found)) == k
        assert i not in found
        for group in set(groups):
            members = [j for j in range(131) if which[j] == group and j != i]
            taken = [j for j in found if which[j] == group]
            assert taken == members[: len(taken)]
        complete = [g for g in set(groups) if groups.count(g) == int((which == g).sum()) - int(which[i] == g)]
        assert len(set(groups)) - len(complete) <= 1


@pytest.mark.parametrize("metric", METRICS)
def test_all_rows_equal(metric: str) -> None:
    for row in (torch.zeros(5), torch.full((5,), 0.3)):
        neighbors, _ = knn(row.expand(9, 5), torch.tensor([0, 9]), 4, metric)
        want = [[j for j in range(9) if j != i][:4] for i in range(9)]
        assert neighbors.tolist() == want


def test_zero_vectors_have_cosine_zero() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]])
    neighbors, similarity = knn(x, torch.tensor([0, 4]), 3, "cosine")
    assert neighbors.tolist() == [[1, 2, 3], [0, 3, 2], [0, 3, 1], [0, 1, 2]]
    assert similarity.tolist() == [[0, 0, 0], [0, 0, -1], [0, 0, -1], [0, 0, 0]]


def test_near_distances_keep_their_digits() -> None:
    """Far from the origin |x|^2 + |y|^2 - 2 x.y would have none left."""
    x = torch.tensor([[1e4], [1e4 + 2**-9], [1e4 + 3 * 2**-9], [1e4 - 2**-9]])
    neighbors, similarity = knn(x, torch.tensor([0, 4]), 2, "euclidean")
    assert neighbors.tolist() == [[1, 3], [0, 2], [1, 0], [0, 1]]
    assert (-similarity * 2**18).tolist() == [[1, 1], [1, 4], [4, 9], [1, 4]]


@pytest.mark.parametrize("metric", METRICS)
def test_bags_do_not_see_each_other_and_order_does_not_matter(metric: str) -> None:
    x = leaf(40, 6).detach()
    neighbors, similarity = knn(x, torch.tensor([0, 15, 40]), 5, metric)
    alone = knn(x[15:], torch.tensor([0, 25]), 5, metric)
    assert torch.equal(neighbors[15:], alone[0] + 15)
    order = torch.randperm(25, generator=torch.Generator().manual_seed(0))
    moved, moved_similarity = knn(x[15:][order], torch.tensor([0, 25]), 5, metric)
    assert torch.equal(order[moved.long()], alone[0].long()[order])
    torch.testing.assert_close(moved_similarity, alone[1][order])
    torch.testing.assert_close(similarity[15:], alone[1])


@pytest.mark.parametrize("metric", METRICS)
def test_broken_values_come_last_and_stay_in_bounds(metric: str) -> None:
    x = leaf(12, 3, dtype=torch.float32).detach()
    clean = knn(x[:11], torch.tensor([0, 11]), 10, metric)[0]
    for value in (math.nan, math.inf):
        broken = x.clone()
        broken[11, 1] = value
        neighbors, similarity = knn(broken, torch.tensor([0, 12]), 11, metric)
        assert torch.equal(neighbors[:11, :10], clean)
        assert (neighbors[:11, 10] == 11).all()
        assert neighbors[11].tolist() == list(range(11))
        assert not similarity[:11, 10].isfinite().any()
        assert not similarity[11].isfinite().any()
        torch.testing.assert_close(similarity[:11, 10], similarity[11], equal_nan=True)


@pytest.mark.parametrize("metric", METRICS)
def test_memory_is_a_tile(monkeypatch: pytest.MonkeyPatch, metric: str) -> None:
    tile, n = 1 << 16, 4000
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    x = leaf(n, 16, dtype=torch.float32).detach()
    with largest_tensor() as largest:
        knn(x, torch.tensor([0, n]), 8, metric)
    assert largest.bytes <= 8 * tile < n * n


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_and_repeats(metric: str, dtype: torch.dtype) -> None:
    x = leaf(64, 8, dtype=dtype).detach()
    ptr = torch.tensor([0, 64])
    got, want = knn(x, ptr, 5, metric), knn(x.float(), ptr, 5, metric)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for _ in range(2):
            again = knn(x, ptr, 5, metric)
            assert torch.equal(got[0], again[0])
            assert torch.equal(got[1], again[1])
    finally:
        torch.set_num_threads(threads)


def test_nothing_and_no_such_metric() -> None:
    for ptr in ([0], [0, 0], [0, 0, 0]):
        neighbors, similarity = knn(torch.zeros(0, 4), torch.tensor(ptr), 3, "cosine")
        assert neighbors.shape == similarity.shape == (0, 3)
    with pytest.raises(ValueError, match=r"metric must be 'cosine' or 'euclidean', got 'dot'"):
        knn(torch.zeros(2, 2), torch.tensor([0, 2]), 1, "dot")
