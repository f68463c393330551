"""cross_view_attention through its public function."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.checks import (
    DTYPES,
    check_compiled,
    check_gradients,
    check_op,
    few,
    keeps_rule,
    leaf,
    repeats,
    some_views,
)
from umda_fast.ops import cross_view_attention
from umda_fast.parity.cases import cross_view_case


def inputs(n: int, views: int, heads: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    q, k, v = (leaf(n, views, heads, width, seed=i, dtype=dtype) for i in range(3))
    wide = torch.promote_types(dtype, torch.float32)
    return [q, k, v, leaf(n, views, heads, seed=3, dtype=dtype), leaf(heads, views, views, seed=4, dtype=wide)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 2, 11), torch.float32),
        ((5, 3, 2, 11), torch.bfloat16),
        ((1, 1, 1, 8), torch.float16),
        ((0, 4, 2, 16), torch.float32),
    ],
)
def test_opcheck(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q, k, v, gate, bias = inputs(*shape, dtype=dtype)
    n, views, heads, _ = shape
    mask = some_views(n, views)
    for b, m in ((None, None), (bias, mask)):
        check_op("cross_view", q, k, v, gate, b, m)
    plain = [x.detach() for x in (q, k, v, gate)]
    d_mass, d_entropy = torch.randn(n, views, views), torch.randn(n, views, heads)
    check_op("cross_view_backward", plain[0], d_mass, d_entropy, *plain, bias.detach(), mask)
    check_op("cross_view_backward", None, None, d_entropy, *plain, None, None)


def test_compiles_as_one_graph() -> None:
    mask = some_views(6, 3)

    def function(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, *, backend: str) -> Any:
        return cross_view_attention(q, k, v, gate, bias=bias, mask=mask, backend=backend)

    check_compiled(function, *inputs(6, 3, 2, 9))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked: bool) -> None:
    mask = some_views(3, 3) if masked else None
    check_gradients(
        lambda q, k, v, gate, bias: cross_view_attention(q, k, v, gate, bias=bias, mask=mask),
        *inputs(3, 3, 2, 8, torch.float64),
    )


@few
@given(
    n=st.integers(0, 30),
    views=st.integers(1, 7),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 9, 59, 97, 256]),
    missing=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(n: int, views: int, heads: int, width: int, missing: bool, dtype: torch.dtype) -> None:
    keeps_rule(cross_view_case("drawn", n, views, heads, width, missing=missing), dtype)


def test_every_dtype_of_16_views() -> None:
    for dtype in DTYPES:
        keeps_rule(cross_view_case("16 views", 6, 16, 2, 16, missing=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats(dtype: torch.dtype) -> None:
    repeats(cross_view_case("large enough for two threads", 700, 3, 2, 32, missing=True), dtype)


def test_strides_change_nothing() -> None:
    q, k, v, gate, bias = (x.detach() for x in inputs(7, 3, 2, 12))
    expected = cross_view_attention(q, k, v, gate, bias=bias)
    packed = torch.stack([q, k, v], 2)
    slices = packed.unbind(2)
    assert not slices[0].is_contiguous()
    reversed_ = [x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (q, k, v)]
    for given_ in (slices, reversed_):
        found = cross_view_attention(*given_, gate.mT.contiguous().mT, bias=bias.mT.contiguous().mT)
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


def test_missing_views_are_not_read_and_get_nothing() -> None:
    arguments = inputs(9, 4, 2, 16)
    mask = some_views(9, 4)
    with torch.no_grad():
        for x in arguments[:4]:
            x[~mask] = math.nan
    q, k, v, gate, bias = arguments
    out = cross_view_attention(q, k, v, gate, bias=bias, mask=mask, backend="cpp")
    for x in out:
        assert (x[~mask] == 0).all()
        assert x.isfinite().all()
    out.out.sum().backward()
    for x in arguments[:4]:
        assert x.grad is not None
        assert (x.grad[~mask] == 0).all()
        assert x.grad.isfinite().all()
    assert bias.grad is not None
    assert (bias.grad.diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("views", [2, 3, 6])
def test_a_bias_of_minus_infinity_is_a_missing_view(backend: str, views: int) -> None:
    """For the view that has it: its results, and the gradients that come from them, are those of the mask."""
    arguments = inputs(7, views, 2, 8)
    gone = torch.arange(views) == views - 1
    mask = (~gone).expand(7, views)
    *_, bias = arguments
    closed = torch.where(gone & ~torch.eye(views, dtype=torch.bool), -math.inf, bias.detach()).requires_grad_()
    results = []
    for b, m in ((bias, mask), (closed, None)):
        out = cross_view_attention(*arguments[:4], bias=b, mask=m, backend=backend)
        kept = [x[:, :-1] for x in out]
        total = torch.stack([(x * x).sum() for x in kept]).sum()
        results.append([*kept, *torch.autograd.grad(total, [*arguments[:4], b])])
    for found, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_view_that_may_listen_to_nobody_is_alone(backend: str, missing: bool) -> None:
    q, k, v, gate, bias = (x.detach() for x in inputs(7, 3, 2, 8))
    bias[:, 1] = -math.inf
    mask = some_views(7, 3) if missing else torch.ones(7, 3, dtype=torch.bool)
    out, mass, entropy = cross_view_attention(q, k, v, gate, bias=bias, mask=mask, backend=backend)
    there = mask[:, 1]
    assert torch.equal(out[there, 1], v[there, 1])
    assert torch.equal(mass[there, 1], torch.eye(3)[1].expand(int(there.sum()), 3))
    for x in (out, mass, entropy):
        assert x.isfinite().all()
    assert not entropy[:, 1].any()
    torch.testing.assert_close(mass.sum(-1), mask.float())


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_nan_is_no_mask(backend: str) -> None:
    q, k, v, gate, bias = (x.detach() for x in inputs(3, 3, 2, 8))
    bias[:, 1] = -math.inf
    k[1] = math.nan
    for x in cross_view_attention(q, k, v, gate, bias=bias, backend=backend)[::2]:
        assert x[1].isnan().all()
        assert x[[0, 2]].isfinite().all()


def test_one_view_is_the_view() -> None:
    q, k, v, gate, _ = inputs(5, 1, 2, 8)
    for backend in ("cpp", "reference"):
        out, mass, entropy = cross_view_attention(q, k, v, gate, backend=backend)
        assert torch.equal(out, v)
        assert (mass == 1).all()
        assert (entropy == 0).all()


def test_outputs_alias_no_input() -> None:
    q, k, v, gate, _ = inputs(5, 1, 2, 8)
    for backend in ("cpp", "reference"):
        out = cross_view_attention(q, k, v, gate, backend=backend).out
        assert out.untyped_storage().data_ptr() != v.untyped_storage().data_ptr()
