"""cross_view against loops, finite differences and the rules for absent views."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from tests.reference._checks import check_gradients, check_repeats, leaf, same_bits, with_gradients
from umda_fast.reference.cross_view import cross_view

Array = npt.NDArray[np.float64]

SHAPES = [(3, 1, 1, 3), (4, 2, 3, 5), (3, 3, 1, 7), (2, 5, 3, 1), (1, 5, 2, 3)]


def inputs(n: int, views: int, heads: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    vectors = [leaf(n, views, heads, width, seed=i, dtype=dtype) for i in range(3)]
    return [*vectors, leaf(n, views, heads, seed=3, dtype=dtype), leaf(heads, views, views, seed=4)]


def some_mask(n: int, views: int) -> Tensor:
    """Every instance has a view; the first instance exactly one, the others all but one in turn."""
    mask = torch.ones(n, views, dtype=torch.bool)
    for i in range(n):
        if views > 1:
            mask[i, i % views] = False
    mask[0] = torch.arange(views) == views - 1
    return mask


def loops(
    q: Array, k: Array, v: Array, gate_logits: Array, bias: Array, mask: npt.NDArray[np.bool_]
) -> tuple[Array, ...]:
    """The formula of section 1, one number at a time."""
    n, views, heads, width = q.shape
    out, mass = np.zeros((n, views, heads, width)), np.zeros((n, views, views))
    entropy = np.zeros((n, views, heads))
    for i in range(n):
        present = [u for u in range(views) if mask[i, u]]
        for u in present:
            others = [w for w in present if w != u]
            for h in range(heads):
                p = {u: 1.0}
                if others:
                    score = {
                        w: sum(q[i, u, h, d] * k[i, w, h, d] for d in range(width)) / math.sqrt(width)
                        + bias[h, u, w]
                        for w in others
                    }
                    total = sum(math.exp(s) for s in score.values())
                    g = 1 / (1 + math.exp(-gate_logits[i, u, h]))
                    p = {u: g, **{w: (1 - g) * math.exp(score[w]) / total for w in others}}
                for w, share in p.items():
                    out[i, u, h] += share * v[i, w, h]
                    mass[i, u, w] += share / heads
                    entropy[i, u, h] -= share * math.log(share)
    return out, mass, entropy


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_formula(shape: tuple[int, ...], masked: bool, biased: bool) -> None:
    q, k, v, gate, bias = inputs(*shape)
    mask = some_mask(*shape[:2])
    result = cross_view(q, k, v, gate, bias if biased else None, mask if masked else None)
    expected = loops(
        *(x.detach().numpy() for x in (q, k, v, gate, bias if biased else torch.zeros_like(bias))),
        mask.numpy() if masked else np.ones(shape[:2], dtype=bool),
    )
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, torch.from_numpy(want))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives(shape: tuple[int, ...], masked: bool) -> None:
    mask = some_mask(*shape[:2]) if masked else None
    q, k, v, gate, bias = inputs(*shape)
    check_gradients(lambda *x: cross_view(*x, mask=mask), [q, k, v, gate, bias])
    check_gradients(lambda *x: cross_view(*x, mask=mask), [q, k, v, gate], twice=False)


@pytest.mark.parametrize("output", [0, 1, 2])
def test_derivatives_of_one_output(output: int) -> None:
    mask = some_mask(4, 3)
    check_gradients(lambda *x: cross_view(*x, mask=mask)[output], inputs(4, 3, 2, 3), twice=False)


def test_one_view_passes_through() -> None:
    q, k, v, gate, bias = inputs(4, 1, 2, 3)
    out, mass, entropy = cross_view(q, k, v, gate, bias)
    assert torch.equal(out, v)
    assert torch.equal(mass, torch.ones(4, 1, 1, dtype=torch.float64))
    assert not entropy.any()
    assert not entropy.signbit().any()
    (weight,) = torch.autograd.grad(out.sum() + mass.sum() + entropy.sum(), v)
    assert torch.equal(weight, torch.ones_like(v))


def test_mass_is_a_distribution_over_present_views() -> None:
    mask = some_mask(4, 5)
    _, mass, entropy = cross_view(*inputs(4, 5, 2, 3), mask=mask)
    torch.testing.assert_close(mass.sum(-1), mask.double())
    assert not mass.masked_select(~(mask[:, :, None] & mask[:, None, :])).any()
    limit = mask.sum(1).log()[:, None, None]
    assert (entropy >= 0).all()
    assert (entropy <= limit + torch.finfo(torch.float64).eps * 8).all()


def test_nothing_leaks_from_absent_views() -> None:
    mask = some_mask(4, 3)
    clean = inputs(4, 3, 2, 3)
    dirty = [x.detach().clone() for x in clean]
    for x in dirty[:4]:
        x[~mask] = math.nan
    outputs, gradients = with_gradients(lambda *x: cross_view(*x, mask=mask), dirty)
    expected = with_gradients(lambda *x: cross_view(*x, mask=mask), clean)
    assert same_bits(outputs + gradients, expected[0] + expected[1])
    for x in outputs + gradients[:4]:
        assert not x[~mask].any()
    assert not gradients[4].diagonal(dim1=1, dim2=2).any()

    # Nor through the gradient that reaches absent rows.
    leaves = [x.requires_grad_() for x in dirty]
    out = cross_view(*leaves, mask=mask)[0]
    weight = torch.ones_like(out).masked_fill(~mask[:, :, None, None], math.nan)
    for gradient in torch.autograd.grad(out, leaves, weight):
        assert gradient.isfinite().all()


def test_no_nan_on_the_way_back() -> None:
    """Not even inside backward, where anomaly detection would report it."""
    mask = some_mask(4, 3)
    with torch.autograd.set_detect_anomaly(True):
        with_gradients(lambda *x: cross_view(*x, mask=mask), inputs(4, 3, 2, 3))
        with_gradients(cross_view, inputs(4, 1, 2, 3))


def test_diagonal_of_the_bias_is_not_read() -> None:
    q, k, v, gate, bias = inputs(3, 3, 2, 3)
    broken = bias.detach().clone()
    broken.diagonal(dim1=1, dim2=2).fill_(math.nan)
    got = with_gradients(cross_view, [q, k, v, gate, broken])
    want = with_gradients(cross_view, [q, k, v, gate, bias])
    assert same_bits(got[0] + got[1], want[0] + want[1])


def test_nan_stays_in_its_instance() -> None:
    leaves = [x.detach() for x in inputs(3, 3, 2, 3)]
    expected = cross_view(*leaves)
    for i in range(4):
        broken = [x.clone() for x in leaves]
        broken[i][1, 0, 0] = math.nan
        result = cross_view(*broken)
        assert result[0][1].isnan().any()
        for got, want in zip(result, expected, strict=True):
            assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("logit", [-math.inf, -1e4, -120.0, 120.0, 1e4, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_gate(logit: float, dtype: torch.dtype) -> None:
    q, k, v, _, bias = (x.detach().to(dtype) for x in inputs(2, 3, 2, 3))
    gate = torch.full((2, 3, 2), logit, dtype=dtype)
    outputs, gradients = with_gradients(cross_view, [q, k, v, gate, bias])
    for x in outputs + gradients:
        assert x.isfinite().all()
    if logit > 0:
        torch.testing.assert_close(outputs[0], v)
        torch.testing.assert_close(outputs[2], torch.zeros_like(outputs[2]))


def test_gate_gradient_keeps_its_digits() -> None:
    """At a logit of 30 the complement of g is 1e-13: gone if it were taken as 1 - g in float32."""
    arguments = [x.detach() for x in inputs(2, 3, 2, 3)]
    arguments[3] = torch.full_like(arguments[3], 30.0)
    want = with_gradients(cross_view, arguments)[1][3]
    got = with_gradients(cross_view, [x.float() for x in arguments])[1][3]
    torch.testing.assert_close(got, want.float(), atol=0, rtol=torch.finfo(torch.float32).eps ** 0.5)


def test_one_sided_cross_attention() -> None:
    """One other view draws everything: its probability is 1, the others' underflow to 0."""
    q, k, v, gate, bias = (x.detach().float() for x in inputs(2, 3, 2, 3))
    bias[:, :, 0] = 1e4
    outputs, gradients = with_gradients(cross_view, [q, k, v, gate, bias])
    for x in outputs + gradients:
        assert x.isfinite().all()
    bias[:, :, 0] = 0
    bias[:, 0, 1] = -math.inf
    outputs, gradients = with_gradients(cross_view, [q, k, v, gate, bias])
    assert not outputs[1][:, 0, 1].any()
    for x in outputs + gradients:
        assert x.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    low = [x.detach() for x in inputs(3, 3, 2, 5, dtype=dtype)]
    low[4] = low[4].float()
    got = cross_view(*low)
    want = cross_view(*(x.float() for x in low))
    assert same_bits(got, [want[0].to(dtype), want[1], want[2]])
    assert [x.dtype for x in with_gradients(cross_view, low)[1]] == [dtype] * 4 + [torch.float32]


def test_permutations_of_instances_views_and_heads() -> None:
    q, k, v, gate, bias = (x.detach() for x in inputs(4, 4, 3, 3))
    mask = some_mask(4, 4)
    out, mass, entropy = cross_view(q, k, v, gate, bias, mask)
    n, u, h = torch.tensor([2, 0, 3, 1]), torch.tensor([3, 1, 0, 2]), torch.tensor([1, 2, 0])

    def move(x: Tensor) -> Tensor:
        return x[n][:, u][:, :, h]

    moved = cross_view(*map(move, (q, k, v, gate)), bias[h][:, u][:, :, u], mask[n][:, u])
    torch.testing.assert_close(moved[0], move(out))
    torch.testing.assert_close(moved[1], mass[n][:, u][:, :, u])
    torch.testing.assert_close(moved[2], move(entropy))


def test_packed_slices_and_nothing() -> None:
    packed = leaf(3, 2, 3, 2, 5).detach()
    q, k, v = packed.unbind(2)
    gate = leaf(3, 2, 2).detach()
    want = cross_view(q.contiguous(), k.contiguous(), v.contiguous(), gate)
    assert same_bits(cross_view(q, k, v, gate), want)
    outputs, gradients = with_gradients(cross_view, inputs(0, 3, 2, 5))
    assert [tuple(x.shape) for x in outputs] == [(0, 3, 2, 5), (0, 3, 3), (0, 3, 2)]
    assert not gradients[4].any()


def test_repeats_and_traces() -> None:
    leaves = [x.float() for x in inputs(200, 4, 2, 16)]
    mask = some_mask(200, 4)
    check_repeats(lambda *x: cross_view(*x, mask=mask), leaves)
    traced = torch.compile(cross_view, backend="aot_eager", fullgraph=True)
    small = inputs(3, 3, 2, 3)
    for got, want in zip(traced(*small), cross_view(*small), strict=True):
        torch.testing.assert_close(got, want)
