"""fuse_views through its public function."""

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
from umda_fast.ops import _library, backends_used, fuse_views
from umda_fast.ops import view_fusion as module
from umda_fast.parity.cases import view_fusion_case


def inputs(n: int, views: int, width: int, narrow: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [leaf(n, views, width, seed=0, dtype=dtype), leaf(n, views, seed=1), leaf(n, views, narrow, seed=2)]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((5, 3, 11, 4), torch.float32),
        ((5, 1, 8, 1), torch.bfloat16),
        ((0, 4, 6, 3), torch.float16),
    ],
)
def test_opcheck(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    y, scores, projected = inputs(*shape, dtype=dtype)
    n, views, width, _ = shape
    mask = some_views(n, views)
    for p, m in ((None, None), (projected, mask)):
        check_op("view_fusion", y, scores, p, m)
    plain = [x.detach() for x in (y, scores, projected)]
    outputs = _library.op("view_fusion")(*plain, mask)
    saved = outputs[2], outputs[7], outputs[4]
    grads = plain[0].sum(1), torch.randn(n, views), torch.randn(views, width), torch.randn(views, width), torch.ones(())
    check_op("view_fusion_backward", *grads, *plain, mask, *saved)
    check_op("view_fusion_backward", None, grads[1], None, None, None, *plain[:2], None, None, *saved)


def test_compiles_as_one_graph() -> None:
    mask = some_views(6, 3)

    def function(y: Tensor, scores: Tensor, projected: Tensor, *, backend: str) -> Any:
        return fuse_views(y, scores, projected, mask=mask, backend=backend)

    check_compiled(function, *inputs(6, 3, 9, 4))


@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(masked: bool) -> None:
    mask = some_views(5, 3) if masked else None
    leaves = [leaf(5, 3, 4, seed=0), leaf(5, 3, seed=1), leaf(5, 3, 3, seed=2)]
    check_gradients(
        lambda *x: [o for o in fuse_views(*x, mask=mask) if o.is_floating_point()],
        *(x.detach().double().requires_grad_() for x in leaves),
    )


@few
@given(
    n=st.integers(0, 60),
    views=st.integers(1, 16),
    width=st.sampled_from([2, 8, 59, 97, 256]),
    narrow=st.sampled_from([None, 3, 30, 128]),
    missing=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(n: int, views: int, width: int, narrow: int | None, missing: bool, dtype: torch.dtype) -> None:
    keeps_rule(view_fusion_case("drawn", n, views, width, narrow, missing=missing), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats(dtype: torch.dtype) -> None:
    repeats(view_fusion_case("large enough for two threads", 1500, 3, 32, 16, missing=True), dtype)


def test_no_output_without_a_projection_or_a_gradient() -> None:
    y, scores, projected = inputs(6, 3, 5, 4)
    for backend in ("cpp", "reference"):
        out = fuse_views(y, scores, backend=backend)
        assert out.cosine_sum == 0
        assert out.pairs == 18
        assert out.instances.tolist() == [6] * 3
        out = fuse_views(y, scores, projected.detach(), backend=backend)
        gradients = torch.autograd.grad(out.variance.sum(), [y, scores], allow_unused=True, materialize_grads=True)
        assert gradients[0].any()
        assert not gradients[1].any()


def test_inputs_of_several_dtypes() -> None:
    """What autocast makes: a narrow projection of wide features, and the other way round."""
    y, scores, projected = inputs(6, 3, 5, 4)
    wide = fuse_views(y, scores, projected.bfloat16().float())
    mixed = fuse_views(y, scores, projected.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(wide, mixed, strict=True))
    mixed = fuse_views(y.bfloat16(), scores, projected)
    assert [x.dtype for x in mixed[:4]] == [torch.bfloat16] + 3 * [torch.float32]
    mixed.cosine_sum.backward()
    assert projected.grad is not None
    assert projected.grad.dtype == torch.float32


def test_missing_views_are_not_read_and_get_nothing() -> None:
    leaves = inputs(9, 4, 16, 8)
    mask = some_views(9, 4)
    with torch.no_grad():
        for x in leaves:
            x[~mask] = math.nan
    for backend in ("cpp", "reference"):
        out = fuse_views(*leaves, mask=mask, backend=backend)
        assert all(x.isfinite().all() for x in out)
        assert (out.beta[~mask] == 0).all()
        gradients = torch.autograd.grad(sum(x.square().sum() for x in out if x.requires_grad), leaves)
        for gradient in gradients:
            assert gradient.isfinite().all()
            assert (gradient[~mask] == 0).all()
            assert gradient[mask].any()


def test_one_view_is_the_view() -> None:
    y, scores, projected = inputs(5, 1, 8, 4)
    for backend in ("cpp", "reference"):
        out = fuse_views(y, scores, projected, backend=backend)
        assert torch.equal(out.z, y[:, 0])
        assert (out.beta == 1).all()
        assert out.pairs == out.cosine_sum == 0


def test_the_kernel_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr(module, "reference", called)
    y, scores, projected = inputs(5, 3, 8, 4)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        fuse_views(y, scores, projected).z.sum().backward()
    assert backends_used()["view_fusion"] == "cpp"
    names = {event.key for event in profile.key_averages()}
    assert {"umda_fast::view_fusion", "umda_fast::view_fusion_backward"} <= names


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.zeros(4, 3)}, ValueError, r"y must have shape \[N, V, D\], got \[4, 3\]"),
        ({"y": torch.zeros(4, 3, 2).int()}, TypeError, "y must be float32 or .*, got int32"),
        ({"y": torch.zeros(4, 17, 2)}, ValueError, r"V \(y.shape\[1\]\) must be in 1..16, got 17"),
        ({"scores": torch.zeros(4, 2)}, ValueError, r"scores must have shape \[4, 3\], got \[4, 2\]"),
        (
            {"scores": torch.zeros(4, 3).double()},
            TypeError,
            "scores must be float32 or bfloat16 or float16, got float64",
        ),
        ({"projected": torch.zeros(4, 3)}, ValueError, r"projected must have shape \[4, 3, P\], got \[4, 3\]"),
        ({"projected": torch.zeros(4, 3, 2).to("meta")}, ValueError, "projected must be on the device of y, cpu"),
        ({"mask": torch.ones(4, 3)}, TypeError, "mask must be bool, got float32"),
        ({"mask": torch.ones(3, 4).bool()}, ValueError, r"mask must have shape \[4, 3\], got \[3, 4\]"),
        ({"mask": torch.zeros(4, 3).bool()}, ValueError, "mask must leave every instance .* instance 0 has none"),
    ],
)
def test_bad_input(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    good = {"y": torch.zeros(4, 3, 2), "scores": torch.zeros(4, 3), "projected": None, "mask": None}
    with pytest.raises(error, match=message):
        fuse_views(**{**good, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_scores_of_minus_infinity_are_a_mask(backend: str) -> None:
    """Of one view as if it had no weight; of all views of an instance: 0, without a gradient to anything."""
    y, projected = leaf(4, 3, 5, seed=0), leaf(4, 3, 2, seed=1)
    scores = leaf(4, 3, seed=2).detach()
    scores[1], scores[2, 0] = -math.inf, -math.inf
    scores.requires_grad_()
    out = fuse_views(y, scores, projected, backend=backend)
    assert not out.z[1].any()
    assert not out.beta[1].any()
    assert out.beta[2, 0] == 0
    torch.testing.assert_close(out.beta.sum(1), torch.tensor([1.0, 0.0, 1.0, 1.0]))
    dy, d_scores = torch.autograd.grad(out.z.square().sum() + out.beta.square().sum(), [y, scores])
    assert not dy[1].any()
    assert not d_scores[1].any()
    assert not dy[2, 0].any()
    assert dy.isfinite().all()
    assert d_scores.isfinite().all()
