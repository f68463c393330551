"""What parity runs: for every operation a few shapes that have broken kernels, and how to run one case.

Shapes are odd on purpose: ragged and empty bags, missing views full of NaN, packed slices, one view, one task, rows
of no neighbours, widths that fill no vector. And for every operation the widths that the GPU suite times, over several
tiles: kernels take other paths there (whole vectors, larger tiles), which odd widths never reach.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from umda_fast import ops
from umda_fast.parity.case import Case, Inputs, Outputs, Run, normal, offsets
from umda_fast.parity.layer_cases import (
    dropout_add_norm_case,
    gelu_dropout_case,
    linear_residual_case,
    norm_linear_case,
)

# --- cross_view


def close(bias: Tensor) -> None:
    """-inf for view 0 towards every other, and towards one in one head: an additive mask."""
    bias[:, 0] = -math.inf
    bias[0, 1, 2:3] = -math.inf


def cross_view_case(
    shape: str, n: int, views: int, heads: int, width: int, *, missing: bool = False, closed: bool = False
) -> Case:
    """Packed q, k, v, read as slices; with ``missing``, views that are absent hold NaN; with ``closed``, a bias that is
    a mask."""
    inputs = {
        "qkv": normal(n, views, 3, heads, width, seed=1),
        "gate": normal(n, views, heads, seed=2),
        "bias": normal(heads, views, views, seed=3),
    }
    if closed:
        close(inputs["bias"])
    if missing:
        mask = torch.rand(n, views, generator=torch.Generator().manual_seed(4)) < 0.6
        mask[torch.arange(n), torch.arange(n) % views] = True
        inputs["mask"] = mask
        inputs["qkv"][~mask] = math.nan
        inputs["gate"][~mask] = math.nan

    def run(x: Inputs, backend: str) -> Outputs:
        q, k, v = x["qkv"].unbind(2)
        return ops.cross_view_attention(
            q, k, v, x["gate"], bias=x["bias"], mask=x.get("mask"), backend=backend
        )._asdict()

    return Case("cross_view", shape, inputs, run, ("qkv", "gate"), ("qkv", "gate", "bias"))


def cross_view_tokens_case(
    shape: str,
    lengths: Sequence[int],
    segments: Sequence[int],
    heads: int,
    width: int,
    *,
    views: int,
    closed: bool = False,
) -> Case:
    """Segments of ``lengths`` tokens, ``segments`` of them per instance, views in turn; with ``closed``, a bias that is
    a mask."""
    tokens = sum(lengths)
    inputs = {name: normal(tokens, heads, width, seed=i) for i, name in enumerate("qkv")}
    inputs |= {
        "gate": normal(tokens, heads, seed=5),
        "bias": normal(heads, views, views, seed=6),
        "cu_tokens": offsets(lengths),
        "cu_segments": offsets(segments),
        "view": torch.cat(
            [torch.arange(count, dtype=torch.int32) % views for count in segments]
            or [torch.empty(0, dtype=torch.int32)]
        ),
    }
    if closed:
        close(inputs["bias"])

    def run(x: Inputs, backend: str) -> Outputs:
        output = ops.cross_view_token_attention(
            x["q"], x["k"], x["v"], x["gate"], x["cu_tokens"], x["cu_segments"], x["view"], views,
            bias=x["bias"], token_entropy=True, backend=backend,
        )  # fmt: skip
        return {name: y for name, y in output._asdict().items() if y is not None}

    return Case("cross_view_tokens", shape, inputs, run, ("q", "k", "v", "gate"), ("q", "k", "v", "gate", "bias"))


# --- view_fusion


def view_fusion_case(
    shape: str, n: int, views: int, width: int, projection: int | None, *, missing: bool = False, closed: bool = False
) -> Case:
    """All outputs of views off 0, whose projections have something in common; with ``missing``, views that are absent
    hold NaN; with ``closed``, scores that are a mask, for some instances of all views."""
    inputs = {
        "y": normal(n, views, width, seed=20) + 2 * normal(views, width, seed=24),
        "scores": normal(n, views, seed=21),
    }
    if closed:
        inputs["scores"][::3] = -math.inf
        inputs["scores"][1::3, 0] = -math.inf
    if projection is not None:
        inputs["projected"] = normal(n, views, projection, seed=22) + normal(n, 1, projection, seed=25)
    if missing:
        mask = torch.rand(n, views, generator=torch.Generator().manual_seed(23)) < 0.6
        mask[torch.arange(n), torch.arange(n) % views] = True
        for x in list(inputs.values()):
            x[~mask] = math.nan
        inputs["mask"] = mask

    def run(x: Inputs, backend: str) -> Outputs:
        found = ops.fuse_views(x["y"], x["scores"], x.get("projected"), mask=x.get("mask"), backend=backend)
        # Whole numbers: held to equality.
        counts = {"instances": found.instances.double(), "pairs": found.pairs.double()}
        return {**found._asdict(), **counts}

    features = tuple(name for name in inputs if name != "mask")
    return Case("view_fusion", shape, inputs, run, features, features)


# --- knn


def _similarities(x: Tensor, metric: str) -> Tensor:
    """All pairs of one bag, in x's dtype."""
    if metric == "cosine":
        unit = torch.nn.functional.normalize(x, dim=1, eps=1e-8)
        return unit @ unit.T
    return -torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square()


def knn_case(shape: str, sizes: Sequence[int], width: int, k: int, metric: str) -> Case:
    """Compared are the similarities, best first, and how good in float64 the neighbours really are.

    The neighbours themselves may differ where two are nearly as good. The reference computes in float64, so the
    composition is the matrix of all pairs of a bag and ``topk``.
    """
    inputs = {"x": normal(sum(sizes), width, seed=7), "ptr": offsets(sizes)}

    def outputs(x: Inputs, neighbors: Tensor, similarity: Tensor) -> Outputs:
        quality = torch.full(neighbors.shape, -math.inf, dtype=torch.float64, device=neighbors.device)
        for begin, end in pairwise(x["ptr"].tolist()):
            pairs = _similarities(x["x"][begin:end].double(), metric).fill_diagonal_(math.nan)
            columns = neighbors[begin:end].long() - begin
            inside = (columns >= 0) & (columns < end - begin)
            if end > begin:
                found = pairs.gather(1, columns.clamp(0, end - begin - 1))
                quality[begin:end] = found.masked_fill(~inside, -math.inf)
        return {"similarity": similarity, "quality": quality.to(similarity.dtype)}

    def run(x: Inputs, backend: str) -> Outputs:
        graph = ops.knn_graph(x["x"], x["ptr"], k, metric=metric, backend=backend)
        assert graph.similarity is not None
        return outputs(x, graph.neighbors, graph.similarity)

    def composition(x: Inputs, backend: str) -> Outputs:
        neighbors = torch.full((x["x"].shape[0], k), -1, dtype=torch.int32, device=x["x"].device)
        similarity = torch.full(neighbors.shape, -math.inf, device=x["x"].device)
        for begin, end in pairwise(x["ptr"].tolist()):
            degree = min(k, end - begin - 1)
            if degree > 0:
                pairs = _similarities(x["x"][begin:end].float(), metric).fill_diagonal_(-math.inf)
                best = pairs.topk(degree, dim=1)
                similarity[begin:end, :degree] = best.values
                neighbors[begin:end, :degree] = (best.indices + begin).int()
        return outputs(x, neighbors, similarity)

    return Case("knn", f"{shape}, {metric}", inputs, run, ("x",), composition=composition)


# --- neighbors


def random_graph(nodes: int, degree: int, *, csr: bool) -> Inputs:
    """Absent edges in mid-row, self edges, duplicates, a row without edges, and with ``csr`` a hub."""
    generator = torch.Generator().manual_seed(nodes + degree)
    if not csr:
        neighbors = torch.randint(-1, max(1, nodes), (nodes, degree), generator=generator, dtype=torch.int32)
        neighbors[2:3] = -1
        neighbors[3:4] = 0
        return {"neighbors": neighbors}
    degrees = torch.randint(0, 2 * degree + 1, (nodes,), generator=generator)
    degrees[:1] = 3 * degree + 5
    indptr = offsets(degrees.tolist())
    edges = int(indptr[-1])
    return {
        "neighbors": torch.randint(-1, nodes, (edges,), generator=generator, dtype=torch.int32),
        "indptr": indptr,
    }


def _graph(x: Inputs) -> ops.NeighborGraph:
    return ops.NeighborGraph(x["neighbors"], indptr=x.get("indptr"))


def neighbor_cases(shape: str, nodes: int, degree: int, heads: int, width: int, *, csr: bool) -> list[Case]:
    """One case of every operation over a graph; width is that of a head."""
    graph = random_graph(nodes, degree, csr=csr)
    count = graph["neighbors"].shape
    qkv = {name: normal(nodes, heads, width, seed=i) for i, name in enumerate("qkv")}
    x = {**graph, "x": normal(nodes, heads * width, seed=8)}
    weight = normal(*count, seed=9).abs() + 0.05
    weighted = {**x, "weight": weight.masked_fill(graph["neighbors"] < 0, math.nan)}

    def attention(self_loop: bool) -> Run:
        def run(x: Inputs, backend: str) -> Outputs:
            out = ops.neighbor_attention(
                x["q"], x["k"], x["v"], _graph(x), x.get("log_weight"), self_loop=self_loop, backend=backend
            )
            return {"out": out}

        return run

    def cosine(x: Inputs, backend: str) -> Outputs:
        return {"cosine": ops.edge_cosine(x["x"], _graph(x), backend=backend)}

    def total(x: Inputs, backend: str) -> Outputs:
        return {"sum": ops.neighbor_sum(x["x"], _graph(x), x["weight"], backend=backend)}

    def energy(x: Inputs, backend: str) -> Outputs:
        return {"energy": ops.smoothness_energy(x["x"], _graph(x), x["weight"], backend=backend)}

    def transposed(x: Inputs, backend: str) -> Outputs:
        t_ptr, t_edge = _graph(x).transpose(backend=backend)
        return {"t_ptr": t_ptr.double(), "t_edge": t_edge.double()}  # whole numbers: held to equality

    weights_attended = {**graph, **qkv, "log_weight": weight.log()}
    features = ("q", "k", "v")
    attended = "neighbor_attention"
    return [
        Case("graph_transpose", shape, graph, transposed, ()),
        Case("edge_cosine", shape, x, cosine, ("x",), ("x",)),
        Case(attended, shape, weights_attended, attention(True), features, (*features, "log_weight")),
        Case(attended, f"{shape}, no self loop", {**graph, **qkv}, attention(False), features, features),
        Case("neighbor_sum", shape, weighted, total, ("x",), ("x", "weight")),
        Case("smoothness_energy", shape, weighted, energy, ("x",), ("x", "weight")),
    ]


# --- bag_pool, representation_gram, task_gradients


def bag_pool_case(shape: str, sizes: Sequence[int], width: int, tasks: int) -> Case:
    """Bags of these sizes."""
    n = sum(sizes)
    inputs = {"z": normal(n, width, seed=10), "scores": normal(n, tasks, seed=11), "ptr": offsets(sizes)}

    def run(x: Inputs, backend: str) -> Outputs:
        return ops.bag_attention_pool(x["z"], x["scores"], x["ptr"], backend=backend)._asdict()

    return Case("bag_pool", shape, inputs, run, ("z", "scores"), ("z", "scores"))


def representation_gram_case(
    shape: str, sizes: Sequence[int], width: int, tasks: int, hidden: int, losses: int
) -> Case:
    """Bags of these sizes; the pooling that the arguments come from is made in float64."""
    n, bags = sum(sizes), len(sizes)
    z, ptr = normal(n, width, seed=15), offsets(sizes)
    weights = {
        "score_weight": normal(tasks, hidden, seed=16),
        "value_weight": normal(hidden, width, seed=17) / math.sqrt(width),
        "gate_weight": normal(hidden, width, seed=18) / math.sqrt(width),
    }
    value, gate = (z @ weights["value_weight"].T).tanh(), (z @ weights["gate_weight"].T).sigmoid()
    scores = (value * gate) @ weights["score_weight"].T
    pool = ops.bag_attention_pool(z, scores, ptr, backend="reference")
    bag = torch.repeat_interleave(torch.arange(bags), ptr.diff())
    hidden_units = {"value": value, "gate": gate, "attention": (scores - pool.lse[bag]).exp()}
    d_pooled = normal(losses, bags, tasks, width, seed=19)
    inputs = {"d_pooled": d_pooled, "z": z, "pooled": pool.pooled, "ptr": ptr, **hidden_units, **weights}

    def run(x: Inputs, backend: str) -> Outputs:
        rest = {name: tensor for name, tensor in x.items() if name != "d_pooled"}
        return {"gram": ops.representation_gram(list(x["d_pooled"]), **rest, backend=backend)}

    return Case("representation_gram", shape, inputs, run, ("d_pooled", "z", "pooled", "value", "gate"))


def task_gradient_cases(shape: str, tasks: int, pieces: Sequence[int], *, inactive: bool = False) -> list[Case]:
    """Gradients as lists of pieces, of the smoothed values, their Gram matrix and a combination."""
    size = sum(pieces)
    ema = normal(tasks, size, seed=12)
    inputs = {"grads": normal(tasks, size, seed=13), "ema": ema}
    if inactive:
        inputs["active"] = torch.arange(tasks) % 2 == 0
        inputs["grads"][1::2] = math.nan

    def statistics(x: Inputs, backend: str) -> Outputs:
        kept = x["ema"].clone()
        lists = [list(row.split(list(pieces))) for row in x["grads"]]
        gram = ops.task_gradient_statistics(lists, kept, beta=0.75, step=3, active=x.get("active"), backend=backend)
        return {"gram": gram, "ema": kept}

    def combined(x: Inputs, backend: str) -> Outputs:
        return {"out": ops.combine_task_gradients(x["ema"], x["weights"], backend=backend)}

    return [
        Case("task_gradient_statistics", shape, inputs, statistics, ("grads",)),
        Case("combine_task_gradients", shape, {"ema": ema, "weights": normal(tasks, seed=14)}, combined, ()),
    ]


def linear_weight_gradient_case(shape: str, batch: int, outputs: int, inputs: int) -> Case:
    """A layer of these sizes; written to rows that lie apart."""

    def run(x: Inputs, backend: str) -> Outputs:
        out = x["x"].new_empty(outputs, inputs + 3)[:, :inputs]
        return {"out": ops.linear_weight_gradient(x["d_out"], x["x"], out, backend=backend).contiguous()}

    tensors = {"d_out": normal(batch, outputs, seed=20), "x": normal(batch, inputs, seed=21)}
    return Case("linear_weight_gradient", shape, tensors, run, ())


def all_cases() -> list[Case]:
    """The table of `run_parity`."""
    cases = [
        cross_view_case("N=33 V=3 H=2 Dh=32", 33, 3, 2, 32),
        cross_view_case("N=19 V=4 H=3 Dh=59, missing views", 19, 4, 3, 59, missing=True),
        cross_view_case("N=5 V=16 H=1 Dh=8, missing views", 5, 16, 1, 8, missing=True),
        cross_view_case("N=7 V=1 H=2 Dh=97", 7, 1, 2, 97),
        cross_view_case("N=9 V=4 H=3 Dh=59, closed and missing views", 9, 4, 3, 59, missing=True, closed=True),
        cross_view_case("N=9 V=7 H=2 Dh=20, closed views", 9, 7, 2, 20, closed=True),
        cross_view_case("N=0", 0, 3, 2, 16),
        cross_view_tokens_case("ragged, H=2 Dh=32", [5, 9, 3, 1, 17, 2, 0], [3, 1, 0, 3], 2, 32, views=3),
        cross_view_tokens_case("one view, Dh=59", [7, 4], [1, 1], 1, 59, views=1),
        cross_view_tokens_case("closed views", [5, 9, 3, 1, 17, 2, 0], [3, 1, 0, 3], 2, 32, views=3, closed=True),
        cross_view_tokens_case("no token", [], [], 1, 16, views=2),
        norm_linear_case("N=33 V=3 D=59, 97 + 5 columns", 33, 3, 59, 97, 5),
        norm_linear_case("N=5 V=1 D=256, 32 + 1 columns", 5, 1, 256, 32, 1),
        linear_residual_case("N=33 V=3, 59 to 97", 33, 3, 59, 97),
        linear_residual_case("N=1 V=1, 256 to 16", 1, 1, 256, 16),
        gelu_dropout_case("200 x 97, p = 0.3", (200,), 97, p=0.3),
        gelu_dropout_case("70 x 3 x 40, p = 0.1, float32 bias", (70, 3), 40, p=0.1, wide_bias=True),
        gelu_dropout_case("D=1, p = 0.5, no bias", (9,), 1, p=0.5, bias=False),
        gelu_dropout_case("one row of 1030, no dropout", (), 1030),
        gelu_dropout_case("N=0", (0, 2), 8, p=0.2),
        dropout_add_norm_case("200 x 97, p = 0.3", (200,), 97, p=0.3),
        dropout_add_norm_case("70 x 3 x 40, p = 0.1, float32 residual", (70, 3), 40, p=0.1, wide=True),
        dropout_add_norm_case("33 x 59, p = 0.2, no norm", (33,), 59, p=0.2, norm=False),
        dropout_add_norm_case("9 x 8, no dropout, no gain", (9,), 8, gain=False),
        dropout_add_norm_case("one row of 1030, no gain, no norm", (), 1030, gain=False, norm=False),
        dropout_add_norm_case("N=0", (0, 2), 8, p=0.2),
        view_fusion_case("N=700 V=3 D=97 P=33", 700, 3, 97, 33),
        view_fusion_case("N=19 V=4 D=59 P=8, missing views", 19, 4, 59, 8, missing=True),
        view_fusion_case("N=19 V=4 D=59, closed and missing views", 19, 4, 59, None, missing=True, closed=True),
        view_fusion_case("N=5 V=1 D=1 P=1", 5, 1, 1, 1),
        view_fusion_case("N=7 V=16 D=33, missing views, no projections", 7, 16, 33, None, missing=True),
        bag_pool_case("ragged, D=97 T=5", [3, 0, 40, 1, 300, 0], 97, 5),
        bag_pool_case("one bag, D=256 T=1", [70], 256, 1),
        bag_pool_case("D=1 T=8", [9, 4], 1, 8),
        bag_pool_case("empty bags only", [0, 0], 16, 3),
        representation_gram_case("ragged, D=97 T=5 H=33", [3, 0, 40, 1, 300, 0], 97, 5, 33, 4),
        representation_gram_case("one bag, D=64 T=8 H=32", [70], 64, 8, 32, 8),
        representation_gram_case("D=1 T=1 H=1", [9, 4], 1, 1, 1, 1),
        representation_gram_case("N=0", [0], 16, 2, 8, 3),
        linear_weight_gradient_case("B=300 O=97 I=301", 300, 97, 301),
        linear_weight_gradient_case("B=1 O=1 I=1", 1, 1, 1),
        linear_weight_gradient_case("B=0", 0, 3, 5),
        *task_gradient_cases("T=5 P=1003", 5, [700, 1, 302]),
        *task_gradient_cases("T=4 P=300, two active", 4, [300], inactive=True),
        *task_gradient_cases("T=1 P=1", 1, [1]),
        *neighbor_cases("k=5 H=2 Dh=59", 31, 5, 2, 59, csr=False),
        *neighbor_cases("CSR H=1 Dh=97", 23, 4, 1, 97, csr=True),
        *neighbor_cases("N=0", 0, 3, 1, 16, csr=False),
        *neighbor_cases("no edge", 4, 0, 1, 16, csr=False),
    ]
    for metric in ("cosine", "euclidean"):
        cases += [
            knn_case("ragged, d=59 k=4", [17, 0, 1, 3, 40], 59, 4, metric),
            knn_case("d=1 k=9, k >= n", [5, 2], 1, 9, metric),
        ]
    return cases + timed_cases()


def timed_cases() -> list[Case]:
    """The widths of `umda_fast.bench.workloads` at sizes of some tiles."""
    return [
        cross_view_case("as timed: N=70 V=3 H=4 Dh=64", 70, 3, 4, 64),
        *(
            cross_view_tokens_case(f"as timed: 2 x 300 tokens and more, Dh={width}", [330, 301], [2], 2, width, views=2)
            for width in (64, 128)
        ),
        norm_linear_case("as timed: N=50 V=3 D=256, 768 + 4 columns", 50, 3, 256, 768, 4),
        linear_residual_case("as timed: N=50 V=3, 256 to 256", 50, 3, 256, 256),
        gelu_dropout_case("as timed: 300 x 512, p = 0.1", (300,), 512, p=0.1, wide_bias=True),
        dropout_add_norm_case("as timed: 300 x 256, p = 0.1", (300,), 256, p=0.1, wide=True),
        view_fusion_case("as timed: N=300 V=3 D=256 P=64", 300, 3, 256, 64),
        knn_case("as timed: d=64 k=8", [301, 140], 64, 8, "cosine"),
        knn_case("as timed: d=256 k=8", [301, 140], 256, 8, "cosine"),
        *neighbor_cases("as timed: k=8 H=4 Dh=64", 150, 8, 4, 64, csr=False),
        *neighbor_cases("as timed, CSR: k=8 H=1 Dh=64", 90, 8, 1, 64, csr=True),
        bag_pool_case("as timed: D=256 T=8", [300, 5, 70], 256, 8),
        representation_gram_case("as timed: D=128 T=4 H=64", [300], 128, 4, 64, 4),
        linear_weight_gradient_case("as timed: B=300 O=256 I=256", 300, 256, 256),
        *task_gradient_cases("as timed: T=8 P=12288", 8, [8192, 4096]),
    ]
