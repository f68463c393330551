"""The binding files of the CUDA library, run on CPU tensors over the emulated kernels.

Their operations are registered in a namespace of their own, with the schemas of ``umda_fast``.
"""

import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import umda_fast.ops
from tests.cuda_host import _host
from umda_fast.parity.cases import representation_gram_case
from umda_fast.reference import bag_pool as reference_bag_pool
from umda_fast.reference import neighbors as reference
from umda_fast.reference import task_gradients as reference_task_gradients
from umda_fast.reference.representation_gram import representation_gram as reference_representation_gram

GRAPH = "Tensor neighbors, Tensor? indptr"
FORWARD_GRAPH = f"{GRAPH}, Tensor? t_ptr, Tensor? t_edge"
BACKWARD_GRAPH = f"{GRAPH}, Tensor t_ptr, Tensor t_edge"
SCHEMAS = {
    "bag_pool": "(Tensor z, Tensor scores, Tensor ptr) -> (Tensor pooled, Tensor entropy, Tensor lse)",
    "bag_pool_backward": "(Tensor? d_pooled, Tensor? d_entropy, Tensor? d_lse, Tensor z, Tensor scores, "
    "Tensor ptr, Tensor pooled, Tensor entropy, Tensor lse) -> (Tensor dz, Tensor d_scores)",
    "graph_transpose": f"({GRAPH}, int num_nodes) -> (Tensor t_ptr, Tensor t_edge)",
    "edge_cosine": f"(Tensor r, {FORWARD_GRAPH}) -> Tensor",
    "edge_cosine_backward": f"(Tensor d_cos, Tensor r, {BACKWARD_GRAPH}) -> Tensor",
    "neighbor_attention": "(Tensor q, Tensor k, Tensor v, Tensor? log_weight, "
    f"{FORWARD_GRAPH}, bool self_loop) -> (Tensor out, Tensor lse)",
    "neighbor_attention_backward": "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? log_weight, "
    f"{BACKWARD_GRAPH}, bool self_loop, Tensor out, Tensor lse) -> "
    "(Tensor dq, Tensor dk, Tensor dv, Tensor d_log_weight)",
    "neighbor_sum": f"(Tensor x, Tensor weight, {FORWARD_GRAPH}) -> Tensor",
    "neighbor_sum_backward": f"(Tensor d_out, Tensor x, Tensor weight, {BACKWARD_GRAPH}) -> "
    "(Tensor dx, Tensor d_weight)",
    "smoothness_energy": f"(Tensor z, Tensor weight, {FORWARD_GRAPH}) -> (Tensor energy, Tensor weight_sum)",
    "smoothness_energy_backward": f"(Tensor d_energy, Tensor z, Tensor weight, {BACKWARD_GRAPH}, "
    "Tensor energy, Tensor weight_sum) -> (Tensor dz, Tensor d_weight)",
    "representation_gram": "(Tensor[] d_pooled, Tensor z, Tensor attention, Tensor ptr, Tensor pooled, Tensor value, "
    "Tensor gate, Tensor score_weight, Tensor value_weight, Tensor gate_weight) -> Tensor",
    "task_gradient_statistics": "(Tensor[] grads, Tensor(a!) ema, Tensor correction, Tensor? active, "
    "float beta) -> Tensor",
    "combine_task_gradients": "(Tensor ema, Tensor weights, Tensor(a!) out) -> ()",
}


@pytest.fixture(scope="module")
def ops() -> Any:
    for name, schema in SCHEMAS.items():
        torch.library.define(f"umda_fast_emulated::{name}", schema)
    torch.ops.load_library(str(_host.bindings()))
    return torch.ops.umda_fast_emulated


def test_schemas_are_those_of_umda_fast() -> None:
    for module in pkgutil.iter_modules(umda_fast.ops.__path__):
        importlib.import_module(f"umda_fast.ops.{module.name}")
    compared = 0
    for defined in torch._C._jit_get_all_schemas():
        namespace, _, name = defined.name.partition("::")
        if namespace == "umda_fast" and name in SCHEMAS:
            ours = torch._C.parse_schema(f"umda_fast::{name}{SCHEMAS[name]}")
            assert [str(a.type) for a in ours.arguments] == [str(a.type) for a in defined.arguments], name
            assert [str(r.type) for r in ours.returns] == [str(r.type) for r in defined.returns], name
            compared += 1
    assert compared > 0


def close(got: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """Parity is tested elsewhere; here, that the right arguments reach the right place."""
    for x, y in zip(got, exact, strict=True):
        torch.testing.assert_close(x, y.to(x.dtype), rtol=1e-4, atol=1e-5)


def grads(results: Sequence[Tensor] | Tensor, d: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> Any:
    """Gradients of a reference."""
    results = [results] if isinstance(results, Tensor) else results
    used = [(r, x) for r, x in zip(results, d, strict=True) if x is not None]
    return torch.autograd.grad([r for r, _ in used], leaves, [x for _, x in used])


def rows(*shape: int, seed: int) -> Tensor:
    """Random rows that are not contiguous, not even in the innermost dimension."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 2, generator=g)[..., 0].requires_grad_()


@pytest.fixture(params=["table", "csr"])
def graph(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor | None]:
    g = torch.Generator().manual_seed(0)
    if request.param == "table":
        return torch.randint(-1, 12, (12, 6), generator=g, dtype=torch.int32)[:, ::2], None
    return torch.randint(-1, 12, (30,), generator=g, dtype=torch.int32), torch.tensor(
        [0, 3, 3, 9, 10, 12, 15, 20, 21, 22, 25, 29, 30]
    )


def weights(neighbors: Tensor) -> Tensor:
    """Positive edge values."""
    return torch.rand(neighbors.shape, generator=torch.Generator().manual_seed(5)).requires_grad_()


def test_bag_pool(ops: Any) -> None:
    z, scores, ptr = rows(20, 10, seed=0), rows(20, 3, seed=1), torch.tensor([0, 7, 7, 20])
    results = ops.bag_pool(z, scores, ptr)
    exact = reference_bag_pool.bag_pool(z, scores, ptr)
    close(results, exact)
    # Broadcast, as the gradient of a sum is.
    d_pooled, d_entropy = torch.ones(1).expand(3, 3, 10), torch.ones(1).expand(3, 3)
    got = ops.bag_pool_backward(d_pooled, d_entropy, None, z, scores, ptr, *results)
    close(got, grads(exact, [d_pooled, d_entropy, None], [z, scores]))
    with pytest.raises(RuntimeError, match="scores must have size 20 in dimension 0, got 5"):
        ops.bag_pool(z, scores[:5], ptr)
    with pytest.raises(RuntimeError, match="ptr must be Long"):
        ops.bag_pool(z, scores, ptr.int())


def test_graph_transpose(ops: Any, graph: tuple[Tensor, Tensor | None]) -> None:
    for got, want in zip(ops.graph_transpose(*graph, 12), reference.graph_transpose(*graph, 12), strict=True):
        assert torch.equal(got, want)


def test_edge_cosine(ops: Any, graph: tuple[Tensor, Tensor | None]) -> None:
    r, d = rows(12, 9, seed=0), weights(graph[0])
    exact = reference.edge_cosine(r, *graph)
    close([ops.edge_cosine(r, *graph, None, None)], [exact])
    got = ops.edge_cosine_backward(d, r, *graph, *reference.graph_transpose(*graph, 12))
    close([got], grads(exact, [d], [r]))


def test_neighbor_sum(ops: Any, graph: tuple[Tensor, Tensor | None]) -> None:
    x, weight, d = rows(12, 9, seed=0), weights(graph[0]), rows(12, 9, seed=1)
    exact = reference.neighbor_sum(x, weight, *graph)
    close([ops.neighbor_sum(x, weight, *graph, None, None)], [exact])
    got = ops.neighbor_sum_backward(d, x, weight, *graph, *reference.graph_transpose(*graph, 12))
    close(got, grads(exact, [d], [x, weight]))
    half = ops.neighbor_sum_backward(d.half(), x.half(), weight.half(), *graph, *reference.graph_transpose(*graph, 12))
    assert [t.dtype for t in half] == [torch.float16, torch.float16]
    with pytest.raises(RuntimeError, match="weight must have the shape of neighbors"):
        ops.neighbor_sum(x, weight[:3], *graph, None, None)


def test_smoothness_energy(ops: Any, graph: tuple[Tensor, Tensor | None]) -> None:
    z, weight, d = rows(12, 9, seed=0), weights(graph[0]), torch.tensor(0.7)
    exact = reference.smoothness_energy(z, weight, *graph)
    results = ops.smoothness_energy(z, weight, *graph, None, None)
    close(results, exact)
    transposed = reference.graph_transpose(*graph, 12)
    got = ops.smoothness_energy_backward(d, z, weight, *graph, *transposed, *results)
    close(got, grads(exact, [d, None], [z, weight]))


@pytest.mark.parametrize("self_loop", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_neighbor_attention(ops: Any, graph: tuple[Tensor, Tensor | None], weighted: bool, self_loop: bool) -> None:
    q, k, v = rows(12, 3, 2, 5, seed=0).unbind(1)
    d = rows(12, 2, 5, seed=1)
    log_weight = weights(graph[0]) if weighted else None
    exact = reference.neighbor_attention(q, k, v, log_weight, *graph, self_loop)
    results = ops.neighbor_attention(q, k, v, log_weight, *graph, None, None, self_loop)
    close(results, exact)
    transposed = reference.graph_transpose(*graph, 12)
    got = ops.neighbor_attention_backward(d, q, k, v, log_weight, *graph, *transposed, self_loop, *results)
    leaves = [q, k, v] if log_weight is None else [q, k, v, log_weight]
    close(got[: len(leaves)], grads(exact, [d, None], leaves))
    assert got[3].shape == graph[0].shape


def test_representation_gram(ops: Any) -> None:
    inputs = representation_gram_case("", [5, 0, 7], 6, 3, 4, 2).rounded(torch.float32, "cpu")
    names = ("z", "attention", "ptr", "pooled", "value", "gate", "score_weight", "value_weight", "gate_weight")
    rest = [inputs[name].T.contiguous().T if inputs[name].dim() == 2 else inputs[name] for name in names]
    d_pooled = [d.mT.contiguous().mT for d in inputs["d_pooled"]]
    close([ops.representation_gram(d_pooled, *rest)], [reference_representation_gram(d_pooled, *rest)])
    with pytest.raises(RuntimeError, match="gate must have size 4 in dimension 1, got 2"):
        ops.representation_gram(d_pooled, *rest[:5], rest[5][:, :2], *rest[6:])
    with pytest.raises(RuntimeError, match="d_pooled must hold at most 128"):
        ops.representation_gram(d_pooled * 65, *rest)


@pytest.mark.parametrize("matrix", [True, False])
def test_task_gradients(ops: Any, matrix: bool) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(4, 5), (3,), (2, 2, 2)]
    if matrix:
        grads = [torch.randn(3, 62, generator=g)[:, ::2]]
    else:
        grads = [torch.randn(s, generator=g) for _ in range(3) for s in shapes]
        grads[0] = torch.randn(5, 4, generator=g).T
    ema = torch.randn(3, 40, generator=g)[:, :31]
    correction, active = torch.rand(3, generator=g), torch.tensor([True, False, True])
    exact = ema.clone()
    wanted = reference_task_gradients.task_gradient_statistics(grads, exact, correction, active, 0.8)
    gram = ops.task_gradient_statistics(grads, ema, correction, active, 0.8)
    close([gram, ema], [wanted, exact])
    out, weight = torch.empty(31), torch.rand(3, generator=g)
    assert ops.combine_task_gradients(ema, weight, out) is None
    close([out], [weight @ exact])
    with pytest.raises(RuntimeError, match="grads"):
        ops.task_gradient_statistics(grads[:1] * 2, ema, correction, active, 0.8)
