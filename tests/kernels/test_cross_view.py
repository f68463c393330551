"""The Triton kernels of cross_view against the float64 reference, in the interpreter."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels._parity import assert_close, normal
from umda_fast.kernels import cross_view as kernels
from umda_fast.parity.cases import close
from umda_fast.reference.cross_view import cross_view as reference

OUTPUTS = ("out", "mass", "entropy")
GRADIENTS = ("dq", "dk", "dv", "d_gate", "d_bias")


@dataclass
class Case:
    """Inputs and output gradients of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    bias: Tensor | None
    mask: Tensor | None
    d_out: Tensor | None
    d_mass: Tensor | None
    d_entropy: Tensor | None

    def forward(self) -> tuple[Tensor, ...]:
        return kernels.cross_view(self.q, self.k, self.v, self.gate, self.bias, self.mask)

    def backward(self) -> tuple[Tensor, ...]:
        return kernels.cross_view_backward(
            self.d_out, self.d_mass, self.d_entropy, self.q, self.k, self.v, self.gate, self.bias, self.mask
        )


def make(
    n: int,
    views: int,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    masked: bool = True,
    biased: bool = True,
    gradients: str = "ome",
) -> Case:
    """A packed QKV; absent views (every instance has one view at least) hold NaN everywhere."""
    packed = normal(n, views, 3, heads, width, seed=0, dtype=dtype)
    gate = normal(n, views, heads, seed=1, dtype=dtype)
    mask = None
    if masked:
        mask = torch.rand(n, views, generator=torch.Generator().manual_seed(2)) < 0.6
        mask[torch.arange(n), torch.arange(n) % views] = True
        packed[~mask] = math.nan
        gate[~mask] = math.nan
    q, k, v = packed.unbind(2)
    return Case(
        *(q, k, v, gate),
        bias=normal(heads, views, views, seed=3) if biased else None,
        mask=mask,
        d_out=normal(n, views, heads, width, seed=4, dtype=dtype) if "o" in gradients else None,
        d_mass=normal(n, views, views, seed=5) if "m" in gradients else None,
        d_entropy=normal(n, views, heads, seed=6) if "e" in gradients else None,
    )


def compose(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What one would write in PyTorch: every step in the precision of its inputs."""
    views = q.shape[1]
    own = torch.eye(views, dtype=torch.bool)[None, :, None, :]
    present = torch.ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    q, k, v, gate = (x.masked_fill(~present.view(*q.shape[:2], *[1] * (x.dim() - 2)), 0) for x in (q, k, v, gate))
    other = present[:, :, None, None] & present[:, None, None, :] & ~own & (bias != -math.inf).transpose(0, 1)
    some = other.any(-1, keepdim=True)
    s = torch.einsum("nuhd,nwhd->nuhw", q, k) / math.sqrt(q.shape[3]) + bias.to(q.dtype).transpose(0, 1)
    a = s.masked_fill(~other, -math.inf).masked_fill(~some, 0.0).softmax(-1).masked_fill(~other, 0.0)
    g = gate.sigmoid().masked_fill(~some[..., 0], 1.0)[..., None]
    p = torch.where(own, g, (1 - g) * a)
    out = torch.einsum("nuhw,nwhd->nuhd", p, v)
    entropy = -(p * p.masked_fill(p == 0, 1.0).log()).sum(-1)
    absent = ~present[:, :, None]
    return (
        out.masked_fill(absent[..., None], 0.0),
        p.mean(2).masked_fill(absent, 0.0),
        entropy.masked_fill(absent, 0.0),
    )


def differentiate(function: Any, case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a differentiable implementation on the case's values in ``dtype``."""
    bias = case.bias if case.bias is not None else torch.zeros(case.q.shape[2], *2 * [case.q.shape[1]])
    bias_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = [x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v, case.gate)]
    inputs.append(bias.to(bias_dtype).requires_grad_())
    outputs = function(*inputs, case.mask)
    pairs = [(x, g) for x, g in zip(outputs, (case.d_out, case.d_mass, case.d_entropy), strict=True) if g is not None]
    total = sum((x.to(bias_dtype) * g.to(bias_dtype)).sum() for x, g in pairs)
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return [x.detach() for x in outputs], filled


def check(case: Case) -> None:
    """Outputs by the 2x rule, gradients by the 3x rule, and zeros where a view is absent."""
    exact = differentiate(reference, case, torch.float64)
    composed = differentiate(compose if case.q.dtype != torch.float32 else reference, case, case.q.dtype)
    actual = case.forward(), case.backward()
    for name, x, e, c in zip(OUTPUTS, actual[0], exact[0], composed[0], strict=True):
        assert_close(name, x, e, c, 2)
    for name, x, e, c in zip(GRADIENTS, actual[1], exact[1], composed[1], strict=True):
        assert_close(name, x, e, c, 3)
    if case.mask is not None:
        for x in (*actual[0], *actual[1][:4]):
            assert (x[~case.mask] == 0).all()
    assert (actual[1][4].diagonal(dim1=1, dim2=2) == 0).all()


@pytest.mark.parametrize("views", range(1, 17))
def test_every_number_of_views(views: int) -> None:
    check(make(3, views, 2, 11))


@pytest.mark.parametrize("views", [3, 7])
@pytest.mark.parametrize("width", [8, 20, 64, 97, 256])
def test_head_dimensions(views: int, width: int) -> None:
    check(make(5, views, 1, width, masked=False))


@pytest.mark.parametrize("views", [2, 3, 4, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_is_a_mask(views: int, masked: bool, dtype: torch.dtype) -> None:
    """One view listens to nobody, in one head another not to a third: both as if those were missing."""
    case = make(5, views, 2, 24, dtype, masked=masked)
    assert case.bias is not None
    close(case.bias)
    check(case)


@pytest.mark.parametrize("views", [3, 6])
def test_nan_is_no_mask(views: int) -> None:
    case = make(3, views, 1, 8, masked=False)
    assert case.bias is not None
    close(case.bias)
    case.k[1] = math.nan
    for x in case.forward()[::2]:
        assert x[1].isnan().all()
        assert x[::2].isfinite().all()


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("heads", [1, 3, 7])
def test_heads(views: int, heads: int) -> None:
    check(make(3, views, heads, 8))


@pytest.mark.parametrize("views", [3, 4, 6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(views: int, dtype: torch.dtype) -> None:
    check(make(4, views, 2, 24, dtype))


@pytest.mark.parametrize("views", [1, 3, 5])
@pytest.mark.parametrize("gradients", ["o", "m", "e", "me", ""])
def test_absent_gradients(views: int, gradients: str) -> None:
    case = make(3, views, 1, 8, gradients=gradients or "o")
    if not gradients:
        case.d_out = None
        assert all((x == 0).all() for x in case.backward())
    else:
        check(case)


@pytest.mark.parametrize("views", [3, 5])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_specialisations(views: int, masked: bool, biased: bool) -> None:
    check(make(3, views, 2, 8, masked=masked, biased=biased))


@pytest.mark.parametrize("views", [3, 6])
def test_several_blocks_per_program(views: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "MAX_CHUNKS", 2)
    check(make(45 if views == 3 else 7, views, 2, 64))


@pytest.mark.parametrize("views", [3, 5])
def test_strides(views: int) -> None:
    """Other layouts than packed [N, V, 3, H, Dh], and expanded gradients, give the same bits."""
    case = make(3, views, 2, 8)
    case.d_out = torch.ones(()).expand(case.q.shape)
    case.d_mass = torch.ones(()).expand(3, views, views)
    case.d_entropy = normal(2, views, 3, seed=7).permute(2, 1, 0)
    expected = (*case.forward(), *case.backward())
    assert case.mask is not None
    assert case.bias is not None
    case.q = case.q.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    case.k = case.k.transpose(0, 1).contiguous().transpose(0, 1)
    case.v = case.v.transpose(1, 2).contiguous().transpose(1, 2)
    case.gate = case.gate.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    case.mask = case.mask.t().contiguous().t()
    case.bias = case.bias.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for x, y in zip(expected, (*case.forward(), *case.backward()), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("views", [3, 5])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_saturated_gates_and_logits(views: int) -> None:
    """Beside ordinary instances, which set the scale that errors are measured on."""
    case = make(12, views, 1, 8, masked=False)
    case.gate[0:2] = 1000.0
    case.gate[2:4] = -1000.0
    case.q[4:6].mul_(300.0)
    check(case)


@pytest.mark.parametrize("views", [3, 5])
@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_stays_in_its_instance(views: int) -> None:
    case = make(5, views, 2, 8, masked=False)
    expected = (*case.forward(), *case.backward()[:4])
    case.q[2, 0], case.k[2, 1], case.v[2, 2] = math.nan, math.inf, math.nan
    rest = torch.arange(5) != 2
    for x, y in zip(expected, (*case.forward(), *case.backward()[:4]), strict=True):
        assert torch.equal(x[rest], y[rest])
    assert case.forward()[0][2].isnan().any()


@pytest.mark.parametrize("views", [3, 5])
def test_no_instances(views: int) -> None:
    case = make(0, views, 2, 8)
    assert [x.shape[0] for x in case.forward()] == [0, 0, 0]
    assert (case.backward()[4] == 0).all()


def test_bad_input() -> None:
    case = make(2, 3, 2, 8)
    with pytest.raises(TypeError, match="q: expected float32"):
        kernels.cross_view(case.q.double(), case.k, case.v, case.gate, None, None)
    with pytest.raises(ValueError, match="k: expected"):
        kernels.cross_view(case.q, case.k[:1], case.v, case.gate, None, None)
    with pytest.raises(ValueError, match="gate_logits: expected"):
        kernels.cross_view(case.q, case.k, case.v, case.gate[:1], None, None)
    with pytest.raises(ValueError, match="bias: expected"):
        kernels.cross_view(case.q, case.k, case.v, case.gate, torch.zeros(2, 3), None)
    with pytest.raises(TypeError, match=r"mask: expected torch\.bool"):
        kernels.cross_view(case.q, case.k, case.v, case.gate, None, torch.ones(2, 3))
    case.d_mass = torch.zeros(2, 3, 2)
    with pytest.raises(ValueError, match="d_mass: expected"):
        case.backward()
    with pytest.raises(ValueError, match="1 to 16 views"):
        make(1, 17, 1, 8).forward()
    with pytest.raises(ValueError, match="head dimension of 8 to 256"):
        make(1, 2, 1, 4).forward()
