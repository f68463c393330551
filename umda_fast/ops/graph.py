"""A graph of instances as the message-passing operations take it."""

from typing import NamedTuple

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.reference.neighbors import graph_order as reference_order
from umda_fast.reference.neighbors import graph_transpose as reference_transpose

#: Bytes that the last level of a processor's cache holds: rows that fit are near wherever they lie.
_CACHE = 32 << 20


class Reordering(NamedTuple):
    """A graph whose nodes have been given other numbers, and the way there and back."""

    graph: "NeighborGraph"
    order: Tensor  #: int64 [N]: node p is node order[p] of the graph it came from; ``x[order]`` are its features
    rank: Tensor  #: int64 [N], the inverse: ``y[rank]`` are results in the old numbering
    edges: Tensor  #: int64, neighbors' shape: where every edge was; ``weight.flatten()[edges]`` are its weights


class _Stamp(NamedTuple):
    """What something was made of: tensors and what they held then."""

    neighbors: Tensor
    indptr: Tensor | None
    #: The tensors' versions; None for those of inference mode, which keep none; empty in a trace, where none is known.
    versions: tuple[int, ...] | None
    #: The trace or CUDA graph that the making is part of, empty for none.
    recording: str

    def still(self, other: "_Stamp") -> bool:
        """Whether nothing has changed since."""
        same = self.neighbors is other.neighbors and self.indptr is other.indptr
        return same and self.versions is not None and self[2:] == other[2:]


def _trace() -> str:
    return str(torch._guards.CompileContext.current_compile_id())


_trace._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see _dispatch.py


class NeighborGraph:
    """Neighbours of every instance: a table of fixed degree, or CSR for any degree.

    Attributes:
        neighbors: int32 [N, k], -1 where absent (anywhere in a row); with ``indptr``, int32 [E].
        similarity: values of the edges, neighbors' shape, or None.
        indptr: int64 [N+1] of a CSR graph (row i owns ``neighbors[indptr[i]:indptr[i+1]]``), or None.

    An edge (i, j) means that i listens to j. Raises TypeError or ValueError, naming the argument, for another
    dtype, shape or device, an ``indptr`` that is no offset vector, or an index outside 0..N-1.

    The tensors may be changed in place (a buffer that batches are copied to): the next operation checks them again and
    makes what it keeps of the graph anew.
    """

    def __init__(
        self,
        neighbors: Tensor,
        similarity: Tensor | None = None,
        indptr: Tensor | None = None,
        *,
        trusted: bool = False,
    ) -> None:
        if not trusted:
            shape = ["N", "k"] if indptr is None else ["E"]
            _validate.tensor(neighbors, "neighbors", shape, dtype=torch.int32)
            if indptr is not None:
                _validate.offsets(indptr, "indptr", neighbors.shape[0], "E", like=neighbors)
            if similarity is not None:
                _validate.tensor(
                    similarity,
                    "similarity",
                    neighbors.shape,
                    dtype=_validate.FLOATS,
                    like=neighbors,
                    like_name="neighbors",
                )
        self.neighbors = neighbors
        self.similarity = similarity
        self.indptr = indptr
        self._transpose: tuple[Tensor, Tensor] | None = None
        self._transpose_of: _Stamp | None = None
        if not trusted:
            _validate.indices(neighbors, "neighbors", -1, self.num_nodes)
        self._checked = self._stamp()

    def _stamp(self) -> _Stamp:
        if torch.compiler.is_compiling():
            return _Stamp(self.neighbors, self.indptr, (), _trace())
        tensors = [self.neighbors] if self.indptr is None else [self.neighbors, self.indptr]
        versions = None if any(x.is_inference() for x in tensors) else tuple(x._version for x in tensors)
        # A CUDA graph must hold the making of what it reads: its replays see values that no version tells of.
        recording = "CUDA graph" if _validate.capturing(self.neighbors) else ""
        return _Stamp(self.neighbors, self.indptr, versions, recording)

    def check(self) -> None:
        """Checks indices and offsets again if they were changed since. Raises as the constructor does."""
        now = self._stamp()
        if now.recording or now.versions is None:
            return  # values are not looked at in a trace, nor in a capture
        if not self._checked.recording and not now.still(self._checked):
            if self.indptr is not None:
                _validate.offsets(self.indptr, "indptr", self.neighbors.shape[0], "E", like=self.neighbors)
            _validate.indices(self.neighbors, "neighbors", -1, self.num_nodes)
        self._checked = now

    def __repr__(self) -> str:
        form = f"k={self.neighbors.shape[1]}" if self.indptr is None else f"edges={self.neighbors.shape[0]}"
        return f"NeighborGraph(num_nodes={self.num_nodes}, {form}, device={self.neighbors.device})"

    @property
    def num_nodes(self) -> int:
        """N, the number of instances."""
        return self.neighbors.shape[0] if self.indptr is None else self.indptr.shape[0] - 1

    def transpose(self, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """The edges by the instance they point at, kept until the graph's tensors change.

        Returns:
            ``t_ptr`` int64 [N+1] and ``t_edge`` int64 [E]: ``t_edge[t_ptr[j]:t_ptr[j+1]]`` are the flat positions
            in ``neighbors`` of the edges that point at j, ascending; -1 behind ``t_ptr[N]``.
        """
        stamp = self._stamp()
        if self._transpose is None or self._transpose_of is None or not stamp.still(self._transpose_of):
            self.check()
            self._transpose = _transpose(self.neighbors, self.indptr, self.num_nodes, backend)
            self._transpose_of = stamp
        return self._transpose

    def reorder(self, *, backend: str | None = None) -> Reordering:
        """The graph with its nodes numbered so that neighbours have numbers near each other.

        Rows that are gathered soon after each other are then found in the cache: with n x d features too large for
        it, and a graph that has such an order at all (that of similar instances has, a random one has not), a pass
        takes about half the time (docs/performance.md). Moving the features costs about one pass.

        The neighbours of a node keep their order, so that a sum over them has the same bits. The order is found
        breadth first and does not depend on the number of threads.

        Args:
            backend: see `umda_fast.set_backend`; for a graph on a GPU the order is found on the CPU.

        Returns:
            The graph, with its similarities, and the permutations of nodes and edges.

        Raises:
            ValueError: a graph on meta.
        """
        if self.neighbors.is_meta:
            raise ValueError("neighbors must have values, the order depends on them; got meta tensors")
        if self.neighbors.device.type != "cpu":
            made, *moves = self.to("cpu").reorder(backend=backend)
            return Reordering(made.to(self.neighbors.device), *(x.to(self.neighbors.device) for x in moves))
        order = _order(self.neighbors, self.indptr, *self.transpose(), backend)
        n = self.num_nodes
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(n))
        if self.indptr is None:
            degree = self.neighbors.shape[1]
            edges, indptr = order[:, None] * degree + torch.arange(degree), None
        else:
            degrees = self.indptr.diff()[order]
            indptr = torch.cat([self.indptr[:1], degrees.cumsum(0)])
            edges = (self.indptr[:-1][order] - indptr[:-1]).repeat_interleave(degrees) + torch.arange(
                self.neighbors.shape[0]
            )
        old = self.neighbors.reshape(-1)[edges].long()
        # n stands for absent: a graph without nodes has nothing to look up.
        ranks = torch.cat([rank, rank.new_full((1,), -1)])
        neighbors = ranks[torch.where(old < 0, n, old)].to(torch.int32)
        similarity = None if self.similarity is None else self.similarity.reshape(-1)[edges]
        return Reordering(NeighborGraph(neighbors, similarity, indptr, trusted=True), order, rank, edges)

    def reorder_where_it_pays(self, row_bytes: int) -> Reordering | None:
        """`reorder`, if passes over rows of so many bytes gain from it; None if not, or if it cannot be told.

        It pays on the CPU, where the rows do not fit the cache, most edges join rows that lie far apart, and the
        new order brings them together. A sample of the edges tells a random graph beforehand, at next to no cost.
        """
        n, table = self.num_nodes, self.neighbors
        if torch.compiler.is_compiling() or table.device.type != "cpu" or n * row_bytes <= _CACHE or not table.numel():
            return None
        row, near = self.rows().reshape(-1), _CACHE // 4 // row_bytes
        sample = torch.arange(4096) * table.numel() // 4096

        def apart(i: Tensor, j: Tensor) -> bool:
            return int(((i - j).abs() > near).sum()) * 2 > sample.shape[0]

        i, j = row[sample], table.reshape(-1)[sample].long()
        if not apart(i, j) or not self._neighbors_meet():
            return None
        made = self.reorder()
        return None if apart(made.rank[i], made.rank[j.clamp(min=0)]) else made

    def _neighbors_meet(self) -> bool:
        """Whether neighbours of neighbours are the same nodes more often than chance has it, by a sample."""
        n, edges = self.num_nodes, self.neighbors.numel()
        degree = min(16, max(1, edges // n))
        nodes = torch.arange(min(256, n)) * n // min(256, n)

        def of(nodes: Tensor) -> Tensor:
            begin = nodes * self.neighbors.shape[1] if self.indptr is None else self.indptr[nodes]
            at = (begin[..., None] + torch.arange(degree)).clamp(max=edges - 1)
            return self.neighbors.reshape(-1)[at].long().clamp(min=0)

        second = of(of(nodes)).reshape(nodes.shape[0], -1).sort(1).values
        return bool((second[:, 1:] == second[:, :-1]).float().mean() > 0.03)

    def rows(self) -> Tensor:
        """int64, neighbors' shape: the instance that every edge starts from."""
        count = torch.arange(self.num_nodes, device=self.neighbors.device)
        if self.indptr is None:
            return count[:, None].expand(self.neighbors.shape)
        return count.repeat_interleave(self.indptr.diff(), output_size=self.neighbors.shape[0])

    def to(self, device: torch.device | str) -> "NeighborGraph":
        """The graph on another device."""
        parts = (self.neighbors, self.similarity, self.indptr)
        neighbors, similarity, indptr = (None if x is None else x.to(device) for x in parts)
        assert neighbors is not None
        return NeighborGraph(neighbors, similarity, indptr, trusted=True)

    def to_edge_index(self) -> tuple[Tensor, Tensor | None]:
        """As torch_geometric has it: ``edge_index`` int64 [2, E'] of (source j, target i), and its similarities.

        Absent edges are left out, so the number of edges depends on the data. Raises ValueError for a graph on meta.
        """
        if self.neighbors.is_meta:
            raise ValueError("neighbors must have values, how many edges there are depends on them; got meta tensors")
        valid = self.neighbors >= 0
        index = torch.stack([self.neighbors[valid].long(), self.rows()[valid]])
        return index, None if self.similarity is None else self.similarity[valid]

    @classmethod
    def from_edge_index(
        cls, edge_index: Tensor, num_nodes: int, similarity: Tensor | None = None
    ) -> "NeighborGraph":
        """A CSR graph from torch_geometric's ``edge_index`` int64 [2, E] of (source j, target i).

        The edges of a target keep their order. Raises TypeError or ValueError naming what is wrong.
        """
        _validate.tensor(edge_index, "edge_index", [2, "E"], dtype=torch.int64)
        _validate.in_range(num_nodes, "num_nodes", 0)
        _validate.indices(edge_index, "edge_index", 0, num_nodes)
        if similarity is not None:
            _validate.tensor(similarity, "similarity", [edge_index.shape[1]], dtype=_validate.FLOATS)
        target, order = edge_index[1].sort(stable=True)
        indptr = torch.searchsorted(target, torch.arange(num_nodes + 1, device=target.device))
        return cls(
            edge_index[0][order].to(torch.int32),
            None if similarity is None else similarity[order],
            indptr,
            trusted=True,
        )

    def union(self, other: "NeighborGraph") -> "NeighborGraph":
        """The edges of both graphs, each once, as CSR with ascending neighbours.

        The similarity of an edge that both have is this graph's. Both or neither must have similarities.
        """
        if other.num_nodes != self.num_nodes:
            raise ValueError(f"other must have {self.num_nodes} nodes, got {other.num_nodes}")
        if (self.similarity is None) != (other.similarity is None):
            raise ValueError("other must have similarities exactly when this graph has them")
        mine, values = self.to_edge_index()
        theirs, other_values = other.to_edge_index()
        index = torch.cat([mine, theirs], 1)
        if values is not None and other_values is not None:
            values = torch.cat([values, other_values.to(values.dtype)])
        return self._distinct(index, values)

    def symmetrize(self) -> "NeighborGraph":
        """The union of the graph and its reverse, as CSR: i listens to j whenever j listens to i."""
        index, values = self.to_edge_index()
        return self._distinct(
            torch.cat([index, index.flip(0)], 1), None if values is None else values.repeat(2)
        )

    def _distinct(self, index: Tensor, values: Tensor | None) -> "NeighborGraph":
        key, order = (index[1] * self.num_nodes + index[0]).sort(stable=True)
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        chosen = order[first]  # the stable sort keeps the first of equal edges first
        return NeighborGraph.from_edge_index(
            index[:, chosen], self.num_nodes, None if values is None else values[chosen]
        )


def _transpose(
    neighbors: Tensor, indptr: Tensor | None, n: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    # Integers: the dtype of the features plays no part.
    chosen = resolve("graph_transpose", neighbors, backend)
    if chosen == "reference":
        return reference_transpose(neighbors, indptr, n)
    t_ptr, t_edge = _library.op(native("graph_transpose", chosen))(neighbors, indptr, n)
    return t_ptr, t_edge


def _order(
    neighbors: Tensor, indptr: Tensor | None, t_ptr: Tensor, t_edge: Tensor, backend: str | None
) -> Tensor:
    chosen = resolve("graph_order", neighbors, backend)
    if chosen == "reference":
        return reference_order(neighbors, indptr, t_ptr, t_edge)
    order: Tensor = _library.op(native("graph_order", chosen))(neighbors, indptr, t_ptr, t_edge)
    return order


def _order_fake(neighbors: Tensor, indptr: Tensor | None, t_ptr: Tensor, t_edge: Tensor) -> Tensor:
    return t_ptr.new_empty(t_ptr.shape[0] - 1)


def _fake(neighbors: Tensor, indptr: Tensor | None, num_nodes: int) -> tuple[Tensor, Tensor]:
    return (
        neighbors.new_empty(num_nodes + 1, dtype=torch.int64),
        neighbors.new_empty(neighbors.numel(), dtype=torch.int64),
    )


_library.define(
    "graph_transpose",
    "(Tensor neighbors, Tensor? indptr, int num_nodes) -> (Tensor t_ptr, Tensor t_edge)",
    _fake,
)
_library.define(
    "graph_order",
    "(Tensor neighbors, Tensor? indptr, Tensor t_ptr, Tensor t_edge) -> Tensor",
    _order_fake,
)
