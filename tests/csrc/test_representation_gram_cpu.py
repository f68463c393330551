"""representation_gram on the CPU: every instruction set, any number of threads, every element written."""

import pytest
import torch
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.parity.cases import representation_gram_case
from umda_fast.reference.representation_gram import representation_gram as reference

#: Bag sizes, width, tasks, hidden units, losses: chunks with several bags and bags of several chunks, every remainder.
CASES = [
    ([3, 0, 700, 1, 150, 5], 59, 5, 33, 3),
    ([3, 0, 213, 1, 60], 128, 8, 64, 8),
    ([0, 40, 0, 0], 97, 13, 17, 16),
    ([1, 1, 1], 1, 5, 1, 2),
    ([64, 65, 2, 0], 131, 3, 20, 5),
    ([30], 256, 16, 128, 16),
    ([0, 0], 3, 2, 4, 1),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ORDER = ("z", "attention", "ptr", "pooled", "value", "gate", "score_weight", "value_weight", "gate_weight")


def inputs(case: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    found = representation_gram_case("", *CASES[case]).rounded(dtype, "cpu")
    return list(found["d_pooled"]), [found[name] for name in ORDER]


def kernel(d_pooled: list[Tensor], rest: list[Tensor]) -> Tensor:
    result: Tensor = torch.ops.umda_fast.representation_gram(d_pooled, *rest)
    return result


def check(case: int, dtype: torch.dtype) -> None:
    d_pooled, rest = inputs(case, dtype)
    with poisoned_memory():
        ours = kernel(d_pooled, rest)
    wide = [x.double() if x.is_floating_point() else x for x in rest]
    exact = reference([d.double() for d in d_pooled], *wide)
    assert_close(f"bags of {CASES[case][0]}", ours, exact, reference(d_pooled, *rest), 2)
    assert torch.equal(ours, ours.T)


def check_all() -> None:
    for case in range(len(CASES)):
        for dtype in DTYPES[:2]:  # each set's own float16 is the business of simd_check.cpp
            check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_error_rule(case: int, dtype: torch.dtype) -> None:
    check(case, dtype)


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_forced_instruction_set(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_all")


@pytest.mark.parametrize("case", [0, 2])
def test_same_bits_for_any_number_of_threads(case: int) -> None:
    arguments = inputs(case, torch.float32)
    with threads(1):
        expected = kernel(*arguments)
    for count in (2, 3):
        with threads(count):
            assert torch.equal(kernel(*arguments), expected)


def test_a_part_of_the_losses_is_a_part_of_the_matrix() -> None:
    """Chunks have other lengths with fewer losses, and with them the sums: both are held to the same exact matrix."""
    d_pooled, rest = inputs(1, torch.float32)
    wide = [x.double() if x.is_floating_point() else x for x in rest]
    chosen = [5, 2]
    exact = reference([d.double() for d in d_pooled], *wide)[chosen][:, chosen]
    composed = reference([d_pooled[loss] for loss in chosen], *rest)
    assert_close("a part", kernel([d_pooled[loss] for loss in chosen], rest), exact, composed, 2)
    assert_close("of the whole", kernel(d_pooled, rest)[chosen][:, chosen], exact, composed, 2)


def test_many_instances_and_losses() -> None:
    """Groups of more than one chunk of the least length, in every task."""
    case = representation_gram_case("", [5000], 40, 20, 30, 33)
    found = case.rounded(torch.float32, "cpu")
    d_pooled, rest = list(found["d_pooled"]), [found[name] for name in ORDER]
    exact = reference([d.double() for d in d_pooled], *(x.double() if x.is_floating_point() else x for x in rest))
    assert_close("33 losses", kernel(d_pooled, rest), exact, reference(d_pooled, *rest), 2)


@pytest.mark.parametrize(("ptr", "message"), [([0, 5, 3, 10], "decrease"), ([0, 5, 7, 9], "end")])
def test_direct_calls_are_guarded(ptr: list[int], message: str) -> None:
    case = representation_gram_case("", [5, 2, 3], 4, 2, 3, 2).rounded(torch.float32, "cpu")
    rest = [case[name] for name in ORDER]
    with pytest.raises(RuntimeError, match=message):
        kernel(list(case["d_pooled"]), [*rest[:2], torch.tensor(ptr), *rest[3:]])
    with pytest.raises(RuntimeError, match="gate must have size 3"):
        kernel(list(case["d_pooled"]), [*rest[:5], rest[5][:, :2], *rest[6:]])
