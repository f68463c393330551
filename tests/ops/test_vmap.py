"""Batching rules: vmapped calls and per-task gradients against the same calls one after another."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from umda_fast import ops
from umda_fast.ops import NeighborGraph, _batching, _library

pytestmark = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))

PTR = torch.tensor([0, 4, 4, 9, 10])
NODES = 10


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def graph_of(form: str) -> NeighborGraph:
    table = ops.knn_graph(normal(NODES, 5, seed=1), PTR, 3)
    return table if form == "table" else table.symmetrize()


def arguments(form: str) -> dict[str, tuple[Any, ...]]:
    """Arguments of every operation; each pair of forms has the optional ones given in one and None in the other."""
    graph = graph_of(form)
    tables = (graph.neighbors, graph.indptr, *graph.transpose())
    given = form == "csr"
    x, z = normal(NODES, 6, seed=2), normal(NODES, 6, seed=3)
    q, k, v = (normal(NODES, 2, 8, seed=s) for s in (4, 5, 6))
    weight = normal(*graph.neighbors.shape, seed=7).abs()
    log_weight = weight.log() if given else None
    scores = normal(NODES, 3, seed=8)
    views = tuple(normal(NODES, 3, 2, 8, seed=s) for s in (9, 10, 11))
    gate = normal(NODES, 3, 2, seed=12)
    bias = normal(2, 3, 3, seed=13) if given else None
    mask = torch.arange(NODES * 3).reshape(NODES, 3) % 4 > 0 if given else None
    cross = (*views, gate, bias, mask)
    vectors = [normal(6, seed=s) if given else None for s in (14, 15, 16, 17)]
    fused = views[0].flatten(2), gate[..., 0], views[1].flatten(2) if given else None, mask

    def grads(name: str, forward: tuple[Any, ...], optional: bool) -> tuple[Any, ...]:
        outputs = _library.op(name)(*forward)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        parts = [normal(*x.shape, seed=20 + i).to(x.dtype) for i, x in enumerate(outputs)]
        return tuple(None if optional and not given and i == 1 else part for i, part in enumerate(parts))

    found: dict[str, tuple[Any, ...]] = {
        "bag_pool": (z, scores, PTR),
        "cross_view": cross,
        "dropout_add_norm": (x, *vectors[:2], z, *vectors[2:], torch.tensor(7), 20_000, 1e-5),
        "edge_cosine": (x, *tables),
        "gelu_dropout": (x, q.flatten(1)[0, :6] if given else None, torch.tensor(7), 20_000),
        "graph_transpose": (graph.neighbors, graph.indptr, NODES),
        "graph_order": (graph.neighbors, graph.indptr, *graph.transpose()),
        "knn": (x, PTR, 3, "cosine"),
        "neighbor_attention": (q, k, v, log_weight, *tables, given),
        "neighbor_sum": (x, weight, *tables),
        "smoothness_energy": (z, weight, *tables),
        "view_fusion": fused,
    }
    for name, optional, saves, gradients in (
        ("bag_pool", True, True, 3),
        ("cross_view", True, False, 3),
        ("edge_cosine", False, False, 1),
        ("gelu_dropout", False, False, 1),
        ("neighbor_attention", False, True, 1),
        ("neighbor_sum", False, False, 1),
        ("smoothness_energy", False, True, 1),
    ):
        forward = found[name]
        saved = tuple(_library.op(name)(*forward)) if saves else ()
        found[f"{name}_backward"] = (*grads(name, forward, optional)[:gradients], *forward, *saved)
    _, _, mean, _, count, _, _, rest = _library.op("view_fusion")(*fused)
    d_z, d_beta, d_mean, d_variance, _, d_cosine_sum, _, _ = grads("view_fusion", fused, True)
    total, _, *moments = _library.op("dropout_add_norm")(*found["dropout_add_norm"])
    found["dropout_add_norm_backward"] = (
        *(normal(NODES, 6, seed=18), normal(NODES, 6, seed=19) if given else None),
        *(x, *vectors[:2], total, vectors[2], *moments, torch.tensor(7), 20_000),
    )
    found["view_fusion_backward"] = (d_z, d_beta, d_mean, d_variance, d_cosine_sum, *fused, mean, rest, count)
    return found


NAMES = sorted(arguments("table"))


def batched(x: Tensor, dim: int, size: int, seed: int) -> Tensor:
    """``size`` variants of x along a new dimension; offsets and indices are the same in each."""
    copies = torch.stack([x] * size, dim)
    if x.is_floating_point():
        scale = 1 + normal(size, seed=seed).abs()
        copies = copies * scale.reshape([size if i == dim else 1 for i in range(copies.dim())])
    return copies


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else tuple(value)


@pytest.mark.parametrize("form", ["table", "csr"])
@pytest.mark.parametrize("name", NAMES)
def test_same_as_one_after_another(name: str, form: str) -> None:
    args = arguments(form)[name]
    op, size = _library.op(name), 3
    tensors = [i for i, x in enumerate(args) if isinstance(x, Tensor)]
    # All together, each alone, and each combination of dimensions that the counter below runs into.
    for chosen in [set(tensors), *({i} for i in tensors), set(tensors[::2]), set(tensors[1::2]) or {tensors[0]}]:
        dims = [i % (args[i].dim() + 1) if i in chosen else None for i in range(len(args))]
        inputs = [
            x if dim is None else batched(x, dim, size, 30 + i)
            for i, (x, dim) in enumerate(zip(args, dims, strict=True))
        ]
        results = as_tuple(torch.vmap(lambda *a: op(*a), in_dims=tuple(dims))(*inputs))
        for b in range(size):
            one = [x if dim is None else x.select(dim, b).contiguous() for x, dim in zip(inputs, dims, strict=True)]
            for result, expected in zip(results, as_tuple(op(*one)), strict=True):
                assert result.dtype == expected.dtype
                torch.testing.assert_close(result[b], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("form", ["table", "csr"])
@pytest.mark.parametrize("name", [name for name in NAMES if f"{name}_backward" in NAMES])
def test_gradients_through_a_batched_forward(name: str, form: str) -> None:
    args = arguments(form)[name]
    op, size = _library.op(name), 3
    leaves = {
        i: batched(x, 0, size, 50 + i).requires_grad_()
        for i, x in enumerate(args)
        if isinstance(x, Tensor) and x.is_floating_point()
    }
    dims = tuple(0 if i in leaves else None for i in range(len(args)))

    def loss(*args: Any) -> Tensor:
        return as_tuple(op(*args))[0].square().sum()

    together = torch.vmap(loss, in_dims=dims)(*(leaves.get(i, x) for i, x in enumerate(args))).sum()
    found = torch.autograd.grad(together, list(leaves.values()))
    for b in range(size):
        one = {i: x.detach()[b].requires_grad_() for i, x in leaves.items()}
        expected = torch.autograd.grad(loss(*(one.get(i, x) for i, x in enumerate(args))), list(one.values()))
        for gradient, alone in zip(found, expected, strict=True):
            assert torch.equal(gradient[b], alone)


@pytest.mark.parametrize("name", NAMES)
def test_empty_batch(name: str) -> None:
    args = arguments("csr")[name]
    dims = [0 if isinstance(x, Tensor) else None for x in args]
    inputs = [x if dim is None else x.new_empty((0, *x.shape)) for x, dim in zip(args, dims, strict=True)]
    results = as_tuple(torch.vmap(_library.op(name), in_dims=tuple(dims))(*inputs))
    for result, one in zip(results, as_tuple(_library.op(name)(*args)), strict=True):
        assert result.shape == (0, *one.shape)
        assert result.dtype == one.dtype


def test_every_operation_has_a_rule() -> None:
    listed = {f"{name}{suffix}" for name in _batching._OPERATIONS for suffix in ("", "_triton")}
    defined = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("umda_fast::")
    }
    # They make no gradients.
    statistics = {"combine_task_gradients", "representation_gram", "task_gradient_statistics"}
    assert defined - listed == statistics | {"linear_weight_gradient"}
    for name in sorted(defined & listed):
        assert _library.has_kernel(name, "FuncTorchBatched")


class Network(nn.Module):
    """A few layers shared by the tasks, one after the other through every differentiable operation."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.packed = nn.Linear(6, 3 * 16 + 2)
        self.project = nn.Linear(16, 48)
        self.scores = nn.Linear(16, tasks, bias=False)  # it would cancel in the softmax
        self.heads = nn.ModuleList(nn.Linear(16, 1) for _ in range(tasks))

    def features(self, views: Tensor, graph: NeighborGraph) -> Tensor:
        """Pooled representations [B, T, 16], and what the penalties add, spread over them."""
        backend = "cpp" if views.dtype == torch.float32 else "reference"
        parts = self.packed(views).split([16, 16, 16, 2], -1)
        q, k, v = (x.unflatten(-1, (2, 8)) for x in parts[:3])
        crossed = ops.cross_view_attention(q, k, v, parts[3], backend=backend)
        z = crossed.out.flatten(2).mean(1)
        cosine = ops.edge_cosine(z, graph, backend=backend)
        q, k, v = self.project(z).unflatten(-1, (3, 2, 8)).unbind(1)
        z = z + ops.neighbor_attention(q, k, v, graph, cosine, backend=backend).flatten(1)
        z = z + ops.neighbor_sum(z, graph, cosine.exp(), backend=backend)
        energy = ops.smoothness_energy(z, graph, cosine.exp(), backend=backend)
        pool = ops.bag_attention_pool(z, self.scores(z), PTR, backend=backend)
        return pool.pooled + pool.entropy[:, :, None] + energy + crossed.entropy.mean()

    def losses(self, pooled: Tensor) -> list[Tensor]:
        return [(head(pooled[:, t]) - t).square().mean() for t, head in enumerate(self.heads)]

    def shared(self) -> list[nn.Parameter]:
        return [p for module in (self.packed, self.project, self.scores) for p in module.parameters()]


TASKS = 3
VIEWS = normal(NODES, 3, 6, seed=40)


def sequential(network: Network, graph: NeighborGraph, views: Tensor = VIEWS) -> list[list[Tensor]]:
    """Per task, the gradients of the shared parameters."""
    losses = network.losses(network.features(views, graph))
    return [list(torch.autograd.grad(loss, network.shared(), retain_graph=True)) for loss in losses]


def check(found: Callable[[int, int], Tensor], network: Network, graph: NeighborGraph) -> None:
    """Each task's whole gradient: error against float64 at most 3 times that of sequential ones, or 4 ulp."""
    exact = sequential(copy.deepcopy(network).double(), graph, VIEWS.double())
    for t, row in enumerate(sequential(network, graph)):
        mine = [found(t, i) for i in range(len(row))]
        assert [x.shape for x in mine] == [x.shape for x in row]
        mine_flat, row_flat, truth = (torch.cat([x.flatten().double() for x in xs]) for xs in (mine, row, exact[t]))
        allowed = max(3 * float((row_flat - truth).norm()), 4 * torch.finfo(torch.float32).eps * float(truth.norm()))
        assert float((mine_flat - truth).norm()) <= allowed


@pytest.mark.parametrize("form", ["table", "csr"])
def test_is_grads_batched(form: str) -> None:
    network, graph = Network(TASKS), graph_of(form)
    shared = network.shared()
    losses = torch.stack(network.losses(network.features(VIEWS, graph)))
    rows = torch.autograd.grad(losses, shared, torch.eye(TASKS), is_grads_batched=True, retain_graph=True)
    check(lambda t, i: rows[i][t], network, graph)
    vmapped = torch.func.vmap(lambda g: torch.autograd.grad(losses, shared, g, retain_graph=True))(torch.eye(TASKS))
    check(lambda t, i: vmapped[i][t], network, graph)


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("form", ["table", "csr"])
def test_torchjd(form: str, chunk: int | None) -> None:
    autojac = pytest.importorskip("torchjd.autojac")
    network, graph = Network(TASKS), graph_of(form)
    autojac.backward(network.losses(network.features(VIEWS, graph)), inputs=network.shared(), parallel_chunk_size=chunk)
    jacobians = [p.jac for p in network.shared()]
    check(lambda t, i: jacobians[i][t], network, graph)

    network.zero_grad()
    for p in network.parameters():
        if hasattr(p, "jac"):
            del p.jac
    features = network.features(VIEWS, graph)
    autojac.mtl_backward(network.losses(features), features=features, parallel_chunk_size=chunk)
    jacobians = [p.jac for p in network.shared()]
    check(lambda t, i: jacobians[i][t], network, graph)
    own = [list(head.parameters()) for head in network.heads]
    losses = network.losses(network.features(VIEWS, graph))
    for loss, parameters in zip(losses, own, strict=True):
        for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True), strict=True):
            torch.testing.assert_close(p.grad, gradient)
