"""representation_gram through its public function."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.checks import DTYPES, check_op, few, keeps_rule, repeats
from umda_fast.ops import representation_gram
from umda_fast.parity.case import Case
from umda_fast.parity.cases import representation_gram_case

CASE = representation_gram_case("ragged", [3, 0, 9], 11, 3, 5, 4)
NAMES = (
    *("z", "attention", "ptr", "pooled", "value", "gate"),
    *("score_weight", "value_weight", "gate_weight"),
)


def arguments(case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    inputs = case.rounded(dtype, "cpu")
    return list(inputs["d_pooled"]), [inputs[name] for name in NAMES]


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype: torch.dtype) -> None:
    d_pooled, rest = arguments(CASE, dtype)
    check_op("representation_gram", d_pooled, *rest)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_compiles_as_one_graph(backend: str) -> None:
    d_pooled, rest = arguments(CASE, torch.float32)

    def function(d_pooled: list[Tensor], rest: list[Tensor]) -> Tensor:
        return representation_gram([2 * d for d in d_pooled], *rest, backend=backend).cos()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(d_pooled, rest), function(d_pooled, rest))


@few
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    width=st.sampled_from([1, 3, 59, 97, 128]),
    tasks=st.integers(1, 9),
    hidden=st.sampled_from([1, 7, 32, 65]),
    losses=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(sizes: list[int], width: int, tasks: int, hidden: int, losses: int, dtype: torch.dtype) -> None:
    keeps_rule(representation_gram_case("drawn", sizes, width, tasks, hidden, losses), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats(dtype: torch.dtype) -> None:
    repeats(representation_gram_case("one long bag among short ones", [5, 2000, 0, 40], 33, 3, 20, 3), dtype)


def test_strides_change_nothing() -> None:
    d_pooled, rest = arguments(CASE, torch.float32)
    expected = representation_gram(d_pooled, *rest)
    turned = [x if x.dim() != 2 else x.T.contiguous().T for x in rest]
    assert torch.equal(representation_gram([d.mT.contiguous().mT for d in d_pooled], *turned), expected)


def test_carries_no_gradient() -> None:
    d_pooled, rest = arguments(CASE, torch.float32)
    rest[0].requires_grad_()
    for backend in ("cpp", "reference"):
        assert not representation_gram(d_pooled, *rest, backend=backend).requires_grad
