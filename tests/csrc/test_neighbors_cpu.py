"""neighbors on the CPU: every instruction set, any number of threads, every element written."""

from collections.abc import Callable, Collection

import pytest
import torch
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.reference import neighbors as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: Nodes, degree, heads, width of a head, CSR: every remainder of the blocking, heads of 1, 2, 4 and more
#: vectors, any number of heads (16 are handled at once), rows of more edges than a tile, no nodes, no edges.
CASES = [
    (50, 5, 1, 59, False),
    (120, 16, 4, 64, False),
    (120, 9, 4, 64, True),
    (90, 7, 3, 97, True),
    (40, 3, 1, 1, False),
    (60, 50, 2, 32, False),
    (60, 4, 5, 16, True),
    (60, 4, 8, 8, False),
    (30, 6, 1, 300, False),
    (30, 6, 2, 256, True),
    (30, 4, 12, 8, False),
    (30, 40, 17, 4, True),
    (20, 5, 16, 16, False),
    (20, 5, 7, 3, True),
    (3, 9, 2, 8, False),
    (0, 4, 2, 8, False),
    (5, 0, 2, 8, False),
]

Graph = tuple[Tensor, Tensor | None]


def graph(nodes: int, degree: int, csr: bool) -> Graph:
    """Random, with absent edges, self edges, duplicates, nodes without edges and a hub."""
    generator = torch.Generator().manual_seed(nodes + degree)
    if not csr:
        neighbors = torch.randint(-1, max(1, nodes), (nodes, degree), generator=generator, dtype=torch.int32)
        neighbors[2:3] = -1
        neighbors[:, 1:2] = min(1, nodes - 1)
        return neighbors, None
    degrees = torch.randint(0, 2 * degree + 1, (nodes,), generator=generator)
    degrees[3] = 5 * degree + 40
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), degrees.cumsum(0)])
    edges = int(indptr[-1])
    return torch.randint(-1, nodes, (edges,), generator=generator, dtype=torch.int32), indptr


def features(nodes: int, heads: int, width: int, dtype: torch.dtype, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    return [torch.randn(nodes, heads, width, generator=generator).to(dtype) for _ in range(count)]


def edge_values(neighbors: Tensor) -> Tensor:
    return torch.rand(neighbors.shape, generator=torch.Generator().manual_seed(5)) + 0.05


#: For each operation: the kernel's outputs and gradients, and the reference's, from the same arguments.
Pair = tuple[Callable[[], list[Tensor]], Callable[[torch.dtype], list[Tensor]], list[str]]


def pairs(nodes: int, degree: int, heads: int, width: int, csr: bool, dtype: torch.dtype) -> dict[str, Pair]:
    ops = torch.ops.umda_fast
    table = graph(nodes, degree, csr)
    transpose = ops.graph_transpose(*table, nodes)
    q, k, v, d_out = features(nodes, heads, width, dtype, 4)
    x, d_x = q.flatten(1), d_out.flatten(1)
    weight = edge_values(table[0])
    d_edges, d_energy = (
        torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)),
        torch.tensor(1.7),
    )

    def run(
        function: Callable[..., object], grads: list[Tensor | None], *leaves: Tensor
    ) -> Callable[..., list[Tensor]]:
        def composed(precision: torch.dtype) -> list[Tensor]:
            # Values of edges stay float32 beside 16-bit features.
            own = [t.to(precision if t.dtype == dtype else max_float(precision)).requires_grad_() for t in leaves]
            found = function(*own)
            outputs = list(found) if isinstance(found, tuple) else [found]
            used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
            d_leaves = torch.autograd.grad([o for o, _ in used], own, [g.to(o.dtype) for o, g in used])
            return [*(o.detach() for o in outputs), *d_leaves]

        return composed

    def max_float(precision: torch.dtype) -> torch.dtype:
        return torch.float64 if precision == torch.float64 else torch.float32

    def sums() -> list[Tensor]:
        out = ops.neighbor_sum(x, weight, *table, None, None)
        return [out, *ops.neighbor_sum_backward(d_x, x, weight, *table, *transpose)]

    def cosines() -> list[Tensor]:
        return [
            ops.edge_cosine(x, *table, None, None),
            ops.edge_cosine_backward(d_edges, x, *table, *transpose),
        ]

    def energies() -> list[Tensor]:
        found = ops.smoothness_energy(x, weight, *table, None, None)
        return [*found, *ops.smoothness_energy_backward(d_energy, x, weight, *table, *transpose, *found)]

    result: dict[str, Pair] = {
        "neighbor_sum": (
            sums,
            run(lambda x, w: reference.neighbor_sum(x, w, *table), [d_x], x, weight),
            ["out", "dx", "d_weight"],
        ),
        "edge_cosine": (
            cosines,
            run(lambda x: reference.edge_cosine(x, *table), [d_edges], x),
            ["cosine", "dr"],
        ),
        "smoothness_energy": (
            energies,
            run(lambda x, w: reference.smoothness_energy(x, w, *table), [d_energy, None], x, weight),
            ["energy", "weight_sum", "dz", "d_weight"],
        ),
    }

    for self_loop in (True, False):
        for log_weight in (weight.log(), None):

            def attend(loop: bool = self_loop, w: Tensor | None = log_weight) -> list[Tensor]:
                found = ops.neighbor_attention(q, k, v, w, *table, None, None, loop)
                grads = ops.neighbor_attention_backward(d_out, q, k, v, w, *table, *transpose, loop, *found)
                return [*found, *(grads if w is not None else grads[:3])]

            def attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor | None = None, loop: bool = self_loop) -> object:
                return reference.neighbor_attention(q, k, v, w, *table, self_loop=loop)

            leaves = [q, k, v] if log_weight is None else [q, k, v, log_weight]
            names = ["out", "lse", "dq", "dk", "dv", "d_log_weight"][: 2 + len(leaves)]
            name = f"neighbor_attention, self_loop={self_loop}, weights: {log_weight is not None}"
            result[name] = (attend, run(attention, [d_out, None], *leaves), names)
    return result


def check(
    nodes: int, degree: int, heads: int, width: int, csr: bool, dtype: torch.dtype, only: Collection[str] = ()
) -> None:
    case = f"{nodes} nodes of degree {degree}, {heads} x {width}, csr {csr}, {dtype}"
    table = graph(nodes, degree, csr)
    for found, wanted in zip(
        torch.ops.umda_fast.graph_transpose(*table, nodes),
        reference.graph_transpose(*table, nodes),
        strict=True,
    ):
        assert torch.equal(found, wanted), case
    for operation, (kernel, composed, names) in pairs(nodes, degree, heads, width, csr, dtype).items():
        if only and operation not in only:
            continue
        with poisoned_memory():
            ours = kernel()
        for name, o, e, c in zip(names, ours, composed(torch.float64), composed(dtype), strict=True):
            none = torch.isinf(e)
            assert torch.equal(torch.isinf(o), none), f"{operation}: {name}, {case}"
            o, e, c = (t.masked_fill(none, 0) for t in (o, e, c))
            assert_close(f"{operation}: {name}, {case}", o, e, c, 3 if name.startswith("d") else 2)


def check_all() -> None:
    for case in CASES:
        for dtype in DTYPES[:2]:  # each set's own float16 is the business of simd_check.cpp
            check(*case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_error_rule(case: int, dtype: torch.dtype) -> None:
    check(*CASES[case], dtype)


@pytest.mark.parametrize("csr", [False, True])
def test_bag_of_50000(csr: bool) -> None:
    """Chunks, and more edges to one node than any chunk holds: in a table, everybody points at node 1."""
    check(50_000, 3, 1, 3, csr, torch.float32)


def test_rows_written_past_the_caches() -> None:
    """Outputs of more than 32 MB."""
    operations = ["neighbor_sum", "neighbor_attention, self_loop=True, weights: True"]
    check(33_000, 1, 4, 64, False, torch.float32, operations)


def test_nan_stays_with_its_neighbors() -> None:
    """Numbers of several edges share a vector: a NaN must not pass from one row's into the next one's."""
    table = torch.tensor([[1, 2, 3], [2, 3, -1], [3, 1, 4], [1, 2, 4], [2, -1, -1]], dtype=torch.int32)
    q, k, v = features(5, 2, 8, torch.float32, 3)
    clean = torch.ops.umda_fast.neighbor_attention(q, k, v, None, table, None, None, None, True)
    q[0], k[0], v[0] = torch.nan, torch.nan, torch.nan
    with threads(1):
        found = torch.ops.umda_fast.neighbor_attention(q, k, v, None, table, None, None, None, True)
    for ours, wanted in zip(found, clean, strict=True):
        assert ours[0].isnan().all()
        assert torch.equal(ours[1:], wanted[1:])


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_forced_instruction_set(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_all")


@pytest.mark.parametrize("csr", [False, True])
def test_same_bits_for_any_number_of_threads(csr: bool) -> None:
    def everything() -> list[Tensor]:
        found = list(torch.ops.umda_fast.graph_transpose(*graph(1500, 11, csr), 1500))
        for kernel, _, _ in pairs(1500, 11, 2, 24, csr, torch.float32).values():
            found += kernel()
        return found

    with threads(1):
        expected = everything()
    for count in (2, 3):
        with threads(count):
            for found, wanted in zip(everything(), expected, strict=True):
                assert torch.equal(found, wanted)


def test_strides() -> None:
    """Slices of one packed projection are read where they are; other layouts are copied."""
    ops = torch.ops.umda_fast
    table = graph(80, 6, False)
    transpose = ops.graph_transpose(*table, 80)
    q, k, v, d_out = features(80, 2, 24, torch.float32, 4)
    packed = torch.stack([q, k, v], 1)
    apart = [t.permute(1, 2, 0).contiguous().permute(2, 0, 1) for t in (q, k, v)]

    def run(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        found = ops.neighbor_attention(q, k, v, None, *table, None, None, True)
        return [
            *found,
            *ops.neighbor_attention_backward(d_out, q, k, v, None, *table, *transpose, True, *found),
        ]

    expected = run(q, k, v)
    for arguments in (packed.unbind(1), apart):
        for found, wanted in zip(run(*arguments), expected, strict=True):
            assert torch.equal(found, wanted)


def test_indices_out_of_range_are_absent() -> None:
    """Validation is the caller's; a direct call must not read foreign memory."""
    neighbors, _ = graph(50, 4, False)
    x, weight = torch.randn(50, 8), edge_values(neighbors)
    wrong, absent = neighbors.clone(), neighbors.clone()
    wrong[:, 0], absent[:, 0] = 2**31 - 1, -1
    ops = torch.ops.umda_fast
    assert torch.equal(
        ops.neighbor_sum(x, weight, wrong, None, None, None),
        ops.neighbor_sum(x, weight, absent, None, None, None),
    )
    for found, wanted in zip(ops.graph_transpose(wrong, None, 50), ops.graph_transpose(absent, None, 50), strict=True):
        assert torch.equal(found, wanted)


def test_a_wrong_transpose_is_refused() -> None:
    ops = torch.ops.umda_fast
    neighbors, _ = graph(50, 4, False)
    x, weight = torch.randn(50, 8), edge_values(neighbors)
    t_ptr, t_edge = ops.graph_transpose(neighbors, None, 50)
    broken = t_edge.clone()
    broken[0] = neighbors.numel()
    with pytest.raises(RuntimeError, match="t_edge"):
        ops.neighbor_sum_backward(x, x, weight, neighbors, None, t_ptr, broken)
    with pytest.raises(RuntimeError, match="t_ptr"):
        ops.neighbor_sum_backward(x, x, weight, neighbors, None, t_ptr.flip(0), t_edge)
