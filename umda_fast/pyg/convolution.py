"""Attention over neighbours as a torch_geometric layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing

from umda_fast.ops import NeighborGraph, neighbor_attention


class NeighborAttentionConv(MessagePassing):
    """Dot-product attention of every node over its neighbours, nothing of the size [E, heads, channels] stored.

    ``out_i = W_skip x_i + sum_j softmax_{j in N(i)}(q_i.k_j/sqrt(C) + log w_ij) v_j``: the layer of Shi et al.
    (2021), `torch_geometric.nn.TransformerConv`, whose names of parameters, defaults and ``state_dict`` it has
    (without edge features, ``beta`` and dropout).

    Args:
        in_channels: width of x.
        out_channels: C, width of one head.
        heads: attention heads.
        concat: heads side by side, [N, heads * C], or their mean, [N, C].
        add_self_loops: whether a node also attends to itself with weight 1, besides the edges given.
        bias: whether the linear layers have a bias.
        root_weight: whether ``W_skip x`` is added.
        backend: see `umda_fast.set_backend`.
        kwargs: of ``MessagePassing``; ``flow`` is honoured.

    Raises:
        ValueError: a size below 1, or an ``aggr``: the sum is part of the layer.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int = 1,
        concat: bool = True,
        *,
        add_self_loops: bool = False,
        bias: bool = True,
        root_weight: bool = True,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.setdefault("aggr", "add") not in ("add", "sum"):
            raise ValueError(f"aggr must be 'add', got {kwargs['aggr']!r}")
        for name, size in {"in_channels": in_channels, "out_channels": out_channels, "heads": heads}.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        super().__init__(node_dim=0, **kwargs)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.heads = heads
        self.concat = concat
        self.add_self_loops = add_self_loops
        self.backend = backend
        self.lin_key = nn.Linear(in_channels, heads * out_channels, bias=bias)
        self.lin_query = nn.Linear(in_channels, heads * out_channels, bias=bias)
        self.lin_value = nn.Linear(in_channels, heads * out_channels, bias=bias)
        width = heads * out_channels if concat else out_channels
        self.lin_skip = nn.Linear(in_channels, width, bias=bias) if root_weight else None

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        super().reset_parameters()
        for linear in (self.lin_key, self.lin_query, self.lin_value, self.lin_skip):
            if linear is not None:
                linear.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor | NeighborGraph, edge_weight: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            x: [N, in_channels].
            edge_index: int64 [2, E] of (source, target); or a graph, which keeps its transpose between layers
                and steps, and is faster where it is used more than once.
            edge_weight: [E], or the shape of the graph's neighbors: factors of ``exp(score)`` in the softmax, not
                negative, with a gradient. An edge of weight 0 is left out.

        Returns:
            [N, heads * C], or [N, C] with ``concat=False``. A node without edges (and without self loop) gets 0
            from the attention.

        Raises:
            TypeError, ValueError: an argument of another type, dtype, shape or device; a node outside 0..N-1.
            NotImplementedError: under an explainer, which needs messages that this layer never stores.
        """
        if self.explain:
            raise NotImplementedError("NeighborAttentionConv stores no messages, which explainers need")
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor (one set of nodes), got {type(x).__name__}")
        if x.dim() != 2 or x.shape[1] != self.in_channels:
            raise ValueError(f"x must have shape [N, {self.in_channels}], got {list(x.shape)}")
        graph, weight = self._graph(edge_index, edge_weight, x.shape[0])
        log_weight = None
        if weight is not None:
            wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
            graph, log_weight = _weighted(graph, weight, wanted)
        shape = (x.shape[0], self.heads, self.out_channels)
        out = neighbor_attention(
            self.lin_query(x).view(shape),
            self.lin_key(x).view(shape),
            self.lin_value(x).view(shape),
            graph,
            log_weight,
            self_loop=self.add_self_loops,
            backend=self.backend,
        )
        out = out.flatten(1) if self.concat else out.mean(1)
        return out if self.lin_skip is None else out + self.lin_skip(x)

    def _graph(
        self, edge_index: Tensor | NeighborGraph, edge_weight: Tensor | None, nodes: int
    ) -> tuple[NeighborGraph, Tensor | None]:
        """The graph, and the weights in the order of its edges."""
        if isinstance(edge_index, NeighborGraph):
            if self.flow != "source_to_target":
                raise ValueError("edge_index must be a tensor for flow 'target_to_source', got a NeighborGraph")
            _check_weight(edge_weight, edge_index.neighbors.shape)
            return edge_index, edge_weight
        if not isinstance(edge_index, Tensor) or edge_index.layout != torch.strided:
            got = getattr(edge_index, "layout", type(edge_index).__name__)
            raise TypeError(f"edge_index must be a dense tensor [2, E] or a NeighborGraph, got {got}")
        if self.flow == "target_to_source":
            edge_index = edge_index.flip(0)
        _check_weight(edge_weight, edge_index.shape[1:])
        graph = NeighborGraph.from_edge_index(edge_index, nodes, similarity=edge_weight)
        return graph, graph.similarity

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels}, heads={self.heads})"


def _check_weight(weight: Tensor | None, shape: torch.Size) -> None:
    if weight is None:
        return
    if not weight.is_floating_point():
        raise TypeError(f"edge_weight must be floating, got {str(weight.dtype).removeprefix('torch.')}")
    if weight.shape != shape:
        raise ValueError(f"edge_weight must have shape {list(shape)}, got {list(weight.shape)}")


def _weighted(graph: NeighborGraph, weight: Tensor, dtype: torch.dtype) -> tuple[NeighborGraph, Tensor]:
    """The graph without its edges of weight 0, and the logarithms of the others in ``dtype``."""
    present = graph.neighbors >= 0
    if bool((present & ~(weight >= 0)).any()):
        raise ValueError("edge_weight must be at least 0 everywhere, got a negative or NaN weight")
    kept = present & (weight > 0)
    # The value at an absent edge is not read; 1 there keeps the 1/0 of the logarithm out of its gradient.
    log_weight = torch.where(kept, weight, 1.0).to(dtype).log()
    neighbors = torch.where(kept, graph.neighbors, -1)
    return NeighborGraph(neighbors, indptr=graph.indptr, trusted=True), log_weight
