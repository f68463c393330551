"""csrc/cuda/task_gradients.cu, emulated, against the reference in float64."""

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p
from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
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
from umda_fast.reference.task_gradients import combine_task_gradients as reference_combine
from umda_fast.reference.task_gradients import task_gradient_statistics as reference_statistics

BETA = 0.9


@cache
def _structures() -> tuple[Any, Any]:
    statistics = structure(
        "TaskGradientStatistics",
        tasks=c_int64,
        columns=c_int64,
        pieces=c_int64,
        piece_begin=c_void_p,
        grads=c_void_p,
        types=c_void_p,
        ema=c_void_p,
        ema_stride=c_int64,
        correction=c_void_p,
        active=c_void_p,
        beta=c_double,
        gram=c_void_p,
        workspace=c_void_p,
    )
    combination = structure(
        "TaskGradientCombination",
        tasks=c_int64,
        columns=c_int64,
        ema=c_void_p,
        ema_stride=c_int64,
        weights=c_void_p,
        out=c_void_p,
        out_type=c_int,
    )
    return statistics, combination


def statistics(
    grads: list[list[Tensor]],
    ema: Tensor,
    correction: Tensor,
    active: Tensor | None,
    max_blocks: int = 1000,
    order: int = 0,
    shift: int = 0,
) -> list[Tensor]:
    """The emulated kernel on ``grads[task][piece]``: the new ema, and gram."""
    arena = Arena()
    tasks, pieces = len(grads), len(grads[0])
    begin = list(accumulate((g.numel() for g in grads[0]), initial=0))
    held = [arena.put(g, shift) for row in grads for g in row]
    new = arena.put(ema, shift)
    gram = arena.empty(tasks, tasks, dtype=torch.float32)
    flags = None if active is None else arena.put(active)
    begin_list = (c_int64 * len(begin))(*begin)
    grad_list = (c_void_p * len(held))(*map(pointer, held))
    type_list = (c_int * len(held))(*(dtype_code(g.dtype) for g in held))
    arguments = _structures()[0](
        *(tasks, begin[-1], pieces),
        *(ctypes.cast(x, c_void_p) for x in (begin_list, grad_list, type_list)),
        *(pointer(new), new.stride(0), pointer(arena.put(correction)), pointer(flags)),
        *(BETA, pointer(gram), None),
    )
    space = arena.workspace(workspace_size("task_gradient_statistics", arguments))
    arguments.workspace = pointer(space)
    call("task_gradient_statistics", arguments, arena, max_blocks, order)
    return [new, gram]


def check(
    tasks: int,
    sizes: list[int],
    dtypes: list[torch.dtype] | None = None,
    inactive: tuple[int, ...] = (),
    shift: int = 0,
    extra_columns: int = 0,
) -> None:
    """Parity of ema and gram for pieces of the given sizes."""
    g = torch.Generator().manual_seed(tasks)
    dtypes = dtypes or [torch.float32]
    grads = [
        [torch.randn(n, generator=g).to(dtypes[i % len(dtypes)]) for i, n in enumerate(sizes)] for _ in range(tasks)
    ]
    columns = sum(sizes)
    ema = torch.randn(tasks, columns + extra_columns, generator=g)[:, :columns]
    correction = 1 + torch.rand(tasks, generator=g)
    active = None
    if inactive:
        active = torch.ones(tasks, dtype=torch.bool)
        for t in inactive:
            active[t] = False
            grads[t] = [torch.full_like(x, torch.nan) for x in grads[t]]

    wanted = []
    for dtype in (torch.float64, torch.float32):
        new = ema.to(dtype).clone()
        flat = [x.to(dtype) for row in grads for x in row]
        gram = reference_statistics(flat, new, correction.to(dtype), active, BETA)
        wanted.append([new, gram])
    results = repeatable(lambda blocks, order: statistics(grads, ema, correction, active, blocks, order, shift))
    for name, got, exact, baseline in zip(("ema", "gram"), results, *wanted, strict=True):
        assert_parity(got, exact, baseline, 2, name)
    for t in inactive:
        assert torch.equal(results[0][t], ema[t])
    assert torch.equal(results[1], results[1].T)


@pytest.mark.parametrize("tasks", [1, 2, 3, 4, 5, 8, 17, 33, 64])
def test_tasks(tasks: int) -> None:
    check(tasks, [600, 44])


@pytest.mark.parametrize(
    "sizes", [[0], [1], [3, 4097, 0, 256], [4096, 8192], [5] * 90, [1, 2, 3, 59, 97, 256]], ids=str
)
def test_pieces(sizes: list[int]) -> None:
    check(3, sizes)


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
def test_storage(dtype: torch.dtype) -> None:
    check(2, [512, 100, 31], [dtype])


def test_mixed_storage_and_more_pieces_than_fit_one_launch() -> None:
    check(8, [36, 7] * 40, list(STORAGE))


def test_inactive_tasks_keep_their_row() -> None:
    check(4, [300, 5], inactive=(0, 2))


def test_strided_and_unaligned() -> None:
    check(3, [256, 600], extra_columns=7)
    check(3, [256, 600], shift=1)


def test_gram_is_exact_over_many_columns() -> None:
    columns = 300_000
    g = torch.Generator().manual_seed(0)
    grads = [[1 + torch.rand(columns, generator=g)] for _ in range(2)]
    ema = 1 + torch.rand(2, columns, generator=g)
    new, gram = statistics(grads, ema, torch.ones(2), None)
    exact = new.double() @ new.double().T
    assert ((gram.double() - exact).abs() / exact).max() < 1e-6


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("columns", [0, 1, 59, 1024])
def test_combine(columns: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    ema = torch.randn(5, columns + 4, generator=g)[:, :columns]
    weights = torch.randn(5, generator=g)

    def run(max_blocks: int, order: int) -> list[Tensor]:
        arena = Arena()
        out = arena.empty(columns, dtype=dtype)
        source = arena.put(ema)
        call(
            "combine_task_gradients",
            _structures()[1](
                *(5, columns, pointer(source), source.stride(0)),
                *(pointer(arena.put(weights)), pointer(out), dtype_code(dtype)),
            ),
            arena,
            max_blocks,
            order,
        )
        return [out]

    exact, baseline = torch.empty(columns, dtype=torch.float64), torch.empty(columns, dtype=dtype)
    reference_combine(ema.double(), weights.double(), exact)
    reference_combine(ema, weights, baseline)
    assert_parity(repeatable(run)[0], exact, baseline, 2, "out")
