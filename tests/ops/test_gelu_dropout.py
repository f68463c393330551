"""gelu_dropout through its public function."""

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
from umda_fast.ops import backends_used, dropout_seed, gelu_dropout
from umda_fast.ops import gelu_dropout as function
from umda_fast.parity.layer_cases import gelu_dropout_case

SEED = torch.tensor(1234567890123456789)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((5, 3, 11), torch.float32), ((8,), torch.bfloat16), ((0, 6), torch.float16)]
)
def test_opcheck(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, bias = leaf(*shape, dtype=dtype), leaf(shape[-1], seed=1)
    for b, seed, threshold in ((bias, SEED, 9000), (None, None, 0)):
        check_op("gelu_dropout", x, b, seed, threshold)
        plain = x.detach(), None if b is None else b.detach()
        check_op("gelu_dropout_backward", x.detach(), *plain, seed, threshold)


def test_compiles_as_one_graph() -> None:
    def call(x: Tensor, bias: Tensor, *, backend: str) -> Tensor:
        return gelu_dropout(x, bias, p=0.4, seed=SEED, backend=backend)

    check_compiled(call, leaf(6, 3, 9), leaf(9, seed=1))


def test_a_compiled_call_draws_its_seed_each_time() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: gelu_dropout(x, p=0.5), fullgraph=True, backend="aot_eager")
    x = torch.full((40, 40), 20.0)
    torch.manual_seed(3)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), first)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_derivatives(p: float) -> None:
    x, bias = leaf(5, 3, dtype=torch.float64), leaf(3, seed=1, dtype=torch.float64)
    check_gradients(lambda x, bias: gelu_dropout(x, bias, p=p, seed=SEED), x, bias)
    assert backends_used()["gelu_dropout"] == "reference"


@few
@given(
    rows=st.sampled_from([(), (1,), (70,), (9, 3), (0,), (2, 0, 3)]),
    width=st.sampled_from([1, 8, 59, 97, 256, 1030]),
    p=st.sampled_from([0.0, 0.1, 0.9]),
    bias=st.booleans(),
    wide=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_accuracy(rows: tuple[int, ...], width: int, p: float, bias: bool, wide: bool, dtype: torch.dtype) -> None:
    keeps_rule(gelu_dropout_case("drawn", rows, width, p=p, bias=bias, wide_bias=wide), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats(dtype: torch.dtype) -> None:
    repeats(gelu_dropout_case("large enough for two threads", (1500,), 96, p=0.1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_backends_drop_the_same(dtype: torch.dtype) -> None:
    x = torch.full((33, 50), 20.0, dtype=dtype)
    found = [gelu_dropout(x, p=0.4, seed=SEED, backend=backend) for backend in ("cpp", "reference")]
    assert torch.equal(*found)
    assert 0.3 < float((found[0] == 0).float().mean()) < 0.5


def test_seeds_come_from_the_generator_and_say_all() -> None:
    x = leaf(30, 40)
    torch.manual_seed(5)
    first, second = gelu_dropout(x, p=0.5), gelu_dropout(x, p=0.5)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(gelu_dropout(x, p=0.5), first)
    torch.manual_seed(5)
    assert torch.equal(gelu_dropout(x, p=0.5, seed=dropout_seed("cpu")), first)
    state = torch.get_rng_state()
    gelu_dropout(x)
    gelu_dropout(x, p=1e-6)  # rounds to 0
    gelu_dropout(x, p=0.5, seed=SEED)
    assert torch.equal(torch.get_rng_state(), state), "a number was drawn that nobody needs"
    seeds = torch.stack([dropout_seed("cpu") for _ in range(200)])
    assert seeds.unique().numel() == 200
    for bit in (0, 31, 32, 63):  # every one of the 64 is used
        assert 50 < int(((seeds >> bit) & 1).sum()) < 150


def test_backward_drops_what_forward_dropped() -> None:
    x = leaf(60, 33)
    y = gelu_dropout(x + 20.0, p=0.3)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx == 0, y == 0)
    kept = dx[dx != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 65536 / (65536 - round(0.3 * 65536))))


def test_slices_and_expanded_inputs() -> None:
    """What is not contiguous gives what its copy gives, values and gradients."""
    wide, bias = leaf(12, 7, 18), leaf(36, seed=1)
    for x, b in (
        (wide[:, 1:5, ::2], bias[::4]),
        (wide.transpose(0, 2), bias[:12]),
        (wide[:1].expand(5, 7, 18), bias[3:21]),
    ):
        own = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (x, b)]
        y, wanted = (gelu_dropout(*args, p=0.3, seed=SEED, backend="cpp") for args in ((x, b), own))
        assert torch.equal(y, wanted)
        d_y = torch.randn(wanted.shape[::-1], generator=torch.Generator().manual_seed(0)).permute(2, 1, 0)
        found = torch.autograd.grad(y, [x, b], d_y)
        expected = torch.autograd.grad(wanted, own, d_y.contiguous())
        assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_what_nobody_needs_a_gradient_of() -> None:
    x, bias = leaf(6, 8), leaf(8, seed=1)

    def gradients(x: Tensor, bias: Tensor, *wanted: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(gelu_dropout(x, bias, p=0.3, seed=SEED).square().sum(), wanted))

    dx, d_bias = gradients(x, bias, x, bias)
    assert torch.equal(gradients(x.detach(), bias, bias)[0], d_bias)
    assert torch.equal(gradients(x, bias.detach(), x)[0], dx)


def test_between_two_layers_under_autocast() -> None:
    """As PyTorch's own composition there, by the rule; the bias of the first layer stays float32."""
    torch.manual_seed(0)
    first, second, x = nn.Linear(24, 48), nn.Linear(48, 8), torch.randn(200, 24)
    exact = [copy.deepcopy(m).double() for m in (first, second)]

    def fused(x: Tensor) -> Tensor:
        hidden = nn.functional.linear(x, first.weight)
        result: Tensor = second(gelu_dropout(hidden, first.bias))
        return result

    with torch.autocast("cpu", torch.bfloat16):
        ours, own = fused(x), second(nn.functional.gelu(first(x)))
    wide = exact[1](nn.functional.gelu(exact[0](x.double())))
    assert ours.dtype == torch.bfloat16
    assert float((ours - wide).detach().abs().max()) <= 2 * float((own - wide).detach().abs().max())
    ours.sum().backward()
    assert first.bias.grad is not None
    assert first.bias.grad.dtype == torch.float32


def test_the_kernel_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: object) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setitem(function.__globals__, "reference", called)
    x, bias = leaf(5, 8), leaf(8, seed=1)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        gelu_dropout(x, bias, p=0.3).sum().backward()
    assert backends_used()["gelu_dropout"] == "cpp"
    names = {event.key for event in profile.key_averages()}
    assert {"umda_fast::gelu_dropout", "umda_fast::gelu_dropout_backward"} <= names


def test_saves_its_input_alone() -> None:
    """No mask and no result of GELU: backward has x, bias and seed."""
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    x, bias = leaf(50, 16), leaf(16, seed=1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        gelu_dropout(x, bias, p=0.3, seed=SEED)
    assert {t.data_ptr() for t in saved} == {x.data_ptr(), bias.data_ptr(), SEED.data_ptr()}


X = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a torch.Tensor, got list"),
        ({"x": X.int()}, TypeError, "x must be float32 or .*, got int32"),
        ({"x": torch.zeros(())}, ValueError, r"x must have shape \[\.\.\., D\] with D at least 1, got \[\]"),
        ({"x": torch.zeros(4, 0)}, ValueError, r"x must have shape \[\.\.\., D\] with D at least 1, got \[4, 0\]"),
        ({"bias": torch.zeros(2)}, ValueError, r"bias must have shape \[3\], got \[2\]"),
        ({"bias": torch.zeros(3).double()}, TypeError, "bias must be float32 or bfloat16 or float16, got float64"),
        ({"x": X.double(), "bias": torch.zeros(3)}, TypeError, "bias must be float64, got float32"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias must be on the device of x, cpu, got meta"),
        ({"p": 1.0}, ValueError, "p must be at least 0 and below 1, got 1.0"),
        ({"p": -0.1}, ValueError, "p must be at least 0 and below 1, got -0.1"),
        ({"p": float("nan")}, ValueError, "p must be at least 0 and below 1, got nan"),
        ({"p": True}, TypeError, "p must be a float, got bool"),
        ({"seed": 3}, TypeError, "seed must be a torch.Tensor, got int"),
        ({"seed": torch.tensor(3.0)}, TypeError, "seed must be int64, got float32"),
        ({"seed": torch.tensor([3])}, ValueError, r"seed must have shape \[\], got \[1\]"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        gelu_dropout(**{"x": X, "p": 0.5, **change})  # type: ignore[arg-type]
