"""Task-gradient statistics and their combination against loops."""

import math

import pytest
import torch
from torch import Tensor

from tests.reference._checks import leaf
from umda_fast.reference import task_gradients as module
from umda_fast.reference.task_gradients import combine_task_gradients, task_gradient_statistics

BETA = 0.9


def loops(grads: Tensor, ema: Tensor, correction: Tensor, active: list[bool]) -> tuple[Tensor, Tensor]:
    ema = ema.clone()
    tasks, width = ema.shape
    for t in range(tasks):
        for p in range(width if active[t] else 0):
            ema[t, p] = BETA * ema[t, p] + (1 - BETA) * grads[t, p]
    corrected = (ema.double() * correction.double()[:, None]).tolist()
    gram = [[math.fsum(a * b for a, b in zip(r, s, strict=True)) for s in corrected] for r in corrected]
    return ema, torch.tensor(gram, dtype=torch.float64)


@pytest.mark.parametrize(("tasks", "width"), [(1, 1), (2, 7), (5, 30)])
@pytest.mark.parametrize("chunk", [4, 1 << 20])
@pytest.mark.parametrize("some", [False, True])
def test_equals_the_formula(
    monkeypatch: pytest.MonkeyPatch, tasks: int, width: int, chunk: int, some: bool
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    grads, ema = leaf(tasks, width).detach(), leaf(tasks, width, seed=1).detach()
    correction = leaf(tasks, seed=2).detach().abs() + 1
    flags = [not some or t % 2 == 1 for t in range(tasks)]
    want_ema, want = loops(grads, ema, correction, flags)
    gram = task_gradient_statistics([grads], ema, correction, torch.tensor(flags) if some else None, BETA)
    torch.testing.assert_close(ema, want_ema)
    torch.testing.assert_close(gram, want)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("chunk", [5, 1 << 20])
def test_lists_of_tensors_are_the_columns_in_order(
    monkeypatch: pytest.MonkeyPatch, tasks: int, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    shapes = [(3, 4), (7,), (2, 1, 3), (), (0, 5)]
    width = sum(math.prod(s) for s in shapes)
    buffer = leaf(tasks, width, dtype=torch.float32).detach()
    pieces = []
    for row in buffer:
        parts = row.split([math.prod(s) for s in shapes])
        pieces += [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]
    pieces[0] = pieces[0].T.contiguous().T  # strides must not matter
    ema = leaf(tasks, width, seed=1, dtype=torch.float32).detach()
    other = ema.clone()
    correction = torch.ones(tasks)
    gram = task_gradient_statistics([buffer], ema, correction, None, BETA)
    listed = task_gradient_statistics(pieces, other, correction, None, BETA)
    assert torch.equal(ema, other)
    torch.testing.assert_close(gram, listed)


def test_updates_in_place_and_inactive_rows_are_not_read() -> None:
    ema = leaf(3, 8, dtype=torch.float32).detach()
    before, storage = ema.clone(), ema.data_ptr()
    grads = torch.full((3, 8), math.nan)
    grads[1] = 1.0
    active = torch.tensor([False, True, False])
    gram = task_gradient_statistics([grads], ema, torch.ones(3), active, BETA)
    assert ema.data_ptr() == storage
    assert torch.equal(ema[[0, 2]], before[[0, 2]])
    assert not torch.equal(ema[1], before[1])
    assert gram.isfinite().all()
    assert gram.dtype == torch.float32
    assert torch.equal(gram, gram.T)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_gradients(dtype: torch.dtype) -> None:
    grads = leaf(2, 9, dtype=dtype).detach()
    ema, other = torch.zeros(2, 9), torch.zeros(2, 9)
    gram = task_gradient_statistics([grads], ema, torch.ones(2), None, BETA)
    want = task_gradient_statistics([grads.float()], other, torch.ones(2), None, BETA)
    assert torch.equal(ema, other)
    assert torch.equal(gram, want)


def test_gram_of_many_parameters_is_exact_to_float32() -> None:
    """Two million columns, large terms that cancel: sums in float32 would be off by more than an ulp."""
    width = 1 << 21
    grads = leaf(2, width, dtype=torch.float32).detach() + 100
    grads[1, ::2] *= -1
    ema = torch.zeros(2, width)
    gram = task_gradient_statistics([grads], ema, torch.full((2,), 10.0), None, BETA)
    exact = 100 * ema.double() @ ema.double().T
    assert ((gram - exact).abs() <= torch.finfo(torch.float32).eps * exact.abs()).all()


def test_no_task_and_no_parameter() -> None:
    assert (
        task_gradient_statistics([torch.zeros(3, 0)], torch.zeros(3, 0), torch.ones(3), None, BETA).tolist()
        == [[0.0] * 3] * 3
    )
    out = torch.empty(0)
    combine_task_gradients(torch.zeros(3, 0), torch.ones(3), out)
    assert out.shape == (0,)


@pytest.mark.parametrize("tasks", [1, 4])
def test_combine(tasks: int) -> None:
    ema, weights = leaf(tasks, 11).detach(), leaf(tasks, seed=1).detach()
    out = torch.full((11,), math.nan, dtype=torch.float64)
    storage = out.data_ptr()
    combine_task_gradients(ema, weights, out)
    want = [sum(float(weights[t]) * float(ema[t, p]) for t in range(tasks)) for p in range(11)]
    assert out.data_ptr() == storage
    torch.testing.assert_close(out, torch.tensor(want, dtype=torch.float64))
    low = torch.empty(11, dtype=torch.bfloat16)
    combine_task_gradients(ema.float(), weights.float(), low)
    single = torch.empty(11)
    combine_task_gradients(ema.float(), weights.float(), single)
    assert torch.equal(low, single.bfloat16())


def test_no_gradient_is_recorded() -> None:
    grads, ema, correction, out = leaf(2, 3), torch.zeros(2, 3, dtype=torch.float64), leaf(2), torch.zeros(3)
    assert not task_gradient_statistics([grads], ema, correction, None, BETA).requires_grad
    assert not ema.requires_grad
    combine_task_gradients(leaf(2, 3), correction, out)
    assert not out.requires_grad
