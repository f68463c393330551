"""bag_pool on the CPU: every instruction set, any number of threads, every element written."""

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.reference.bag_pool import bag_pool as reference

#: Bag sizes, tasks, width: bags that are cut and bags that are not, empty ones, every remainder of blocking.
CASES = [
    ([3, 0, 700, 1, 1500, 5], 1, 59),
    ([3, 0, 513, 1, 600], 8, 256),
    ([0, 40, 0, 0], 13, 97),
    ([1, 1, 1], 5, 1),
    ([2, 50_000, 0], 2, 3),
    ([512, 1024, 2, 0], 3, 131),
    ([0, 0], 2, 3),
    ([], 1, 4),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(sizes: list[int], tasks: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(width)
    n = sum(sizes)
    z = torch.randn(n, width, generator=generator)
    # A common offset: what is computed relative to the maximum does not lose digits to it.
    scores = 3 * torch.randn(n, tasks, generator=generator) + 20
    return [z.to(dtype), scores.to(dtype), torch.tensor([0, *accumulate(sizes)])]


def gradients_for(outputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]


def kernel(z: Tensor, scores: Tensor, ptr: Tensor) -> list[Tensor]:
    """Outputs and gradients."""
    ops = torch.ops.umda_fast
    outputs = list(ops.bag_pool(z, scores, ptr))
    grads = gradients_for(outputs)
    return [*outputs, *ops.bag_pool_backward(*grads, z, scores, ptr, *outputs)]


def composition(z: Tensor, scores: Tensor, ptr: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [z.to(dtype).requires_grad_(), scores.to(dtype).requires_grad_()]
    outputs = list(reference(*leaves, ptr))
    like = [z.dtype, torch.float32, torch.float32]
    grads = gradients_for([o.detach().to(d) for o, d in zip(outputs, like, strict=True)])
    # lse of an empty bag is -inf: no gradient flows from there.
    found = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)])
    return [*(o.detach() for o in outputs), *found]


def check(sizes: list[int], tasks: int, width: int, dtype: torch.dtype) -> None:
    z, scores, ptr = inputs(sizes, tasks, width, dtype)
    with poisoned_memory():
        ours = kernel(z, scores, ptr)
    exact, own = composition(z, scores, ptr, torch.float64), composition(z, scores, ptr, dtype)
    names = ["pooled", "entropy", "lse", "dz", "d_scores"]
    for name, o, e, c in zip(names, ours, exact, own, strict=True):
        empty = torch.isinf(e)
        assert torch.equal(torch.isinf(o), empty), name
        o, e, c = (x.masked_fill(empty, 0) for x in (o, e, c))
        assert_close(f"{name}, bags of {sizes}", o, e, c, 3 if name.startswith("d") else 2)


def check_all() -> None:
    for sizes, tasks, width in CASES:
        for dtype in DTYPES[:2]:  # each set's own float16 is the business of simd_check.cpp
            check(sizes, tasks, width, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_error_rule(case: int, dtype: torch.dtype) -> None:
    check(*CASES[case], dtype)


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_forced_instruction_set(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_all")


def test_same_bits_for_any_number_of_threads() -> None:
    arguments = inputs([5, 0, 3000, 1, 512, *[7] * 300], 5, 67, torch.float32)
    with threads(1):
        expected = kernel(*arguments)
    for count in (2, 3):
        with threads(count):
            for found, wanted in zip(kernel(*arguments), expected, strict=True):
                assert torch.equal(found, wanted)


def test_strides() -> None:
    z, scores, ptr = inputs([30, 600], 4, 33, torch.float32)
    wide = torch.randn(630, 3, 33)
    wide[:, 1] = z
    apart = torch.randn(630, 66)
    apart[:, ::2] = z
    expected = kernel(z, scores, ptr)
    for other in (wide[:, 1], apart[:, ::2]):
        for found, wanted in zip(kernel(other, scores.T.contiguous().T, ptr), expected, strict=True):
            assert torch.equal(found, wanted)


def test_gradients_of_some_outputs_only() -> None:
    z, scores, ptr = inputs([30, 600, 0], 3, 20, torch.float32)
    outputs = list(torch.ops.umda_fast.bag_pool(z, scores, ptr))
    grads = gradients_for(outputs)
    backward = torch.ops.umda_fast.bag_pool_backward
    for keep in range(3):
        alone = [g if i == keep else None for i, g in enumerate(grads)]
        zeros = [g if i == keep else torch.zeros_like(g) for i, g in enumerate(grads)]
        found = backward(*alone, z, scores, ptr, *outputs)
        for f, wanted in zip(found, backward(*zeros, z, scores, ptr, *outputs), strict=True):
            assert torch.equal(f, wanted)


def test_scores_of_minus_infinity() -> None:
    """An instance nobody looks at weighs nothing; a bag of them is like an empty one."""
    z, scores, ptr = inputs([700, 4, 600], 2, 9, torch.float32)
    scores[:600, 0] = -torch.inf
    scores[700:704] = -torch.inf
    ours = kernel(z, scores, ptr)
    exact = composition(z, scores, ptr, torch.float64)
    own = composition(z, scores, ptr, torch.float32)
    assert torch.equal(ours[2].isinf(), exact[2].isinf())
    for o, e, c in zip(ours, exact, own, strict=True):
        o, e, c = (torch.nan_to_num(x, neginf=0.0) if x.isinf().any() else x for x in (o, e, c))
        assert_close("", o, e, c, 3)


def test_nan_stays_in_its_bag() -> None:
    z, scores, ptr = inputs([700, 4, 600], 2, 9, torch.float32)
    scores[650, 1] = torch.nan
    pooled, entropy, lse, dz, d_scores = kernel(z, scores, ptr)
    for statistic in (pooled, entropy, lse):
        assert statistic[0, 1].isnan().all()
        assert not statistic[0, 0].isnan().any()
        assert not statistic[1:].isnan().any()
    assert dz[:700].isnan().all()
    assert not dz[700:].isnan().any()
    assert not d_scores[700:].isnan().any()


@pytest.mark.parametrize(
    ("ptr", "message"),
    [([0, 5, 3, 10], "decrease"), ([1, 10], "start"), ([0, 9], "end")],
)
def test_direct_calls_are_guarded(ptr: list[int], message: str) -> None:
    z, scores = torch.randn(10, 4), torch.randn(10, 2)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.umda_fast.bag_pool(z, scores, torch.tensor(ptr))
