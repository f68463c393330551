"""The Triton kernel of knn against the float64 reference, in the interpreter."""

import math

import pytest
import torch
from torch import Tensor

from tests.kernels._parity import normal
from umda_fast.kernels.knn import knn
from umda_fast.reference.knn import knn as reference

PTR = torch.tensor([0, 0, 1, 3, 70, 70, 75])


def signs(n: int, width: int, seed: int) -> Tensor:
    """Entries of -1 and 1: with a width of 4^j, norms, products, distances are exact, ties are many."""
    return normal(n, width, seed=seed).sign()


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("width", "k"), [(4, 3), (16, 8)])
def test_ties_and_order(metric: str, dtype: torch.dtype, width: int, k: int) -> None:
    """Where float32 is exact, neighbours and similarities are those of the reference, every tie included."""
    x = signs(75, width, seed=0).to(dtype)
    neighbors, similarity = knn(x, PTR, k, metric)
    expected = reference(x, PTR, k, metric)
    assert neighbors.dtype == torch.int32
    assert similarity.dtype == torch.float32
    assert torch.equal(neighbors, expected[0])
    assert torch.equal(similarity, expected[1])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("width", [2, 7, 70])
def test_similarities(metric: str, width: int) -> None:
    """Against float64 by the 2x rule; a neighbour that differs is one that float32 cannot tell apart."""
    x = normal(75, width, seed=1)
    neighbors, similarity = knn(x, PTR, 5, metric)
    exact_neighbors, exact = reference(x.double(), PTR, 5, metric)
    assert torch.equal(similarity.isinf(), exact.isinf())
    found = ~exact.isinf()
    points = x if metric == "euclidean" else x / x.norm(dim=1, keepdim=True).clamp_min(1e-8)
    pair = points[torch.arange(75)[:, None]], points[neighbors.clamp_min(0).long()]
    composed = (pair[0] * pair[1]).sum(-1) if metric == "cosine" else -(pair[0] - pair[1]).square().sum(-1)
    theirs = (composed.double() - exact)[found].abs().max().item()
    allowed = 2 * theirs + 4 * torch.finfo(torch.float32).eps * exact[found].abs().max().item()
    assert (similarity.double() - exact)[found].abs().max().item() <= allowed
    differs = neighbors != exact_neighbors
    assert ((composed.double() - exact)[differs].abs() <= allowed).all()
    assert differs.float().mean() < 0.02


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_twins_and_far_origin(metric: str) -> None:
    """Equal rows tie exactly wherever they stand in a tile, however far from the origin the points are."""
    # Small integers: the interpreter's product is BLAS, whose rounding depends on where a column stands.
    x = (normal(9, 3, seed=2) * 64).round()[torch.arange(70) % 9]
    if metric == "euclidean":
        x += 2.0**20
    neighbors, similarity = knn(x, torch.tensor([0, 70]), 12, metric)
    expected = reference(x, torch.tensor([0, 70]), 12, metric)
    if metric == "euclidean":
        assert torch.equal(neighbors, expected[0])
    for i in range(70):
        twins = [j for j in range(70) if j % 9 == i % 9 and j != i]
        assert neighbors[i, : len(twins)].tolist() == twins
        assert (similarity[i, : len(twins)] == similarity[i, 0]).all()


def test_largest_k_and_short_bags() -> None:
    x = signs(75, 16, seed=3)
    neighbors, similarity = knn(x, PTR, 64, "euclidean")
    expected = reference(x, PTR, 64, "euclidean")
    assert torch.equal(neighbors, expected[0])
    assert torch.equal(similarity, expected[1])
    assert (neighbors[0] == -1).all()
    assert (similarity[0] == -math.inf).all()
    assert (neighbors[1] >= 0).sum() == 1


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_ranks_last(metric: str) -> None:
    x = signs(6, 4, seed=4)
    x[2, 1] = math.nan
    neighbors, similarity = knn(x, torch.tensor([0, 6]), 5, metric)
    others = torch.arange(6) != 2
    assert (neighbors[others, -1] == 2).all()
    assert similarity[others, -1].isnan().all()
    assert not similarity[others, :-1].isnan().any()
    assert similarity[2].isnan().all()
    assert sorted(neighbors[2].tolist()) == [0, 1, 3, 4, 5]


def test_zero_vectors_have_cosine_zero() -> None:
    x = signs(5, 4, seed=5)
    x[1] = 0
    neighbors, similarity = knn(x, torch.tensor([0, 5]), 4, "cosine")
    assert (similarity[1] == 0).all()
    assert neighbors[1].tolist() == [0, 2, 3, 4]


def test_strides() -> None:
    x = signs(20, 16, seed=6)
    ptr = torch.tensor([0, 8, 20])
    expected = knn(x, ptr, 3, "cosine")
    wide = torch.full((20, 40), math.nan)
    wide[:, 8:24] = x
    for other in (wide[:, 8:24], x.t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(knn(other, ptr, 3, "cosine"), expected, strict=True))


def test_nothing() -> None:
    for ptr in (torch.tensor([0]), torch.tensor([0, 0, 0])):
        neighbors, similarity = knn(torch.zeros(0, 4), ptr, 3, "cosine")
        assert neighbors.shape == similarity.shape == (0, 3)


def test_bad_input() -> None:
    x, ptr = torch.zeros(4, 2), torch.tensor([0, 4])
    with pytest.raises(TypeError, match="x: expected float32"):
        knn(x.double(), ptr, 1, "cosine")
    with pytest.raises(ValueError, match=r"x: expected \[N, d\]"):
        knn(x[0], ptr, 1, "cosine")
    with pytest.raises(ValueError, match="ptr: expected int64"):
        knn(x, ptr.int(), 1, "cosine")
    with pytest.raises(ValueError, match="k: expected 1 to 64, got 0"):
        knn(x, ptr, 0, "cosine")
    with pytest.raises(ValueError, match="k: expected 1 to 64, got 65"):
        knn(x, ptr, 65, "cosine")
    with pytest.raises(ValueError, match="metric: expected"):
        knn(x, ptr, 1, "manhattan")
