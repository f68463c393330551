"""csrc/cuda/{neighbors,graph_transpose}.cu, emulated, against the reference in float64."""

from collections.abc import Callable, Sequence
from ctypes import c_bool, c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_host._host import (
    STORAGE,
    Arena,
    assert_parity,
    call,
    dtype_code,
    pointer,
    repeatable,
    structure,
    workspace_size,
)
from umda_fast.ops import NeighborGraph
from umda_fast.reference import neighbors as reference


@cache
def _structures() -> dict[str, Any]:
    table = structure(
        "NeighborTable",
        nodes=c_int64,
        degree=c_int64,
        edges=c_int64,
        neighbors=c_void_p,
        indptr=c_void_p,
        t_ptr=c_void_p,
        t_edge=c_void_p,
    )
    heads = structure("Heads", data=c_void_p, stride=c_int64, head_stride=c_int64)
    # x: [nodes, heads, width]; p: an address; b: a flag.
    kinds = {"x": heads, "p": c_void_p, "b": c_bool}

    def operation(name: str, fields: str, has_heads: bool = False) -> Any:
        members = dict(f.split(":") for f in fields.split())
        return structure(
            name,
            graph=table,
            **({"heads": c_int64} if has_heads else {}),
            width=c_int64,
            type=c_int,
            **{member: kinds[kind] for member, kind in members.items()},
            workspace=c_void_p,
        )

    return {
        "Table": table,
        "Heads": heads,
        "graph_transpose": structure(
            "GraphTranspose",
            neighbors=c_void_p,
            indptr=c_void_p,
            edges=c_int64,
            nodes=c_int64,
            t_ptr=c_void_p,
            t_edge=c_void_p,
            workspace=c_void_p,
        ),
        "edge_cosine_forward": operation("EdgeCosineForward", "r:x cosine:p"),
        "edge_cosine_backward": operation("EdgeCosineBackward", "r:x d_cosine:p dr:p"),
        "neighbor_sum_forward": operation("NeighborSumForward", "x:x weight:p out:p"),
        "neighbor_sum_backward": operation("NeighborSumBackward", "x:x d_out:x weight:p dx:p d_weight:p"),
        "smoothness_forward": operation("SmoothnessForward", "z:x weight:p energy:p weight_sum:p"),
        "smoothness_backward": operation(
            "SmoothnessBackward", "z:x weight:p d_energy:p energy:p weight_sum:p dz:p d_weight:p"
        ),
        "neighbor_attention_forward": operation(
            "NeighborAttentionForward", "q:x k:x v:x log_weight:p self_loop:b out:p lse:p", True
        ),
        "neighbor_attention_backward": operation(
            "NeighborAttentionBackward",
            "d_out:x q:x k:x v:x log_weight:p self_loop:b dq:p dk:p dv:p d_log_weight:p",
            True,
        ),
    }


@dataclass
class Graph:
    """A table or a CSR graph."""

    nodes: int
    neighbors: Tensor
    indptr: Tensor | None = None

    def __post_init__(self) -> None:
        self.transposed = reference.graph_transpose(self.neighbors, self.indptr, self.nodes)


def table(nodes: int, degree: int, seed: int = 0) -> Graph:
    """A table of random neighbours, some absent, some twice in a row."""
    g = torch.Generator().manual_seed(seed)
    neighbors = torch.randint(-1, max(nodes, 1), (nodes, degree), generator=g, dtype=torch.int32)
    neighbors[torch.rand(nodes, degree, generator=g) < 0.2] = -1
    return Graph(nodes, neighbors)


def csr(degrees: Sequence[int], seed: int = 0) -> Graph:
    """A CSR graph of random neighbours, some absent."""
    g = torch.Generator().manual_seed(seed)
    nodes, edges = len(degrees), sum(degrees)
    neighbors = torch.randint(-1, nodes, (edges,), generator=g, dtype=torch.int32)
    return Graph(nodes, neighbors, torch.tensor([0, *degrees]).cumsum(0))


def hub(nodes: int = 330, degree: int = 5) -> Graph:
    """A table in which most nodes point at node 7: its list in the transpose takes several parts."""
    graph = table(nodes, degree)
    graph.neighbors[:, :2] = 7
    graph.neighbors[5, 0] = -1
    return Graph(nodes, graph.neighbors)


GRAPHS: dict[str, Callable[[], Graph]] = {
    "table": lambda: table(61, 6),
    "hub": hub,
    "wide table": lambda: table(3, 300),
    "csr": lambda: csr([3, 0, 17, 1, 0, 0, 40, 2, 33, 0]),
    "long rows": lambda: csr([0, 700, 1, 257, 256, 0, 90, 300]),
    "no nodes": lambda: table(0, 4),
    "no edges": lambda: table(5, 0),
    "nobody": lambda: Graph(4, torch.full((4, 3), -1, dtype=torch.int32)),
    "one node": lambda: Graph(1, torch.zeros(1, 1, dtype=torch.int32)),
}


class Call:
    """One launcher call: puts tensors into guarded memory and fills in the argument struct."""

    def __init__(self, name: str, graph: Graph, schedule: tuple[int, int], shift: int = 0) -> None:
        self.name, self.schedule, self.shift = name, schedule, shift
        self.arena = Arena()
        self.kind = _structures()[name]
        self.fields: dict[str, Any] = {}
        neighbors = self.arena.put(graph.neighbors)
        indptr, t_ptr, t_edge = (None if x is None else self.arena.put(x) for x in (graph.indptr, *graph.transposed))
        degree = graph.neighbors.shape[1] if graph.indptr is None else 0
        self.fields["graph"] = _structures()["Table"](
            *(graph.nodes, degree, neighbors.numel()), *map(pointer, (neighbors, indptr, t_ptr, t_edge))
        )

    def rows(self, **tensors: Tensor) -> "Call":
        for name, x in tensors.items():
            held = self.arena.put(x, self.shift)
            head_stride = held.stride(1) if x.dim() == 3 else 0
            self.fields[name] = _structures()["Heads"](pointer(held), held.stride(0), head_stride)
            self.fields |= {"width": x.shape[-1], "type": dtype_code(x.dtype)}
            if x.dim() == 3:
                self.fields["heads"] = x.shape[1]
        return self

    def values(self, **tensors: Tensor | None) -> "Call":
        self.fields |= {k: None if x is None else pointer(self.arena.put(x)) for k, x in tensors.items()}
        return self

    def with_flag(self, self_loop: bool) -> "Call":
        self.fields["self_loop"] = self_loop
        return self

    def run(self, **outputs: Tensor) -> list[Tensor]:
        """Launch; ``outputs`` give shapes and dtypes."""
        made = {k: self.arena.empty(*x.shape, dtype=x.dtype) for k, x in outputs.items()}
        fields = self.fields | {k: pointer(x) for k, x in made.items()}
        arguments = self.kind(**fields)
        arguments.workspace = pointer(self.arena.workspace(workspace_size(self.name, arguments)))
        call(self.name, arguments, self.arena, *self.schedule)
        return list(made.values())


Schedule = tuple[int, int]


def compare(
    names: Sequence[str],
    run: Callable[[Schedule], list[Tensor]],
    expected: Sequence[Sequence[Tensor]],
    factor: float,
) -> list[Tensor]:
    """Parity of every output with the (exact, baseline) ones, and the same bits for every grid and order."""
    results = repeatable(lambda blocks, order: run((blocks, order)))
    for name, got, want, base in zip(names, results, *expected, strict=True):
        assert_parity(got, want, base, factor, name)
    return results


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    d_out: Tensor,
    dtype: torch.dtype | None,
) -> tuple[list[Tensor], list[Tensor]]:
    """Results of a reference function and the gradients of its first one, as given or in float64."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    results = function(*leaves)
    results = (results,) if isinstance(results, Tensor) else results
    grads: Sequence[Tensor | None] = [None] * len(leaves)
    if results[0].requires_grad:
        grads = torch.autograd.grad(results[0], leaves, d_out.to(results[0].dtype), allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)]
    return [r.detach() for r in results], filled


def both(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], d_out: Tensor
) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    """(exact, baseline) results and (exact, baseline) gradients."""
    exact = gradients(function, inputs, d_out, torch.float64)
    baseline = gradients(function, inputs, d_out, None)
    return [exact[0], baseline[0]], [exact[1], baseline[1]]


def features(graph: Graph, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random rows."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(graph.nodes, *shape, generator=g).to(dtype)


def edge_values(graph: Graph, seed: int = 9) -> Tensor:
    """Random weights in (0, 1); NaN where there is no edge, for it must not matter."""
    g = torch.Generator().manual_seed(seed)
    values = torch.rand(graph.neighbors.shape, generator=g)
    return values.masked_fill(graph.neighbors < 0, torch.nan)


# ---- graph_transpose ---------------------------------------------------------------------------------------


def check_transpose(neighbors: Tensor, indptr: Tensor | None, nodes: int) -> None:
    def run(blocks: int, order: int) -> list[Tensor]:
        arena = Arena()
        t_ptr = arena.empty(nodes + 1, dtype=torch.int64)
        t_edge = arena.empty(neighbors.numel(), dtype=torch.int64)
        held = arena.put(neighbors), None if indptr is None else arena.put(indptr)
        arguments = _structures()["graph_transpose"](
            *map(pointer, held), neighbors.numel(), nodes, pointer(t_ptr), pointer(t_edge)
        )
        arguments.workspace = pointer(arena.workspace(workspace_size("graph_transpose", arguments)))
        call("graph_transpose", arguments, arena, blocks, order)
        return [t_ptr, t_edge]

    expected = reference.graph_transpose(neighbors, indptr, nodes)
    for got, want in zip(repeatable(run), expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("nodes", "edges"), [(0, 0), (0, 3), (1, 1), (5, 0), (7, 100), (255, 900), (256, 9000), (70_000, 5000)]
)
def test_transpose(nodes: int, edges: int) -> None:
    g = torch.Generator().manual_seed(edges)
    neighbors = torch.randint(-1, max(nodes, 1), (edges,), generator=g, dtype=torch.int32)
    neighbors[neighbors >= nodes] = -1
    check_transpose(neighbors, None, nodes)


@pytest.mark.parametrize("graph", [name for name, make in GRAPHS.items() if make().indptr is not None])
def test_transpose_of_csr(graph: str) -> None:
    made = GRAPHS[graph]()
    check_transpose(made.neighbors, made.indptr, made.nodes)


@pytest.mark.parametrize("broken", [None, 0, 300, -1])
@pytest.mark.parametrize("nodes", [1, 2, 150])
def test_transpose_of_symmetric_graphs(nodes: int, broken: int | None) -> None:
    """They need no sort; what only looks like one (the same degrees, in and out) is told from one."""
    made = NeighborGraph(table(nodes, 4).neighbors).symmetrize()
    assert made.indptr is not None
    neighbors = made.neighbors.clone()
    if broken is not None and neighbors.numel() > abs(broken):
        neighbors[broken] = (neighbors[broken] + 1) % nodes
    check_transpose(neighbors, made.indptr, nodes)


# ---- edge_cosine -------------------------------------------------------------------------------------------


def check_cosine(graph: Graph, r: Tensor, shift: int = 0) -> None:
    d_cosine = edge_values(graph)
    results, grads = both(
        lambda r: reference.edge_cosine(r, graph.neighbors, graph.indptr), [r], d_cosine.nan_to_num(3)
    )
    shape = torch.empty(graph.neighbors.shape)
    compare(
        ["cosine"],
        lambda s: Call("edge_cosine_forward", graph, s, shift).rows(r=r).run(cosine=shape),
        results,
        2,
    )
    compare(
        ["dr"],
        lambda s: Call("edge_cosine_backward", graph, s, shift).rows(r=r).values(d_cosine=d_cosine).run(dr=r),
        grads,
        3,
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_cosine_graphs(graph: str) -> None:
    check_cosine(GRAPHS[graph](), features(GRAPHS[graph](), 24))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("width", [1, 3, 59, 97, 256, 264, 301])
def test_cosine_widths(width: int, dtype: torch.dtype) -> None:
    graph = table(40, 5)
    check_cosine(graph, features(graph, width, dtype=dtype))


def test_cosine_of_short_and_equal_rows() -> None:
    graph = table(20, 5)
    r = features(graph, 8)
    r[3] = 0
    r[4] = 1e-10
    r[5] = r[6]
    check_cosine(graph, r)


# ---- neighbor_sum ------------------------------------------------------------------------------------------


def check_sum(graph: Graph, x: Tensor, shift: int = 0) -> None:
    weight, d_out = edge_values(graph), features(graph, *x.shape[1:], dtype=x.dtype, seed=3)
    results, grads = both(lambda x, w: reference.neighbor_sum(x, w, graph.neighbors, graph.indptr), [x, weight], d_out)
    compare(
        ["out"],
        lambda s: Call("neighbor_sum_forward", graph, s, shift).rows(x=x).values(weight=weight).run(out=x),
        results,
        2,
    )
    compare(
        ["dx", "d_weight"],
        lambda s: (
            Call("neighbor_sum_backward", graph, s, shift)
            .rows(x=x, d_out=d_out)
            .values(weight=weight)
            .run(dx=x, d_weight=weight)
        ),
        grads,
        3,
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_sum_graphs(graph: str) -> None:
    check_sum(GRAPHS[graph](), features(GRAPHS[graph](), 20))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("width", [1, 3, 59, 97, 256, 264, 301])
def test_sum_widths(width: int, dtype: torch.dtype) -> None:
    graph = table(40, 5)
    check_sum(graph, features(graph, width, dtype=dtype))


def test_sum_strided_and_unaligned() -> None:
    graph = hub()
    check_sum(graph, features(graph, 48)[:, :24])
    check_sum(graph, features(graph, 24), shift=1)


def test_absent_neighbours_beyond_the_table_and_a_nan_row_nobody_points_at() -> None:
    graph = table(30, 4)
    outside = graph.neighbors.clone()
    outside[outside < 0] = 30
    outside[0, 0] = 2**31 - 1
    graph.neighbors[0, 0] = -1
    graph.neighbors[graph.neighbors == 11] = -1
    outside[outside == 11] = -5
    x = features(graph, 8)
    x[11] = torch.nan
    weight = edge_values(graph)
    results = [
        Call("neighbor_sum_forward", Graph(30, n), (1000, 0)).rows(x=x).values(weight=weight).run(out=x)[0]
        for n in (graph.neighbors, outside)
    ]
    assert torch.equal(*results)
    assert torch.isfinite(results[0]).all()


# ---- smoothness_energy -------------------------------------------------------------------------------------


def check_energy(graph: Graph, z: Tensor, weight: Tensor) -> None:
    d_energy = torch.tensor(1.7)
    results, grads = both(
        lambda z, w: reference.smoothness_energy(z, w, graph.neighbors, graph.indptr), [z, weight], d_energy
    )
    scalar = torch.empty(())
    energy, weight_sum = compare(
        ["energy", "weight_sum"],
        lambda s: (
            Call("smoothness_forward", graph, s).rows(z=z).values(weight=weight).run(energy=scalar, weight_sum=scalar)
        ),
        results,
        2,
    )
    compare(
        ["dz", "d_weight"],
        lambda s: (
            Call("smoothness_backward", graph, s)
            .rows(z=z)
            .values(weight=weight, d_energy=d_energy, energy=energy, weight_sum=weight_sum)
            .run(dz=z, d_weight=weight)
        ),
        grads,
        3,
    )


@pytest.mark.parametrize("graph", GRAPHS)
def test_energy_graphs(graph: str) -> None:
    made = GRAPHS[graph]()
    check_energy(made, features(made, 20), edge_values(made))


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("width", [1, 3, 59, 97, 256, 264, 301])
def test_energy_widths(width: int, dtype: torch.dtype) -> None:
    graph = table(40, 5)
    check_energy(graph, features(graph, width, dtype=dtype), edge_values(graph))


def test_energy_without_weight() -> None:
    graph = table(10, 3)
    check_energy(graph, features(graph, 8), torch.zeros(10, 3))


def test_energy_of_rows_that_are_nearly_the_same() -> None:
    graph = table(40, 5)
    check_energy(graph, 100 + 1e-3 * features(graph, 16), edge_values(graph))


# ---- neighbor_attention ------------------------------------------------------------------------------------


def check_attention(
    graph: Graph,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    weighted: bool = True,
    self_loop: bool = True,
    packed: bool = False,
    shift: int = 0,
) -> None:
    if packed:
        q, k, v = features(graph, 3, heads, width, dtype=dtype).unbind(1)
    else:
        q, k, v = (features(graph, heads, width, dtype=dtype, seed=i) for i in range(3))
    d_out = features(graph, heads, width, dtype=dtype, seed=4)
    log_weight = edge_values(graph).log() if weighted else None

    def function(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        weight = rest[0] if rest else None
        return reference.neighbor_attention(q, k, v, weight, graph.neighbors, graph.indptr, self_loop)

    inputs = [q, k, v] if log_weight is None else [q, k, v, log_weight]
    results, grads = both(function, inputs, d_out)
    compare(
        ["out", "lse"],
        lambda s: (
            Call("neighbor_attention_forward", graph, s, shift)
            .rows(q=q, k=k, v=v)
            .values(log_weight=log_weight)
            .with_flag(self_loop)
            .run(out=torch.empty(q.shape, dtype=dtype), lse=torch.empty(graph.nodes, heads))
        ),
        results,
        2,
    )

    def backward(schedule: Schedule) -> list[Tensor]:
        like = torch.empty(q.shape, dtype=dtype)
        found = (
            Call("neighbor_attention_backward", graph, schedule, shift)
            .rows(d_out=d_out, q=q, k=k, v=v)
            .values(log_weight=log_weight)
            .with_flag(self_loop)
            .run(dq=like, dk=like, dv=like, d_log_weight=torch.empty(graph.neighbors.shape))
        )
        return found if weighted else found[:3]

    compare(["dq", "dk", "dv", "d_log_weight"][: len(inputs)], backward, grads, 3)


@pytest.mark.parametrize("self_loop", [True, False])
@pytest.mark.parametrize("graph", GRAPHS)
def test_attention_graphs(graph: str, self_loop: bool) -> None:
    check_attention(GRAPHS[graph](), 2, 12, self_loop=self_loop)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize(("heads", "width"), [(1, 1), (2, 3), (1, 59), (3, 97), (1, 256), (1, 264), (1, 301), (4, 16)])
def test_attention_widths(heads: int, width: int, dtype: torch.dtype) -> None:
    check_attention(table(30, 5), heads, width, dtype)


def test_attention_without_weights() -> None:
    check_attention(table(30, 5), 2, 16, weighted=False)


def test_attention_on_slices_of_one_tensor() -> None:
    check_attention(hub(), 2, 16, packed=True)
    check_attention(hub(), 2, 16, packed=True, shift=1)


def test_attention_to_neighbours_of_weight_zero() -> None:
    graph = table(10, 3)
    q, k, v = (features(graph, 1, 4, seed=i) for i in range(3))
    log_weight = torch.full((10, 3), -torch.inf)
    out, lse = (
        Call("neighbor_attention_forward", graph, (1000, 0))
        .rows(q=q, k=k, v=v)
        .values(log_weight=log_weight)
        .with_flag(False)
        .run(out=q, lse=torch.empty(10, 1))
    )
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == -torch.inf).all()
    found = (
        Call("neighbor_attention_backward", graph, (1000, 0))
        .rows(d_out=v, q=q, k=k, v=v)
        .values(log_weight=log_weight)
        .with_flag(False)
        .run(dq=q, dk=q, dv=q, d_log_weight=log_weight)
    )
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


# ---- all of them -------------------------------------------------------------------------------------------


@st.composite
def any_graph(draw: st.DrawFn) -> Graph:
    """A table or a CSR graph of any shape."""
    seed = draw(st.integers(0, 100))
    if draw(st.booleans()):
        return table(draw(st.integers(0, 30)), draw(st.integers(0, 12)), seed)
    return csr(draw(st.lists(st.one_of(st.integers(0, 8), st.integers(200, 300)), max_size=8)), seed)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    graph=any_graph(),
    width=st.integers(1, 70),
    heads=st.integers(1, 3),
    dtype=st.sampled_from(STORAGE),
    self_loop=st.booleans(),
    shift=st.integers(0, 1),
)
def test_any_shape(graph: Graph, width: int, heads: int, dtype: torch.dtype, self_loop: bool, shift: int) -> None:
    x = features(graph, width, dtype=dtype, seed=width)
    check_cosine(graph, x, shift)
    check_sum(graph, x, shift)
    check_energy(graph, x, edge_values(graph))
    check_attention(graph, heads, width, dtype, self_loop=self_loop, shift=shift)


def test_offsets_that_are_wrong_hang_nothing_and_reach_nowhere() -> None:
    graph = csr([3, 270, 5, 0, 20])
    assert graph.indptr is not None
    x = features(graph, 12)
    weight = torch.rand(graph.neighbors.shape)
    for wrong in ([0, 900, 3, 4, 5, 298], [7, 7, 7, 7, 7, 7], [-9, 50, 20, 400, -3, 1000]):
        for broken in (
            Graph(5, graph.neighbors, torch.tensor(wrong)),
            Graph(5, graph.neighbors, graph.indptr),
        ):
            if broken.indptr is graph.indptr:
                t_edge = broken.transposed[1].clone()
                t_edge[::7], t_edge[::11] = 10**9, -4
                broken.transposed = (torch.tensor(wrong), t_edge)
            Call("neighbor_sum_forward", broken, (3, 0)).rows(x=x).values(weight=weight).run(out=x)
            Call("neighbor_sum_backward", broken, (3, 0)).rows(x=x, d_out=x).values(weight=weight).run(
                dx=x, d_weight=weight
            )
