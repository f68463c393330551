"""view_fusion on the CPU against the reference, forward and backward."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, poisoned_memory, run_on, threads
from umda_fast.reference.view_fusion import view_fusion as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUTS = ("z", "beta", "mean", "variance", "count", "cosine_sum", "pairs")
DIFFERENTIABLE = (0, 1, 2, 3, 5)
GRADIENTS = ("dy", "d_scores", "d_projected")


class Case(NamedTuple):
    y: Tensor
    scores: Tensor
    projected: Tensor | None
    mask: Tensor | None
    d_z: Tensor | None
    d_beta: Tensor | None
    d_mean: Tensor | None
    d_variance: Tensor | None
    d_cosine_sum: Tensor | None

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self[:4]

    @property
    def grads(self) -> tuple[Tensor | None, ...]:
        return self[4:]


def make_case(
    count: int, views: int, width: int, narrow: int | None = 9, *, masked: bool = False,
    dtype: torch.dtype = torch.float32, others: torch.dtype | None = None, seed: int = 0, used: str = "zbmvc",
) -> Case:  # fmt: skip
    """Views off 0, projections with something in common; NaN wherever a view is missing."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    y = (normal(count, views, width) + 3 * normal(views, width)).to(dtype)
    scores = (2 * normal(count, views)).to(others or dtype)
    projected = None
    if narrow is not None:
        projected = (normal(count, views, narrow) + normal(count, 1, narrow)).to(others or dtype)
    grads: list[Tensor | None] = [
        normal(count, width).to(dtype),
        normal(count, views),
        normal(views, width),
        normal(views, width),
        normal(1)[0],
    ]
    mask = None
    if masked:
        mask = torch.rand(count, views, generator=generator) > 0.4
        mask[:, 0] |= ~mask.any(1)
        for tensor in (y, scores, projected, grads[1]):
            if tensor is not None:
                tensor[~mask] = math.nan
    grads = [g if name in used else None for name, g in zip("zbmvc", grads, strict=True)]
    return Case(y, scores, projected, mask, *grads)


def run_reference(case: Case, dtype: torch.dtype | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients in ``dtype``, or in the case's own."""
    leaves = [x.to(dtype or x.dtype).clone().requires_grad_() for x in case[:3] if x is not None]
    outputs = reference(*leaves, *([None] if case.projected is None else []), case.mask)
    pairs = [(outputs[i], g) for i, g in zip(DIFFERENTIABLE, case.grads, strict=True) if g is not None]
    pairs = [(o, g.nan_to_num().to(o.dtype)) for o, g in pairs if o.requires_grad]
    found: list[Tensor] = [torch.zeros_like(x) for x in leaves]
    if pairs:
        found = list(
            torch.autograd.grad(
                [o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True, materialize_grads=True
            )
        )
    return [o.detach() for o in outputs], found


def run(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    *outputs, rest = torch.ops.umda_fast.view_fusion(*case.inputs)
    saved = outputs[2], rest, outputs[4]
    return outputs, list(torch.ops.umda_fast.view_fusion_backward(*case.grads, *case.inputs, *saved))


def check(case: Case) -> None:
    with poisoned_memory():
        outputs, gradients = run(case)
    assert_parity(case, outputs, gradients)


def assert_parity(case: Case, outputs: list[Tensor], gradients: list[Tensor]) -> None:
    """Outputs by the 2x rule, gradients by the 3x rule, and zeros where a view is absent."""
    exact, exact_gradients = run_reference(case, torch.float64)
    own, own_gradients = run_reference(case, None)
    assert [x.dtype for x in outputs] == [x.dtype for x in own]
    for name, mine, right, theirs in zip(OUTPUTS, outputs, exact, own, strict=True):
        if mine.is_floating_point():
            assert_close(name, mine, right, theirs, 2)
        else:
            assert torch.equal(mine, right), name
    if case.projected is None:
        assert gradients.pop().shape == (0,)
    for name, mine, right, theirs in zip(GRADIENTS, gradients, exact_gradients, own_gradients, strict=False):
        assert mine.dtype == theirs.dtype, name
        assert_close(name, mine, right, theirs, 3)
    if case.mask is not None:
        for tensor in (outputs[1], *gradients):
            assert (tensor[~case.mask] == 0).all()


@settings(max_examples=60, deadline=None)
@given(
    count=st.sampled_from([0, 1, 7, 8, 33, 70, 300]),
    views=st.integers(1, 16),
    widths=st.sampled_from([(1, 2), (59, 30), (32, 16), (97, None), (256, 128), (0, 0), (70, 5)]),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_against_reference(
    count: int, views: int, widths: tuple[int, int | None], masked: bool, dtype: torch.dtype, seed: int
) -> None:
    check(make_case(count, views, *widths, masked=masked, dtype=dtype, seed=seed))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("used", ["z", "b", "m", "v", "c", "zc", "bmv", "zm", ""])
def test_gradients_that_nobody_asks_for(used: str, masked: bool) -> None:
    check(make_case(100, 3, 40, 20, masked=masked, used=used))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_partitions(dtype: torch.dtype) -> None:
    check(make_case(20_000, 3, 16, 8, masked=True, dtype=dtype))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 128), (torch.bfloat16, 256)])
def test_past_the_caches(dtype: torch.dtype, width: int) -> None:
    """Results so many that they are written around the caches."""
    check(make_case(66_000, 1, width, None, dtype=dtype))


def test_types_may_differ() -> None:
    check(make_case(50, 3, 24, 12, masked=True, dtype=torch.bfloat16, others=torch.float32))
    check(make_case(50, 3, 24, 12, dtype=torch.float32, others=torch.float16))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("used", ["zmvc", "v"])
def test_far_from_zero(masked: bool, used: str) -> None:
    """A mean of 1000 standard deviations, which E[x^2] - E[x]^2 would not survive, also where a view comes late."""
    case = make_case(3000, 3, 20, None, masked=masked, used=used)
    y = case.y + 1e4
    y[5] += 100  # an outlier among the rows that the shift is made of
    mask = case.mask
    if mask is not None:
        mask[:2000, 2] = False
        mask[:, 0] |= ~mask.any(1)
        y = torch.where(mask[..., None], y.nan_to_num(1e4), torch.nan)
    check(case._replace(y=y, scores=case.scores.nan_to_num(), mask=mask))


def test_constant_features_have_no_variance() -> None:
    y = torch.full((1000, 2, 5), 1234.567)
    outputs = torch.ops.umda_fast.view_fusion(y, torch.zeros(1000, 2), None, None)
    assert torch.equal(outputs[2], y[0])
    assert (outputs[3] == 0).all()


def test_views_that_nobody_has() -> None:
    case = make_case(40, 4, 12, masked=True)
    mask = torch.zeros(40, 4, dtype=torch.bool)
    mask[:, 0] = True
    mask[3, 2] = True
    case = case._replace(mask=mask, y=case.y.nan_to_num(1.0), scores=case.scores.nan_to_num())
    assert case.projected is not None
    case = case._replace(projected=case.projected.nan_to_num(1.0), d_beta=torch.ones(40, 4))
    check(case)
    outputs, gradients = run(case)
    assert outputs[4].tolist() == [40, 0, 1, 0]
    assert (outputs[3][1:] == 0).all()
    assert outputs[6] == 1
    alone = torch.arange(40) != 3  # no pair: no cosine, not even its rounding
    assert (gradients[2][alone] == 0).all()
    assert (gradients[2][3, [0, 2]] != 0).any()


def test_short_and_long_projections() -> None:
    """Around and below the clamp of the norms, and zeros."""
    case = make_case(64, 3, 8, 16)
    assert case.projected is not None
    case.projected[:8] *= 1e-12
    case.projected[8:16, 1] = 0
    case.projected[16:24] *= 1e12
    outputs, gradients = run(case)
    exact, exact_gradients = run_reference(case, torch.float64)
    own, own_gradients = run_reference(case, None)
    assert_close("cosine_sum", outputs[5], exact[5], own[5], 2)
    for rows in (slice(0, 8), slice(8, 16), slice(16, 24), slice(24, 64)):  # of very different scales
        assert_close("d_projected", gradients[2][rows], exact_gradients[2][rows], own_gradients[2][rows], 3)


def test_large_scores() -> None:
    case = make_case(60, 4, 16, masked=True)
    case.scores.mul_(200)
    check(case)


def test_strides() -> None:
    case = make_case(40, 3, 24, 12, masked=True)
    assert case.projected is not None
    assert case.mask is not None
    expected = run(case)
    wide = torch.full((40, 3, 40), math.nan)
    wide[..., 8:32] = case.y
    for layout in ((0, 1, 2), (2, 1, 0), (1, 0, 2)):
        back = [layout.index(d) for d in range(3)]
        projected = case.projected.permute(layout).contiguous().permute(back)
        y = wide[..., 8:32] if layout == (0, 1, 2) else case.y.permute(layout).contiguous().permute(back)
        moved = case._replace(
            y=y, projected=projected, scores=case.scores.mT.contiguous().mT, mask=case.mask.mT.contiguous().mT
        )
        found = run(moved)
        for a, b in zip((*expected[0], *expected[1]), (*found[0], *found[1]), strict=True):
            assert torch.equal(a, b)
    shared = torch.ones(()).expand(40, 24)  # what sum().backward() gives
    first, second = (run(case._replace(d_z=d))[1] for d in (shared, shared.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("masked", [False, True])
def test_same_bits_for_any_number_of_threads(masked: bool) -> None:
    case = make_case(3000, 3, 20, 10, masked=masked)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            outputs, gradients = run(case)
            results.append((*outputs, *gradients))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_not_a_number_stays_in_its_instance() -> None:
    """Through z, beta and the cosines; the moments of its column are NaN, and no other's."""
    case = make_case(30, 3, 16, 8, used="zbc")
    mask = torch.ones(30, 3, dtype=torch.bool)
    mask[:, 2] = False
    case = case._replace(mask=mask)
    assert case.projected is not None
    case.y[0, 1, 5] = math.nan  # among the rows that the shift is made of
    case.y[4, 1, 3] = math.inf
    case.scores[7, 0] = math.nan
    case.projected[9, 1] = math.nan
    outputs, gradients = run(case)
    fine = torch.tensor([i not in (0, 4, 7, 9) for i in range(30)])
    for tensor in (outputs[0], outputs[1], *gradients):
        assert tensor[fine].isfinite().all()
    assert outputs[0][0].isnan().tolist() == [d == 5 for d in range(16)]
    assert outputs[0][7].isnan().all()
    assert outputs[2].isfinite().logical_not().nonzero().tolist() == [[1, 3], [1, 5]]
    assert outputs[5].isnan()
    for tensor in (outputs[1], *gradients):
        assert (tensor[:, 2] == 0).all()


def test_direct_callers_are_checked() -> None:
    y, scores = torch.zeros(4, 3, 8), torch.zeros(4, 3)
    for arguments, message in [
        ((y[0], scores, None, None), "y must have 3 dimensions"),
        ((y, scores[:, :2], None, None), "scores must have size 3"),
        ((y, scores, y[:3], None), "projected must have size 4"),
        ((y.double(), scores, None, None), "y must be float32"),
        ((y, scores, y.double(), None), "projected must be float32"),
        ((y, scores, None, scores), "mask must be Bool"),
        ((torch.zeros(1, 17, 1), torch.zeros(1, 17), None, None), "1 to 16 views"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.umda_fast.view_fusion(*arguments)
    outputs = torch.ops.umda_fast.view_fusion(y, scores, None, None)
    with pytest.raises(RuntimeError, match="d_mean must have size 3"):
        torch.ops.umda_fast.view_fusion_backward(
            None, None, torch.zeros(2, 8), None, None, y, scores, None, None, outputs[2], outputs[7], outputs[4]
        )


def check_instruction_set() -> None:
    for views in (1, 2, 3, 5):
        for width, narrow in ((59, 30), (32, 16), (8, 3)):
            for dtype in DTYPES:
                check(make_case(37, views, width, narrow, masked=views > 1, dtype=dtype))
    test_far_from_zero(True, "v")


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_instruction_sets(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_instruction_set")
