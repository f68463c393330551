"""Message passing against loops over edges, as a table and as CSR, whole and in pieces."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.reference._checks import (
    check_gradients,
    check_repeats,
    largest_tensor,
    leaf,
    same_bits,
    saved_tensors,
    with_gradients,
)
from umda_fast.reference import neighbors as module
from umda_fast.reference.neighbors import (
    edge_cosine,
    graph_transpose,
    neighbor_attention,
    neighbor_sum,
    smoothness_energy,
)

Graph = tuple[Tensor, Tensor | None]


def table(n: int, k: int, seed: int = 0) -> Graph:
    """Absent neighbours anywhere in a row, a row without any, duplicates, loops, k > n welcome."""
    generator = torch.Generator().manual_seed(seed)
    neighbors = torch.randint(-n // 2, n, (n, k), generator=generator).clamp_min(-1).to(torch.int32)
    if n:
        neighbors[n // 2] = -1
    return neighbors, None


def csr(n: int, edges: int, seed: int = 0) -> Graph:
    """Rows of any degree, some of 0; some edges absent."""
    neighbors, _ = table(edges, 1, seed)
    neighbors = neighbors.reshape(-1) % n if n else neighbors.reshape(-1)
    neighbors[: edges // 4] = -1
    generator = torch.Generator().manual_seed(seed + 1)
    cuts = torch.randint(0, edges + 1, (n - 1,), generator=generator).sort().values
    indptr = torch.cat([torch.tensor([0]), cuts, torch.tensor([edges])])
    return neighbors.to(torch.int32), indptr


GRAPHS: dict[str, tuple[int, Graph]] = {
    "table": (7, table(7, 3)),
    "table of one": (5, table(5, 1)),
    "k > n": (3, table(3, 5)),
    "csr": (6, csr(6, 17)),
    "no edge": (4, (torch.full((4, 2), -1, dtype=torch.int32), None)),
    "k = 0": (4, (torch.empty(4, 0, dtype=torch.int32), None)),
    "csr without edges": (3, (torch.empty(0, dtype=torch.int32), torch.zeros(4, dtype=torch.int64))),
}
graphs = pytest.mark.parametrize("name", list(GRAPHS))
pieces = pytest.mark.parametrize("tile", [60, 1 << 25])


def edges(graph: Graph) -> list[tuple[int, int, int]]:
    """(flat position, row, column) of every edge that is there."""
    neighbors, indptr = graph
    if indptr is None:
        found = [
            (i * neighbors.shape[1] + c, i, j)
            for i, row in enumerate(neighbors.tolist())
            for c, j in enumerate(row)
        ]
    else:
        bounds = indptr.tolist()
        flat = neighbors.tolist()
        found = [(e, i, flat[e]) for i in range(len(bounds) - 1) for e in range(bounds[i], bounds[i + 1])]
    return [edge for edge in found if edge[2] >= 0]


def weights(graph: Graph, seed: int = 9) -> Tensor:
    """Positive, NaN where absent: those must never be used."""
    positive = leaf(*graph[0].shape, seed=seed).detach().exp()
    return positive.masked_fill(graph[0] < 0, math.nan)


@graphs
def test_transpose_lists_the_edges_by_target(name: str) -> None:
    n, graph = GRAPHS[name]
    t_ptr, t_edge = graph_transpose(*graph, n)
    assert t_ptr.dtype == t_edge.dtype == torch.int64
    want = [[e for e, _, j in edges(graph) if j == node] for node in range(n)]
    assert [t_edge[t_ptr[j] : t_ptr[j + 1]].tolist() for j in range(n)] == want
    assert t_ptr[0] == 0
    assert t_ptr[-1] == len(edges(graph))
    assert t_edge[t_ptr[-1] :].tolist() == [-1] * (graph[0].numel() - len(edges(graph)))


@graphs
@pieces
def test_edge_cosine(monkeypatch: pytest.MonkeyPatch, name: str, tile: int) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    n, graph = GRAPHS[name]
    r = leaf(n, 5)
    want = torch.zeros(graph[0].numel(), dtype=torch.float64)
    for e, i, j in edges(graph):
        want[e] = torch.nn.functional.cosine_similarity(r[i], r[j], dim=0).detach()
    torch.testing.assert_close(edge_cosine(r, *graph), want.reshape(graph[0].shape))
    check_gradients(lambda x: edge_cosine(x, *graph), [r])


def test_edge_cosine_of_zero_vectors() -> None:
    graph = torch.tensor([[1], [0], [0]], dtype=torch.int32), None
    r = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    (cosine,), (gradient,) = with_gradients(lambda x: edge_cosine(x, *graph), [r])
    torch.testing.assert_close(cosine, torch.tensor([[0.0], [0.0], [1.0]]))
    assert gradient.isfinite().all()


@graphs
@pieces
@pytest.mark.parametrize("self_loop", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_attention(
    monkeypatch: pytest.MonkeyPatch, name: str, tile: int, self_loop: bool, weighted: bool
) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    n, graph = GRAPHS[name]
    heads, width = 2, 3
    q, k, v = (leaf(n, heads, width, seed=i) for i in range(3))
    log_weight = weights(graph).log() if weighted else None
    flat = log_weight.reshape(-1).tolist() if log_weight is not None else [0.0] * graph[0].numel()
    want = torch.zeros(n, heads, width, dtype=torch.float64)
    want_lse = torch.full((n, heads), -math.inf, dtype=torch.float64)
    for i in range(n):
        listed = [(j, flat[e]) for e, row, j in edges(graph) if row == i] + ([(i, 0.0)] if self_loop else [])
        for h in range(heads if listed else 0):
            scores = torch.stack(
                [q[i, h] @ k[j, h] / math.sqrt(width) + bonus for j, bonus in listed]
            ).detach()
            want[i, h] = scores.softmax(0) @ torch.stack([v[j, h] for j, _ in listed]).detach()
            want_lse[i, h] = scores.exp().sum().log()
    out, lse = neighbor_attention(q, k, v, log_weight, *graph, self_loop)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@graphs
@pieces
@pytest.mark.parametrize("self_loop", [False, True])
def test_attention_derivatives(
    monkeypatch: pytest.MonkeyPatch, name: str, tile: int, self_loop: bool
) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    n, graph = GRAPHS[name]
    log_weight = weights(graph).log().nan_to_num(0.0).requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = neighbor_attention(q, k, v, w, *graph, self_loop)
        return out, lse.masked_fill(lse == -math.inf, 0.0)  # finite differences of -inf are NaN

    vectors = [leaf(n, 2, 3, seed=i) for i in range(3)]
    check_gradients(function, [*vectors, log_weight], twice=name in ("table", "csr"))


def test_attention_over_weights_of_zero() -> None:
    graph = torch.tensor([[1, 2], [2, -1], [0, 1]], dtype=torch.int32), None
    vectors = [leaf(3, 2, 3, seed=i) for i in range(3)]
    log_weight = torch.tensor([[-math.inf, 0.5], [-math.inf, 0.0], [0.0, -math.inf]], dtype=torch.float64)
    (out, lse), gradients = with_gradients(
        lambda *x: neighbor_attention(*x, *graph, False), [*vectors, log_weight]
    )
    torch.testing.assert_close(out[0], vectors[2][2].detach())
    torch.testing.assert_close(out[2], vectors[2][0].detach())
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()
    for gradient in gradients:
        assert gradient.isfinite().all()
    assert not gradients[3][log_weight == -math.inf].any()


@graphs
@pieces
def test_sum(monkeypatch: pytest.MonkeyPatch, name: str, tile: int) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    n, graph = GRAPHS[name]
    x, weight = leaf(n, 5), weights(graph)
    want = torch.zeros(n, 5, dtype=torch.float64)
    for e, i, j in edges(graph):
        want[i] += weight.reshape(-1)[e] * x[j].detach()
    torch.testing.assert_close(neighbor_sum(x, weight, *graph), want)
    weight = weight.nan_to_num(0.0).requires_grad_()
    check_gradients(lambda a, w: neighbor_sum(a, w, *graph), [x, weight])


@graphs
@pieces
def test_smoothness(monkeypatch: pytest.MonkeyPatch, name: str, tile: int) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    n, graph = GRAPHS[name]
    z, weight = leaf(n, 5), weights(graph)
    flat = weight.reshape(-1).tolist()
    total = sum(flat[e] for e, _, _ in edges(graph))
    energy = sum(flat[e] * float((z[i] - z[j]).detach().square().sum()) for e, i, j in edges(graph))
    got, weight_sum = smoothness_energy(z, weight, *graph)
    torch.testing.assert_close(weight_sum.item(), float(total))
    torch.testing.assert_close(got.item(), energy / (5 * total) if total else 0.0)
    weight = weight.nan_to_num(1.0).requires_grad_()
    if total:
        check_gradients(lambda a, w: smoothness_energy(a, w, *graph), [z, weight])
    else:
        for gradient in with_gradients(lambda a, w: smoothness_energy(a, w, *graph), [z, weight])[1]:
            assert not gradient.any()


def test_smoothness_without_weight() -> None:
    graph = torch.tensor([[1], [0]], dtype=torch.int32), None
    (energy, total), gradients = with_gradients(
        lambda a, w: smoothness_energy(a, w, *graph)[0:2],
        [leaf(2, 3), torch.zeros(2, 1, dtype=torch.float64)],
    )
    assert energy == total == 0
    assert not gradients[0].any()


def every_op(graph: Graph, self_loop: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    def function(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        x = v.flatten(1)
        return (
            edge_cosine(q.flatten(1), *graph),
            *neighbor_attention(q, k, v, weight, *graph, self_loop),
            neighbor_sum(x, weight, *graph),
            *smoothness_energy(x, weight.square(), *graph),
        )

    return function


def test_csr_of_a_table_gives_the_same() -> None:
    n, k = 9, 4
    neighbors, _ = table(n, k)
    full = (neighbors.reshape(-1), torch.arange(n + 1) * k)
    present = neighbors.reshape(-1) >= 0
    packed = (
        neighbors.reshape(-1)[present],
        torch.cat([torch.tensor([0]), (neighbors >= 0).sum(1).cumsum(0)]),
    )
    inputs = [leaf(n, 2, 3, seed=i) for i in range(3)]
    weight = leaf(n, k, seed=3)
    want, want_gradients = with_gradients(every_op((neighbors, None)), [*inputs, weight])
    for graph, select in ((full, slice(None)), (packed, present)):
        outputs, gradients = with_gradients(every_op(graph), [*inputs, weight.reshape(-1)[select]])
        # The cotangent of the cosines is drawn in the table's shape; compare what does not depend on it.
        torch.testing.assert_close(outputs[0], want[0].reshape(-1)[select])
        for got, expected in zip(outputs[1:], want[1:], strict=True):
            torch.testing.assert_close(got, expected)
        if graph is full:
            for got, expected in zip(gradients, want_gradients, strict=True):
                torch.testing.assert_close(got.reshape(expected.shape), expected)


def test_relabelling_the_nodes_relabels_the_result() -> None:
    n, k = 8, 3
    neighbors, _ = table(n, k)
    arguments = [*(leaf(n, 2, 3, seed=i).detach() for i in range(3)), leaf(n, k, seed=3).detach()]
    order = torch.tensor([3, 1, 7, 0, 5, 2, 6, 4])
    place = order.argsort().to(torch.int32)
    moved = torch.where(neighbors[order] >= 0, place[neighbors[order].long()], -1).to(torch.int32)
    want = every_op((neighbors, None))(*arguments)
    got = every_op((moved, None))(*(x[order] for x in arguments))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b[order] if b.dim() else b)


def test_nan_goes_no_further_than_its_edges() -> None:
    """Row 0 is NaN: what does not touch it, and absent edges above all, must not see it."""
    n = 6
    neighbors = torch.tensor([[1, 2], [0, -1], [3, -1], [-1, -1], [5, 3], [-1, 4]], dtype=torch.int32)
    graph = neighbors, None
    inputs = [leaf(n, 2, 3, seed=i).detach() for i in range(3)]
    weight = leaf(n, 2, seed=3).detach().masked_fill(neighbors < 0, math.nan)
    for x in inputs:
        x[0] = math.nan
    function = every_op(graph)
    (cosine, out, lse, total, *_), _ = with_gradients(function, [*inputs, weight])
    clean = slice(2, None)  # rows 0 and 1 touch row 0
    assert cosine[clean].isfinite().all()
    assert not cosine[neighbors < 0].any()
    for x in (out, lse, total):
        assert x[clean].isfinite().all()
        assert x[1].isnan().any()
    gradients = with_gradients(lambda *x: function(*x)[:4], [*inputs, weight])[1]
    for gradient in gradients[:3]:
        assert gradient[3:].isfinite().all()
    assert not gradients[3][neighbors < 0].any()
    assert gradients[3][clean].isfinite().all()


def test_nan_without_edges_is_not_seen() -> None:
    graph = torch.tensor([[1, -1], [0, -1], [-1, -1]], dtype=torch.int32), None
    z, weight = leaf(3, 5).detach(), leaf(3, 2, seed=1).detach().exp()
    z[2] = math.nan
    outputs, gradients = with_gradients(
        lambda a, w: (edge_cosine(a, *graph), *smoothness_energy(a, w, *graph)), [z, weight]
    )
    for x in (*outputs, gradients[0][:2], gradients[1]):
        assert x.isfinite().all()


def test_pieces_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    n, k, heads, width = 400, 16, 2, 32
    tile = 1 << 14
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile)
    graph = torch.randint(0, n, (n, k), generator=torch.Generator().manual_seed(0)).to(torch.int32), None
    arguments = [*(leaf(n, heads, width, seed=i).float() for i in range(3)), leaf(n, k, seed=3).float()]
    with largest_tensor() as largest:
        with_gradients(every_op(graph), arguments)
    bound = 8 * max(tile, (n + 1) * heads * width, n * k * heads)
    gathered = 4 * n * k * heads * width
    assert largest.bytes <= bound < gathered / 4
    with saved_tensors() as saved:
        every_op(graph)(*arguments)
    assert sum(saved.values()) < gathered


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    graph = table(9, 4)
    low = [leaf(9, 2, 3, seed=i, dtype=dtype).detach() for i in range(3)]
    weight = leaf(9, 4, seed=3).detach().float()
    got = every_op(graph)(*low, weight)
    want = every_op(graph)(*(x.float() for x in low), weight)
    low_places = (1, 3)
    assert same_bits(got, [x.to(dtype) if i in low_places else x for i, x in enumerate(want)])


def test_nothing() -> None:
    for graph in (
        (torch.empty(0, 3, dtype=torch.int32), None),
        (torch.empty(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)),
    ):
        empty = [leaf(0, 2, 3) for _ in range(3)]
        outputs, _ = with_gradients(every_op(graph), [*empty, leaf(*graph[0].shape)])
        shapes = [tuple(graph[0].shape), (0, 2, 3), (0, 2), (0, 6), (), ()]
        assert [tuple(x.shape) for x in outputs] == shapes
        t_ptr, t_edge = graph_transpose(*graph, 0)
        assert t_ptr.tolist() == [0]
        assert t_edge.tolist() == []


@pytest.mark.parametrize("form", ["table", "csr"])
def test_repeats_and_traces(form: str) -> None:
    n, k = 300, 8
    neighbors, _ = table(n, k)
    graph = (neighbors, None) if form == "table" else (neighbors.reshape(-1), torch.arange(n + 1) * k)
    arguments = [*(leaf(n, 2, 16, seed=i).float() for i in range(3)), leaf(*graph[0].shape, seed=3).float()]
    check_repeats(every_op(graph), arguments)
    traced = torch.compile(every_op(graph), backend="aot_eager", fullgraph=True)
    for got, want in zip(traced(*arguments), every_op(graph)(*arguments), strict=True):
        torch.testing.assert_close(got, want)
