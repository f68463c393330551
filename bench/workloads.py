"""What the suite times: every operation at three sizes, its floor, and what a user could compose instead.

A floor counts the bytes that must move, each input read once and each output written once, and the products that
must be done, whatever the implementation. Where rows are gathered, one row per edge counts: neighbours are drawn
at random, so that caches help little.
"""

import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from umda_fast import ops
from umda_fast.reference import neighbors as reference_neighbors
from umda_fast.reference.bag_pool import bag_pool as reference_bag_pool
from umda_fast.reference.cross_view import cross_view as reference_cross_view
from umda_fast.reference.cross_view_tokens import cross_view_tokens as reference_tokens
from umda_fast.reference.neighbors import edge_cosine as reference_cosine
from umda_fast.reference.neighbors import graph_transpose as reference_transpose
from umda_fast.reference.neighbors import neighbor_attention as reference_attention
from umda_fast.reference.neighbors import neighbor_sum as reference_sum
from umda_fast.reference.neighbors import smoothness_energy as reference_energy
from umda_fast.reference.representation_gram import representation_gram as reference_gram
from umda_fast.reference.task_gradients import combine_task_gradients as reference_combine
from umda_fast.reference.task_gradients import task_gradient_statistics as reference_statistics
from umda_fast.reference.view_fusion import view_fusion as reference_fusion

OURS = "umda_fast"
EAGER = "eager reference"
COMPILED = "torch.compile of the reference"
SDPA = "scaled_dot_product_attention"
FLASH = "flash attention without statistics"
FLEX = "FlexAttention, own and other views"
CHUNKED = "chunked matmul + topk"
PYG = "torch_geometric"
CUSPARSE = "sparse CSR matrix product"

VIEWS, HEADS, HEAD_DIM, WIDTH, DEGREE, TASKS = 3, 4, 64, 256, 8, 8

#: Tokens of an instance for which FlexAttention is compiled.
FLEX_LENGTH = 4096

Function = Callable[..., Any]


@dataclass(frozen=True)
class Floor:
    """The least an implementation moves and multiplies."""

    bytes: float
    flops: float = 0.0
    unit: str = "bfloat16"  #: which of the machine's matrix rates counts

    def seconds(self, rates: Mapping[str, float]) -> float:
        """The longer of the two times at the machine's own rates (`gpu_suite.measure_rates`)."""
        return max(self.bytes / rates["copy"], self.flops / rates[self.unit] if self.flops else 0.0)

    def rate(self, seconds: float, rates: Mapping[str, float]) -> tuple[float, str]:
        """What ``seconds`` amount to: TFLOP/s where products bind, else GB/s."""
        if self.flops and self.flops / rates[self.unit] >= self.bytes / rates["copy"]:
            return self.flops / seconds / 1e12, "TFLOP/s"
        return self.bytes / seconds / 1e9, "GB/s"


@dataclass(frozen=True)
class Problem:
    """One operation on one shape. A contender is called with ``leaves`` and returns one output or a tuple."""

    op: str
    shape: str
    size: int
    dtype: torch.dtype
    leaves: tuple[Tensor, ...]
    contenders: dict[str, Function]  #: ours first
    forward: Floor
    backward: Floor | None = None  #: None: it has no gradient
    compiled: str | None = None  #: whose `torch.compile` also contends, at one size
    absent: dict[str, str] = field(default_factory=dict)  #: contenders that are not there, and why
    late: dict[str, Function] = field(default_factory=dict)  #: contenders that compile when they are first called


@dataclass(frozen=True)
class Place:
    """Where tensors are made."""

    device: torch.device
    dtype: torch.dtype  #: of features

    def normal(self, *shape: int, dtype: torch.dtype | None = None, grad: bool = True) -> Tensor:
        """Normal values, never zeros: some GPUs run faster on those. float32 values in ``dtype``."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        x = torch.randn(shape, generator=generator, device=self.device).to(dtype or self.dtype)
        return x.requires_grad_(grad)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 values of ``low..high - 1``."""
        generator = torch.Generator(self.device).manual_seed(sum(shape))
        return torch.randint(low, high, shape, generator=generator, device=self.device)

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"


def dtype_unit(dtype: torch.dtype) -> str:
    """The matrix rate at which products of ``dtype`` are done."""
    return "float32" if dtype == torch.float32 else "bfloat16"


def installed(package: str) -> bool:
    """Whether an optional package can be imported."""
    return importlib.util.find_spec(package) is not None


def optional(package: str, name: str, function: Function) -> tuple[dict[str, Function], dict[str, str]]:
    """A contender that imports a package when it is called: as `Problem.contenders`, or else as `Problem.absent`."""
    return ({name: function}, {}) if installed(package) else ({}, {name: f"{package} is not installed"})


@contextmanager
def untiled() -> Iterator[None]:
    """The reference of message passing in one piece, as a user would write it: its tiles save memory, cost time, and
    make as many copies of the code for a compiler."""
    with mock.patch.object(reference_neighbors, "TILE_ELEMENTS", 1 << 62):
        yield


def _gelu_dropout(x: Tensor, bias: Tensor | None, seed: Tensor | None, threshold: int) -> Tensor:
    active = F.gelu(x if bias is None else x + bias.to(x.dtype))
    return active if seed is None else F.dropout(active, threshold / 65536)


def _dropout_add_norm(
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    added = x if bias is None else x + bias.to(x.dtype)
    added = added if seed is None else F.dropout(added, threshold / 65536)
    total = residual + (added if gain is None else added * gain.to(x.dtype))
    if norm_weight is None:
        return total, x.new_empty(0)
    return total, F.layer_norm(total, x.shape[-1:], norm_weight, norm_bias, eps).to(x.dtype)


@contextmanager
def stored_masks() -> Iterator[None]:
    """The reference with PyTorch's own dropout, as a user would write it. The numbers that all backends share take
    several times as long when they are composed of elementary operations."""
    with (
        mock.patch.object(importlib.import_module("umda_fast.ops.gelu_dropout"), "reference", _gelu_dropout),
        mock.patch.object(importlib.import_module("umda_fast.ops.dropout_add_norm"), "reference", _dropout_add_norm),
    ):
        yield


# --- cross_view


def cross_view(n: int, place: Place) -> Problem:
    """Slices of one packed tensor, all views present."""
    packed = place.normal(n, VIEWS, 3, HEADS, HEAD_DIM, grad=False)
    q, k, v = (x.requires_grad_() for x in packed.unbind(2))
    gate = place.normal(n, VIEWS, HEADS)
    bias = place.normal(HEADS, VIEWS, VIEWS, dtype=torch.float32)

    def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return ops.cross_view_attention(q, k, v, gate, bias=bias).out

    def eager(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return reference_cross_view(q, k, v, gate, bias)[0]

    def sdpa(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        hidden = torch.eye(VIEWS, dtype=torch.bool, device=q.device)
        logits = bias.to(q.dtype).masked_fill(hidden, -math.inf)
        cross = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), logits)
        g = gate.sigmoid()[..., None]
        return g * v + (1 - g) * cross.transpose(1, 2)

    elements = n * VIEWS * HEADS * HEAD_DIM * packed.element_size()
    statistics = 4 * n * VIEWS * (VIEWS + HEADS)
    gates = gate.nbytes
    return Problem(
        "cross_view",
        f"N = {n:,}, V = {VIEWS}, {HEADS} heads x {HEAD_DIM}",
        n,
        place.dtype,
        (q, k, v, gate, bias),
        {OURS: ours, EAGER: eager, SDPA: sdpa},
        Floor(4 * elements + statistics + gates),
        Floor(7 * elements + 2 * gates),
        EAGER,
    )


# --- projections


def norm_linear(n: int, place: Place) -> Problem:
    """Layer norm, packed queries, keys and values, and the gates."""
    x = place.normal(n, VIEWS, WIDTH)
    scale, shift = (place.normal(WIDTH, dtype=torch.float32) for _ in "ab")
    weight, gate, gate_bias = place.normal(3 * WIDTH, WIDTH), place.normal(HEADS, WIDTH), place.normal(HEADS)
    leaves = (x, scale, shift, weight, gate, gate_bias)

    def ours(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Any:
        return ops.norm_linear(x, scale, shift, weight, None, gate, bias)

    def eager(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Any:
        normed = F.layer_norm(x.float(), [WIDTH], scale, shift).to(x.dtype)
        return F.linear(normed, weight), F.linear(normed, gate, bias)

    rows = n * VIEWS
    out = rows * (3 * WIDTH + HEADS) * x.element_size()
    work = 2.0 * rows * WIDTH * (3 * WIDTH + HEADS)
    unit = dtype_unit(place.dtype)
    return Problem(
        "norm_linear",
        f"N = {n:,}, V = {VIEWS}, {WIDTH} to {3 * WIDTH} + {HEADS}",
        n,
        place.dtype,
        leaves,
        {OURS: ours, EAGER: eager},
        Floor(x.nbytes + out, work, unit),
        Floor(2 * x.nbytes + out, 2 * work, unit),
        EAGER,
    )


def linear_residual(n: int, place: Place) -> Problem:
    """The output projection, dropout, and the sum with what came in."""
    x, residual = place.normal(n, VIEWS, WIDTH), place.normal(n, VIEWS, WIDTH, grad=True)
    weight, bias = place.normal(WIDTH, WIDTH), place.normal(WIDTH)
    rate = 0.1

    def ours(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        return ops.linear_residual(x, weight, bias, residual, dropout=rate)

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Any:
        return residual + F.dropout(F.linear(x, weight, bias), rate)

    work = 2.0 * n * VIEWS * WIDTH**2
    unit = dtype_unit(place.dtype)
    return Problem(
        "linear_residual",
        f"N = {n:,}, V = {VIEWS}, {WIDTH} to {WIDTH}",
        n,
        place.dtype,
        (x, weight, bias, residual),
        {OURS: ours, EAGER: eager},
        Floor(3 * x.nbytes, work, unit),
        Floor(4 * x.nbytes, 2 * work, unit),
        EAGER,
    )


def gelu_dropout(n: int, place: Place) -> Problem:
    """Between the two linear layers of a feed-forward part: bias, GELU, dropout."""
    x, bias = place.normal(n, VIEWS, 2 * WIDTH), place.normal(2 * WIDTH, dtype=torch.float32)
    rate = 0.1

    def ours(x: Tensor, bias: Tensor) -> Any:
        return ops.gelu_dropout(x, bias, p=rate)

    def eager(x: Tensor, bias: Tensor) -> Any:
        return F.dropout(F.gelu(x + bias.to(x.dtype)), rate)

    return Problem(
        "gelu_dropout",
        f"N = {n:,}, V = {VIEWS}, {2 * WIDTH} wide",
        n,
        place.dtype,
        (x, bias),
        {OURS: ours, EAGER: eager},
        Floor(2 * x.nbytes),
        Floor(3 * x.nbytes),
        EAGER,
    )


def dropout_add_norm(n: int, place: Place) -> Problem:
    """After a linear layer: bias, dropout, gain, the sum with the stream, and the layer norm that is read next."""
    x, residual = place.normal(n, VIEWS, WIDTH), place.normal(n, VIEWS, WIDTH, grad=True)
    vectors = [place.normal(WIDTH, dtype=torch.float32) for _ in range(4)]
    rate = 0.1

    def ours(x: Tensor, residual: Tensor, *vectors: Tensor) -> Any:
        return ops.dropout_add_norm(x, residual, *vectors, p=rate)

    def eager(x: Tensor, residual: Tensor, bias: Tensor, gain: Tensor, scale: Tensor, shift: Tensor) -> Any:
        total = residual + gain.to(x.dtype) * F.dropout(x + bias.to(x.dtype), rate)
        return total, F.layer_norm(total.float(), [WIDTH], scale, shift).to(x.dtype)

    return Problem(
        "dropout_add_norm",
        f"N = {n:,}, V = {VIEWS}, {WIDTH} wide",
        n,
        place.dtype,
        (x, residual, *vectors),
        {OURS: ours, EAGER: eager},
        Floor(4 * x.nbytes),
        Floor(6 * x.nbytes),
        EAGER,
    )


# --- cross_view_tokens


def cross_view_tokens(size: tuple[int, int], place: Place) -> Problem:
    """``size``: tokens of an instance, Dh. Two views of equal length; instances fill 16k tokens on a GPU."""
    length, width = size
    heads = 1024 // width if place.cuda else 2
    instances = max(1, (16_384 if place.cuda else 0) // length)
    tokens = instances * length
    leaves = tuple(place.normal(tokens, heads, width) for _ in "qkv")
    gate = place.normal(tokens, heads)
    segments = 2 * instances
    cu_tokens = torch.arange(segments + 1, device=place.device) * (length // 2)
    cu_segments = torch.arange(instances + 1, device=place.device) * 2
    view = torch.arange(segments, dtype=torch.int32, device=place.device) % 2

    def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return ops.cross_view_token_attention(q, k, v, gate, cu_tokens, cu_segments, view, 2).out

    def eager(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return reference_tokens(q, k, v, gate, cu_tokens, cu_segments, view, 2, None, False)[0]

    def batched(x: Tensor) -> Tensor:
        return x.view(instances, length, heads, width).transpose(1, 2)

    def flash(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(batched(q), batched(k), batched(v))
        return out.transpose(1, 2).reshape(tokens, heads, width)

    contenders: dict[str, Function] = {OURS: ours, EAGER: eager, FLASH: flash}
    absent = {COMPILED: "the reference reads the lengths back to the host: it cannot be traced"}
    late: dict[str, Function] = {}
    if place.cuda and length == FLEX_LENGTH:
        late[FLEX] = _flex(length, batched, heads)
    else:
        absent[FLEX] = f"compiled for {FLEX_LENGTH:,} tokens on CUDA devices only"
    work = 2.0 * instances * length**2 * heads * width  # of one product with all pairs
    moved = tokens * heads * width * leaves[0].element_size()
    unit = dtype_unit(place.dtype)
    return Problem(
        "cross_view_tokens",
        f"{instances} x {length:,} tokens in 2 views, {heads} heads x {width}",
        length,
        place.dtype,
        (*leaves, gate),
        contenders,
        Floor(4 * moved, 2 * work, unit),
        Floor(7 * moved, 5 * work, unit),  # scores, probabilities' gradient, dq, dk, dv
        absent=absent,
        late=late,
    )


def _flex(length: int, batched: Callable[[Tensor], Tensor], heads: int) -> Function:
    """Two calls, one per mask, blended; no statistics."""
    masks: list[Any] = []

    def flex(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        from torch.nn.attention import flex_attention

        if not masks:

            def own(b: Any, h: Any, i: Any, j: Any) -> Any:
                return (i < length // 2) == (j < length // 2)

            def others(b: Any, h: Any, i: Any, j: Any) -> Any:
                return (i < length // 2) != (j < length // 2)

            make = flex_attention.create_block_mask
            masks.extend(make(mask, None, None, length, length, device=q.device) for mask in (own, others))
            masks.append(torch.compile(flex_attention.flex_attention, dynamic=False))
        intra, cross = (masks[2](batched(q), batched(k), batched(v), block_mask=mask) for mask in masks[:2])
        g = gate.sigmoid().view(-1, length, heads).transpose(1, 2)[..., None]
        out: Tensor = (g * intra + (1 - g) * cross).transpose(1, 2).reshape(q.shape)
        return out

    return flex


# --- view_fusion


def view_fusion(n: int, place: Place) -> Problem:
    """Fusion, moments and cosines, all views present."""
    width = 64  # of the projections
    y, scores = place.normal(n, VIEWS, WIDTH), place.normal(n, VIEWS)
    projected = place.normal(n, VIEWS, width)

    def ours(y: Tensor, scores: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
        found = ops.fuse_views(y, scores, projected)
        return found.z, found.mean, found.variance, found.cosine_sum

    def eager(y: Tensor, scores: Tensor, projected: Tensor) -> tuple[Tensor, ...]:
        z, _, mean, variance, _, cosine_sum, _ = reference_fusion(y, scores, projected)
        return z, mean, variance, cosine_sum

    fused = n * WIDTH * y.element_size()
    read = y.nbytes + projected.nbytes + scores.nbytes
    return Problem(
        "view_fusion",
        f"N = {n:,}, V = {VIEWS}, D = {WIDTH}, P = {width}",
        n,
        place.dtype,
        (y, scores, projected),
        {OURS: ours, EAGER: eager},
        Floor(read + fused + 4.0 * n * VIEWS),
        Floor(2 * read + fused),
        EAGER,
    )


# --- knn


def chunked_topk(x: Tensor, ptr: Tensor, k: int, metric: str = "cosine", rows: int = 4096) -> tuple[Tensor, Tensor]:
    """Cosine as users compose it: a matrix product per chunk of rows, then topk, in x's dtype.

    Returns what `umda_fast.ops.knn_graph` holds: neighbors int32 [N, k], similarity float32 [N, k].
    """
    assert metric == "cosine"
    unit = F.normalize(x.float(), dim=1).to(x.dtype)
    neighbors = torch.full((x.shape[0], k), -1, dtype=torch.int32, device=x.device)
    similarity = torch.full((x.shape[0], k), -math.inf, device=x.device)
    for begin, end in pairwise(ptr.tolist()):
        degree = min(k, end - begin - 1)
        for first in range(begin, end if degree > 0 else begin, rows):
            last = min(first + rows, end)
            products = unit[first:last] @ unit[begin:end].T
            products.diagonal(offset=first - begin).fill_(-math.inf)
            values, index = products.topk(degree, dim=1)
            similarity[first:last, :degree] = values.float()
            neighbors[first:last, :degree] = (index + begin).int()
    return neighbors, similarity


def knn(size: tuple[int, int, str], place: Place) -> Problem:
    """``size``: instances of one bag, d, dtype. The floor counts every pair once: a bag with itself is symmetric."""
    n, width, kind = size
    dtype = getattr(torch, kind)
    x = place.normal(n, width, dtype=dtype, grad=False)
    ptr = torch.tensor([0, n], device=place.device)

    def ours(x: Tensor) -> Tensor:
        return ops.knn_graph(x, ptr, DEGREE).neighbors

    contenders: dict[str, Function] = {OURS: ours, CHUNKED: lambda x: chunked_topk(x, ptr, DEGREE)[0]}
    absent = {COMPILED: "the reference loops over tiles on the host: it cannot be traced"}
    if n <= 20_000:
        contenders["float64 reference"] = lambda x: ops.knn_graph(x, ptr, DEGREE, backend="reference").neighbors
    else:
        absent["float64 reference"] = "timed at up to 20,000 instances"
    return Problem(
        "knn",
        f"n = {n:,}, d = {width}, k = {DEGREE}, cosine, {kind}",
        n,
        dtype,
        (x,),
        contenders,
        Floor(x.nbytes + 8.0 * n * DEGREE, 1.0 * n * n * width, kind),
        absent=absent,
    )


# --- neighbors


@dataclass(frozen=True)
class _Edges:
    """A random graph, as everybody wants it."""

    graph: ops.NeighborGraph
    target: Tensor  #: int64 [E], the instance an edge starts from
    source: Tensor  #: int64 [E], the neighbour it listens to
    indptr: Tensor  #: int64 [N+1]
    n: int

    @property
    def table(self) -> Tensor:
        return self.graph.neighbors


def _table(n: int, place: Place) -> Tensor:
    """DEGREE different neighbours of every instance, ascending, anywhere in the table."""
    apart = torch.arange(DEGREE, device=place.device) * (n // DEGREE)
    return ((place.integers(0, n, n, 1) + apart) % n).sort(1).values.int()


def _edges(n: int, place: Place) -> _Edges:
    table = _table(n, place)
    indptr = torch.arange(n + 1, device=place.device) * DEGREE
    rows = torch.arange(n, device=place.device).repeat_interleave(DEGREE)
    graph = ops.NeighborGraph(table)
    graph.transpose()  # once per graph, and an operation of its own: `graph_transpose`
    return _Edges(graph, rows, table.reshape(-1).long(), indptr, n)


def _weights(n: int, place: Place) -> Tensor:
    return place.normal(n, DEGREE, dtype=torch.float32, grad=False).abs().add_(0.05).requires_grad_()


def graph_transpose(n: int, place: Place) -> Problem:
    """The edges by target, once per graph."""
    table = _table(n, place)

    def ours(table: Tensor) -> Tensor:
        return ops.NeighborGraph(table, trusted=True).transpose()[1]

    return Problem(
        "graph_transpose",
        f"N = {n:,}, k = {DEGREE}",
        n,
        torch.int32,
        (table,),
        {OURS: ours, EAGER: lambda table: reference_transpose(table, None, n)[1]},
        Floor(table.nbytes + 8.0 * table.numel() + 8.0 * n),
        compiled=EAGER,
    )


def edge_cosine(n: int, place: Place) -> Problem:
    """r of 64 columns, as the model has it."""
    width = 64
    edges = _edges(n, place)
    r = place.normal(n, width)
    row = width * r.element_size()
    count = edges.table.numel()
    return Problem(
        "edge_cosine",
        f"N = {n:,}, k = {DEGREE}, d = {width}",
        n,
        place.dtype,
        (r,),
        {
            OURS: lambda r: ops.edge_cosine(r, edges.graph),
            EAGER: lambda r: reference_cosine(r, edges.table),
            "F.cosine_similarity": lambda r: F.cosine_similarity(
                r[:, None], r.index_select(0, edges.source).view(n, DEGREE, width), dim=-1
            ).float(),
        },
        Floor((count + n) * row + 8.0 * count),
        Floor((2 * count + 2 * n) * row + 8.0 * count),
        EAGER,
    )


def neighbor_attention(n: int, place: Place) -> Problem:
    """With edge weights and a self loop."""
    edges = _edges(n, place)
    q, k, v = (place.normal(n, HEADS, HEAD_DIM) for _ in "qkv")
    log_weight = _weights(n, place).detach().log().requires_grad_()
    row = HEADS * HEAD_DIM * q.element_size()
    count = edges.table.numel()
    geometric, absent = optional("torch_geometric", PYG, _geometric_attention(edges))
    contenders: dict[str, Function] = {
        OURS: lambda q, k, v, w: ops.neighbor_attention(q, k, v, edges.graph, w),
        EAGER: lambda q, k, v, w: reference_attention(q, k, v, w, edges.table, None, True)[0],
        **geometric,
    }
    return Problem(
        "neighbor_attention",
        f"N = {n:,}, k = {DEGREE}, {HEADS} heads x {HEAD_DIM}",
        n,
        place.dtype,
        (q, k, v, log_weight),
        contenders,
        Floor((2 * count + 4 * n) * row + 8.0 * count),
        Floor((3 * count + 8 * n) * row + 8.0 * count),
        EAGER,
        absent,
    )


def _geometric_attention(edges: _Edges) -> Function:
    def attend(q: Tensor, k: Tensor, v: Tensor, log_weight: Tensor) -> Tensor:
        from torch_geometric.utils import scatter, softmax

        loops = torch.arange(edges.n, device=q.device)
        target, source = torch.cat([edges.target, loops]), torch.cat([edges.source, loops])
        bias = torch.cat([log_weight.flatten(), log_weight.new_zeros(edges.n)])
        scores = (q.index_select(0, target) * k.index_select(0, source)).sum(-1) / math.sqrt(q.shape[-1])
        alpha = softmax(scores + bias[:, None], target, num_nodes=edges.n).to(v.dtype)
        messages = alpha[..., None] * v.index_select(0, source)
        out: Tensor = scatter(messages, target, dim_size=edges.n, reduce="sum")
        return out

    return attend


def neighbor_sum(n: int, place: Place) -> Problem:
    """Weighted sums of rows: a sparse matrix times a dense one."""
    edges = _edges(n, place)
    x, weight = place.normal(n, WIDTH), _weights(n, place)
    row = WIDTH * x.element_size()
    count = edges.table.numel()

    def csr(x: Tensor, weight: Tensor) -> Tensor:
        values = weight.flatten().to(x.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that CSR is young
            return torch.sparse_csr_tensor(edges.indptr, edges.source, values, (n, n)) @ x

    geometric, absent = optional("torch_geometric", PYG, _geometric_sum(edges))
    contenders: dict[str, Function] = {
        OURS: lambda x, w: ops.neighbor_sum(x, edges.graph, w),
        EAGER: lambda x, w: reference_sum(x, w, edges.table),
        CUSPARSE: csr,
        "F.embedding_bag": lambda x, w: F.embedding_bag(
            edges.source.view(n, DEGREE), x, mode="sum", per_sample_weights=w.to(x.dtype)
        ),
        **geometric,
    }
    return Problem(
        "neighbor_sum",
        f"N = {n:,}, k = {DEGREE}, D = {WIDTH}",
        n,
        place.dtype,
        (x, weight),
        contenders,
        Floor((count + n) * row + 8.0 * count),
        Floor((2 * count + 2 * n) * row + 12.0 * count),
        EAGER,
        absent,
    )


def _geometric_sum(edges: _Edges) -> Function:
    layers: list[Any] = []

    def propagate(x: Tensor, weight: Tensor) -> Tensor:
        from torch_geometric.nn import SimpleConv

        if not layers:
            layers.append(SimpleConv(aggr="sum"))
        index = torch.stack([edges.source, edges.target])
        out: Tensor = layers[0](x, index, weight.flatten().to(x.dtype))
        return out

    return propagate


def smoothness_energy(n: int, place: Place) -> Problem:
    """One scalar out."""
    edges = _edges(n, place)
    z, weight = place.normal(n, WIDTH), _weights(n, place)
    row = WIDTH * z.element_size()
    count = edges.table.numel()
    return Problem(
        "smoothness_energy",
        f"N = {n:,}, k = {DEGREE}, D = {WIDTH}",
        n,
        place.dtype,
        (z, weight),
        {
            OURS: lambda z, w: ops.smoothness_energy(z, edges.graph, w),
            EAGER: lambda z, w: reference_energy(z, w, edges.table)[0],
        },
        Floor((count + n) * row + 8.0 * count),
        Floor((2 * count + 2 * n) * row + 12.0 * count),
        EAGER,
    )


# --- bag_pool


def bag_pool(n: int, place: Place) -> Problem:
    """64 ragged bags, all tasks in one pass."""
    bags = min(64, n)
    share = torch.rand(bags, generator=torch.Generator().manual_seed(0)) + 0.1
    sizes = (share / share.sum() * n).long()
    sizes[-1] += n - sizes.sum()
    ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(place.device)
    index = torch.arange(bags, device=place.device).repeat_interleave(ptr.diff(), output_size=n)
    z, scores = place.normal(n, WIDTH), place.normal(n, TASKS)

    def pooled(z: Tensor, scores: Tensor) -> Tensor:
        from torch_geometric.utils import scatter, softmax

        weights = softmax(scores, index, num_nodes=bags)
        return torch.stack([scatter(w[:, None] * z, index, dim_size=bags, reduce="sum") for w in weights.unbind(1)], 1)

    geometric, absent = optional("torch_geometric", f"{PYG} softmax + scatter", pooled)
    contenders: dict[str, Function] = {
        OURS: lambda z, s: ops.bag_attention_pool(z, s, ptr).pooled,
        EAGER: lambda z, s: reference_bag_pool(z, s, ptr)[0],
        **geometric,
    }
    return Problem(
        "bag_pool",
        f"{n:,} x {WIDTH} in {bags} ragged bags, T = {TASKS}",
        n,
        place.dtype,
        (z, scores),
        contenders,
        Floor(z.nbytes + scores.nbytes),
        Floor(2 * z.nbytes + 2 * scores.nbytes),
        EAGER,
        absent,
    )


# --- representation_gram


def representation_gram(n: int, place: Place) -> Problem:
    """As many losses as tasks, on the representation of the default model, in one bag."""
    tasks, width = 4, 128
    hidden = width // 2
    z = place.normal(n, width)
    value_weight, gate_weight = (place.normal(hidden, width, dtype=torch.float32, grad=False) for _ in "ab")
    score_weight = place.normal(tasks, hidden, dtype=torch.float32, grad=False)
    ptr = torch.tensor([0, n], device=place.device)

    def scored(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gate = (z @ value_weight.to(z.dtype).T).tanh(), (z @ gate_weight.to(z.dtype).T).sigmoid()
        return value, gate, (value * gate) @ score_weight.to(z.dtype).T

    with torch.no_grad():
        value, gate, scores = scored(z)
        pool = ops.bag_attention_pool(z, scores, ptr)
        attention = (scores.float() - pool.lse).exp()
    d_pooled = [place.normal(1, tasks, width, grad=False) for _ in range(tasks)]
    arguments = (attention, ptr, pool.pooled, value, gate, score_weight, value_weight, gate_weight)

    def autograd(z: Tensor) -> Tensor:
        pooled = reference_bag_pool(z, scored(z)[2], ptr)[0]
        rows = [torch.autograd.grad(pooled, z, p, retain_graph=True)[0].flatten() for p in d_pooled]
        stacked = torch.stack(rows).float()
        return stacked @ stacked.T

    products = 2 * tasks * tasks * width + tasks * tasks * hidden + 2 * tasks * hidden * width + tasks**2 * width
    moved = sum(x.nbytes for x in (z, attention, value, gate))
    return Problem(
        "representation_gram",
        f"N = {n:,}, D = {width}, H = {hidden}, {tasks} losses, T = {tasks}",
        n,
        place.dtype,
        (z,),
        {
            OURS: lambda z: ops.representation_gram(d_pooled, z, *arguments),
            EAGER: lambda z: reference_gram(d_pooled, z, *arguments),
            "autograd for each loss + matmul": autograd,
        },
        Floor(moved, 2.0 * n * products, "float32"),
    )


# --- task_gradients


def task_gradient_statistics(columns: int, place: Place) -> Problem:
    """The running mean in place and its Gram matrix."""
    beta = 0.9
    grads = place.normal(TASKS, columns, dtype=torch.float32, grad=False)
    # A running mean of each contender's own: they write to it.
    means = [torch.zeros_like(grads) for _ in range(2)]
    correction = grads.new_full((TASKS,), 1 / (1 - beta**3))

    def stacked(grads: Tensor) -> Tensor:
        mean = torch.stack(list(grads)) * (1 - beta) + means[1] * beta
        means[1].copy_(mean)
        corrected = mean * correction[:, None]
        return corrected @ corrected.T


    def jacobian_descent(grads: Tensor) -> Tensor:
        from torchjd.aggregation import IMTLG

        means[1].mul_(beta).add_(grads, alpha=1 - beta)
        return IMTLG()(means[1])

    torchjd, absent = optional("torchjd", "torchjd IMTLG, combination included", jacobian_descent)
    contenders: dict[str, Function] = {
        OURS: lambda grads: ops.task_gradient_statistics(grads, means[0], beta=beta, step=3),
        EAGER: lambda grads: reference_statistics([grads], means[1], correction, None, beta),
        "stack + matmul": stacked,
        **torchjd,
    }
    return Problem(
        "task_gradient_statistics",
        f"T = {TASKS}, P = {columns:,}",
        columns,
        torch.float32,
        (grads,),
        contenders,
        Floor(3.0 * grads.nbytes),
        absent=absent,
    )


def combine_task_gradients(columns: int, place: Place) -> Problem:
    """A weighted sum of the rows."""
    ema = place.normal(TASKS, columns, dtype=torch.float32, grad=False)
    weights, out = place.normal(TASKS, dtype=torch.float32, grad=False), ema.new_empty(columns)

    def eager(ema: Tensor, weights: Tensor) -> Tensor:
        reference_combine(ema, weights, out)
        return out

    return Problem(
        "combine_task_gradients",
        f"T = {TASKS}, P = {columns:,}",
        columns,
        torch.float32,
        (ema, weights),
        {
            OURS: lambda ema, weights: ops.combine_task_gradients(ema, weights, out),
            EAGER: eager,
            "matrix-vector product": lambda ema, weights: torch.mv(ema.T, weights, out=out),
        },
        Floor(ema.nbytes + out.nbytes),
    )


def linear_weight_gradient(rows: int, place: Place) -> Problem:
    """Of a layer of the default width of this file, written where it is wanted."""
    d_out, x = (place.normal(rows, WIDTH, dtype=torch.float32, grad=False) for _ in "ab")
    out = d_out.new_empty(WIDTH, WIDTH)
    return Problem(
        "linear_weight_gradient",
        f"B = {rows:,}, O = I = {WIDTH}",
        rows,
        torch.float32,
        (d_out, x),
        {
            OURS: lambda d_out, x: ops.linear_weight_gradient(d_out, x, out),
            "matrix product": lambda d_out, x: torch.mm(d_out.T, x, out=out),
        },
        Floor(d_out.nbytes + x.nbytes + out.nbytes, 2.0 * rows * WIDTH**2, "float32"),
    )


@dataclass(frozen=True)
class Workload:
    """How an operation's problems are made, and their sizes: quick, on a CPU, on a GPU."""

    make: Callable[[Any, Place], Problem]
    quick: tuple[Any, ...]
    cpu: tuple[Any, ...]
    cuda: tuple[Any, ...]
    compiled_size: int = -1  #: which of the sizes contenders are compiled for


_INSTANCES = ((32, 64, 128), (1_000, 10_000, 50_000), (10_000, 100_000, 1_000_000))
_COLUMNS = ((100, 1_000, 10_000), (10_000, 100_000, 1_000_000), (1_000_000, 10_000_000, 100_000_000))

#: Every native operation, in the order of docs/performance.md.
WORKLOADS: dict[str, Workload] = {
    "cross_view": Workload(cross_view, *_INSTANCES),
    "norm_linear": Workload(norm_linear, *_INSTANCES),
    "linear_residual": Workload(linear_residual, *_INSTANCES),
    "gelu_dropout": Workload(gelu_dropout, *_INSTANCES),
    "dropout_add_norm": Workload(dropout_add_norm, *_INSTANCES),
    "view_fusion": Workload(view_fusion, *_INSTANCES),
    "cross_view_tokens": Workload(
        cross_view_tokens,
        ((8, 16), (16, 16), (32, 16)),
        ((64, 64), (256, 64), (1024, 64)),
        ((1024, 64), (FLEX_LENGTH, 64), (FLEX_LENGTH, 128), (16_384, 64)),
        compiled_size=1,
    ),
    "knn": Workload(
        knn,
        ((32, 16, "float32"), (64, 16, "float32"), (128, 16, "float32")),
        ((1_000, 64, "float32"), (4_000, 64, "float32"), (10_000, 64, "float32")),
        ((10_000, 64, "bfloat16"), (100_000, 64, "bfloat16"), (100_000, 64, "float32"), (100_000, 256, "bfloat16")),
    ),
    "graph_transpose": Workload(graph_transpose, *_INSTANCES),
    "edge_cosine": Workload(edge_cosine, *_INSTANCES),
    "neighbor_attention": Workload(neighbor_attention, *_INSTANCES),
    "neighbor_sum": Workload(neighbor_sum, *_INSTANCES),
    "smoothness_energy": Workload(smoothness_energy, *_INSTANCES),
    "bag_pool": Workload(bag_pool, (32, 64, 128), (1_000, 10_000, 100_000), (100_000, 1_000_000, 4_000_000)),
    "representation_gram": Workload(representation_gram, *_INSTANCES),
    "task_gradient_statistics": Workload(task_gradient_statistics, *_COLUMNS),
    "combine_task_gradients": Workload(combine_task_gradients, *_COLUMNS),
    "linear_weight_gradient": Workload(linear_weight_gradient, *_INSTANCES),
}
