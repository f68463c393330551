"""knn on the CPU: equal to the reference where arithmetic is exact, and near it where it rounds."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.reference.knn import knn as reference

METRICS = ["cosine", "euclidean"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def kernel(x: Tensor, ptr: Tensor, k: int, metric: str) -> tuple[Tensor, Tensor]:
    neighbors, similarity = torch.ops.umda_fast.knn(x, ptr, k, metric)
    return neighbors, similarity


def offsets(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(sizes)])


def exact_rows(count: int, width: int, metric: str, generator: torch.Generator) -> Tensor:
    """Rows for which every step is exact in float32, with ties and duplicates.

    Signs only, and as many as make the norm a power of two, for the cosine; small integers otherwise.
    """
    if metric == "euclidean":
        return torch.randint(-3, 4, (count, width), generator=generator).float()
    width = 4 ** max(1, round(math.log(width, 4)))
    return torch.randint(0, 2, (count, width), generator=generator).float() * 2 - 1


def assert_equals_reference(x: Tensor, ptr: Tensor, k: int, metric: str) -> None:
    neighbors, similarity = kernel(x, ptr, k, metric)
    expected, expected_similarity = reference(x, ptr, k, metric)
    torch.testing.assert_close(similarity, expected_similarity, rtol=0, atol=0, equal_nan=True)
    assert neighbors.dtype == torch.int32
    assert torch.equal(neighbors, expected)


def assert_near_exact(x: Tensor, sizes: list[int], k: int, metric: str) -> None:
    """Similarities by the error rule; nothing that was left out is better by more than two errors."""
    ptr = offsets(sizes)
    neighbors, similarity = kernel(x, ptr, k, metric)
    points = x.double()
    own = x.float()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=1, eps=1e-8)
        own = torch.nn.functional.normalize(own, dim=1, eps=1e-8)
    for begin, size in zip(ptr.tolist(), sizes, strict=False):
        here = slice(begin, begin + size)
        degree = max(0, min(k, size - 1))
        assert (neighbors[here, degree:] == -1).all()
        assert (similarity[here, degree:] == -math.inf).all()
        if degree == 0:
            continue
        if metric == "cosine":
            exact, composed = points[here] @ points[here].T, own[here] @ own[here].T
        else:
            mode = "donot_use_mm_for_euclid_dist"
            exact = -torch.cdist(points[here], points[here], compute_mode=mode).square()
            composed = -torch.cdist(own[here], own[here], compute_mode=mode).square()
        columns = neighbors[here, :degree].long() - begin
        assert columns.min() >= 0
        assert columns.max() < size
        assert (columns != torch.arange(size)[:, None]).all()
        assert (columns.sort(1).values.diff(dim=1) > 0).all()
        found = exact.gather(1, columns)
        # Off the diagonal, where the composition's error is real too.
        composed = composed.fill_diagonal_(0) + exact.diagonal().diag().float()
        error = (similarity[here, :degree].double() - found).abs().max().item()
        assert_close("similarity", similarity[here, :degree], found, composed.gather(1, columns), 2)
        steps = similarity[here, :degree].diff(dim=1)
        assert (steps <= 0).all()
        assert ((steps < 0) | (columns.diff(dim=1) > 0)).all()
        rest = exact.clone().fill_diagonal_(-math.inf).scatter(1, columns, -math.inf)
        assert (rest.max(1).values <= found.min(1).values + 2 * error + 1e-300).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("width", [1, 3, 59, 97, 256, 300])
def test_near_exact(metric: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    sizes = [0, 1, 2, 17, 0, 300, 5, 49, 500, 1]
    x = torch.randn(sum(sizes), width, generator=generator)
    for k in (1, 8, 16):
        assert_near_exact(x, sizes, k, metric)
    assert_near_exact(x + 3, sizes, 400, metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_storage_types_and_strides(metric: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    wide = torch.randn(260, 90, generator=generator).to(dtype)
    ptr = offsets([100, 0, 160])
    for x in (wide[:, 3:62], wide.T.contiguous().T[:, :59], wide[::2]):
        there = offsets([50, 0, 80]) if len(x) == 130 else ptr
        neighbors, similarity = kernel(x, there, 7, metric)
        # Conversion is exact: the same bits as from float32.
        again, similarity_again = kernel(x.float().contiguous(), there, 7, metric)
        assert torch.equal(neighbors, again)
        assert torch.equal(similarity, similarity_again)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 70) | st.sampled_from([1, 240, 241, 520]), min_size=0, max_size=6),
    width=st.sampled_from([1, 3, 4, 16, 59, 97, 256]),
    k=st.integers(1, 40),
    metric=st.sampled_from(METRICS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_equals_reference_with_ties(
    sizes: list[int], width: int, k: int, metric: str, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = exact_rows(sum(sizes), width, metric, generator).to(dtype)
    with poisoned_memory():
        assert_equals_reference(x, offsets(sizes), k, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_not_a_number_and_infinity(metric: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x = exact_rows(400, 16, metric, generator)
    x[[0, 7, 30, 31, 32, 390], 5] = math.nan
    x[[8, 200], 3] = math.inf
    ptr = offsets([20, 16, 364])
    for k in (3, 15, 18, 500):
        assert_equals_reference(x, ptr, k, metric)
    assert_equals_reference(torch.full((300, 16), math.nan), offsets([300]), 8, metric)
    assert_equals_reference(torch.zeros(300, 16), offsets([300]), 8, metric)


@pytest.mark.parametrize("metric", METRICS)
def test_extreme_magnitudes(metric: str) -> None:
    """Norms whose squares leave float32 are no reason to lose the cosine; below 1e-8 it is clamped."""
    generator = torch.Generator().manual_seed(4)
    x = exact_rows(60, 16, "cosine", generator)
    x *= torch.tensor([2.0**-60, 2.0**-20, 1.0, 2.0**60, 2.0**90]).repeat(12)[:, None]
    if metric == "euclidean":
        x = x.clamp(-(2.0**50), 2.0**50)
    neighbors, similarity = kernel(x, offsets([60]), 5, metric)
    _, expected = reference(x.double(), offsets([60]), 5, metric)
    torch.testing.assert_close(similarity, expected.float())
    assert (neighbors >= 0).all()


def test_duplicates_are_at_distance_zero() -> None:
    x = torch.randn(40, 97, generator=torch.Generator().manual_seed(5)) * 1e3
    x = x.repeat(10, 1)
    neighbors, similarity = kernel(x, offsets([400]), 9, "euclidean")
    assert (similarity == 0).all()
    assert torch.equal(neighbors % 40, torch.arange(400, dtype=torch.int32)[:, None].expand(-1, 9) % 40)
    assert (neighbors.diff(dim=1) > 0).all()
    # Near-duplicates far from the origin: their distances have all their digits.
    near = torch.full((200, 59), 1000.0) + torch.arange(200)[:, None] * 2.0**-9
    neighbors, similarity = kernel(near, offsets([200]), 2, "euclidean")
    assert torch.equal(neighbors[1:-1].sort(1).values[:, 0], torch.arange(0, 198, dtype=torch.int32))
    assert torch.equal(similarity[1:-1], torch.full((198, 2), -59.0 * 2.0**-18))


def test_one_bag_of_50000() -> None:
    """Rows of a bag of 50,000 between thousands of tiny ones, by a stable sort of all their similarities."""
    generator = torch.Generator().manual_seed(6)
    sizes = [3] * 1000 + [50_000] + [2, 1, 0] * 1000
    x = torch.randint(-20, 21, (sum(sizes), 3), generator=generator).float()
    neighbors, similarity = kernel(x, offsets(sizes), 10, "euclidean")
    begin = 3000
    bag = x[begin : begin + 50_000]
    for row in [0, 1, 777, 25_000, 49_999, *torch.randint(0, 50_000, (20,), generator=generator).tolist()]:
        exact = -(bag - bag[row]).square().sum(1)
        exact[row] = -math.inf
        best, order = exact.sort(descending=True, stable=True)
        assert torch.equal(neighbors[begin + row].long(), order[:10] + begin)
        assert torch.equal(similarity[begin + row], best[:10])
    first, last = slice(0, begin), slice(begin + 50_000, None)
    assert_equals = reference(x[first], offsets([3] * 1000), 10, "euclidean")
    assert torch.equal(neighbors[first], assert_equals[0])
    tail = reference(x[last], offsets([2, 1, 0] * 1000), 10, "euclidean")
    moved = torch.where(tail[0] >= 0, tail[0] + begin + 50_000, tail[0])
    assert torch.equal(neighbors[last], moved)


@pytest.mark.parametrize("metric", METRICS)
def test_same_bits_for_any_number_of_threads(metric: str) -> None:
    x = torch.randn(4000, 59, generator=torch.Generator().manual_seed(7))
    x[1000:1500] = x[:500]  # ties
    ptr = offsets([2500, 30, 0, 1, 900, 569])
    results = []
    for count in (1, 2, 5):
        with threads(count):
            results.append(kernel(x, ptr, 16, metric))
    for neighbors, similarity in results[1:]:
        assert torch.equal(neighbors, results[0][0])
        assert torch.equal(similarity, results[0][1])


def test_direct_callers_are_checked() -> None:
    x = torch.randn(10, 4)
    ptr = offsets([10])
    for arguments, message in [
        ((x, offsets([9]), 2, "cosine"), "ptr must start at 0 and end at 10"),
        ((x, torch.tensor([0, 8, 4, 10]), 2, "cosine"), "must not decrease"),
        ((x, ptr, 0, "cosine"), "k must be at least 1"),
        ((x, ptr, 2, "manhattan"), "metric must be"),
        ((x.double(), ptr, 2, "cosine"), "x must be float32, bfloat16 or float16"),
        ((x[0], ptr, 2, "cosine"), "x must have 2 dimensions"),
        ((x[:, :0], ptr, 2, "cosine"), "at least one column"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            kernel(*arguments)


def check_instruction_set() -> None:
    generator = torch.Generator().manual_seed(8)
    sizes = [0, 1, 3, 17, 600, 45]
    for metric in METRICS:
        for width in (3, 59, 256):
            assert_near_exact(torch.randn(sum(sizes), width, generator=generator), sizes, 9, metric)
            for dtype in DTYPES:
                x = exact_rows(sum(sizes), width, metric, generator).to(dtype)
                assert_equals_reference(x, offsets(sizes), 9, metric)
    test_not_a_number_and_infinity("cosine")
    test_same_bits_for_any_number_of_threads("cosine")


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_instruction_sets(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_instruction_set")
