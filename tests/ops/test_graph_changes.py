"""What a graph keeps of itself follows its tensors when they are changed in place."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from umda_fast import ops
from umda_fast.ops import NeighborGraph, _library, _validate

pytestmark = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))

PTR = torch.tensor([0, 9])


def features() -> Tensor:
    return torch.randn(9, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def graph_of(form: str) -> NeighborGraph:
    table = ops.knn_graph(features().detach(), PTR, 3)
    return table if form == "table" else table.symmetrize()


def copy_of(graph: NeighborGraph) -> NeighborGraph:
    return NeighborGraph(graph.neighbors.clone(), indptr=None if graph.indptr is None else graph.indptr.clone())


def energy(z: Tensor, graph: NeighborGraph) -> Tensor:
    q = z.view(9, 1, 4)
    return ops.neighbor_attention(q, q, q, graph).square().sum()


def gradient(graph: NeighborGraph, function: Callable[[Tensor, NeighborGraph], Tensor] = energy) -> Tensor:
    z = features()
    return torch.autograd.grad(function(z, graph), z)[0]


@pytest.mark.parametrize("form", ["table", "csr"])
@pytest.mark.parametrize("compiled", [False, True])
def test_edges_dropped_in_place(form: str, compiled: bool) -> None:
    """After a first backward pass: the gradients are those of a graph that never was another."""
    torch._dynamo.reset()
    function: Any = torch.compile(energy, fullgraph=True, backend="aot_eager") if compiled else energy
    graph = graph_of(form)
    before = gradient(graph, function)
    for edge in (0, 1):
        graph.neighbors.view(-1)[edge::3] = -1
        found = gradient(graph, function)
        assert not torch.equal(found, before)
        assert torch.equal(found, gradient(copy_of(graph)))
        before = found


def test_rows_moved_in_place() -> None:
    graph = graph_of("csr")
    gradient(graph)
    assert graph.indptr is not None
    graph.indptr[1:-1] -= (graph.indptr.diff()[:-1] > 1).long()  # each row gives its last edge to the next
    assert torch.equal(gradient(graph), gradient(copy_of(graph)))


@pytest.mark.parametrize("form", ["table", "csr"])
def test_a_tensor_put_in_place_of_another(form: str) -> None:
    graph = graph_of(form)
    gradient(graph)
    graph.neighbors = torch.where(graph.neighbors == 3, -1, graph.neighbors)
    assert torch.equal(gradient(graph), gradient(copy_of(graph)))


def test_the_transpose_is_kept_while_nothing_changes() -> None:
    graph = graph_of("table")
    kept = graph.transpose()
    assert graph.transpose() is kept
    graph.neighbors[0, 0] = -1
    assert graph.transpose() is not kept


def test_an_index_written_out_of_range_is_named() -> None:
    """No kernel may read it."""
    graph = graph_of("table")
    gradient(graph)
    graph.neighbors[4, 1] = 1 << 20
    for call in (lambda: energy(features(), graph), graph.transpose):
        with pytest.raises(ValueError, match=r"neighbors must be in -1\.\.8, got neighbors\[4, 1\] = 1048576"):
            call()
    csr = graph_of("csr")
    assert csr.indptr is not None
    csr.indptr[3] = 0
    with pytest.raises(ValueError, match="indptr must not decrease"):
        energy(features(), csr)


def test_a_graph_that_comes_out_of_a_compiled_function() -> None:
    """What it keeps was made in the trace: it says nothing of changes after that."""

    def both(z: Tensor) -> tuple[Tensor, NeighborGraph]:
        graph = ops.knn_graph(z.detach(), PTR, 3)
        return energy(z, graph) + ops.edge_cosine(z, graph).sum(), graph

    torch._dynamo.reset()
    _, graph = torch.compile(both, fullgraph=True, backend="aot_eager")(features())
    again = torch.compile(energy, fullgraph=True, backend="aot_eager")
    assert torch.equal(gradient(graph, again), gradient(copy_of(graph)))
    graph.neighbors[:, 0] = -1
    assert torch.equal(gradient(graph, again), gradient(copy_of(graph)))
    assert torch.equal(gradient(graph), gradient(copy_of(graph)))


def test_a_cuda_graph_holds_the_making_of_the_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graph whose tensors are static buffers: a replay sees values that came after, whatever is kept."""
    graph = graph_of("table")
    warm = graph.transpose()
    monkeypatch.setattr(_validate, "capturing", lambda value: True)
    captured = graph.transpose()
    assert captured is not warm
    assert graph.transpose() is captured  # once for all operations of the capture
    graph.neighbors[0, 0] = 99
    graph.check()  # values cannot be looked at in a capture
    monkeypatch.undo()
    graph.neighbors[0, 0] = -1
    assert graph.transpose() is not captured


def test_in_inference_mode_nothing_is_kept() -> None:
    """Its tensors have no versions."""
    with torch.inference_mode():
        graph = graph_of("table")
        first = graph.transpose()
        graph.neighbors[:, 0] = -1
        second = graph.transpose()
        assert not torch.equal(first[1], second[1])
        for found, expected in zip(second, copy_of(graph).transpose(), strict=True):
            assert torch.equal(found, expected)
