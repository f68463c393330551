"""Message passing through the public functions, and the graph that it takes."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.cpu_checks import threads
from tests.ops.checks import DTYPES, check_compiled, check_gradients, check_op, few, keeps_rule, leaf, repeats
from umda_fast.ops import (
    NeighborGraph,
    bag_attention_pool,
    edge_cosine,
    knn_graph,
    neighbor_attention,
    neighbor_sum,
    smoothness_energy,
)
from umda_fast.parity.case import offsets
from umda_fast.parity.cases import neighbor_cases, random_graph


def graph(nodes: int = 9, degree: int = 4, *, csr: bool = False) -> NeighborGraph:
    parts = random_graph(nodes, degree, csr=csr)
    return NeighborGraph(parts["neighbors"], indptr=parts.get("indptr"))


def positive(g: NeighborGraph, dtype: torch.dtype = torch.float32) -> Tensor:
    return (leaf(*g.neighbors.shape, seed=5, dtype=dtype).detach().abs() + 0.1).requires_grad_()


@pytest.mark.parametrize(("csr", "dtype"), [(False, torch.float32), (True, torch.bfloat16), (False, torch.float16)])
def test_opcheck(csr: bool, dtype: torch.dtype) -> None:
    g = graph(csr=csr)
    table = g.neighbors, g.indptr
    t = *table, *g.transpose(backend="cpp")
    q, k, v = (leaf(9, 2, 11, seed=i, dtype=dtype) for i in range(3))
    x, weight = leaf(9, 13, seed=7, dtype=dtype), positive(g)
    check_op("graph_transpose", *table, 9)
    check_op("graph_order", *t)
    check_op("edge_cosine", x, *t)
    check_op("edge_cosine", x.detach(), *table, None, None)
    check_op("neighbor_sum", x, weight, *t)
    for self_loop, log_weight in ((True, weight), (False, None)):
        check_op("neighbor_attention", q, k, v, log_weight, *t, self_loop)

    q, k, v, x, weight = (y.detach() for y in (q, k, v, x, weight))
    check_op("edge_cosine_backward", weight, x, *t)
    check_op("neighbor_sum_backward", x, x, weight, *t)
    ops = torch.ops.umda_fast
    saved = ops.neighbor_attention(q, k, v, weight, *t, True)
    check_op("neighbor_attention_backward", q, q, k, v, weight, *t, True, *saved)
    saved = ops.smoothness_energy(x, weight, *t)
    check_op("smoothness_energy", x, weight, *t)
    check_op("smoothness_energy_backward", torch.tensor(1.5), x, weight, *t, *saved)


@pytest.mark.parametrize(("csr", "backends"), [(False, ["cpp", "reference"]), (True, ["cpp"])])
def test_compiles_as_one_graph(csr: bool, backends: list[str]) -> None:
    g = graph(csr=csr)
    g.transpose()
    x, weight = leaf(9, 10), positive(g)
    q, k, v = (leaf(9, 2, 5, seed=i) for i in range(3))

    def function(q: Tensor, k: Tensor, v: Tensor, x: Tensor, w: Tensor, *, backend: str) -> tuple[Tensor, ...]:
        return (
            edge_cosine(x, g, backend=backend),
            neighbor_sum(x, g, w, backend=backend),
            smoothness_energy(x, g, w, backend=backend),
            neighbor_attention(q, k, v, g, w, backend=backend),
        )

    check_compiled(function, q, k, v, x, weight, backends=backends)


def test_a_chain_of_operations_compiles_as_one_graph() -> None:
    """The graph is searched, transposed and used inside the traced function."""
    ptr = offsets([7, 5])

    def function(x: Tensor, *, backend: str) -> Tensor:
        g = knn_graph(x, ptr, 3, backend=backend)
        weight = edge_cosine(x, g, backend=backend).exp()
        h = neighbor_sum(x, g, weight, backend=backend)
        return bag_attention_pool(h, h[:, :2], ptr, backend=backend).pooled

    check_compiled(function, leaf(12, 6), backends=["cpp"])


@pytest.mark.parametrize("csr", [False, True])
def test_derivatives(csr: bool) -> None:
    g = graph(6, 3, csr=csr)
    double = torch.float64
    x, weight = leaf(6, 4, dtype=double), positive(g, double)
    q, k, v = (leaf(6, 2, 3, seed=i, dtype=double) for i in range(3))
    check_gradients(lambda x: edge_cosine(x, g), x)
    check_gradients(lambda x, w: neighbor_sum(x, g, w), x, weight)
    check_gradients(lambda x, w: smoothness_energy(x, g, w), x, weight)
    for self_loop in (True, False):
        check_gradients(
            lambda q, k, v, w, loop=self_loop: neighbor_attention(q, k, v, g, w, self_loop=loop), q, k, v, weight
        )


@few
@given(
    nodes=st.integers(0, 30),
    degree=st.integers(0, 9),
    heads=st.integers(1, 3),
    width=st.sampled_from([1, 3, 59, 97, 256]),
    csr=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(nodes: int, degree: int, heads: int, width: int, csr: bool, dtype: torch.dtype) -> None:
    for case in neighbor_cases("drawn", nodes, degree, heads, width, csr=csr and nodes > 0):
        keeps_rule(case, dtype)


@pytest.mark.parametrize("csr", [False, True])
def test_repeats(csr: bool) -> None:
    for case in neighbor_cases("large enough for two threads", 500, 8, 2, 32, csr=csr):
        repeats(case)


def test_no_row_and_no_weight() -> None:
    alone = NeighborGraph(torch.full((4, 3), -1, dtype=torch.int32))
    x, q, nothing = leaf(4, 6), leaf(4, 2, 3), torch.full((4, 3), math.nan)
    for backend in ("cpp", "reference"):
        assert (edge_cosine(x, alone, backend=backend) == 0).all()
        assert (neighbor_sum(x, alone, nothing, backend=backend) == 0).all()
        assert (neighbor_attention(q, q, q, alone, self_loop=False, backend=backend) == 0).all()
        torch.testing.assert_close(neighbor_attention(q, q, q, alone, backend=backend), q)
        energy = smoothness_energy(x, alone, nothing, backend=backend)
        assert energy.item() == 0
        (gradient,) = torch.autograd.grad(energy, x)
        assert (gradient == 0).all()


@pytest.mark.parametrize("csr", [False, True])
def test_strides_change_nothing(csr: bool) -> None:
    g = graph(csr=csr)
    q, k, v = (leaf(9, 2, 8, seed=i).detach() for i in range(3))
    packed = torch.stack([q, k, v], 1).unbind(1)
    x, weight = q.flatten(1), positive(g).detach()

    def loosely(x: Tensor) -> Tensor:
        return torch.stack([x, x], -1)[..., 0]

    assert torch.equal(neighbor_attention(q, k, v, g, weight), neighbor_attention(*packed, g, loosely(weight)))
    assert torch.equal(neighbor_sum(x, g, weight), neighbor_sum(loosely(x), g, loosely(weight)))
    assert torch.equal(smoothness_energy(x, g, weight), smoothness_energy(x.T.contiguous().T, g, weight))
    assert torch.equal(edge_cosine(x, g), edge_cosine(loosely(x), g))


# --- the graph


def edges_of(g: NeighborGraph) -> list[tuple[int, int]]:
    rows, columns = g.rows().flatten().tolist(), g.neighbors.flatten().tolist()
    return [(i, j) for i, j in zip(rows, columns, strict=True) if j >= 0]


@pytest.mark.parametrize("csr", [False, True])
def test_transpose_is_kept_and_the_same_on_every_backend(csr: bool) -> None:
    one, other = graph(csr=csr), graph(csr=csr)
    native, plain = one.transpose(backend="cpp"), other.transpose(backend="reference")
    for a, b in zip(native, plain, strict=True):
        assert torch.equal(a, b)
    assert one.transpose() is native


@pytest.mark.parametrize("csr", [False, True])
def test_edge_index_there_and_back(csr: bool) -> None:
    g = graph(csr=csr)
    index, _ = g.to_edge_index()
    assert [(i, j) for j, i in index.T.tolist()] == edges_of(g)
    again = NeighborGraph.from_edge_index(index, g.num_nodes)
    assert edges_of(again) == edges_of(g)
    shuffled = NeighborGraph.from_edge_index(index.flip(1), g.num_nodes)
    assert sorted(edges_of(shuffled)) == sorted(edges_of(g))


def test_similarities_travel_with_their_edges() -> None:
    index = torch.tensor([[2, 0, 1], [0, 2, 0]])  # (source, target)
    g = NeighborGraph.from_edge_index(index, 3, torch.tensor([0.2, 0.0, 0.1]))
    assert edges_of(g) == [(0, 2), (0, 1), (2, 0)]
    assert g.similarity is not None
    torch.testing.assert_close(g.similarity, torch.tensor([0.2, 0.1, 0.0]))
    both = g.symmetrize()
    assert edges_of(both) == [(0, 1), (0, 2), (1, 0), (2, 0)]
    assert both.similarity is not None
    torch.testing.assert_close(both.similarity, torch.tensor([0.1, 0.2, 0.1, 0.0]))


@pytest.mark.parametrize("operation", ["symmetrize", "union"])
def test_sets_of_edges(operation: str) -> None:
    g, other = graph(), graph(csr=True)
    made: Callable[[], NeighborGraph] = g.symmetrize if operation == "symmetrize" else lambda: g.union(other)
    mine = set(edges_of(g))
    more = {(j, i) for i, j in mine} if operation == "symmetrize" else set(edges_of(other))
    assert edges_of(made()) == sorted(mine | more)


def test_moves_and_shows() -> None:
    g = graph(csr=True).to("cpu")
    assert repr(g) == f"NeighborGraph(num_nodes=9, edges={g.neighbors.shape[0]}, device=cpu)"
    assert "k=4" in repr(graph())


# --- its order


def clustered(clusters: int, size: int, *, csr: bool) -> NeighborGraph:
    """Rings of ``size`` nodes with two neighbours on either side, under shuffled numbers."""
    n = clusters * size
    node = torch.arange(n)
    steps = torch.tensor([-2, -1, 1, 2])
    table = node[:, None] // size * size + (node[:, None] % size + steps) % size
    number = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    neighbors = torch.empty_like(table).index_copy_(0, number, number[table]).int()
    if csr:
        return NeighborGraph(neighbors.flatten(), indptr=torch.arange(n + 1) * 4)
    return NeighborGraph(neighbors)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("csr", [False, True])
def test_reordering_is_the_same_graph(csr: bool, backend: str) -> None:
    g = graph(40, 5, csr=csr)
    g.similarity = positive(g).detach()
    made, order, rank, edges = g.reorder(backend=backend)
    assert sorted(order.tolist()) == list(range(40))
    assert torch.equal(order[rank], torch.arange(40))
    assert edges.shape == made.neighbors.shape == g.neighbors.shape
    assert made.similarity is not None
    assert torch.equal(made.similarity, g.similarity.flatten()[edges])
    assert sorted((order[i].item(), order[j].item()) for i, j in edges_of(made)) == sorted(edges_of(g))
    # Each node's edges keep their order: the same bits.
    x = leaf(40, 7).detach()
    assert torch.equal(neighbor_sum(x[order], made, made.similarity)[rank], neighbor_sum(x, g, g.similarity))
    assert torch.equal(order, g.reorder(backend="reference" if backend == "cpp" else "cpp").order)


@pytest.mark.parametrize("csr", [False, True])
def test_order_brings_neighbours_together(csr: bool) -> None:
    made = clustered(20, 30, csr=csr).reorder().graph
    distance = (made.rows() - made.neighbors).abs()
    assert int(distance.max()) < 30
    with threads(2):
        assert torch.equal(clustered(20, 30, csr=csr).reorder().order, clustered(20, 30, csr=csr).reorder().order)


@pytest.mark.parametrize("csr", [False, True])
def test_reordered_only_where_it_pays(csr: bool) -> None:
    g = clustered(300, 100, csr=csr)
    assert g.reorder_where_it_pays(2048) is not None
    assert g.reorder_where_it_pays(512) is None  # all rows fit the cache
    together = g.reorder().graph
    assert together.reorder_where_it_pays(2048) is None
    neighbors = torch.randint(30_000, (30_000, 4), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    assert NeighborGraph(neighbors).reorder_where_it_pays(2048) is None


def test_order_of_nothing() -> None:
    for g in (
        NeighborGraph(torch.empty(0, 3, dtype=torch.int32)),
        NeighborGraph(torch.empty(0, dtype=torch.int32), indptr=torch.zeros(1, dtype=torch.int64)),
        NeighborGraph(torch.empty(4, 0, dtype=torch.int32)),
    ):
        made = g.reorder()
        assert torch.equal(made.order, torch.arange(g.num_nodes))
        assert made.graph.neighbors.shape == g.neighbors.shape
        assert g.reorder_where_it_pays(1 << 30) is None


# --- symmetric graphs


@few
@given(nodes=st.integers(1, 60), degree=st.integers(0, 9), broken=st.booleans(), count=st.integers(1, 3))
def test_transpose_of_symmetric_graphs(nodes: int, degree: int, broken: bool, count: int) -> None:
    """Where a kernel takes a short cut for them, what only looks like one must be told from one."""
    g = graph(nodes, degree).symmetrize()
    assert g.indptr is not None
    neighbors = g.neighbors.clone()
    if broken and neighbors.numel() > 1:
        at = int(g.indptr[-1]) // 2
        neighbors[at] = (neighbors[at] + 1) % nodes
    made = NeighborGraph(neighbors, indptr=g.indptr)
    with threads(count):
        native = made.transpose(backend="cpp")
    for a, b in zip(native, NeighborGraph(neighbors, indptr=g.indptr).transpose(backend="reference"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accuracy_on_symmetric_graphs(dtype: torch.dtype) -> None:
    g = graph(40, 5).symmetrize()
    assert g.indptr is not None
    for case in neighbor_cases("symmetric", 40, 5, 2, 11, csr=True):
        inputs = {**case.inputs, "neighbors": g.neighbors, "indptr": g.indptr}
        for name in ("weight", "log_weight"):
            if name in inputs:
                inputs[name] = positive(g).detach()
        keeps_rule(replace(case, inputs=inputs), dtype)
