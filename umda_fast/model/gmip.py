"""Graph-based multi-instance pooling and its penalties (docs/model.md, section 2)."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from umda_fast.model._numerics import wide
from umda_fast.model.config import Message
from umda_fast.model.pooled import BagMaximum, PooledInstances
from umda_fast.model.residual import add_feed_forward, add_linear, feed_forward, normalized, residual_gain
from umda_fast.ops import (
    NeighborGraph,
    bag_attention_pool,
    edge_cosine,
    knn_graph,
    neighbor_attention,
    neighbor_sum,
)
from umda_fast.ops._dispatch import resolve

__all__ = [
    "GMIP",
    "BagPooling",
    "BagPoolingOutput",
    "GMIPOutput",
    "MessagePassing",
    "bag_index",
    "bag_maximum",
    "diversity_penalty",
]


class MessagePassing(nn.Module):
    """One round on a graph: `z <- LN(z + g * W_m m(z))`, or with `pre_norm` `z <- z + g_1 * W_m m(LN(z))` and, with
    `ffn`, then `z + g_2 * FFN(LN(z))`.

    `attention`: `m_i = sum_j alpha[i,j] v_j`, alpha the softmax over the neighbours and i itself of
    `q_i.k_j / sqrt(Dh) + log w[i,j]`, self with w = 1. `mean`: the same without q and k, alpha = w normalised by
    row.

    Args:
        width: D. heads: H, divides D. message: `attention` or `mean`. dropout: after W_m and the feed-forward part.
        pre_norm: whether what is read is normalised, not what is written.
        ffn: hidden width of the feed-forward part, in multiples of D; 0 has none, and without `pre_norm` there is none.
        layer_scale: at which the gains g [D] begin; None has none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        message: Message = "attention",
        dropout: float = 0.1,
        pre_norm: bool = False,
        ffn: int = 0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if message not in ("attention", "mean"):
            raise ValueError(f"message: expected attention or mean, got {message!r}")
        if width % heads:
            raise ValueError(f"heads: expected a divisor of width = {width}, got {heads}")
        if ffn and not pre_norm:
            raise ValueError(f"ffn: expected 0 without pre_norm, got {ffn}")
        self.heads = heads
        self.message = message
        self.pre_norm = pre_norm
        self.input = nn.Linear(width, 3 * width if message == "attention" else width, bias=False)
        self.output = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.gain = residual_gain(width, layer_scale)
        if ffn:
            self.ffn_norm = nn.LayerNorm(width)
            self.ffn = feed_forward(width, ffn, dropout)
            self.ffn_gain = residual_gain(width, layer_scale)
        self.has_ffn = ffn > 0

    def forward(self, z: Tensor, graph: NeighborGraph, log_weight: Tensor) -> Tensor:
        """z [N, D]; log_weight float32 (float64 for float64), the shape of graph.neighbors. Returns [N, D]."""
        if self.pre_norm:
            return self.step(z, normalized(z, self.norm), graph, log_weight)[0]
        message = self._messages(self.input(z), graph, log_weight)
        total, _ = add_linear(z, message, self.output, self.gain, self.dropout)
        out: Tensor = self.norm(total)
        return out

    def step(
        self, z: Tensor, read: Tensor, graph: NeighborGraph, log_weight: Tensor, norm_after: nn.LayerNorm | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """As `forward` with `pre_norm`, of z and `read = norm(z)`; second, `norm_after` of the result, which the next
        round reads, or None without it."""
        message = self._messages(F.linear(read, self.input.weight), graph, log_weight)
        if not self.has_ffn:
            return add_linear(z, message, self.output, self.gain, self.dropout, norm_after)
        z, read_next = add_linear(z, message, self.output, self.gain, self.dropout, self.ffn_norm)
        assert read_next is not None
        return add_feed_forward(z, read_next, self.ffn, self.ffn_gain, self.dropout, norm_after)

    def _messages(self, read: Tensor, graph: NeighborGraph, log_weight: Tensor) -> Tensor:
        """m [N, D] from q, k and v [N, 3 D] side by side, or v [N, D] alone."""
        n, width = read.shape[0], self.output.in_features
        if self.message == "attention":
            q, k, v = read.view(n, 3, self.heads, width // self.heads).unbind(1)
            return neighbor_attention(q, k, v, graph, log_weight).reshape(n, width)
        weight = log_weight.exp()
        total = 1.0 + neighbor_sum(weight.new_ones(n, 1), graph, weight)
        return ((read + neighbor_sum(read, graph, weight)) / total).to(read.dtype)


class GMIPOutput(NamedTuple):
    """What `GMIP` returns."""

    z: Tensor  #: [N, D]
    graph: NeighborGraph
    weight: Tensor  #: exp((cos(r_i, r_j) - 1) / tau) of every edge, the shape of graph.neighbors


class GMIP(nn.Module):
    """A neighbour graph inside every bag and message passing on it, [N, D] -> [N, D].

    The graph: `k` nearest neighbours by the cosine of `r = W_r z`, from the input z, once for all layers. The
    choice of neighbours carries no gradient, the weights of the edges do.

    Args:
        width: D. heads: H. k: neighbours. graph_width: of r. tau: temperature of the edge weights.
        layers: rounds of message passing. message: `attention`, `mean` or `none`.
        symmetrize: whether an edge also runs back. coords_k: neighbours by coordinates, united with the others.
            Both make a graph whose number of edges depends on the data, which synchronises with a GPU.
        dropout: of the messages.
        pre_norm, ffn, layer_scale: of every round, see `MessagePassing`.
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        k: int = 8,
        graph_width: int = 64,
        tau: float = 0.5,
        layers: int = 2,
        message: Message = "attention",
        symmetrize: bool = False,
        coords_k: int = 0,
        dropout: float = 0.1,
        pre_norm: bool = False,
        ffn: int = 0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.k = k
        self.tau = tau
        self.symmetrize = symmetrize
        self.coords_k = coords_k
        self.key = nn.Linear(width, graph_width, bias=False)
        rounds = 0 if message == "none" else layers
        self.layers = nn.ModuleList(
            MessagePassing(width, heads, message, dropout, pre_norm, ffn, layer_scale) for _ in range(rounds)
        )

    def forward(
        self, z: Tensor, ptr: Tensor, coords: Tensor | None = None, frames: Tensor | None = None
    ) -> GMIPOutput:
        """z [N, D]; ptr int64 [B+1]; coords [N, 2], needed when `coords_k` > 0; frames int64 [S+1], offsets of the runs
        of instances whose coordinates are of one frame (of one slide), None where that is the bag.

        Raises:
            ValueError: coordinates are needed and there are none. TypeError, ValueError: a wrong ptr.
        """
        r = self.key(z)
        graph = knn_graph(r.detach(), ptr, self.k)
        if self.coords_k:
            if coords is None:
                raise ValueError(f"coords: expected [N, 2] for coords_k = {self.coords_k}, got None")
            if coords.shape != (z.shape[0], 2):
                raise ValueError(f"coords must have shape [{z.shape[0]}, 2], got {list(coords.shape)}")
            graph = graph.union(knn_graph(coords, ptr if frames is None else frames, self.coords_k, metric="euclidean"))
        if self.symmetrize:
            graph = graph.symmetrize()
        log_weight = (edge_cosine(r, graph) - 1.0) / self.tau
        return GMIPOutput(self._passes(z, graph, log_weight), graph, log_weight.exp())

    def _passes(self, z: Tensor, graph: NeighborGraph, log_weight: Tensor) -> Tensor:
        """All rounds of message passing; on a CPU among instances ordered so that neighbours are near, where that
        pays. Every sum over neighbours keeps its order."""
        if not len(self.layers):
            return z
        # What an edge gathers: of attention the key and the value.
        layers = cast("list[MessagePassing]", list(self.layers))
        gathered = z.shape[1] * z.element_size() * (2 if layers[0].message == "attention" else 1)
        moved = graph.reorder_where_it_pays(gathered)
        if moved is not None:
            z, graph, log_weight = z[moved.order], moved.graph, log_weight.reshape(-1)[moved.edges]
        read = normalized(z, layers[0].norm) if layers[0].pre_norm else None
        for layer, after in zip(layers, [*layers[1:], None], strict=True):
            if read is None:
                z = layer(z, graph, log_weight)
            else:
                z, read = layer.step(z, read, graph, log_weight, None if after is None else after.norm)
        return z if moved is None else z[moved.rank]


class BagPoolingOutput(NamedTuple):
    """What `BagPooling` returns."""

    pooled: Tensor  #: [B, T, D], 0 for an empty bag
    attention: Tensor  #: [N, T], sums to 1 over the instances of a bag
    entropy: Tensor  #: [B, T], of the attention, in nats
    instances: PooledInstances  #: for the gradients of tasks on z
    statistics: Tensor | None  #: [B, 2 D], mean and maximum of z over a bag, 0 for an empty one; None without them


class BagPooling(nn.Module):
    """Gated attention pooling, one score per task over shared hidden units (after Ilse et al. 2018):
    `s[i,t] = w_t . (tanh(W_a z_i) * sigmoid(W_b z_i))`.

    Args:
        width: D. tasks: T. hidden: shared hidden units.
        statistics: whether the mean and the maximum of every dimension are returned as well.
    """

    def __init__(self, width: int, tasks: int, hidden: int = 64, statistics: bool = False) -> None:
        super().__init__()
        self.value = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, tasks, bias=False)  # [T, hidden]; a bias would cancel in the softmax
        self.statistics = statistics

    def hidden(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """`tanh(W_a z)` and `sigmoid(W_b z)` [..., hidden] of z [..., D]."""
        return torch.tanh(self.value(z)), torch.sigmoid(self.gate(z))

    def forward(self, z: Tensor, ptr: Tensor) -> BagPoolingOutput:
        """z [N, D]; ptr int64 [B+1]."""
        value, gate = self.hidden(z)
        scores, score_weight = self.score(value * gate), self.score.weight
        tasks = scores.shape[1]
        if self.statistics:  # the mean is the pooling by equal scores, in the same pass over z
            scores = torch.cat([scores, scores.new_zeros(scores.shape[0], 1)], 1)
            score_weight = torch.cat([score_weight, score_weight.new_zeros(1, score_weight.shape[1])])
        pool = bag_attention_pool(z, scores, ptr)
        bag = bag_index(ptr, z.shape[0])
        attention = torch.exp(scores.to(pool.lse.dtype) - pool.lse[bag])
        top = bag_maximum(z, ptr, bag) if self.statistics else None
        weights = (score_weight, self.value.weight, self.gate.weight)
        instances = PooledInstances(z, ptr, attention, pool.pooled, value, gate, *weights, top)
        return BagPoolingOutput(
            pool.pooled[:, :tasks],
            attention[:, :tasks],
            pool.entropy[:, :tasks],
            instances,
            None if top is None else torch.cat([pool.pooled[:, tasks], top.value], 1),
        )


def bag_maximum(z: Tensor, ptr: Tensor, bag: Tensor | None = None) -> BagMaximum:
    """The maximum over the instances of every bag, dimension by dimension; its gradient goes to the first instance that
    has it.

    Args:
        z: [N, D]. ptr: int64 [B+1]. bag: `bag_index` of the instances, where it is at hand.
    """
    n, width = z.shape
    if n == 0:
        empty = ptr.new_zeros(ptr.shape[0] - 1, width)
        return BagMaximum(z.sum(0).expand(empty.shape), empty, empty > 0)  # 0, and still a function of z
    with torch.no_grad():
        bag = (bag_index(ptr, n) if bag is None else bag)[:, None].expand(n, width)
        highest = z.new_full((ptr.shape[0] - 1, width), -torch.inf).scatter_reduce(0, bag, z, "amax")
        own = torch.arange(n, dtype=torch.int32, device=z.device)[:, None]
        there = torch.where(z == highest.gather(0, bag), own, n)
        first = there.new_full(highest.shape, n).scatter_reduce(0, bag, there, "amin")
        found = first < n
        instance = first.clamp_max(n - 1).long()
        other = torch.where(highest.isnan(), highest, 0.0)  # nothing equals NaN
    return BagMaximum(torch.where(found, z.gather(0, instance), other), instance, found)


def bag_index(ptr: Tensor, count: int) -> Tensor:
    """int64 [count]: the bag of every instance; no shape depends on the data, nothing is read back."""
    return torch.searchsorted(ptr, torch.arange(count, device=ptr.device), right=True) - 1


def diversity_penalty(z: Tensor, ptr: Tensor, gamma: float = 0.5) -> Tensor:
    """Instances of a bag differ: `mean_{b: n_b > 1} mean_d relu(gamma - sqrt(Var_{i in b} z[i,d] + 1e-4))`.

    Args:
        z: [N, D].
        ptr: int64 [B+1].
        gamma: margin.

    Returns:
        A scalar; the variance is the population's. 0 where no bag has two instances.
    """
    z = wide(z)
    equal = z.new_zeros(z.shape[0], 1)  # equal scores: the pooling is a mean
    # The mean is where the sum of squares is smallest: no first derivative passes through it. The second does, which
    # native backends refuse.
    every_order = resolve("bag_pool", z, None, (z,)) == "reference"
    with nullcontext() if every_order else torch.no_grad():
        mean = bag_attention_pool(z, equal, ptr).pooled[:, 0]
        centre = mean[bag_index(ptr, z.shape[0])]
    variance = bag_attention_pool((z - centre).square(), equal, ptr).pooled[:, 0]
    several = (ptr.diff() > 1).to(z.dtype)
    collapse = torch.relu(gamma - (variance + 1e-4).sqrt()).mean(1)
    return (collapse * several).sum() / several.sum().clamp_min(1.0)
