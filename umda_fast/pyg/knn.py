"""Nearest neighbours as torch_geometric's ``edge_index``."""

import torch
from torch import Tensor

from umda_fast.ops import knn_graph
from umda_fast.pyg._index import to_ptr

FLOWS = ("source_to_target", "target_to_source")


def knn_edge_index(
    x: Tensor,
    k: int,
    batch: Tensor | None = None,
    *,
    ptr: Tensor | None = None,
    metric: str = "euclidean",
    flow: str = "source_to_target",
    batch_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Edges from the k nearest other nodes of every node's graph, as ``torch_geometric.nn.knn_graph`` has them.

    Exact, best first, ties to the lower index; no n x n block in memory.

    Args:
        x: [N, d], float32, bfloat16 or float16 (float64 on the reference).
        k: neighbours per node, at least 1; a graph of n nodes gives min(k, n - 1).
        batch: int64 [N], sorted: the graph of every node. None with no ``ptr``: one graph.
        ptr: int64 [B+1], offsets of the graphs, in place of ``batch``.
        metric: ``"euclidean"`` or ``"cosine"``.
        flow: ``"source_to_target"``: rows are (neighbour, node); ``"target_to_source"``: (node, neighbour).
        batch_size: B, where ``batch`` may lack the last graphs.
        backend: see `umda_fast.set_backend`.

    Returns:
        int64 [2, E], the edges of a node together. E depends on the data only through the sizes of the graphs.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; ``batch`` not sorted; both
            ``batch`` and ``ptr``; an unknown metric or flow.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    if flow not in FLOWS:
        raise ValueError(f"flow must be {' or '.join(FLOWS)}, got {flow!r}")
    if ptr is not None and batch is not None:
        raise ValueError("batch or ptr must be given, got both")
    if ptr is None:
        if batch is None:
            batch = x.new_zeros(x.shape[0], dtype=torch.int64)
        ptr = to_ptr(batch, "batch", x.shape[0], batch_size, "batch_size")
    edge_index, _ = knn_graph(x, ptr, k, metric=metric, backend=backend).to_edge_index()
    return edge_index if flow == "source_to_target" else edge_index.flip(0)
