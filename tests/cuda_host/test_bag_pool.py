"""csrc/cuda/bag_pool.cu, emulated, against the reference in float64."""

from ctypes import c_int, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cuda_host._host import (
    STORAGE,
    Arena,
    assert_parity,
    call,
    dtype_code,
    pointer,
    repeatable,
    structure,
    workspace_size,
)
from umda_fast.reference.bag_pool import bag_pool as reference


@cache
def _structures() -> tuple[Any, Any, Any]:
    common = structure(
        "BagPoolInput",
        **dict.fromkeys(("bags", "instances", "tasks", "width"), c_int64),
        ptr=c_void_p,
        z=c_void_p,
        z_stride=c_int64,
        scores=c_void_p,
        scores_stride=c_int64,
        scores_task_stride=c_int64,
        z_type=c_int,
        scores_type=c_int,
    )
    names = ("pooled", "entropy", "lse", "workspace")
    forward = structure("BagPoolForward", **{"in": common}, **dict.fromkeys(names, c_void_p))
    backward = structure(
        "BagPoolBackward",
        **{
            "in": common,
            "d_pooled": c_void_p,
            "d_pooled_bag_stride": c_int64,
            "d_pooled_task_stride": c_int64,
        },
        **dict.fromkeys(("d_entropy", "d_lse", "pooled", "dz", "d_scores", "workspace"), c_void_p),
    )
    return common, forward, backward


@dataclass
class Case:
    """Inputs of the operation, and the gradients of its results (None: not used)."""

    z: Tensor
    scores: Tensor
    ptr: Tensor
    d_pooled: Tensor | None
    d_entropy: Tensor | None
    d_lse: Tensor | None


def make(
    sizes: list[int],
    width: int,
    tasks: int,
    dtype: torch.dtype = torch.float32,
    scores_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """Random inputs for bags of the given sizes."""
    g = torch.Generator().manual_seed(seed)
    n = sum(sizes)
    ptr = torch.tensor([0, *sizes]).cumsum(0)
    shape = (len(sizes), tasks)
    return Case(
        torch.randn(n, width, generator=g).to(dtype),
        (2 * torch.randn(n, tasks, generator=g)).to(scores_dtype or dtype),
        ptr,
        torch.randn(*shape, width, generator=g).to(dtype),
        torch.randn(shape, generator=g),
        torch.randn(shape, generator=g),
    )


def _input(arena: Arena, case: Case, shift: int) -> Any:
    common, _, _ = _structures()
    z, scores, ptr = arena.put(case.z, shift), arena.put(case.scores, shift), arena.put(case.ptr)
    return common(
        *(len(case.ptr) - 1, z.shape[0], scores.shape[1], z.shape[1]),
        *(pointer(ptr), pointer(z), z.stride(0), pointer(scores), scores.stride(0), scores.stride(1)),
        *(dtype_code(z.dtype), dtype_code(scores.dtype)),
    )


def forward(case: Case, max_blocks: int = 1000, order: int = 0, shift: int = 0) -> list[Tensor]:
    """The emulated forward kernel: pooled, entropy, lse."""
    arena = Arena()
    source = _input(arena, case, shift)
    bags, tasks, width = len(case.ptr) - 1, case.scores.shape[1], case.z.shape[1]
    pooled = arena.empty(bags, tasks, width, dtype=case.z.dtype)
    entropy, lse = (arena.empty(bags, tasks, dtype=torch.float32) for _ in range(2))
    space = arena.workspace(workspace_size("bag_pool_forward", source))
    arguments = _structures()[1](source, *map(pointer, (pooled, entropy, lse, space)))
    call("bag_pool_forward", arguments, arena, max_blocks, order)
    return [pooled, entropy, lse]


def backward(
    case: Case, pooled: Tensor, max_blocks: int = 1000, order: int = 0, shift: int = 0, pooled_shift: int = 0
) -> list[Tensor]:
    """The emulated backward kernel: dz, d_scores."""
    arena = Arena()
    source = _input(arena, case, shift)
    d_pooled, d_entropy, d_lse = (
        None if d is None else arena.put(d, s)
        for d, s in zip((case.d_pooled, case.d_entropy, case.d_lse), (shift, 0, 0), strict=True)
    )
    dz = arena.empty(*case.z.shape, dtype=case.z.dtype)
    d_scores = arena.empty(*case.scores.shape, dtype=case.scores.dtype)
    space = arena.workspace(workspace_size("bag_pool_backward", source))
    strides = (0, 0) if d_pooled is None else d_pooled.stride()[:2]
    rest = (d_entropy, d_lse, arena.put(pooled, pooled_shift), dz, d_scores, space)
    arguments = _structures()[2](source, pointer(d_pooled), *strides, *map(pointer, rest))
    call("bag_pool_backward", arguments, arena, max_blocks, order)
    return [dz, d_scores]


def expected(case: Case, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
    """The reference, in its inputs' types or in float64: results and gradients."""
    z, scores = (x.to(dtype or x.dtype).requires_grad_() for x in (case.z, case.scores))
    results = reference(z, scores, case.ptr)
    used = [
        (r, d.to(r.dtype))
        for r, d in zip(results, (case.d_pooled, case.d_entropy, case.d_lse), strict=True)
        if d is not None
    ]
    # lse of an empty bag is -inf whatever the inputs are.
    used = [(torch.where(torch.isfinite(r), r, 0), d) for r, d in used]
    gradients = torch.autograd.grad([r for r, _ in used], [z, scores], [d for _, d in used], allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, (z, scores), strict=True)]
    return [r.detach() for r in results], filled


def check(case: Case, shift: int = 0, pooled_shift: int = 0) -> None:
    """Parity, forward and backward, and the same bits for every grid and order."""
    exact, exact_gradients = expected(case, torch.float64)
    base, base_gradients = expected(case, None)
    results = repeatable(lambda blocks, order: forward(case, blocks, order, shift))
    for name, got, want, baseline in zip(("pooled", "entropy", "lse"), results, exact, base, strict=True):
        assert_parity(got, want, baseline, 2, name)
    gradients = repeatable(lambda blocks, order: backward(case, results[0], blocks, order, shift, pooled_shift))
    for name, got, want, baseline in zip(("dz", "d_scores"), gradients, exact_gradients, base_gradients, strict=True):
        # d_scores goes through pooled, which arrives in z's type, also where the scores are wider.
        assert_parity(got, want, baseline, 3, name, case.z.dtype)


RAGGED = [3, 0, 1, 150, 0, 0, 64, 7, 200, 1, 0]


@pytest.mark.parametrize("width", [1, 3, 59, 97, 256, 264, 301])
@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_widths(width: int, dtype: torch.dtype) -> None:
    check(make(RAGGED, width, 3, dtype))


@pytest.mark.parametrize("tasks", [1, 2, 4, 8, 11])
def test_tasks(tasks: int) -> None:
    check(make(RAGGED, 36, tasks))


@pytest.mark.parametrize(
    "sizes",
    [[], [0], [1], [64], [65], [0, 0, 128, 0], [500], [63, 1, 1, 63], [2] * 70, [0] * 70 + [3]],
    ids=str,
)
def test_bags(sizes: list[int]) -> None:
    check(make(sizes, 20, 2))


def test_scores_of_another_type() -> None:
    check(make(RAGGED, 24, 5, torch.bfloat16, torch.float32))


def test_strided_and_unaligned() -> None:
    case = make(RAGGED, 80, 6)
    case.z = case.z[:, :40]
    case.scores = case.scores[:, ::2]
    assert case.d_pooled is not None
    assert case.d_entropy is not None
    assert case.d_lse is not None
    case.d_pooled = case.d_pooled[:, ::2, 40:]
    case.d_entropy, case.d_lse = (x[:, ::2].contiguous() for x in (case.d_entropy, case.d_lse))
    check(case)
    check(case, shift=1)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_pooled_at_an_odd_offset(dtype: torch.dtype) -> None:
    """Contiguous as the operation asks, but not aligned as its other inputs are."""
    check(make(RAGGED, 64, 3, dtype), pooled_shift=1)


@pytest.mark.parametrize("kept", ["d_pooled", "d_entropy", "d_lse"])
def test_gradients_that_are_not_used(kept: str) -> None:
    case = make(RAGGED, 8, 2)
    for name in {"d_pooled", "d_entropy", "d_lse"} - {kept}:
        setattr(case, name, None)
    check(case)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 5), st.integers(0, 200)), max_size=12),
    width=st.integers(1, 70),
    tasks=st.integers(1, 12),
    dtype=st.sampled_from(STORAGE),
    scores_dtype=st.sampled_from(STORAGE),
    shift=st.integers(0, 1),
)
def test_any_shape(
    sizes: list[int], width: int, tasks: int, dtype: torch.dtype, scores_dtype: torch.dtype, shift: int
) -> None:
    check(make(sizes, width, tasks, dtype, scores_dtype, seed=width), shift)


def test_a_ptr_that_is_wrong_hangs_nothing() -> None:
    for ptr in ([0, 90, 30, 200], [0, 10, 20, 30], [5, 5, 5, 5], [300, 200, 100, 0], [-7, 250, 999, 64]):
        case = make([60, 70, 70], 8, 2)
        case.ptr = torch.tensor(ptr)
        forward(case)
        backward(case, torch.zeros(3, 2, 8))


def test_longer_units() -> None:
    # From 65,536 instances on a unit is longer.
    case = make([40000, 5, 25531], 1, 1)
    check(case)


def test_large_scores_keep_their_digits() -> None:
    case = make(RAGGED, 16, 2)
    case.scores = case.scores + 50
    check(case)


def test_scores_that_exclude_instances() -> None:
    case = make([5, 130, 3], 16, 2)
    case.scores[:5, 0] = -torch.inf  # a whole bag
    case.scores[10:90, 1] = -torch.inf  # a whole unit of the next
    results = forward(case)
    exact, _ = expected(case, torch.float64)
    base, _ = expected(case, None)
    for name, got, want, baseline in zip(("pooled", "entropy", "lse"), results, exact, base, strict=True):
        assert_parity(got, want, baseline, 2, name)
    assert all(torch.isfinite(g).all() for g in backward(case, results[0]))


def test_nan_stays_in_its_bag() -> None:
    case = make([70, 5, 60], 16, 2)
    clean = forward(case), backward(case, forward(case)[0])
    case.scores[71, 1] = torch.nan
    case.z[72, 3] = torch.nan
    results = forward(case)
    assert results[0][1, 1].isnan().all()
    assert results[0][1, 0, 3].isnan()
    for before, after in zip(clean[0], results, strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
    elsewhere = torch.arange(135) // 5 != 14
    for before, after in zip(clean[1], backward(case, results[0]), strict=True):
        assert torch.equal(before[elsewhere], after[elsewhere])
