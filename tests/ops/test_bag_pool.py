"""bag_attention_pool through its public function."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.checks import DTYPES, check_compiled, check_gradients, check_op, few, keeps_rule, leaf, repeats
from umda_fast.ops import BagPoolOutput, bag_attention_pool
from umda_fast.parity.case import offsets
from umda_fast.parity.cases import bag_pool_case


@pytest.mark.parametrize(
    ("sizes", "width", "tasks", "dtype"),
    [
        ([3, 0, 9], 11, 3, torch.float32),
        ([3, 0, 9], 11, 3, torch.bfloat16),
        ([4], 1, 1, torch.float16),
        ([0], 5, 2, torch.float32),
        ([], 4, 2, torch.bfloat16),
    ],
)
def test_opcheck(sizes: list[int], width: int, tasks: int, dtype: torch.dtype) -> None:
    z, scores = leaf(sum(sizes), width, dtype=dtype), leaf(sum(sizes), tasks, seed=1, dtype=dtype)
    ptr = offsets(sizes)
    check_op("bag_pool", z, scores, ptr)
    saved = [x.detach() for x in (z, scores, ptr, *bag_attention_pool(z, scores, ptr, backend="cpp"))]
    pooled, entropy, lse = (torch.ones_like(x) for x in saved[3:])
    check_op("bag_pool_backward", pooled, entropy, lse, *saved)
    check_op("bag_pool_backward", None, None, lse, *saved)


def test_compiles_as_one_graph() -> None:
    ptr = offsets([3, 0, 9])

    def function(z: Tensor, scores: Tensor, *, backend: str) -> BagPoolOutput:
        return bag_attention_pool(z, scores, ptr, backend=backend)

    z, scores = leaf(12, 7), leaf(12, 3, seed=1)
    # The logsumexp of the empty bag is -inf, whose square has no use as a loss: only the others.
    check_compiled(lambda z, s, *, backend: function(z, s, backend=backend)[:2], z, scores)


def test_compiles_with_inductor() -> None:
    """Once, for the whole of the operations: what inductor generates calls the kernel."""
    ptr = offsets([3, 9])

    def function(z: Tensor, scores: Tensor) -> Tensor:
        return bag_attention_pool(z * 2, scores, ptr, backend="cpp").pooled.sin()

    z, scores = leaf(12, 7), leaf(12, 3, seed=1)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(z, scores), function(z, scores))


def test_derivatives() -> None:
    ptr = offsets([3, 1, 2])
    check_gradients(
        lambda z, scores: bag_attention_pool(z, scores, ptr),
        leaf(6, 4, dtype=torch.float64),
        leaf(6, 2, seed=1, dtype=torch.float64),
    )


@few
@given(
    sizes=st.lists(st.integers(0, 60), max_size=6),
    width=st.sampled_from([1, 3, 59, 97, 256]),
    tasks=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(sizes: list[int], width: int, tasks: int, dtype: torch.dtype) -> None:
    keeps_rule(bag_pool_case("drawn", sizes, width, tasks), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats(dtype: torch.dtype) -> None:
    repeats(bag_pool_case("one long bag among short ones", [5, 3000, 0, 40], 33, 3), dtype)


def test_empty_bags() -> None:
    for backend in ("cpp", "reference"):
        z, scores = leaf(3, 4), leaf(3, 2, seed=1)
        out = bag_attention_pool(z, scores, offsets([0, 3, 0]), backend=backend)
        for b in (0, 2):
            assert (out.pooled[b] == 0).all()
            assert (out.entropy[b] == 0).all()
            assert (out.lse[b] == -math.inf).all()
        out.pooled.sum().backward()
        assert z.grad is not None
        assert z.grad.isfinite().all()


def test_strides_change_nothing() -> None:
    z, scores, ptr = leaf(20, 12).detach(), leaf(20, 3, seed=1).detach(), offsets([11, 9])
    expected = bag_attention_pool(z, scores, ptr)
    found = bag_attention_pool(z.T.contiguous().T, torch.cat([scores, scores], 1)[:, :3], ptr)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
