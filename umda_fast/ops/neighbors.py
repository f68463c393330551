"""Message passing over a graph of instances, and its smoothness energy (docs/model.md, section 2)."""

from typing import Any

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.ops.graph import NeighborGraph
from umda_fast.reference import neighbors as reference

#: The graph as every schema takes it.
_GRAPH = "Tensor neighbors, Tensor? indptr, Tensor? t_ptr, Tensor? t_edge"
_GRAPH_BACKWARD = "Tensor neighbors, Tensor? indptr, Tensor t_ptr, Tensor t_edge"


def edge_cosine(r: Tensor, graph: NeighborGraph, *, backend: str | None = None) -> Tensor:
    """Cosine similarity ``cos(r_i, r_j)`` of every edge (i, j), with a gradient to r.

    Args:
        r: [N, d], float32, bfloat16 or float16 (float64 on the reference).
        graph: N instances.
        backend: see `umda_fast.set_backend`.

    Returns:
        neighbors' shape, float32 (float64 for float64); 0 where absent. Norms are clamped at 1e-8.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _check_nodes(r, "r", ["N", "d"], graph)
    chosen = resolve("edge_cosine", r, backend, (r,))
    if chosen == "reference":
        return reference.edge_cosine(r, graph.neighbors, graph.indptr)
    out: Tensor = _library.op(native("edge_cosine", chosen))(r, *_tensors(graph, r))
    return out


def neighbor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    graph: NeighborGraph,
    log_weight: Tensor | None = None,
    *,
    self_loop: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Every instance attends to its neighbours (and itself): one softmax per instance and head.

    ``out_i = sum_j alpha[i,j] v_j``, ``alpha[i,j] = softmax_{j in N(i) + self}(q_i.k_j/sqrt(Dh) + log_weight[i,j])``,
    in the manner of Velickovic et al. (2018) with the dot product of Vaswani et al. (2017). Nothing of the
    size [N, k, H, Dh] is stored by native kernels, forward or backward.

    Args:
        q, k, v: [N, H, Dh], float32, bfloat16 or float16 (float64 on the reference).
        graph: N instances.
        log_weight: float32 (float64 for float64), neighbors' shape, or None for zeros. The self loop has 0.
        self_loop: whether an instance attends to itself as well.
        backend: see `umda_fast.set_backend`.

    Returns:
        [N, H, Dh] in q's dtype; 0 for an instance with nothing to attend to.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _check_nodes(q, "q", ["N", "H", "Dh"], graph)
    _validate.tensor(k, "k", q.shape, like=q, like_name="q")
    _validate.tensor(v, "v", q.shape, like=q, like_name="q")
    if log_weight is not None:
        _check_edges(log_weight, "log_weight", graph, q)
    chosen = resolve("neighbor_attention", q, backend, (q, k, v, log_weight))
    if chosen == "reference":
        return reference.neighbor_attention(q, k, v, log_weight, graph.neighbors, graph.indptr, self_loop)[0]
    tensors = _tensors(graph, q, k, v, log_weight)
    op = _library.op(native("neighbor_attention", chosen))
    out: Tensor = op(q, k, v, log_weight, *tensors, self_loop)[0]
    return out


def neighbor_sum(x: Tensor, graph: NeighborGraph, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """``sum_j weight[i,j] x_j`` over the neighbours j of every instance i.

    Args:
        x: [N, D], float32, bfloat16 or float16 (float64 on the reference).
        graph: N instances.
        weight: float32 (float64 for float64), neighbors' shape; values of absent edges are not read.
        backend: see `umda_fast.set_backend`.

    Returns:
        [N, D] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _check_nodes(x, "x", ["N", "D"], graph)
    _check_edges(weight, "weight", graph, x)
    chosen = resolve("neighbor_sum", x, backend, (x, weight))
    if chosen == "reference":
        return reference.neighbor_sum(x, weight, graph.neighbors, graph.indptr)
    out: Tensor = _library.op(native("neighbor_sum", chosen))(x, weight, *_tensors(graph, x, weight))
    return out


def smoothness_energy(
    z: Tensor, graph: NeighborGraph, weight: Tensor, *, backend: str | None = None
) -> Tensor:
    """``sum_E w[i,j] ||z_i - z_j||^2 / (D sum_E w)``: how much neighbours differ, per feature.

    Args:
        z: [N, D], float32, bfloat16 or float16 (float64 on the reference).
        graph: N instances.
        weight: float32 (float64 for float64), neighbors' shape; values of absent edges are not read.
        backend: see `umda_fast.set_backend`.

    Returns:
        A scalar, float32 (float64 for float64); 0 where the weights sum to 0.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _check_nodes(z, "z", ["N", "D"], graph)
    _check_edges(weight, "weight", graph, z)
    chosen = resolve("smoothness_energy", z, backend, (z, weight))
    if chosen == "reference":
        return reference.smoothness_energy(z, weight, graph.neighbors, graph.indptr)[0]
    tensors = _tensors(graph, z, weight)
    energy: Tensor = _library.op(native("smoothness_energy", chosen))(z, weight, *tensors)[0]
    return energy


def _check_nodes(x: Tensor, name: str, shape: list[int | str], graph: NeighborGraph) -> None:
    if not isinstance(graph, NeighborGraph):
        raise TypeError(f"graph must be a NeighborGraph, got {type(graph).__name__}")
    graph.check()
    _validate.tensor(x, name, [graph.num_nodes, *shape[1:]], dtype=_validate.FLOATS)
    if x.device != graph.neighbors.device:
        raise ValueError(f"graph must be on the device of {name}, {x.device}, got {graph.neighbors.device}")


def _check_edges(values: Tensor, name: str, graph: NeighborGraph, x: Tensor) -> None:
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    _validate.tensor(values, name, graph.neighbors.shape, dtype=wanted, like=x, like_name="the instances")


def _tensors(graph: NeighborGraph, *inputs: Tensor | None) -> tuple[Tensor | None, ...]:
    """The graph as an operation takes it, with its transpose where a backward pass will need it."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return graph.neighbors, graph.indptr, *graph.transpose()
    return graph.neighbors, graph.indptr, None, None


def _transposed(
    x: Tensor, neighbors: Tensor, indptr: Tensor | None, t_ptr: Tensor | None, t_edge: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The graph with a transpose, for a caller of ``torch.ops`` who passed none."""
    if t_ptr is None or t_edge is None:
        t_ptr, t_edge = NeighborGraph(neighbors, indptr=indptr, trusted=True).transpose()
    return neighbors, indptr, t_ptr, t_edge


# --- edge_cosine


def _cosine_fake(
    r: Tensor, neighbors: Tensor, indptr: Tensor | None, t_ptr: Tensor | None, t_edge: Tensor | None
) -> Tensor:
    return r.new_empty(neighbors.shape, dtype=_library.wide(r))


def _cosine_fake_backward(
    d_cos: Tensor, r: Tensor, neighbors: Tensor, indptr: Tensor | None, t_ptr: Tensor, t_edge: Tensor
) -> Tensor:
    return r.new_empty(r.shape)


def _save_inputs(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _save_all(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])  # saved for backward, no result


def _cosine_backward(op: Any, ctx: _library.Context, d_cos: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_cos is None:
        return (None,) * 5
    r, *graph = ctx.saved_tensors
    return op(d_cos, r, *_transposed(r, *graph)), None, None, None, None


_library.define("edge_cosine", f"(Tensor r, {_GRAPH}) -> Tensor", _cosine_fake)
_library.define(
    "edge_cosine_backward", f"(Tensor d_cos, Tensor r, {_GRAPH_BACKWARD}) -> Tensor", _cosine_fake_backward
)
_library.differentiable("edge_cosine", _save_inputs, _cosine_backward)


# --- neighbor_attention


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor | None, neighbors: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=_library.wide(q))


def _attention_fake_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_weight: Tensor | None,
    neighbors: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_log_weight = q.new_empty(neighbors.shape, dtype=_library.wide(q))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_log_weight


def _attention_setup(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.self_loop = inputs
    _save_all(ctx, tuple(tensors), output)


def _attention_backward(
    op: Any, ctx: _library.Context, d_out: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 9
    q, k, v, log_weight, *graph, out, lse = ctx.saved_tensors
    dq, dk, dv, d_log_weight = op(
        d_out, q, k, v, log_weight, *_transposed(q, *graph), ctx.self_loop, out, lse
    )
    return dq, dk, dv, None if log_weight is None else d_log_weight, None, None, None, None, None


_library.define(
    "neighbor_attention",
    f"(Tensor q, Tensor k, Tensor v, Tensor? log_weight, {_GRAPH}, bool self_loop) -> (Tensor out, Tensor lse)",
    _attention_fake,
)
_library.define(
    "neighbor_attention_backward",
    f"(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor? log_weight, {_GRAPH_BACKWARD}, bool self_loop, "
    "Tensor out, Tensor lse) -> (Tensor dq, Tensor dk, Tensor dv, Tensor d_log_weight)",
    _attention_fake_backward,
)
_library.differentiable("neighbor_attention", _attention_setup, _attention_backward)


# --- neighbor_sum


def _sum_fake(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _sum_fake_backward(d_out: Tensor, x: Tensor, weight: Tensor, *graph: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _sum_backward(op: Any, ctx: _library.Context, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 6
    x, weight, *graph = ctx.saved_tensors
    return *op(d_out, x, weight, *_transposed(x, *graph)), None, None, None, None


_library.define("neighbor_sum", f"(Tensor x, Tensor weight, {_GRAPH}) -> Tensor", _sum_fake)
_library.define(
    "neighbor_sum_backward",
    f"(Tensor d_out, Tensor x, Tensor weight, {_GRAPH_BACKWARD}) -> (Tensor dx, Tensor d_weight)",
    _sum_fake_backward,
)
_library.differentiable("neighbor_sum", _save_inputs, _sum_backward)


# --- smoothness_energy


def _energy_fake(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    energy = z.new_empty((), dtype=_library.wide(z))
    return energy, torch.empty_like(energy)


def _energy_fake_backward(d_energy: Tensor, z: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.shape), weight.new_empty(weight.shape)


def _energy_backward(
    op: Any, ctx: _library.Context, d_energy: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if d_energy is None:
        return (None,) * 6
    z, weight, *graph, energy, weight_sum = ctx.saved_tensors
    dz, d_weight = op(d_energy, z, weight, *_transposed(z, *graph), energy, weight_sum)
    return dz, d_weight, None, None, None, None


_library.define(
    "smoothness_energy",
    f"(Tensor z, Tensor weight, {_GRAPH}) -> (Tensor energy, Tensor weight_sum)",
    _energy_fake,
)
_library.define(
    "smoothness_energy_backward",
    f"(Tensor d_energy, Tensor z, Tensor weight, {_GRAPH_BACKWARD}, Tensor energy, Tensor weight_sum) -> "
    "(Tensor dz, Tensor d_weight)",
    _energy_fake_backward,
)
_library.differentiable("smoothness_energy", _save_all, _energy_backward)
