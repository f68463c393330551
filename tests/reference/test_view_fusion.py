"""view_fusion against loops, finite differences and the rules for absent views."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.reference._checks import check_gradients, check_repeats, leaf, same_bits, with_gradients
from umda_fast.reference.view_fusion import view_fusion

Array = npt.NDArray[np.float64]

SHAPES = [(4, 1, 3, 2), (4, 2, 5, 3), (5, 3, 4, 4), (2, 5, 1, 3)]


def inputs(n: int, views: int, width: int, narrow: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = (n, views, width), (n, views), (n, views, narrow)
    return [leaf(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def some_mask(n: int, views: int) -> Tensor:
    """Every instance has a view, the first exactly one; the others all but one in turn."""
    mask = torch.ones(n, views, dtype=torch.bool)
    if views > 1:
        mask[torch.arange(n), torch.arange(n) % views] = False
        mask[0] = torch.arange(views) == views - 1
    return mask


def floats(*arguments: Any, **options: Any) -> list[Tensor]:
    return [x for x in view_fusion(*arguments, **options) if x.is_floating_point()]


def loops(y: Array, scores: Array, projected: Array, mask: npt.NDArray[np.bool_]) -> tuple[Any, ...]:
    """The formulas of section 1, one number at a time."""
    n, views, width = y.shape
    z, beta = np.zeros((n, width)), np.zeros((n, views))
    mean, variance, count = np.zeros((views, width)), np.zeros((views, width)), np.zeros(views, dtype=np.int64)
    cosines = []
    for i in range(n):
        present = [u for u in range(views) if mask[i, u]]
        total = sum(math.exp(scores[i, u]) for u in present)
        for u in present:
            beta[i, u] = math.exp(scores[i, u]) / total
            z[i] += beta[i, u] * y[i, u]
            for w in (w for w in present if w > u):
                a, b = projected[i, u], projected[i, w]
                cosines.append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    for u in range(views):
        rows = y[mask[:, u], u]
        count[u] = len(rows)
        if len(rows):
            mean[u], variance[u] = rows.mean(0), rows.var(0)
    return z, beta, mean, variance, count, np.float64(sum(cosines)), np.int64(len(cosines))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula(shape: tuple[int, ...], masked: bool) -> None:
    leaves = inputs(*shape)
    mask = some_mask(*shape[:2])
    found = view_fusion(*leaves, mask if masked else None)
    full = np.ones(shape[:2], dtype=bool)
    expected = loops(*(x.detach().numpy() for x in leaves), mask.numpy() if masked else full)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, torch.as_tensor(want))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(shape: tuple[int, ...], masked: bool) -> None:
    mask = some_mask(*shape[:2]) if masked else None
    check_gradients(lambda *x: floats(*x, mask=mask), inputs(*shape))
    check_gradients(lambda *x: floats(*x, mask=mask)[:4], inputs(*shape)[:2], twice=False)


def test_nothing_leaks_from_absent_views() -> None:
    mask = some_mask(5, 3)
    clean = inputs(5, 3, 4, 4)
    dirty = [x.detach().clone() for x in clean]
    for x in dirty:
        x[~mask] = math.nan
    outputs, gradients = with_gradients(lambda *x: floats(*x, mask=mask), dirty)
    expected = with_gradients(lambda *x: floats(*x, mask=mask), clean)
    assert same_bits(outputs + gradients, expected[0] + expected[1])
    for x in (outputs[1], *gradients):
        assert not x[~mask].any()


def test_no_nan_on_the_way_back() -> None:
    """Not even inside backward, where anomaly detection would report it."""
    mask = some_mask(4, 3)
    with torch.autograd.set_detect_anomaly(True):
        with_gradients(lambda *x: floats(*x, mask=mask), inputs(4, 3, 2, 3))
        with_gradients(floats, inputs(4, 1, 2, 3))


def test_far_from_zero() -> None:
    """The variance about the mean, in float32, where E[x^2] - E[x]^2 has no digit left."""
    y = 1e4 + leaf(500, 2, 3).detach().float()
    variance = view_fusion(y, torch.zeros(500, 2))[3]
    torch.testing.assert_close(variance.double(), y.double().var(0, correction=0), rtol=1e-5, atol=0)


def test_views_that_nobody_has_and_zero_projections() -> None:
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[:, 1] = True
    leaves = [x.detach() for x in inputs(4, 3, 2, 3)]
    outputs, gradients = with_gradients(lambda *x: floats(*x, mask=mask), leaves)
    assert not outputs[2][[0, 2]].any()
    assert not outputs[3][[0, 2]].any()
    assert not gradients[2].any()
    assert view_fusion(*leaves, mask)[4].tolist() == [0, 4, 0]
    leaves[2][0] = 0
    outputs, gradients = with_gradients(floats, leaves)
    assert all(x.isfinite().all() for x in outputs + gradients)


def test_no_instances() -> None:
    outputs, gradients = with_gradients(floats, inputs(0, 3, 2, 4))
    assert [tuple(x.shape) for x in outputs] == [(0, 2), (0, 3), (3, 2), (3, 2), ()]
    assert all(not x.any() for x in outputs + gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    low = [x.detach() for x in inputs(6, 3, 2, 5, dtype=dtype)]
    got, want = floats(*low), floats(*(x.float() for x in low))
    assert same_bits(got, [want[0].to(dtype), *want[1:]])
    assert [x.dtype for x in with_gradients(floats, low)[1]] == [dtype] * 3


def test_repeats_and_traces() -> None:
    leaves = [x.float() for x in inputs(300, 4, 16, 8)]
    mask = some_mask(300, 4)
    check_repeats(lambda *x: floats(*x, mask=mask), leaves)
    traced = torch.compile(view_fusion, backend="aot_eager", fullgraph=True)
    small = inputs(3, 3, 2, 3)
    for got, want in zip(traced(*small), view_fusion(*small), strict=True):
        torch.testing.assert_close(got, want)
