"""What bad input gets (spec/ops.md): an error that names the argument, before any kernel runs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from umda_fast.ops import (
    NeighborGraph,
    _library,
    _validate,
    bag_attention_pool,
    combine_task_gradients,
    cross_view_attention,
    cross_view_token_attention,
    edge_cosine,
    knn_graph,
    linear_weight_gradient,
    neighbor_attention,
    neighbor_sum,
    representation_gram,
    smoothness_energy,
    task_gradient_statistics,
)

Call = Callable[[], object]


@pytest.fixture(autouse=True)
def no_kernel_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def ran(name: str) -> object:
        raise AssertionError(f"the kernel of {name} ran")

    monkeypatch.setattr(_library, "op", ran)


def t(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def table(rows: list[list[int]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


def ptr(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


GRAPH = NeighborGraph(table([[1, -1], [0, 1], [2, 0]]))
HALF, DOUBLE = torch.float16, torch.float64
X = t(3, 4)
Q = t(2, 3, 2, 8)
G = t(2, 3, 2)
TOKENS = t(5, 2, 8)
VIEWS = torch.tensor([0, 1], dtype=torch.int32)
NO_VIEW = torch.tensor([[True, False, True], [False] * 3])
META = X.to("meta")


def tokens(
    q: Tensor = TOKENS,
    gate: Tensor | None = None,
    cu_tokens: Tensor | None = None,
    cu_segments: Tensor | None = None,
    view: Tensor = VIEWS,
    num_views: int = 2,
    bias: Tensor | None = None,
) -> object:
    gate = q[:, :, 0] if gate is None else gate
    cu_tokens = ptr(0, 2, 5) if cu_tokens is None else cu_tokens
    cu_segments = ptr(0, 2) if cu_segments is None else cu_segments
    return cross_view_token_attention(q, q, q, gate, cu_tokens, cu_segments, view, num_views, bias=bias)


def gram_arguments(**changed: Tensor) -> list[Tensor]:
    """All but the gradients, for one bag of three instances, D = 4, T = 2, H = 5."""
    arguments = {"z": X, "attention": t(3, 2), "ptr": ptr(0, 3), "pooled": t(1, 2, 4)}
    arguments |= {"value": t(3, 5), "gate": t(3, 5)}
    arguments |= {"score_weight": t(2, 5), "value_weight": t(5, 4), "gate_weight": t(5, 4)}
    return list((arguments | changed).values())


CASES: dict[str, tuple[type[Exception], str, Call]] = {
    # bag_pool
    "z is no tensor": (
        TypeError,
        "z must be a torch.Tensor, got list",
        lambda: bag_attention_pool([1.0], X, ptr(0, 3)),
    ),  # type: ignore[arg-type]
    "rank": (ValueError, r"z must have shape \[N, D\], got \[3\]", lambda: bag_attention_pool(t(3), X, ptr(0, 3))),
    "sizes": (
        ValueError,
        r"scores must have shape \[3, T\], got \[4",
        lambda: bag_attention_pool(X, t(4, 2), ptr(0, 3)),
    ),
    "integers": (TypeError, "z must be float32 or", lambda: bag_attention_pool(X.int(), X, ptr(0, 3))),
    "devices": (
        ValueError,
        "scores must be on the device of z, cpu, got meta",
        lambda: bag_attention_pool(X, META, ptr(0, 3)),
    ),
    "ptr int32": (
        TypeError,
        "ptr must be int64, got int32",
        lambda: bag_attention_pool(X, X, ptr(0, 3, dtype=torch.int32)),
    ),
    "ptr rank": (ValueError, "ptr must have shape", lambda: bag_attention_pool(X, X, ptr(0, 3)[None])),
    "ptr empty": (ValueError, "ptr must have shape", lambda: bag_attention_pool(X, X, ptr())),
    "ptr start": (ValueError, "ptr must start at 0, got 1", lambda: bag_attention_pool(X, X, ptr(1, 3))),
    "ptr falls": (ValueError, "ptr must", lambda: bag_attention_pool(X, X, ptr(0, 2, 1, 3))),
    "ptr end": (ValueError, "ptr must end at N = 3, got 2", lambda: bag_attention_pool(X, X, ptr(0, 2))),
    # knn
    "knn rank": (ValueError, "x must have shape", lambda: knn_graph(t(3), ptr(0, 3), 1)),
    "knn ptr": (ValueError, "ptr must end at N = 3, got 4", lambda: knn_graph(X, ptr(0, 4), 1)),
    "k of 0": (ValueError, "k must be at least 1, got 0", lambda: knn_graph(X, ptr(0, 3), 0)),
    "k of 1.5": (TypeError, "k must be an int, got float", lambda: knn_graph(X, ptr(0, 3), 1.5)),  # type: ignore[arg-type]
    "metric": (
        ValueError,
        "metric must be cosine or euclidean, got 'dot'",
        lambda: knn_graph(X, ptr(0, 3), 1, metric="dot"),
    ),
    # cross_view
    "view rank": (ValueError, r"q must have shape \[N, V, H, Dh\]", lambda: cross_view_attention(X, X, X, X)),
    "k differs": (ValueError, "k must have shape", lambda: cross_view_attention(Q, Q[:, :2], Q, G)),
    "v differs": (ValueError, "v must have shape", lambda: cross_view_attention(Q, Q, Q[..., :4], G)),
    "dtype mix": (
        TypeError,
        "k must have the dtype of q, float32, got float16",
        lambda: cross_view_attention(Q, Q.half(), Q, G),
    ),
    "gate": (ValueError, "gate_logits must have shape", lambda: cross_view_attention(Q, Q, Q, G[:1])),
    "17 views": (
        ValueError,
        r"V .* must be in 1..16, got 17",
        lambda: cross_view_attention(*[t(1, 17, 1, 8)] * 3, t(1, 17, 1)),
    ),
    "no view at all": (
        ValueError,
        r"V .* must be in 1..16, got 0",
        lambda: cross_view_attention(*[t(1, 0, 1, 8)] * 3, t(1, 0, 1)),
    ),
    "Dh of 7": (
        ValueError,
        r"Dh .* must be in 8..256, got 7",
        lambda: cross_view_attention(*[t(1, 2, 1, 7)] * 3, t(1, 2, 1)),
    ),
    "Dh of 257": (
        ValueError,
        r"Dh .* 8..256, got 257",
        lambda: cross_view_attention(*[t(1, 2, 1, 257)] * 3, t(1, 2, 1)),
    ),
    "bias shape": (ValueError, "bias must have shape", lambda: cross_view_attention(Q, Q, Q, G, bias=t(2, 2, 2))),
    "bias dtype": (
        TypeError,
        "bias must be float32, got float16",
        lambda: cross_view_attention(Q, Q, Q, G, bias=t(2, 3, 3, dtype=HALF)),
    ),
    "mask dtype": (TypeError, "mask must be bool", lambda: cross_view_attention(Q, Q, Q, G, mask=t(2, 3))),
    "mask shape": (ValueError, "mask must have shape", lambda: cross_view_attention(Q, Q, Q, G, mask=t(3, 2).bool())),
    "an instance with no view": (
        ValueError,
        "mask must .* instance 1 has none",
        lambda: cross_view_attention(Q, Q, Q, G, mask=NO_VIEW),
    ),
    # cross_view_tokens
    "token rank": (ValueError, "q must have shape", lambda: tokens(Q, gate=G)),
    "token gate": (ValueError, "gate_logits must have shape", lambda: tokens(gate=t(4, 2))),
    "cu_tokens": (ValueError, "cu_tokens must end at L = 5, got 4", lambda: tokens(cu_tokens=ptr(0, 2, 4))),
    "cu_segments": (ValueError, "cu_segments must end at S = 2, got 3", lambda: tokens(cu_segments=ptr(0, 3))),
    "views int64": (TypeError, "view_of_segment must be int32", lambda: tokens(view=VIEWS.long())),
    "views too few": (ValueError, "view_of_segment must have shape", lambda: tokens(view=VIEWS[:1])),
    "view of 2": (
        ValueError,
        r"view_of_segment must be in 0..1, got view_of_segment\[1\] = 2",
        lambda: tokens(view=VIEWS * 2),
    ),
    "view of -1": (ValueError, r"view_of_segment\[0\] = -1", lambda: tokens(view=VIEWS - 1)),
    "17 token views": (ValueError, "num_views must be in 1..16, got 17", lambda: tokens(num_views=17)),
    "token bias": (ValueError, "bias must have shape", lambda: tokens(bias=t(2, 3, 3))),
    # graphs
    "neighbors int64": (TypeError, "neighbors must be int32", lambda: NeighborGraph(table([[0]]).long())),
    "neighbor of 3": (
        ValueError,
        r"neighbors must be in -1..2, got neighbors\[1, 0\] = 3",
        lambda: NeighborGraph(table([[0], [3], [1]])),
    ),
    "neighbor of -2": (ValueError, r"neighbors\[0, 0\] = -2", lambda: NeighborGraph(table([[-2]]))),
    "indptr": (
        ValueError,
        "indptr must end at E = 2, got 1",
        lambda: NeighborGraph(table([[0, 0]])[0], indptr=ptr(0, 1)),
    ),
    "CSR rank": (ValueError, "neighbors must have shape", lambda: NeighborGraph(table([[0, 0]]), indptr=ptr(0, 2))),
    "similarity": (ValueError, "similarity must have shape", lambda: NeighborGraph(table([[0]]), t(2, 2))),
    "edge_index": (
        ValueError,
        "edge_index must be in 0..1",
        lambda: NeighborGraph.from_edge_index(torch.tensor([[0], [2]]), 2),
    ),
    "edge_index rank": (ValueError, "edge_index must have shape", lambda: NeighborGraph.from_edge_index(ptr(0, 1), 2)),
    "union": (ValueError, "other must have 3 nodes", lambda: GRAPH.union(NeighborGraph(table([[0]])))),
    "no graph": (TypeError, "graph must be a NeighborGraph, got Tensor", lambda: edge_cosine(X, X)),  # type: ignore[arg-type]
    "nodes": (ValueError, r"r must have shape \[3, d\]", lambda: edge_cosine(t(4, 2), GRAPH)),
    "graph device": (ValueError, "graph must be on the device of r, meta, got cpu", lambda: edge_cosine(META, GRAPH)),
    "attention k": (
        ValueError,
        "k must have shape",
        lambda: neighbor_attention(t(3, 2, 4), t(3, 1, 4), t(3, 2, 4), GRAPH),
    ),
    "log_weight": (
        ValueError,
        "log_weight must have shape",
        lambda: neighbor_attention(*[t(3, 2, 4)] * 3, GRAPH, t(3, 3)),
    ),
    "log_weight dtype": (
        TypeError,
        "log_weight must be float32",
        lambda: neighbor_attention(*[t(3, 2, 4)] * 3, GRAPH, t(3, 2, dtype=DOUBLE)),
    ),
    "sum weight": (ValueError, "weight must have shape", lambda: neighbor_sum(X, GRAPH, t(2, 2))),
    "sum rank": (ValueError, "x must have shape", lambda: neighbor_sum(t(3, 2, 2), GRAPH, t(3, 2))),
    "energy weight": (
        TypeError,
        "weight must be float32, got float16",
        lambda: smoothness_energy(X, GRAPH, t(3, 2, dtype=HALF)),
    ),
    "energy rank": (ValueError, "z must have shape", lambda: smoothness_energy(t(3), GRAPH, t(3, 2))),
    # representation_gram
    "no loss": (ValueError, "d_pooled must hold at least one", lambda: representation_gram([], *gram_arguments())),
    "d_pooled shape": (
        ValueError,
        r"d_pooled\[1\] must have shape \[1, 2, 4\], got \[1, 2, 3\]",
        lambda: representation_gram([t(1, 2, 4), t(1, 2, 3)], *gram_arguments()),
    ),
    "attention rows": (
        ValueError,
        r"attention must have shape \[3, T\]",
        lambda: representation_gram([t(1, 2, 4)], *gram_arguments(attention=t(2, 2))),
    ),
    "attention dtype": (
        TypeError,
        "attention must be float32, got float16",
        lambda: representation_gram([t(1, 2, 4)], *gram_arguments(attention=t(3, 2, dtype=HALF))),
    ),
    "gram ptr": (
        ValueError,
        "ptr must end at N = 3, got 4",
        lambda: representation_gram([t(1, 2, 4)], *gram_arguments(ptr=ptr(0, 4))),
    ),
    "pooled dtype": (
        TypeError,
        "pooled must have the dtype of z, float32, got float16",
        lambda: representation_gram([t(1, 2, 4)], *gram_arguments(pooled=t(1, 2, 4, dtype=HALF))),
    ),
    "gram gate": (
        ValueError,
        r"gate must have shape \[3, 5\]",
        lambda: representation_gram([t(1, 2, 4)], *gram_arguments(gate=t(3, 6))),
    ),
    "score_weight": (
        ValueError,
        r"score_weight must have shape \[2, 5\]",
        lambda: representation_gram([t(1, 2, 4)], *gram_arguments(score_weight=t(5, 2))),
    ),
    # task_gradients
    "ema dtype": (
        TypeError,
        "ema must be float32 or float64",
        lambda: task_gradient_statistics(X, X.half(), beta=0.5, step=1),
    ),
    "ema strides": (ValueError, "ema must be contiguous", lambda: task_gradient_statistics(X.T, X.T, beta=0.5, step=1)),
    "grads shape": (
        ValueError,
        "grads must have shape",
        lambda: task_gradient_statistics(t(3, 5), X, beta=0.5, step=1),
    ),
    "tasks": (
        ValueError,
        "grads must hold one sequence for each of the 3",
        lambda: task_gradient_statistics([[X]], X, beta=0.5, step=1),
    ),
    "pieces": (
        ValueError,
        r"grads\[0\] must hold P = 4 elements in all, got 3",
        lambda: task_gradient_statistics([[t(3)]] * 3, X, beta=0.5, step=1),
    ),
    "ragged pieces": (
        ValueError,
        r"grads\[1\] must hold 1 tensors",
        lambda: task_gradient_statistics([[t(4)], [t(2), t(2)], [t(4)]], X, beta=0.5, step=1),
    ),
    "piece shapes": (
        ValueError,
        r"grads\[1\]\[0\] must have shape",
        lambda: task_gradient_statistics([[t(4)], [t(2, 2)], [t(4)]], X, beta=0.5, step=1),
    ),
    "beta": (
        ValueError,
        "beta must be at least 0 and below 1, got 1.0",
        lambda: task_gradient_statistics(X, t(3, 4), beta=1.0, step=1),
    ),
    "step": (
        ValueError,
        "step must be at least 1, got 0",
        lambda: task_gradient_statistics(X, t(3, 4), beta=0.5, step=0),
    ),
    "active": (
        TypeError,
        "active must be bool",
        lambda: task_gradient_statistics(X, t(3, 4), beta=0.5, step=1, active=t(3)),
    ),
    "weights": (ValueError, "weights must have shape", lambda: combine_task_gradients(X, t(4))),
    "weights dtype": (
        TypeError,
        "weights must have the dtype of ema",
        lambda: combine_task_gradients(X, t(3, dtype=HALF)),
    ),
    "out": (ValueError, "out must have shape", lambda: combine_task_gradients(X, t(3), t(3))),
    "layer input": (ValueError, r"x must have shape \[3, I\]", lambda: linear_weight_gradient(X, t(4, 4), t(4, 4))),
    "layer dtype": (
        TypeError,
        "d_out must be float32 or float64, got float16",
        lambda: linear_weight_gradient(X.half(), X.half(), t(4, 4)),
    ),
    "layer out": (
        ValueError,
        r"out must have shape \[4, 4\], got \[4, 3\]",
        lambda: linear_weight_gradient(X, X, t(4, 3)),
    ),
    "layer out strides": (
        ValueError,
        "out must be contiguous in its last dimension",
        lambda: linear_weight_gradient(X, X, t(4, 4).T),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input(name: str) -> None:
    error, message, call = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_values_are_read_once_per_tensor_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ptr that passed is not read again, until it is written to."""
    reads = []
    item = Tensor.__int__
    monkeypatch.setattr(Tensor, "__int__", lambda self: reads.append(1) or item(self))
    offsets = ptr(0, 1, 3)
    bag_attention_pool(X, X, offsets, backend="reference")
    first = len(reads)
    assert first > 0
    bag_attention_pool(X, X, offsets, backend="reference")
    assert len(reads) == first
    offsets[1] = 5
    with pytest.raises(ValueError, match="ptr must"):
        bag_attention_pool(X, X, offsets, backend="reference")


def test_the_same_tensor_is_checked_for_every_purpose() -> None:
    offsets = ptr(0, 3)
    bag_attention_pool(X, X, offsets, backend="reference")
    with pytest.raises(ValueError, match="ptr must end at N = 4, got 3"):
        knn_graph(t(4, 2), offsets, 1, backend="reference")


def test_a_mask_that_changes_is_checked_again() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    cross_view_attention(Q, Q, Q, G, mask=mask, backend="reference")
    mask[1] = False
    with pytest.raises(ValueError, match="instance 1 has none"):
        cross_view_attention(Q, Q, Q, G, mask=mask, backend="reference")


def test_inference_tensors_are_checked_each_time() -> None:
    """They have no version counter: a change in place must still be seen."""
    with torch.inference_mode():
        offsets = ptr(0, 1, 3)
        bag_attention_pool(X, X, offsets, backend="reference")
        offsets[1] = 5
        with pytest.raises(ValueError, match="ptr must"):
            bag_attention_pool(X, X, offsets, backend="reference")


def test_a_copy_shares_only_checks_that_still_hold() -> None:
    offsets = ptr(0, 1, 3)
    bag_attention_pool(X, X, offsets, backend="reference")
    offsets[1] = 5
    copy = _validate.share_checks(offsets, offsets.clone())
    with pytest.raises(ValueError, match="ptr must"):
        bag_attention_pool(X, X, copy, backend="reference")
