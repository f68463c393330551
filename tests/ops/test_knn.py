"""knn_graph through its public function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ops.checks import DTYPES, check_compiled, check_op, few, keeps_rule, leaf, repeats
from umda_fast.ops import NeighborGraph, knn_graph
from umda_fast.parity.case import offsets
from umda_fast.parity.cases import knn_case

METRICS = ("cosine", "euclidean")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(metric: str, dtype: torch.dtype) -> None:
    for sizes, width, k in (([5, 0, 3], 7, 2), ([], 3, 1), ([2], 1, 4)):
        check_op("knn", leaf(sum(sizes), width, dtype=dtype).detach(), offsets(sizes), k, metric)


def test_compiles_as_one_graph() -> None:
    x, ptr = leaf(12, 5).detach(), offsets([7, 5])

    def function(x: torch.Tensor, *, backend: str) -> torch.Tensor:
        graph = knn_graph(x, ptr, 3, backend=backend)
        assert graph.similarity is not None
        return graph.similarity

    check_compiled(function, x, backends=["cpp"])


@few
@given(
    sizes=st.lists(st.integers(0, 40), max_size=6),
    width=st.sampled_from([1, 3, 59, 97, 256]),
    k=st.integers(1, 20),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(sizes: list[int], width: int, k: int, metric: str, dtype: torch.dtype) -> None:
    keeps_rule(knn_case("drawn", sizes, width, k, metric), dtype)


@pytest.mark.parametrize("metric", METRICS)
def test_repeats(metric: str) -> None:
    repeats(knn_case("two bags", [300, 200], 33, 7, metric))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("metric", METRICS)
def test_duplicates_absent_and_the_instance_itself(backend: str, metric: str) -> None:
    """Equal rows tie to the lower index; a short bag leaves -1 and -inf; nobody is his own neighbour."""
    x = torch.ones(7, 4)
    graph = knn_graph(x, offsets([4, 1, 2]), 5, metric=metric, backend=backend)
    absent = -1
    assert graph.neighbors.tolist() == [
        [1, 2, 3, absent, absent],
        [0, 2, 3, absent, absent],
        [0, 1, 3, absent, absent],
        [0, 1, 2, absent, absent],
        [absent] * 5,
        [6] + [absent] * 4,
        [5] + [absent] * 4,
    ]
    assert graph.similarity is not None
    assert torch.equal(graph.similarity == -math.inf, graph.neighbors == -1)
    best = graph.similarity[graph.neighbors >= 0]
    assert (best == (1 if metric == "cosine" else 0)).all()


def test_broken_values_stay_in_bounds() -> None:
    x = leaf(20, 6).detach()
    x[3], x[11, 2] = math.nan, math.inf
    for backend in ("cpp", "reference"):
        graph = knn_graph(x, offsets([12, 8]), 4, backend=backend)
        assert (graph.neighbors[:12] < 12).all()
        assert ((graph.neighbors[12:] >= 12) & (graph.neighbors[12:] < 20)).all()


def test_carries_no_gradient() -> None:
    graph = knn_graph(leaf(9, 4), offsets([9]), 2)
    assert isinstance(graph, NeighborGraph)
    assert graph.similarity is not None
    assert not graph.similarity.requires_grad
    assert graph.neighbors.dtype == torch.int32
