"""cross_view_token_attention through its public function. The CPU has no kernel: the reference serves it."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.checks import DTYPES, check_gradients, leaf
from umda_fast.ops import backends_used, cross_view_attention, cross_view_token_attention
from umda_fast.ops._library import op
from umda_fast.parity import OUTPUT_FACTOR, assert_close
from umda_fast.parity.case import offsets

LENGTHS, SEGMENTS = [3, 0, 5, 1, 2, 4], [3, 0, 2, 1]


def inputs(dtype: torch.dtype = torch.float32, heads: int = 2, width: int = 8) -> list[Tensor]:
    tokens = sum(LENGTHS)
    wide = torch.promote_types(dtype, torch.float32)
    qkv = [leaf(tokens, heads, width, seed=i, dtype=dtype) for i in range(3)]
    return [*qkv, leaf(tokens, heads, seed=3, dtype=dtype), leaf(heads, 3, 3, seed=4, dtype=wide)]


def layout() -> tuple[Tensor, Tensor, Tensor]:
    return offsets(LENGTHS), offsets(SEGMENTS), torch.tensor([0, 1, 2, 2, 0, 1], dtype=torch.int32)


def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, **options: Any) -> Any:
    out = cross_view_token_attention(q, k, v, gate, *layout(), 3, bias=bias, **options)
    return tuple(x for x in out if x is not None)


@pytest.mark.parametrize("token_entropy", [False, True])
def test_derivatives(token_entropy: bool) -> None:
    check_gradients(lambda *x: attention(*x, token_entropy=token_entropy), *inputs(torch.float64))


def test_shapes_and_what_served() -> None:
    q, k, v, gate, bias = inputs(torch.bfloat16)
    out = cross_view_token_attention(q, k, v, gate, *layout(), 3, bias=bias)
    assert out.out.dtype == torch.bfloat16
    assert out.mass.dtype == out.entropy.dtype == torch.float32
    assert out.mass.shape == (sum(LENGTHS), 3)
    assert out.token_entropy is None
    assert backends_used()["cross_view_tokens"] == "reference"
    torch.testing.assert_close(out.mass.sum(1), torch.ones(sum(LENGTHS)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_token_per_view_is_cross_view(dtype: torch.dtype) -> None:
    """Against the C++ kernel of cross_view, which shares no code with the reference of this operation."""
    n, views, heads, width = 9, 4, 2, 11
    q, k, v = (leaf(n, views, heads, width, seed=i, dtype=dtype).detach() for i in range(3))
    gate, bias = leaf(n, views, heads, seed=3, dtype=dtype).detach(), leaf(heads, views, views, seed=4).detach()

    def tokens(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor) -> list[Tensor]:
        cu_tokens = torch.arange(n * views + 1)
        cu_segments = torch.arange(n + 1) * views
        view = torch.arange(n * views, dtype=torch.int32) % views
        flat = [x.flatten(0, 1) for x in (q, k, v, gate)]
        out = cross_view_token_attention(*flat, cu_tokens, cu_segments, view, views, bias=bias)
        return [x.unflatten(0, (n, views)) for x in out[:3] if x is not None]

    exact = tokens(*(x.double() for x in (q, k, v, gate, bias)))
    own = tokens(q, k, v, gate, bias)
    found = cross_view_attention(q, k, v, gate, bias=bias)
    for name, x, e, c in zip(found._fields, found, exact, own, strict=True):
        assert_close(name, x, e, c, OUTPUT_FACTOR)


def test_no_kernel_of_its_own_on_the_cpu_is_said() -> None:
    with pytest.raises(RuntimeError, match="cross_view_tokens has no CPU kernel"):
        attention(*inputs(), backend="cpp")


@pytest.mark.parametrize("token_entropy", [False, True])
def test_fake_implementation(token_entropy: bool) -> None:
    """The shapes and dtypes that tracing sees are those of the reference."""
    q, k, v, gate, bias = (x.detach() for x in inputs(torch.bfloat16))
    real = attention(q, k, v, gate, bias, token_entropy=token_entropy)
    meta = [x.to("meta") for x in (q, k, v, gate, *layout())]
    fake = op("cross_view_tokens")(*meta, 3, bias.to("meta"), token_entropy)
    for a, b in zip(real, fake, strict=False):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    lse = fake[4:]
    assert all(x.shape == gate.shape and x.dtype == torch.float32 for x in lse)
    grads = op("cross_view_tokens_backward")(
        meta[0], None, None, None, *meta, 3, bias.to("meta"), *lse
    )  # fmt: skip
    assert [x.shape for x in grads] == [x.shape for x in (q, k, v, gate, bias)]


def test_no_tokens() -> None:
    q = torch.zeros(0, 2, 8, requires_grad=True)
    nothing = torch.tensor([0])
    out = cross_view_token_attention(q, q, q, q[:, :, 0], nothing, nothing, torch.zeros(0, dtype=torch.int32), 2)
    assert out.out.shape == (0, 2, 8)
    assert out.mass.shape == (0, 2)


def test_a_bias_of_minus_infinity_is_a_mask() -> None:
    """Its view's tokens are no keys, and a query without a key listens to its own view alone; others are as before."""
    lengths, segments, views = torch.tensor([0, 3, 5, 9, 10, 15]), torch.tensor([0, 3, 5]), [0, 1, 2, 0, 1]
    view = torch.tensor(views, dtype=torch.int32)
    of = view.repeat_interleave(lengths.diff())
    q, k, v = (leaf(15, 2, 8, seed=i) for i in range(3))
    gate, bias = leaf(15, 2, seed=3), leaf(2, 3, 3, seed=4).detach()

    def run(bias: Tensor) -> tuple[Any, list[Tensor]]:
        out = cross_view_token_attention(
            q, k, v, gate, lengths, segments, view, 3, bias=bias, token_entropy=True, backend="reference"
        )
        total = torch.stack([(x * x).sum() for x in out if x is not None]).sum()
        return out, list(torch.autograd.grad(total, [q, k, v, gate, bias]))

    plain, _ = run(bias.clone().requires_grad_())
    bias[:, 0] = -math.inf  # nobody for view 0
    closed, gradients = run(bias.clone().requires_grad_())
    assert torch.equal(closed.mass[of == 0], torch.eye(3)[0].expand(4, 3))
    assert not closed.entropy[of == 0].any()
    assert not closed.token_entropy[of == 0].any()
    for a, b in zip(plain, closed, strict=True):
        assert torch.equal(a[of != 0], b[of != 0])
    for x in (*closed, *gradients):
        assert x.isfinite().all()
    assert not gradients[3][of == 0].any()
    assert not gradients[4][:, 0].any()
    # Towards one other view only: as if the instances had no token of it.
    bias[:, 0, 1], bias[:, 0, 2] = 0.5, -math.inf
    some, _ = run(bias.clone().requires_grad_())
    keep = of != 2
    fewer = cross_view_token_attention(
        *(x[keep] for x in (q, k, v, gate)), torch.tensor([0, 3, 5, 6, 11]), torch.tensor([0, 2, 4]),
        torch.tensor([0, 1, 0, 1], dtype=torch.int32), 3, bias=bias, token_entropy=True, backend="reference",
    )  # fmt: skip
    for a, b in zip(some, fewer, strict=True):
        torch.testing.assert_close(a[of == 0], b[of[keep] == 0])
