"""Exact k-nearest-neighbour graph inside ragged bags (docs/model.md, section 2)."""

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.ops.graph import NeighborGraph
from umda_fast.reference.knn import knn as reference

METRICS = ("cosine", "euclidean")


def knn_graph(
    x: Tensor, ptr: Tensor, k: int, *, metric: str = "cosine", backend: str | None = None
) -> NeighborGraph:
    """The k most similar other instances of every instance's bag: exact, best first, ties to the lower index.

    Args:
        x: [N, d], float32, bfloat16 or float16 (float64 on the reference).
        ptr: int64 [B+1]; bag b owns instances ``ptr[b]:ptr[b+1]``.
        k: neighbours per instance, at least 1.
        metric: ``"cosine"``, or ``"euclidean"``: minus the squared distance.
        backend: see `umda_fast.set_backend`.

    Returns:
        A graph with ``neighbors`` int32 [N, k], -1 where the bag has fewer than k + 1 instances, and
        ``similarity`` float32 [N, k], -inf there. The choice carries no gradient; `edge_cosine` does.
        Memory is O(N k) beyond x. A NaN similarity ranks after every number.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; k < 1; an unknown metric; a
            ``ptr`` that does not start at 0, decreases or does not end at N.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(x, "x", ["N", "d"], dtype=_validate.FLOATS)
    _validate.in_range(x.shape[1], "d (x.shape[1])", 1)
    _validate.offsets(ptr, "ptr", x.shape[0], "N", like=x)
    _validate.in_range(k, "k", 1)
    if metric not in METRICS:
        raise ValueError(f"metric must be {' or '.join(METRICS)}, got {metric!r}")
    chosen = resolve("knn", x, backend)
    x = x.detach()
    if chosen == "reference":
        neighbors, similarity = reference(x, ptr, k, metric)
    else:
        neighbors, similarity = _library.op(native("knn", chosen))(x, ptr, k, metric)
    return NeighborGraph(neighbors, similarity, trusted=True)


def _fake(x: Tensor, ptr: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    similarity = x.new_empty(x.shape[0], k, dtype=_library.wide(x))
    return similarity.new_empty(similarity.shape, dtype=torch.int32), similarity


_library.define(
    "knn",
    "(Tensor x, Tensor ptr, int k, str metric) -> (Tensor neighbors, Tensor similarity)",
    _fake,
    triton="knn",
)
