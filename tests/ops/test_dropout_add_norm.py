"""dropout_add_norm through its public function."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.ops.checks import (
    DTYPES,
    check_compiled,
    check_gradients,
    check_op,
    few,
    keeps_rule,
    leaf,
    repeats,
)
from umda_fast.ops import _library, backends_used, dropout_add_norm
from umda_fast.parity.layer_cases import dropout_add_norm_case

SEED = torch.tensor(1234567890123456789)


def inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, residual, bias, gain, norm_weight, norm_bias."""
    rows = [leaf(*shape, seed=i, dtype=dtype) for i in range(2)]
    return [*rows, *(leaf(shape[-1], seed=i, dtype=dtype) for i in range(2, 6))]


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 3, 11), torch.float32), ((8,), torch.bfloat16), ((0, 6), torch.float16)]
)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual, bias, gain, scale, shift = inputs(*shape, dtype=dtype)
    for arguments in (
        (x, bias, gain, residual.detach().float().requires_grad_(), scale, shift, SEED, 9000),
        (x, bias, None, residual, scale, shift, None, 0),
        (x, None, None, residual, None, None, SEED, 9000),
    ):
        check_op("dropout_add_norm", *arguments, 1e-5)
        x_, bias_, gain_, residual_, scale_, shift_, *drop = (
            t.detach() if isinstance(t, Tensor) else t for t in arguments
        )
        total, normed, *moments = _library.op("dropout_add_norm")(
            x_, bias_, gain_, residual_, scale_, shift_, *drop, 1e-5
        )
        d_normed = None if scale_ is None else torch.randn_like(normed)
        rest = (x_, bias_, gain_, total, scale_, *moments, *drop)
        check_op("dropout_add_norm_backward", torch.randn_like(total), d_normed, *rest)
        check_op("dropout_add_norm_backward", torch.randn_like(total), None, *rest)


def test_compiles_as_one_graph() -> None:
    def call(*tensors: Tensor, backend: str) -> tuple[Tensor, Tensor | None]:
        return dropout_add_norm(*tensors, p=0.4, seed=SEED, backend=backend)

    check_compiled(call, *inputs(6, 3, 9))


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives(p: float) -> None:
    check_gradients(lambda *x: dropout_add_norm(*x, p=p, seed=SEED), *inputs(5, 4, dtype=torch.float64))
    assert backends_used()["dropout_add_norm"] == "reference"


@few
@given(
    rows=st.sampled_from([(), (1,), (70,), (9, 3), (0,), (2, 0, 3)]),
    width=st.sampled_from([1, 8, 59, 97, 256, 1030]),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    gain=st.booleans(),
    norm=st.booleans(),
    wide=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(
    rows: tuple[int, ...], width: int, p: float, gain: bool, norm: bool, wide: bool, dtype: torch.dtype
) -> None:
    keeps_rule(dropout_add_norm_case("drawn", rows, width, p=p, gain=gain, norm=norm, wide=wide), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats(dtype: torch.dtype) -> None:
    repeats(dropout_add_norm_case("large enough for two threads", (1500,), 96, p=0.1), dtype)


def test_seeds_come_from_the_generator() -> None:
    x, residual, *vectors = inputs(30, 40)
    torch.manual_seed(5)
    first, second = (dropout_add_norm(x, residual, *vectors, p=0.5)[0] for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(dropout_add_norm(x, residual, *vectors, p=0.5)[0], first)
    state = torch.get_rng_state()
    dropout_add_norm(x, residual, *vectors)
    assert torch.equal(torch.get_rng_state(), state), "a number was drawn that nobody needs"


def test_slices_and_expanded_inputs() -> None:
    """What is not contiguous gives what its copy gives, values and gradients."""
    wide, vectors = leaf(12, 7, 18), [leaf(36, seed=i) for i in range(1, 5)]
    for x, residual, cut in (
        (wide[:, 1:5, ::2], wide[:, :4, 1::2], slice(0, 36, 4)),
        (wide.transpose(0, 2), leaf(18, 7, 12, seed=9), slice(0, 12)),
        (leaf(5, 7, 18, seed=9), wide[:1].expand(5, 7, 18), slice(3, 21)),
    ):
        given = [x, residual, *(v[cut] for v in vectors)]
        own = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in given]
        y, wanted = (dropout_add_norm(*args, p=0.3, seed=SEED, backend="cpp") for args in (given, own))
        assert y[1] is not None
        assert wanted[1] is not None
        assert torch.equal(y[0], wanted[0])
        assert torch.equal(y[1], wanted[1])
        d_y = torch.randn(x.shape[::-1], generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
        found = torch.autograd.grad(y, given, [d_y, d_y])
        expected = torch.autograd.grad(wanted, own, [d_y.contiguous(), d_y.contiguous()])
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_gain_of_zero_leaves_the_stream_and_learns() -> None:
    """As a block begins: nothing is added, and the gain alone has a gradient."""
    x, residual, bias, gain, *norm = inputs(9, 16)
    zero = torch.zeros_like(gain).requires_grad_()
    total, _ = dropout_add_norm(x, residual, bias, zero, *norm, p=0.3, seed=SEED)
    assert torch.equal(total, residual)
    dx, d_bias, d_gain = torch.autograd.grad(total.square().sum(), [x, bias, zero])
    assert not dx.any()
    assert not d_bias.any()
    assert d_gain.any()


def test_a_block_under_autocast() -> None:
    """As PyTorch's own composition there, by the rule; the stream and all parameters stay float32."""
    torch.manual_seed(0)
    layer, norm, x, stream = nn.Linear(24, 48), nn.LayerNorm(48), torch.randn(200, 24), torch.randn(200, 48)
    exact = copy.deepcopy(layer).double(), copy.deepcopy(norm).double()
    with torch.autocast("cpu", torch.bfloat16):
        product = nn.functional.linear(x, layer.weight)
        total, normed = dropout_add_norm(product, stream, layer.bias, None, norm.weight, norm.bias)
        own = stream + layer(x)
        own_normed = norm(own).bfloat16()
    assert normed is not None
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    wide = stream.double() + exact[0](x.double())
    for a, e, c in ((total, wide, own), (normed, exact[1](wide), own_normed)):
        assert float((a - e).detach().abs().max()) <= 2 * float((c - e).detach().abs().max())
    (total.sum() + normed.square().sum()).backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in (*layer.parameters(), *norm.parameters()))


def test_the_kernel_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setitem(dropout_add_norm.__globals__, "reference", called)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        dropout_add_norm(*inputs(5, 8), p=0.3)[0].sum().backward()
    assert backends_used()["dropout_add_norm"] == "cpp"
    names = {event.key for event in profile.key_averages()}
    assert {"umda_fast::dropout_add_norm", "umda_fast::dropout_add_norm_backward"} <= names


X, V = torch.zeros(4, 3), torch.zeros(3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[\.\.\., D\], got \[\]"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"D \(x.shape\[-1\]\) must be in 1..4096, got 0"),
        ({"x": torch.zeros(4, 4097)}, ValueError, r"D \(x.shape\[-1\]\) must be in 1..4096, got 4097"),
        ({"residual": torch.zeros(4, 2)}, ValueError, r"residual must have shape \[4, 3\], got \[4, 2\]"),
        ({"residual": X.double()}, TypeError, "residual must be float32 or bfloat16 or float16, got float64"),
        ({"bias": V[:2]}, ValueError, r"bias must have shape \[3\], got \[2\]"),
        ({"gain": V.int()}, TypeError, "gain must be float32 or .*, got int32"),
        ({"norm_bias": None}, ValueError, "norm_bias must be a tensor beside norm_weight, got None"),
        ({"norm_weight": None}, ValueError, "norm_weight must be a tensor beside norm_bias, got None"),
        ({"norm_bias": V.bfloat16()}, TypeError, "norm_bias must have the dtype of norm_weight, float32, got bfloat16"),
        ({"p": 1.5}, ValueError, "p must be at least 0 and below 1, got 1.5"),
        ({"seed": torch.tensor([3])}, ValueError, r"seed must have shape \[\], got \[1\]"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    good = {"x": X, "residual": X, "bias": V, "gain": V, "norm_weight": V, "norm_bias": V, "p": 0.5}
    with pytest.raises(error, match=message):
        dropout_add_norm(**{**good, **change})  # type: ignore[arg-type]
