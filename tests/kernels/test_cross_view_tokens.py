"""The Triton kernels of cross_view_tokens against the float64 reference, in the interpreter."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels._parity import assert_close, normal
from umda_fast.kernels import cross_view_tokens as kernels
from umda_fast.parity.cases import close
from umda_fast.reference.cross_view import cross_view as vectors_reference
from umda_fast.reference.cross_view_tokens import cross_view_tokens as reference

# Logits outside a tile are -inf, and 0 * -inf is masked.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")

OUTPUTS = ("out", "mass", "entropy", "token_entropy", "lse_intra", "lse_cross")
GRADIENTS = ("dq", "dk", "dv", "d_gate", "d_bias")


@dataclass
class Layout:
    """Instances of segments: for each instance its (view, tokens)."""

    instances: list[list[tuple[int, int]]]
    views: int

    @property
    def segments(self) -> list[tuple[int, int]]:
        return [segment for instance in self.instances for segment in instance]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, int]:
        lengths = torch.tensor([0] + [n for _, n in self.segments])
        counts = torch.tensor([0] + [len(instance) for instance in self.instances])
        view = torch.tensor([w for w, _ in self.segments], dtype=torch.int32)
        return lengths.cumsum(0), counts.cumsum(0), view, self.views

    @property
    def tokens(self) -> int:
        return sum(n for _, n in self.segments)


# Several tiles per segment, an empty segment, a view in two segments, an instance with one view, one
# without a token.
RAGGED = Layout(
    [[(0, 3), (1, 0), (2, 19)], [(1, 5), (0, 17), (1, 2)], [(2, 6)], [], [(0, 0)], [(0, 1), (3, 1)]], views=4
)


@dataclass
class Case:
    """Inputs and output gradients of one call."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    layout: Layout
    bias: Tensor | None
    d_out: Tensor | None
    d_mass: Tensor | None
    d_entropy: Tensor | None
    d_token_entropy: Tensor | None

    def forward(self) -> tuple[Tensor, ...]:
        return kernels.cross_view_tokens(
            *(self.q, self.k, self.v, self.gate),
            *self.layout.tensors(),
            self.bias,
            self.d_token_entropy is not None,
        )

    def backward(self, lse_intra: Tensor, lse_cross: Tensor) -> tuple[Tensor, ...]:
        return kernels.cross_view_tokens_backward(
            *(self.d_out, self.d_mass, self.d_entropy, self.d_token_entropy),
            *(self.q, self.k, self.v, self.gate),
            *self.layout.tensors(),
            self.bias,
            lse_intra,
            lse_cross,
        )


def make(
    layout: Layout,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    biased: bool = True,
    gradients: str = "omet",
    draw: int = 0,
) -> Case:
    """A packed QKV; other values for every `draw`."""
    n, first = layout.tokens, 7 * draw
    q, k, v = normal(n, 3, heads, width, seed=first, dtype=dtype).unbind(1)
    return Case(
        *(q, k, v, normal(n, heads, seed=first + 1, dtype=dtype)),
        layout=layout,
        bias=normal(heads, layout.views, layout.views, seed=first + 2) if biased else None,
        d_out=normal(n, heads, width, seed=first + 3, dtype=dtype) if "o" in gradients else None,
        d_mass=normal(n, layout.views, seed=first + 4) if "m" in gradients else None,
        d_entropy=normal(n, heads, seed=first + 5) if "e" in gradients else None,
        d_token_entropy=normal(n, heads, seed=first + 6) if "t" in gradients else None,
    )


def compose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cu_tokens: Tensor,
    cu_segments: Tensor,
    view: Tensor,
    views: int,
    bias: Tensor,
    token_entropy: bool,
) -> tuple[Tensor, ...]:
    """What one would write in PyTorch: masks over all pairs of tokens, every step in the precision of its
    inputs."""
    segment = torch.repeat_interleave(torch.arange(view.numel()), cu_tokens.diff())
    instance = torch.repeat_interleave(torch.arange(cu_segments.numel() - 1), cu_segments.diff())[segment]
    of = view.long()[segment]
    same = instance[:, None] == instance
    own, other = same & (of[:, None] == of), same & (of[:, None] != of)
    other = other & (bias != -math.inf)[:, of][:, :, of]  # [h,i,j]
    some = other.any(-1)
    s = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(q.shape[2])
    intra = s.masked_fill(~own, -math.inf).softmax(-1)
    s = s + bias.to(q.dtype)[:, of][:, :, of]
    cross = s.masked_fill(~other, -math.inf).masked_fill(~some[..., None], 0.0).softmax(-1).masked_fill(~other, 0.0)
    g = gate.sigmoid().t().masked_fill(~some, 1.0)[..., None]
    out = torch.einsum("hij,jhd->ihd", g * intra + (1 - g) * cross, v)
    member = torch.nn.functional.one_hot(of, views).to(q.dtype)
    p = (1 - g) * (cross @ member) + g * member
    entropy = [-(x * x.masked_fill(x == 0, 1.0).log()).sum(-1).t() for x in (p, cross)]
    return out, p.mean(0), entropy[0], entropy[1] if token_entropy else entropy[1].new_zeros(0)


def differentiate(function: Any, case: Case, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients of a differentiable implementation on the case's values in ``dtype``."""
    views, heads = case.layout.views, case.q.shape[1]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    bias = case.bias if case.bias is not None else torch.zeros(heads, views, views)
    inputs = [x.detach().to(dtype).requires_grad_() for x in (case.q, case.k, case.v, case.gate)]
    inputs.append(bias.to(wide).requires_grad_())
    outputs = function(*inputs[:4], *case.layout.tensors(), inputs[4], case.d_token_entropy is not None)
    given = (case.d_out, case.d_mass, case.d_entropy, case.d_token_entropy)
    pairs = [(x, g) for x, g in zip(outputs, given, strict=False) if g is not None]
    total = sum((x.to(wide) * g.to(wide)).sum() for x, g in pairs)
    gradients = torch.autograd.grad(total, inputs, allow_unused=True)
    filled = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    return [x.detach() for x in outputs], filled


def check(*cases: Case) -> None:
    """Outputs by the 2x rule, gradients by the 3x rule, each over all `cases` (of one layout) together."""
    found: dict[tuple[str, int], list[tuple[Tensor, ...]]] = {}
    for case in cases:
        exact = differentiate(reference, case, torch.float64)
        composed = differentiate(compose if case.q.dtype != torch.float32 else reference, case, case.q.dtype)
        outputs = case.forward()
        for name, x, e, c in zip(OUTPUTS, outputs, exact[0], composed[0], strict=False):
            finite = ~e.isinf()
            assert torch.equal(x[~finite].double(), e[~finite])
            found.setdefault((name, 2), []).append((x[finite], e[finite], c[finite]))
        for name, *each in zip(GRADIENTS, case.backward(*outputs[4:]), exact[1], composed[1], strict=True):
            found.setdefault((name, 3), []).append(tuple(each))
    for (name, factor), values in found.items():
        x, e, c = (torch.cat(part) for part in zip(*values, strict=True))
        assert_close(name, x, e, c, factor)


@pytest.mark.parametrize(("dtype", "biased"), [(torch.float32, True), (torch.float16, False), (torch.bfloat16, True)])
def test_ragged(dtype: torch.dtype, biased: bool) -> None:
    """Four draws together: a bias where there is one other view has gradient 0, and the error of one draw is luck."""
    check(*(make(RAGGED, 2, 24, dtype, biased, draw=draw) for draw in range(4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_that_is_a_mask(dtype: torch.dtype) -> None:
    """One view listens to nobody, in one head another not to a third."""
    case = make(RAGGED, 2, 24, dtype)
    assert case.bias is not None
    close(case.bias)
    check(case)
    view = case.layout.tensors()[2].repeat_interleave(case.layout.tensors()[0].diff())
    assert (case.forward()[5][view == 0] == -math.inf).all()


@pytest.mark.parametrize("width", [8, 37, 64, 256])
def test_head_dimensions(width: int) -> None:
    check(make(Layout([[(0, 9), (1, 4), (2, 1)]], views=3), 1, width))


def test_long_segments() -> None:
    """The tiles for long segments, more than one of them per segment."""
    layout = Layout([[(0, 140), (1, 33)]], views=2)
    for dtype in (torch.float16, torch.bfloat16):
        check(make(layout, 1, 16, dtype))
    check(make(Layout([[(0, 70), (1, 20)]], views=2), 1, 72, torch.float16))


@pytest.mark.parametrize("gradients", ["o", "m", "e", "t"])
def test_absent_gradients(gradients: str) -> None:
    check(make(Layout([[(0, 4), (1, 5), (2, 3)]], views=3), 1, 8, gradients=gradients))


def test_most_views() -> None:
    check(make(Layout([[(0, 1), (15, 3), (7, 2), (9, 1)]], views=16), 1, 8, torch.float16))


def test_one_token_per_segment_is_cross_view() -> None:
    layout = Layout([[(w, 1) for w in range(3)] for _ in range(4)], views=3)
    case = make(layout, 2, 8)
    out, mass, entropy, *_ = case.forward()
    q, k, v, gate = (x.unflatten(0, (4, 3)).double() for x in (case.q, case.k, case.v, case.gate))
    exact = vectors_reference(q, k, v, gate, case.bias, None)
    composed = vectors_reference(q.float(), k.float(), v.float(), gate.float(), case.bias, None)
    for name, x, e, c in zip(OUTPUTS, (out, mass, entropy), exact, composed, strict=False):
        assert_close(name, x, e.flatten(0, 1), c.flatten(0, 1), 2)


def test_strides() -> None:
    """Other layouts than packed [L, 3, H, Dh], and expanded gradients, give the same bits."""
    case = make(Layout([[(0, 4), (1, 5)]], views=2), 2, 8)
    case.d_out = torch.ones(()).expand(case.q.shape)
    case.d_mass = torch.ones(()).expand(9, 2)
    outputs = case.forward()
    expected = (*outputs, *case.backward(*outputs[4:]))
    case.q = case.q.permute(2, 1, 0).contiguous().permute(2, 1, 0)
    case.k = case.k.transpose(0, 1).contiguous().transpose(0, 1)
    case.gate = case.gate.t().contiguous().t()
    assert case.d_entropy is not None
    case.d_entropy = case.d_entropy.t().contiguous().t()
    outputs = case.forward()
    for x, y in zip(expected, (*outputs, *case.backward(*outputs[4:])), strict=True):
        assert torch.equal(x, y)


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_nan_stays_in_its_instance() -> None:
    layout = Layout([[(0, 3), (1, 2)], [(0, 2), (1, 4)]], views=2)
    case = make(layout, 1, 8)
    outputs = case.forward()
    expected = (*outputs, *case.backward(*outputs[4:])[:4])
    case.q[6], case.k[7], case.v[9] = math.nan, math.inf, math.nan
    outputs = case.forward()
    for x, y in zip(expected, (*outputs, *case.backward(*outputs[4:])[:4]), strict=True):
        assert torch.equal(x[:5], y[:5])
    assert outputs[0][5:].isnan().any()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_saturated_gates_and_logits() -> None:
    """Beside ordinary instances, which set the scale that errors are measured on."""
    case = make(Layout([[(0, 3), (1, 2)] for _ in range(4)], views=2), 1, 8)
    case.gate[0:3] = 1000.0
    case.gate[3:6] = -1000.0
    case.q[6:9].mul_(300.0)
    check(case)


def test_no_tokens() -> None:
    for layout in (Layout([], views=2), Layout([[(0, 0), (1, 0)]], views=2)):
        case = make(layout, 2, 8)
        outputs = case.forward()
        assert [x.shape[0] for x in outputs] == [0] * 6
        assert (case.backward(*outputs[4:])[4] == 0).all()


def test_bad_input() -> None:
    case = make(Layout([[(0, 2), (1, 2)]], views=2), 1, 8)
    q, rest = case.q, case.layout.tensors()
    with pytest.raises(TypeError, match="q: expected float32"):
        kernels.cross_view_tokens(q.double(), case.k, case.v, case.gate, *rest, None, False)
    with pytest.raises(ValueError, match="v: expected"):
        kernels.cross_view_tokens(q, case.k, case.v[:1], case.gate, *rest, None, False)
    with pytest.raises(ValueError, match="gate_logits: expected"):
        kernels.cross_view_tokens(q, case.k, case.v, case.gate[:1], *rest, None, False)
    with pytest.raises(ValueError, match="num_views: expected 1 to 16, got 17"):
        kernels.cross_view_tokens(q, case.k, case.v, case.gate, *rest[:3], 17, None, False)
    with pytest.raises(TypeError, match="cu_segments: expected"):
        kernels.cross_view_tokens(q, case.k, case.v, case.gate, rest[0], rest[1].int(), *rest[2:], None, False)
    with pytest.raises(TypeError, match=r"view_of_segment: expected torch\.int32"):
        kernels.cross_view_tokens(q, case.k, case.v, case.gate, *rest[:2], rest[2].long(), 2, None, False)
