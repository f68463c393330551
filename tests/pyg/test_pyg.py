"""What torch_geometric's users get, against torch_geometric's own layers and compositions of them."""

import importlib
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_geometric")

from torch_geometric.data import Batch, Data
from torch_geometric.nn import MessagePassing, Sequential, TransformerConv
from torch_geometric.nn.aggr import AttentionalAggregation
from torch_geometric.utils import scatter, softmax

from umda_fast.ops import NeighborGraph, _library, knn_graph
from umda_fast.pyg import MultiTaskAttentionAggregation, NeighborAttentionConv, knn_edge_index

BACKENDS = ["reference", *([] if _library.cpp_status is not None else ["cpp"])]
backends = pytest.mark.parametrize("backend", BACKENDS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_edges(nodes: int, edges: int, seed: int = 0) -> Tensor:
    """Not sorted, with loops and double edges; the last two nodes have none."""
    return torch.randint(0, nodes - 2, (2, edges), generator=torch.Generator().manual_seed(seed))


def within_rule(ours: Sequence[Tensor], theirs: Sequence[Tensor], exact: Sequence[Tensor], factor: float) -> None:
    """Error against float64 at most ``factor`` times what torch_geometric makes, or a few ulp of the scale.

    What is zero in exact arithmetic (the gradient of a bias of the keys, which cancels in the softmax) has the scale
    of the others: both sides hold the rounding of sums that size.
    """
    largest = max((float(truth.abs().max()) for truth in exact if truth.numel()), default=0.0)
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        assert mine.shape == other.shape == truth.shape
        assert mine.dtype == other.dtype
        scale = float(truth.abs().max()) if truth.numel() else 0.0
        if scale < torch.finfo(torch.float64).eps * len(truth) * largest:
            scale = largest
        allowed = factor * float((other.double() - truth).abs().max()) if truth.numel() else 0.0
        error = float((mine.double() - truth).abs().max()) if truth.numel() else 0.0
        assert error <= max(allowed, 4 * torch.finfo(mine.dtype).eps * scale)


def gradients(out: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    weight = normal(*out.shape, seed=99).to(out.dtype)
    return list(torch.autograd.grad(out, inputs, weight))


# --- NeighborAttentionConv


@backends
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
def test_conv_is_transformer_conv(backend: str, concat: bool, flow: str) -> None:
    edges = random_edges(30, 150)
    theirs = TransformerConv(12, 16, heads=3, concat=concat, flow=flow)
    ours = NeighborAttentionConv(12, 16, heads=3, concat=concat, flow=flow, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    exact = TransformerConv(12, 16, heads=3, concat=concat, flow=flow).double()
    exact.load_state_dict(theirs.state_dict())
    x = normal(30, 12, seed=1)
    found = []
    for layer, dtype in ((ours, x.dtype), (theirs, x.dtype), (exact, torch.float64)):
        y = x.to(dtype).requires_grad_()
        out = layer(y, edges)
        found.append((out.detach(), gradients(out, [y, *(p for _, p in sorted(layer.named_parameters()))])))
    within_rule(*([out] for out, _ in found), factor=2)
    within_rule(*(grads for _, grads in found), factor=3)


@backends
@pytest.mark.parametrize("loops", [True, False])
def test_conv_with_weights(backend: str, loops: bool) -> None:
    """Weights are factors in the softmax; 0 is no edge; self loops have weight 1."""
    nodes, edges = 20, random_edges(20, 90)
    layer = NeighborAttentionConv(8, 8, heads=2, root_weight=False, add_self_loops=loops, backend=backend)
    start = normal(90, seed=3).abs()
    start[::7] = 0

    def composed(x: Tensor, weight: Tensor) -> Tensor:
        index = edges
        if loops:
            index = torch.cat([edges, torch.arange(nodes).expand(2, -1)], 1)
            weight = torch.cat([weight, weight.new_ones(nodes)])
        linears = (layer.lin_query, layer.lin_key, layer.lin_value)
        q, k, v = (nn.functional.linear(x, m.weight.to(x.dtype), m.bias.to(x.dtype)).view(nodes, 2, 8) for m in linears)
        index, weight = index[:, weight > 0], weight[weight > 0]
        source, target = index
        scores = (q[target] * k[source]).sum(-1) / 8**0.5 + weight.log()[:, None]
        alpha = softmax(scores, target, num_nodes=nodes)
        return scatter(alpha[:, :, None] * v[source], target, 0, nodes).flatten(1)

    found = []
    for function, dtype in (
        (lambda x, w: layer(x, edges, w), torch.float32),
        (composed, torch.float32),
        (composed, torch.float64),
    ):
        x = normal(nodes, 8, seed=4).to(dtype).requires_grad_()
        weight = start.to(dtype).requires_grad_()
        out = function(x, weight)
        found.append((out.detach(), gradients(out, [x, weight])))
    within_rule(*([out] for out, _ in found), factor=2)
    within_rule(*(grads for _, grads in found), factor=3)
    if not loops:
        assert not found[0][0][-2:].any()


@backends
def test_conv_takes_a_graph(backend: str) -> None:
    x = normal(24, 8)
    graph = knn_graph(x, torch.tensor([0, 10, 11, 24]), 4, backend=backend)
    layer = NeighborAttentionConv(8, 8, heads=2, backend=backend)
    index, similarity = graph.to_edge_index()
    assert similarity is not None
    torch.testing.assert_close(layer(x, graph), layer(x, index))
    weight = graph.similarity.exp()
    torch.testing.assert_close(layer(x, graph, weight), layer(x, index, similarity.exp()))
    wide = layer.double()
    wide.backend = "reference"
    assert wide(x.double(), index, similarity.exp()).dtype == torch.float64


def test_conv_inside_a_model() -> None:
    model = Sequential(
        "x, edge_index",
        [
            (NeighborAttentionConv(5, 8), "x, edge_index -> x"),
            nn.ReLU(),
            (NeighborAttentionConv(8, 8, heads=2), "x, edge_index -> x"),
        ],
    )
    graphs = [Data(x=normal(n, 5, seed=n), edge_index=random_edges(n, 3 * n)) for n in (4, 7, 3)]
    batch = Batch.from_data_list(graphs)
    together = model(batch.x, batch.edge_index)
    apart = torch.cat([model(g.x, g.edge_index) for g in graphs])
    torch.testing.assert_close(together, apart)
    assert isinstance(model[0], MessagePassing)
    assert repr(NeighborAttentionConv(5, 8, heads=2)) == "NeighborAttentionConv(5, 8, heads=2)"
    before = {name: p.clone() for name, p in model[0].named_parameters()}
    model[0].reset_parameters()
    assert all(not torch.equal(p, before[name]) for name, p in model[0].named_parameters())


def test_conv_errors() -> None:
    layer, x, edges = NeighborAttentionConv(5, 8), normal(6, 5), random_edges(6, 9)
    with pytest.raises(ValueError, match="heads must be at least 1, got 0"):
        NeighborAttentionConv(5, 8, heads=0)
    with pytest.raises(ValueError, match="aggr must be 'add', got 'max'"):
        NeighborAttentionConv(5, 8, aggr="max")
    with pytest.raises(ValueError, match=r"x must have shape \[N, 5\], got \[6, 4\]"):
        layer(x[:, :4], edges)
    with pytest.raises(TypeError, match="one set of nodes"):
        layer((x, x), edges)
    with pytest.raises(ValueError, match=r"edge_index must be in 0\.\.5"):
        layer(x, edges + 6)
    with pytest.raises(TypeError, match=r"edge_index must be a dense tensor .* got torch.sparse_coo"):
        layer(x, torch.eye(6).to_sparse())
    with pytest.raises(ValueError, match=r"edge_weight must have shape \[9\], got \[8\]"):
        layer(x, edges, torch.ones(8))
    with pytest.raises(TypeError, match="edge_weight must be floating, got int64"):
        layer(x, edges, torch.ones(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="edge_weight must be at least 0"):
        layer(x, edges, -torch.ones(9))
    backwards = NeighborAttentionConv(5, 8, flow="target_to_source")
    with pytest.raises(ValueError, match="edge_index must be a tensor for flow"):
        backwards(x, NeighborGraph.from_edge_index(edges, 6))
    layer.explain = True
    with pytest.raises(NotImplementedError, match="stores no messages"):
        layer(x, edges)


# --- MultiTaskAttentionAggregation


class Column(nn.Module):
    """The scores of one task."""

    def __init__(self, gate: nn.Module, task: int) -> None:
        super().__init__()
        self.gate, self.task = gate, task

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(x)[:, self.task, None]


@backends
@pytest.mark.parametrize("tasks", [1, 4])
def test_aggregation_is_attentional_aggregation(backend: str, tasks: int) -> None:
    """T passes of torch_geometric's; groups 1 and 5 are empty, group 3 has one row."""
    index = torch.tensor([0] * 9 + [2] * 30 + [3] + [4] * 5)
    ours = MultiTaskAttentionAggregation(12, tasks, 8, backend=backend)
    found = []
    for dtype, own in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        gate = MultiTaskAttentionAggregation(12, tasks, 8).to(dtype).gate_nn
        gate.load_state_dict(ours.gate_nn.state_dict())
        layer = MultiTaskAttentionAggregation(12, tasks, 8, gate_nn=gate, backend=backend)
        theirs = [AttentionalAggregation(Column(gate, t)) for t in range(tasks)]
        x = normal(len(index), 12, seed=5).to(dtype).requires_grad_()
        out = layer(x, index, dim_size=6) if own else torch.cat([t(x, index, dim_size=6) for t in theirs], 1)
        found.append((out.detach(), gradients(out, [x, *gate.parameters()])))
    within_rule(*([out] for out, _ in found), factor=2)
    within_rule(*(grads for _, grads in found), factor=3)
    assert found[0][0].shape == (6, tasks * 12)
    assert not found[0][0][[1, 5]].any()


@backends
def test_aggregation_is_softmax_and_scatter(backend: str) -> None:
    index = torch.arange(50) // 8
    layer = MultiTaskAttentionAggregation(12, 3, concat=False, backend=backend)
    found = []
    for dtype, own in ((torch.float32, True), (torch.float32, False), (torch.float64, False)):
        x = normal(50, 12, seed=6).to(dtype).requires_grad_()
        if own:
            out = layer(x, index)
        else:
            linears = (layer.gate_nn.value, layer.gate_nn.gate)
            value, gate = (nn.functional.linear(x, m.weight.to(dtype), m.bias.to(dtype)) for m in linears)
            scores = (value.tanh() * gate.sigmoid()) @ layer.gate_nn.score.weight.to(dtype).T
            alpha = softmax(scores, index)
            out = scatter(alpha[:, :, None] * x[:, None], index, 0)
        found.append((out.detach(), gradients(out, [x])))
    within_rule(*([out] for out, _ in found), factor=2)
    within_rule(*(grads for _, grads in found), factor=3)


def test_aggregation_interface() -> None:
    layer, x = MultiTaskAttentionAggregation(6, 2), normal(10, 6)
    ptr, index = torch.tensor([0, 4, 4, 10]), torch.tensor([0] * 4 + [2] * 6)
    assert torch.equal(layer(x, index), layer(x, ptr=ptr))
    assert torch.equal(layer(x, index), layer(x, index, ptr=ptr, dim=0, max_num_elements=6))
    assert torch.equal(layer(x), layer(x, torch.zeros(10, dtype=torch.int64)))
    assert layer(x[:0], index[:0]).shape == (0, 12)
    assert layer(x[:0], index[:0], dim_size=3).shape == (3, 12)
    assert repr(layer) == "MultiTaskAttentionAggregation(6, num_tasks=2, concat=True)"
    before = [p.clone() for p in layer.parameters()]
    layer.reset_parameters()
    assert not any(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))
    with pytest.raises(ValueError, match="num_tasks must be at least 1, got 0"):
        MultiTaskAttentionAggregation(6, 0)
    with pytest.raises(ValueError, match="index must be sorted"):
        layer(x, index.flip(0))
    with pytest.raises(ValueError, match=r"index must be in 0..1 \(dim_size = 2\), got 2"):
        layer(x, index, dim_size=2)
    with pytest.raises(ValueError, match=r"index must be in 0..2 \(dim_size = 3\), got -1"):
        layer(x, index - 1, dim_size=3)
    with pytest.raises(ValueError, match=r"index must have shape \[10\], got \[9\]"):
        layer(x, index[:9])
    with pytest.raises(TypeError, match="index must be int64, got int32"):
        layer(x, index.int())
    with pytest.raises(ValueError, match="two-dimensional"):
        layer(x[None], index)


class Layer(MessagePassing):
    """Messages are the neighbours' features."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return self.propagate(edge_index, x=x)


@backends
def test_as_aggr_of_a_layer(backend: str) -> None:
    """Edges sorted by target, as nearest neighbours come; nodes without edges get 0."""
    x = normal(14, 6, seed=7)
    edges = knn_edge_index(x, 3, torch.tensor([0] * 5 + [1] + [2] * 8), backend=backend)
    pool = MultiTaskAttentionAggregation(6, 2, backend=backend)
    columns = [AttentionalAggregation(Column(pool.gate_nn, t)) for t in range(2)]
    ours, theirs = Layer(aggr=pool)(x, edges), torch.cat([Layer(aggr=a)(x, edges) for a in columns], 1)
    torch.testing.assert_close(ours, theirs)
    assert not ours[5].any()
    with pytest.raises(ValueError, match="sort_by_row=False"):
        Layer(aggr=pool)(x, edges.flip(1))


# --- knn_edge_index and edge_index


@backends
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_knn_is_cdist_and_topk(backend: str, metric: str) -> None:
    sizes = [7, 1, 0, 20, 3]
    batch = torch.arange(5).repeat_interleave(torch.tensor(sizes))
    x = normal(len(batch), 6, seed=8)
    expected = []
    for b, size in enumerate(sizes):
        (nodes,) = (batch == b).nonzero(as_tuple=True)
        y = x[nodes].double()
        y = nn.functional.normalize(y) if metric == "cosine" else y
        distance = torch.cdist(y, y, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(float("inf"))
        near = distance.topk(min(4, max(size - 1, 0)), largest=False).indices
        expected.append(torch.stack([nodes[near].flatten(), nodes.repeat_interleave(near.shape[1])]))
    wanted = torch.cat(expected, 1)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    assert torch.equal(knn_edge_index(x, 4, batch, metric=metric, backend=backend), wanted)
    assert torch.equal(knn_edge_index(x, 4, ptr=ptr, metric=metric, backend=backend), wanted)
    against = knn_edge_index(x, 4, batch, metric=metric, flow="target_to_source", batch_size=9, backend=backend)
    assert torch.equal(against, wanted.flip(0))
    one = knn_edge_index(x, 4, metric=metric, backend=backend)
    assert torch.equal(one, knn_edge_index(x, 4, torch.zeros_like(batch), metric=metric, backend=backend))


def test_knn_errors() -> None:
    x, batch = normal(5, 3), torch.tensor([0, 0, 1, 1, 1])
    with pytest.raises(ValueError, match="flow must be"):
        knn_edge_index(x, 2, batch, flow="both")
    with pytest.raises(ValueError, match="batch or ptr must be given, got both"):
        knn_edge_index(x, 2, batch, ptr=torch.tensor([0, 2, 5]))
    with pytest.raises(ValueError, match="batch must be sorted"):
        knn_edge_index(x, 2, batch.flip(0))
    with pytest.raises(ValueError, match=r"batch must be in 0..0 \(batch_size = 1\), got 1"):
        knn_edge_index(x, 2, batch, batch_size=1)


@pytest.mark.parametrize("nodes", [3, 12])
def test_edge_index_round_trip(nodes: int) -> None:
    """Order inside a target, double edges, loops and isolated nodes are kept."""
    edges = random_edges(nodes, 4 * nodes)
    values = normal(4 * nodes, seed=9)
    graph = NeighborGraph.from_edge_index(edges, nodes, values)
    assert graph.num_nodes == nodes
    order = edges[1].argsort(stable=True)
    back, similarity = graph.to_edge_index()
    assert torch.equal(back, edges[:, order])
    assert similarity is not None
    assert torch.equal(similarity, values[order])
    again = NeighborGraph.from_edge_index(back, nodes, similarity)
    assert torch.equal(again.neighbors, graph.neighbors)
    assert again.indptr is not None
    assert torch.equal(again.indptr, graph.indptr)
    assert int(again.indptr.diff()[-2:].sum()) == 0

    empty = NeighborGraph.from_edge_index(edges[:, :0], nodes)
    assert empty.num_nodes == nodes
    assert empty.to_edge_index()[0].shape == (2, 0)


def test_table_to_edge_index_and_back() -> None:
    table = knn_graph(normal(9, 4), torch.tensor([0, 6, 7, 9]), 3)
    index, similarity = table.to_edge_index()
    again = NeighborGraph.from_edge_index(index, 9, similarity)
    for i in range(9):
        row = again.neighbors[again.indptr[i] : again.indptr[i + 1]]
        assert torch.equal(row, table.neighbors[i][table.neighbors[i] >= 0])


def test_without_torch_geometric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_geometric", None)
    monkeypatch.delitem(sys.modules, "umda_fast.pyg")
    with pytest.raises(ImportError, match=r"umda_fast.pyg needs torch_geometric, of the extra graph"):
        importlib.import_module("umda_fast.pyg")
