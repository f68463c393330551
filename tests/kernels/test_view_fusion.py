"""The Triton kernels of view_fusion against the float64 reference, in the interpreter."""

import math

import pytest
import torch
from torch import Tensor

from tests.csrc.test_view_fusion_cpu import Case, assert_parity, make_case, run_reference
from tests.kernels._parity import assert_close
from umda_fast.kernels import view_fusion as kernels


def run(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    *outputs, rest = kernels.view_fusion(*case.inputs)
    saved = outputs[2], rest, outputs[4]
    return outputs, list(kernels.view_fusion_backward(*case.grads, *case.inputs, *saved))


def check(case: Case) -> None:
    assert_parity(case, *run(case))


@pytest.mark.parametrize("views", [1, 2, 3, 4, 5, 8, 9, 16])
def test_numbers_of_views(views: int) -> None:
    check(make_case(7, views, 11, 5, masked=True))


@pytest.mark.parametrize("views", [1, 3, 6])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_that_are_a_mask(views: int, masked: bool) -> None:
    """Of all views of an instance, and of one."""
    case = make_case(7, views, 11, 5, masked=masked)
    case.scores[::3] = -math.inf
    case.scores[1::3, 0] = -math.inf
    check(case)
    assert not run(case)[0][0][::3].any()


@pytest.mark.parametrize("views", [3, 6])
@pytest.mark.parametrize(("width", "narrow"), [(1, 2), (30, 140), (140, None)])
def test_widths(views: int, width: int, narrow: int | None) -> None:
    check(make_case(5, views, width, narrow))


def test_rows_too_wide_for_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "KEEP_WIDTH", 8)
    check(make_case(5, 2, 140, 140, masked=True))


@pytest.mark.parametrize("views", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(views: int, dtype: torch.dtype) -> None:
    check(make_case(9, views, 20, 12, masked=True, dtype=dtype))
    check(make_case(9, views, 20, 12, dtype=dtype, others=torch.float32))


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("used", ["z", "b", "m", "v", "c", "bmv", ""])
def test_absent_gradients(views: int, used: str) -> None:
    check(make_case(9, views, 12, 6, masked=True, used=used))


@pytest.mark.parametrize("masked", [False, True])
def test_several_chunks(masked: bool) -> None:
    check(make_case(1100, 2, 3, 3, masked=masked))


@pytest.mark.parametrize("masked", [False, True])
def test_far_from_zero(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mean of 1000 standard deviations; with missing views, one that comes late in a chunk of several blocks."""
    monkeypatch.setattr(kernels, "MIN_CHUNK", 60)
    case = make_case(130, 3, 64, None, masked=masked, used="zmv")
    y = case.y + 1e4
    mask = case.mask
    if mask is not None:
        mask[:50, 2] = False
        mask[:, 0] |= ~mask.any(1)
        y = torch.where(mask[..., None], y.nan_to_num(1e4), torch.nan)
    check(case._replace(y=y, scores=case.scores.nan_to_num(), mask=mask))


def test_views_that_nobody_has() -> None:
    case = make_case(20, 3, 8, 4)
    mask = torch.zeros(20, 3, dtype=torch.bool)
    mask[:, 1] = True
    mask[4, 2] = True
    outputs, gradients = run(case._replace(mask=mask))
    check(case._replace(mask=mask))
    assert outputs[4].tolist() == [0, 20, 1]
    assert outputs[6] == 1
    alone = torch.arange(20) != 4
    assert (gradients[2][alone] == 0).all()


def test_short_projections() -> None:
    """Around and below the clamp of the norms, and zeros."""
    for views in (3, 5):
        case = make_case(12, views, 8, 16)
        assert case.projected is not None
        case.projected[:4] *= 1e-12
        case.projected[4:8, 1] = 0
        gradients = run(case)[1][2]
        exact, own = (run_reference(case, dtype)[1][2] for dtype in (torch.float64, None))
        for rows in (slice(0, 4), slice(4, 8), slice(8, 12)):  # of very different scales
            assert_close("d_projected", gradients[rows], exact[rows], own[rows], 3)


def test_strides() -> None:
    """Other layouts and expanded gradients give the same bits."""
    case = make_case(7, 3, 8, 4, masked=True)
    case = case._replace(d_z=torch.ones(()).expand(7, 8), d_beta=torch.ones(()).expand(7, 3))
    expected = run(case)
    assert case.projected is not None
    assert case.mask is not None
    moved = case._replace(
        y=case.y.permute(2, 1, 0).contiguous().permute(2, 1, 0),
        scores=case.scores.t().contiguous().t(),
        projected=case.projected.transpose(0, 1).contiguous().transpose(0, 1),
        mask=case.mask.t().contiguous().t(),
        d_mean=None if case.d_mean is None else case.d_mean.t().contiguous().t(),
    )
    found = run(moved)
    for a, b in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("views", [3, 5])
def test_nan_stays_in_its_instance(views: int) -> None:
    case = make_case(9, views, 8, 4, used="zbc")
    assert case.projected is not None
    expected = run(case)
    case.y[0, 1, 5], case.scores[4, 0], case.projected[6, 1] = math.nan, math.nan, math.nan
    found = run(case)
    fine = torch.tensor([i not in (0, 4, 6) for i in range(9)])
    for a, b in zip((*expected[0][:2], *expected[1]), (*found[0][:2], *found[1]), strict=True):
        assert torch.equal(a[fine], b[fine])
    assert found[0][0][0].isnan().tolist() == [d == 5 for d in range(8)]
    assert found[0][2].isnan().nonzero().tolist() == [[1, 5]]
    assert found[0][5].isnan()


def test_nothing() -> None:
    for case in (make_case(0, 3, 8, 4, masked=True), make_case(4, 2, 0, 0)):
        check(case)


def test_bad_input() -> None:
    y, scores = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    with pytest.raises(TypeError, match="y: expected float32"):
        kernels.view_fusion(y.double(), scores, None, None)
    with pytest.raises(TypeError, match="projected: expected float32"):
        kernels.view_fusion(y, scores, y.double(), None)
    with pytest.raises(ValueError, match=r"y: expected \[N, V, D\]"):
        kernels.view_fusion(y[0], scores, None, None)
    with pytest.raises(ValueError, match="scores: expected"):
        kernels.view_fusion(y, scores[:1], None, None)
    with pytest.raises(ValueError, match="projected: expected"):
        kernels.view_fusion(y, scores, y[:, :2], None)
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool"):
        kernels.view_fusion(y, scores, None, scores)
    with pytest.raises(ValueError, match="1 to 16 views"):
        kernels.view_fusion(torch.zeros(1, 17, 4), torch.zeros(1, 17), None, None)
    outputs = kernels.view_fusion(y, scores, None, None)
    with pytest.raises(ValueError, match="d_mean: expected"):
        kernels.view_fusion_backward(
            None, None, torch.zeros(3, 3), None, None, y, scores, None, None, outputs[2], outputs[7], outputs[4]
        )
