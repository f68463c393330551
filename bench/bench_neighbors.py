"""neighbors on the CPU: ``python -m bench.bench_neighbors``.

First random neighbours, the worst case for caches; then the kNN graph of shuffled clusters of points, in the order in
which it came and reordered (`NeighborGraph.reorder`), with what the reordering itself costs. Floor: one row of D
elements gathered per edge and pass (see csrc/cpu/neighbors.cpp for the passes), N rows read and written. Baselines:
``F.embedding_bag`` for the sum, ``torch.sparse`` for its forward, torch_geometric's GATConv for the attention (beside
its linear layer, which ours has outside) and a composition of the same attention from index_select and scatter, eager
PyTorch for energy and cosine.
"""

import argparse
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast.ops import NeighborGraph, edge_cosine, knn_graph, neighbor_attention, neighbor_sum, smoothness_energy
from umda_fast.reference import neighbors as reference

from .harness import medians, parser, peak_growth, print_peak_growth, report, require_parity, start, traffic_note

try:
    from torch_geometric.nn import GATConv
    from torch_geometric.utils import scatter
    from torch_geometric.utils import softmax as segment_softmax
except ImportError:
    GATConv = None

DEGREE, WIDTH, HEADS, COSINE_WIDTH, CLUSTERS = 16, 256, 4, 64, 100
Function = Callable[..., Tensor]


def sparse_sum(graph: NeighborGraph, x: Tensor, weight: Tensor) -> Tensor:
    """``neighbor_sum`` as a product of a ``torch.sparse`` CSR matrix, on any device; no edge may be absent."""
    n = graph.num_nodes
    indptr = graph.indptr
    if indptr is None:
        indptr = torch.arange(n + 1, device=x.device) * graph.neighbors.shape[1]
    index = graph.neighbors.reshape(-1)
    matrix = torch.sparse_csr_tensor(indptr.to(index.dtype), index, weight.reshape(-1), (n, n), check_invariants=False)
    return matrix @ x


def clustered(n: int) -> NeighborGraph:
    """The kNN graph of a mixture of Gaussians, its points in no order."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(CLUSTERS, WIDTH, generator=generator)
    points = centres[torch.randint(CLUSTERS, (n,), generator=generator)]
    points += torch.randn(n, WIDTH, generator=generator)
    return knn_graph(points, torch.tensor([0, n]), DEGREE, metric="euclidean")


class Workload:
    """N instances with their neighbours (random ones if none are given), features and gradients to feed back."""

    def __init__(self, n: int, graph: NeighborGraph | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.n = n
        neighbors = torch.randint(0, n, (n, DEGREE), generator=generator, dtype=torch.int32)
        neighbors = neighbors if graph is None else graph.neighbors
        self.graph = NeighborGraph(neighbors)
        self.graph.transpose()
        self.index = neighbors.long()
        self.source = torch.arange(n)[:, None].expand_as(neighbors).flatten()
        self.target = self.index.flatten()
        self.weight = torch.rand(n, DEGREE, generator=generator) + 0.05
        self.x, self.d_x = (torch.randn(n, WIDTH, generator=generator) for _ in range(2))
        self.r = torch.randn(n, COSINE_WIDTH, generator=generator)
        self.q, self.k, self.v, self.d_out = (
            torch.randn(n, HEADS, WIDTH // HEADS, generator=generator) for _ in range(4)
        )

    # Each contender is a function of the tensors it differentiates.

    def ours(self) -> dict[str, Function]:
        g = self.graph
        return {
            "neighbor_sum": lambda x, w: neighbor_sum(x, g, w, backend="cpp"),
            "neighbor_attention": lambda q, k, v, w: neighbor_attention(q, k, v, g, w.log(), backend="cpp"),
            "smoothness_energy": lambda z, w: smoothness_energy(z, g, w, backend="cpp"),
            "edge_cosine": lambda r: edge_cosine(r, g, backend="cpp"),
        }

    def references(self) -> dict[str, Function]:
        table = self.graph.neighbors
        return {
            "neighbor_sum": lambda x, w: reference.neighbor_sum(x, w, table),
            "neighbor_attention": lambda q, k, v, w: reference.neighbor_attention(q, k, v, w.log(), table)[0],
            "smoothness_energy": lambda z, w: reference.smoothness_energy(z, w, table)[0],
            "edge_cosine": lambda r: reference.edge_cosine(r, table),
        }

    def arguments(self, operation: str) -> tuple[list[Tensor], Tensor]:
        """Tensors to differentiate, gradient of the output."""
        return {
            "neighbor_sum": ([self.x, self.weight], self.d_x),
            "neighbor_attention": ([self.q, self.k, self.v, self.weight], self.d_out),
            "smoothness_energy": ([self.x, self.weight], torch.tensor(1.0)),
            "edge_cosine": ([self.r], self.weight),
        }[operation]

    def embedding_bag(self, x: Tensor, w: Tensor) -> Tensor:
        return F.embedding_bag(self.index, x, mode="sum", per_sample_weights=w)

    def sparse_matrix(self, x: Tensor, w: Tensor) -> Tensor:
        return sparse_sum(self.graph, x, w)

    def gather_scatter(self, x: Tensor, w: Tensor) -> Tensor:
        messages = w.reshape(-1, 1) * x.index_select(0, self.target)
        return scatter(messages, self.source, dim_size=self.n, reduce="sum")

    def composed_attention(self, q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
        """The same attention from torch_geometric's parts, the self loop as an edge."""
        loops = torch.arange(self.n)
        source, target = torch.cat([self.source, loops]), torch.cat([self.target, loops])
        bias = torch.cat([w.log().flatten(), w.new_zeros(self.n)])
        scores = (q.index_select(0, source) * k.index_select(0, target)).sum(-1) / math.sqrt(q.shape[-1])
        alpha = segment_softmax(scores + bias[:, None], source, num_nodes=self.n)
        return scatter(alpha[..., None] * v.index_select(0, target), source, dim_size=self.n, reduce="sum")

    def eager_energy(self, z: Tensor, w: Tensor) -> Tensor:
        squares = (z[:, None] - z[self.index]).square().sum(-1)
        return (w * squares).sum() / (z.shape[1] * w.sum())

    def eager_cosine(self, r: Tensor) -> Tensor:
        return F.cosine_similarity(r[:, None], r[self.index], dim=-1)


def both(function: Function, leaves: list[Tensor], grad: Tensor) -> list[Tensor]:
    own = [t.detach().requires_grad_() for t in leaves]
    out = function(*own)
    return [out.detach(), *torch.autograd.grad(out, own, grad.to(out.dtype))]


def check() -> None:
    small = Workload(1500)
    composed = small.references()
    for operation, function in small.ours().items():
        leaves, grad = small.arguments(operation)
        exact = both(composed[operation], [t.double() for t in leaves], grad)
        require_parity(operation, both(function, leaves, grad), exact, both(composed[operation], leaves, grad))


def attention_contenders(work: Workload) -> dict[str, Callable[[], object]]:
    leaves, grad = work.arguments("neighbor_attention")
    contenders: dict[str, Callable[[], object]] = {
        "umda_fast": lambda: both(work.ours()["neighbor_attention"], leaves, grad)
    }
    if GATConv is not None:
        contenders["the same from torch_geometric's parts"] = lambda: both(work.composed_attention, leaves, grad)
        layer = GATConv(WIDTH, WIDTH // HEADS, heads=HEADS, bias=False)
        edges = torch.stack([work.target, work.source])
        flat = grad.flatten(1)
        contenders["GATConv with its linear layer"] = lambda: both(lambda x: layer(x, edges), [work.x], flat)
        contenders["that linear layer alone"] = lambda: both(layer.lin, [work.x], flat)
    return contenders


def bench_order(n: int, repeats: int) -> None:
    """The same operations on a graph in the order in which it came, and with neighbours near each other."""
    graph = clustered(n)
    made = graph.reorder()
    works = {"as it came": Workload(n, graph), "reordered": Workload(n, made.graph)}
    works["reordered"].weight = works["as it came"].weight.flatten()[made.edges]
    for operation in ("neighbor_sum", "neighbor_attention"):
        for direction in ("forward", "forward + backward"):
            contenders: dict[str, Callable[[], object]] = {}
            for name in reversed(works):
                leaves, grad = works[name].arguments(operation)
                function = works[name].ours()[operation]
                if direction == "forward":
                    contenders[name] = lambda f=function, a=leaves: f(*a)
                else:
                    contenders[name] = lambda f=function, a=leaves, g=grad: both(f, a, g)
            title = f"{operation}, n = {n:,}, k = {DEGREE}, kNN graph of {CLUSTERS} shuffled clusters: {direction}"
            report(title, medians(contenders, repeats))
    x = works["as it came"].x
    once: dict[str, Callable[[], object]] = {
        "reorder()": graph.reorder,
        "moving features there and back": lambda: x[made.order][made.rank],
        "transpose()": lambda: NeighborGraph(graph.neighbors, trusted=True).transpose(),
    }
    report(f"once per graph, n = {n:,}, k = {DEGREE}", medians(once, repeats))


def main() -> None:
    options = parser(__doc__ or "")
    options.add_argument("--peak-of", help="run this contender of neighbor_attention once, print its memory")
    options.add_argument("--graph", choices=["random", "clustered"], help="one of the two graphs only")
    chosen = options.parse_args()
    n = int(50_000 * chosen.size)
    if chosen.peak_of is not None:
        print_peak_growth(attention_contenders(Workload(n))[chosen.peak_of])
        return
    start(chosen)
    check()
    if chosen.graph != "clustered":
        bench_random(n, chosen)
    if chosen.graph != "random":
        bench_order(n, chosen.repeats)


def bench_random(n: int, chosen: argparse.Namespace) -> None:
    """Every operation against what can be composed, on a graph of random neighbours."""
    work = Workload(n)
    ours = work.ours()
    gathered = work.target.numel() * work.x.element_size()
    shape = f"n = {n:,}, k = {DEGREE}"

    baselines: dict[str, dict[str, Function]] = {
        "neighbor_sum": {"F.embedding_bag": work.embedding_bag},
        "smoothness_energy": {"eager": work.eager_energy},
        "edge_cosine": {"eager": work.eager_cosine},
    }
    if GATConv is not None:
        baselines["neighbor_sum"]["torch_geometric gather + scatter"] = work.gather_scatter
    forward_only = {"torch.sparse CSR": work.sparse_matrix}  # what a user without gradients would take
    passes = {"neighbor_sum": (1, 2), "smoothness_energy": (1, 3), "edge_cosine": (1, 3)}
    for operation, others in baselines.items():
        leaves, grad = work.arguments(operation)
        width = leaves[0].shape[1]
        for direction, gathers in zip(("forward", "forward + backward"), passes[operation], strict=True):
            functions = {"umda_fast": ours[operation], **others}
            if operation == "neighbor_sum" and direction == "forward":
                functions |= forward_only
            contenders: dict[str, Callable[[], object]] = {
                name: (
                    (lambda f=function, a=leaves: f(*a))
                    if direction == "forward"
                    else (lambda f=function, a=leaves, g=grad: both(f, a, g))
                )
                for name, function in functions.items()
            }
            seconds = medians(contenders, chosen.repeats)
            notes = {name: traffic_note(gathers * gathered * width, s, chosen.copy) for name, s in seconds.items()}
            report(f"{operation}, {shape}, d = {width}: {direction}", seconds, notes)

    contenders = attention_contenders(work)
    seconds = medians(contenders, min(chosen.repeats, 5))
    notes = {name: f"{peak_growth('bench.bench_neighbors', name, chosen) / 1e9:5.2f} GB more" for name in seconds}
    notes["umda_fast"] += ", " + traffic_note(5 * gathered * WIDTH, seconds["umda_fast"], chosen.copy)
    report(f"neighbor_attention, {shape}, {HEADS} x {WIDTH // HEADS}: forward + backward", seconds, notes)
    if GATConv is not None:
        without = seconds["GATConv with its linear layer"] - seconds["that linear layer alone"]
        print(f"  GATConv without its linear layer: {without / seconds['umda_fast']:.2f}x")


if __name__ == "__main__":
    main()
