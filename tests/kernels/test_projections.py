"""The Triton kernels of the projections against float64, in the interpreter, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels._parity import assert_close, normal
from umda_fast import ops
from umda_fast.errors import BackendUnavailableError
from umda_fast.kernels import projections

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5


def norm_inputs(shape: tuple[int, ...], columns: int, second: int, seed: int = 0) -> dict[str, Tensor]:
    width = shape[-1]
    return {
        "x": normal(*shape, seed=seed) * 2 + 3,  # far from 0: one pass over squares would lose digits
        "norm_weight": 1 + 0.3 * normal(width, seed=seed + 1),
        "norm_bias": 0.3 * normal(width, seed=seed + 2),
        "weight": normal(columns, width, seed=seed + 3) / width**0.5,
        "bias": normal(columns, seed=seed + 4),
        "weight2": normal(second, width, seed=seed + 5) / width**0.5,
        "bias2": normal(second, seed=seed + 6),
    }


def composed(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), EPS)
    return F.linear(normed, *layers[:2]), F.linear(normed, *layers[2:])


def with_gradients(
    function: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor], seed: int = 9
) -> tuple[list[Tensor], dict[str, Tensor]]:
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = list(function(*leaves.values()))
    weights = [normal(*y.shape, seed=seed + i).bfloat16().to(y.dtype) for i, y in enumerate(outputs)]
    found = torch.autograd.grad(outputs, list(leaves.values()), weights)
    return [y.detach() for y in outputs], dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "columns", "second"), [((5, 3, 40), 120, 4), ((70, 1, 16), 33, 1), ((3, 97), 7, 65)])
def test_norm_linear(dtype: torch.dtype, shape: tuple[int, ...], columns: int, second: int) -> None:
    inputs = {name: value.to(dtype) for name, value in norm_inputs(shape, columns, second).items()}
    exact = with_gradients(composed, {name: value.double() for name, value in inputs.items()})
    own = with_gradients(composed, inputs)
    ours = with_gradients(lambda *args: ops.norm_linear(*args, eps=EPS, backend="triton"), inputs)
    for i, name in enumerate(["y", "y2"]):
        assert ours[0][i].dtype == dtype
        assert_close(name, ours[0][i], exact[0][i], own[0][i], 2)
    for name in inputs:
        assert_close(f"d_{name}", ours[1][name], exact[1][name], own[1][name], 3)


def derivatives_of_three_orders(function: Callable[..., Sequence[Tensor]], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Gradients of a sum of squares, of the sum of squares of those, and once more."""
    leaves = [value.detach().requires_grad_() for value in inputs.values()]
    found: list[Tensor] = []
    values: Sequence[Tensor] = function(*leaves)
    for _ in range(3):
        total = torch.stack([y.square().sum() for y in values]).sum()
        values = torch.autograd.grad(total, leaves, create_graph=True)
        found += [x.detach() for x in values]
    return found


def test_derivatives_of_every_order() -> None:
    """The gradient is a composition, to be differentiated again; the third derivative of `F.layer_norm` is wrong."""
    given = norm_inputs((4, 2, 16), 7, 3)
    given["x"] = given["x"] / 8

    def normalised(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, *layers: Tensor) -> list[Tensor]:
        variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
        normed = (x - mean) * (variance + EPS).rsqrt() * norm_weight + norm_bias
        return [F.linear(normed, *layers[:2]), F.linear(normed, *layers[2:])]

    def residual(*args: Tensor) -> list[Tensor]:
        return [ops.linear_residual(*args, backend="triton")]

    def composed_residual(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        return [residual + F.linear(x, weight, bias)]

    layers = {name: given[name] for name in ("x", "weight", "bias")} | {"residual": normal(4, 2, 7, seed=9)}
    for ours, theirs, inputs in (
        (lambda *args: ops.norm_linear(*args, eps=EPS, backend="triton"), normalised, given),
        (residual, composed_residual, layers),
    ):
        exact = derivatives_of_three_orders(theirs, {name: value.double() for name, value in inputs.items()})
        own = derivatives_of_three_orders(theirs, inputs)
        for i, (found, e, c) in enumerate(zip(derivatives_of_three_orders(ours, inputs), exact, own, strict=True)):
            assert_close(f"order {i // len(inputs) + 1}, {list(inputs)[i % len(inputs)]}", found, e, c, 3)


def test_forward_mode_is_refused() -> None:
    given = norm_inputs((4, 16), 7, 3)
    x, gamma, beta, weight = (given[name] for name in ("x", "norm_weight", "norm_bias", "weight"))
    calls = (
        lambda x: ops.norm_linear(x, gamma, beta, weight, backend="triton")[0],
        lambda x: ops.linear_residual(x, weight, None, normal(4, 7, seed=3), backend="triton"),
    )
    for call in calls:
        with pytest.raises(BackendUnavailableError, match="reference"):
            torch.func.jvp(call, (x,), (x,))


def test_one_layer_without_bias_and_statistics_of_the_rows() -> None:
    given = norm_inputs((6, 20), 9, 1)
    x, gamma, beta, weight = (given[name] for name in ("x", "norm_weight", "norm_bias", "weight"))
    y, y2, mean, rstd = projections.norm_linear(x, gamma, beta, weight, None, None, None, EPS)
    assert y2.shape == (6, 0)
    wide = x.double()
    assert_close("mean", mean, wide.mean(1), x.mean(1), 2)
    deviation = (wide.var(1, unbiased=False) + EPS).rsqrt()
    assert_close("rstd", rstd, deviation, (x.var(1, unbiased=False) + EPS).rsqrt(), 2)
    exact = F.linear(F.layer_norm(wide, (20,), gamma.double(), beta.double(), EPS), weight.double())
    assert_close("y", y, exact, F.linear(F.layer_norm(x, (20,), gamma, beta, EPS), weight), 2)


def test_a_large_mean_costs_no_digits() -> None:
    given = norm_inputs((4, 64), 8, 1)
    x = (given["x"] + 4096).contiguous()
    y, *_ = projections.norm_linear(x, given["norm_weight"], given["norm_bias"], given["weight"], None, None, None, EPS)
    wide = [given[name].double() for name in ("norm_weight", "norm_bias", "weight")]
    exact = F.linear(F.layer_norm(x.double(), (64,), wide[0], wide[1], EPS), wide[2])
    own = F.linear(F.layer_norm(x, (64,), given["norm_weight"], given["norm_bias"], EPS), given["weight"])
    assert_close("y", y, exact, own, 2)


def test_a_float32_stream_into_bfloat16_layers() -> None:
    """As under autocast: statistics and normalised rows from float32, products of bfloat16."""
    given = norm_inputs((7, 48), 24, 3)
    narrow = {name: given[name].bfloat16() for name in ("weight", "bias", "weight2", "bias2")}
    with torch.autocast("cpu", torch.bfloat16):
        y, y2 = ops.norm_linear(*given.values(), eps=EPS, backend="triton")
        own = composed(*given.values())
    exact = composed(*(value.double() for value in {**given, **narrow}.values()))
    assert y.dtype == y2.dtype == torch.bfloat16
    assert_close("y", y, exact[0], own[0], 2)
    assert_close("y2", y2, exact[1], own[1], 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropped", [False, True])
def test_linear_residual(dtype: torch.dtype, dropped: bool) -> None:
    shape, columns = (5, 3, 40), 37
    inputs = {
        "x": normal(*shape, seed=0).to(dtype),
        "weight": (normal(columns, 40, seed=1) / 6).to(dtype),
        "bias": normal(columns, seed=2).to(dtype),
        "residual": normal(5, 3, columns, seed=3).to(dtype),
    }
    keep = normal(5, 3, columns, seed=4) > 0 if dropped else None
    scale = 2.0 if dropped else 1.0

    def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        y = F.linear(x, weight, bias)
        return [residual + (y if keep is None else torch.where(keep, y * scale, 0.0))]

    def fused(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> list[Tensor]:
        return [torch.ops.umda_fast.linear_residual_triton(x, weight, bias, residual, keep, scale)]

    exact = with_gradients(plain, {name: value.double() for name, value in inputs.items()})
    own, ours = with_gradients(plain, inputs), with_gradients(fused, inputs)
    assert_close("y", ours[0][0], exact[0][0], own[0][0], 2)
    for name in inputs:
        assert_close(f"d_{name}", ours[1][name], exact[1][name], own[1][name], 3)


def test_dropout_drops_its_share_and_keeps_the_residual() -> None:
    x, weight, residual = torch.ones(64, 16), torch.ones(32, 16), normal(64, 32, seed=0)
    torch.manual_seed(0)
    y = ops.linear_residual(x, weight, None, residual, dropout=0.25, backend="triton")
    product = y - residual
    assert set(product.round().unique().tolist()) == {0.0, 21.0}  # 16 / 0.75
    assert abs(float((product.abs() < 1e-3).float().mean()) - 0.25) < 0.04
    assert torch.equal(ops.linear_residual(x, weight, None, residual, backend="triton"), residual + 16)


def test_no_rows_and_what_does_not_fit() -> None:
    given = norm_inputs((0, 8), 6, 2)
    y, y2 = ops.norm_linear(*given.values(), backend="triton")
    assert (y.shape, y2.shape) == ((0, 6), (0, 2))
    assert ops.linear_residual(given["x"], given["weight"], None, torch.empty(0, 6), backend="triton").shape == (0, 6)
    with pytest.raises(ValueError, match="norm_weight"):
        projections.norm_linear(given["x"], torch.ones(7), torch.ones(8), given["weight"], None, None, None, EPS)
    with pytest.raises(ValueError, match="residual"):
        projections.linear_residual(given["x"], given["weight"], None, torch.empty(0, 5), None, 1.0)
    with pytest.raises(TypeError, match="keep"):
        projections.linear_residual(given["x"], given["weight"], None, torch.empty(0, 6), torch.empty(0, 6), 1.0)


def test_the_same_bits_twice() -> None:
    given = norm_inputs((9, 3, 40), 120, 4)
    first = projections.norm_linear(*given.values(), EPS)
    assert all(torch.equal(a, b) for a, b in zip(first, projections.norm_linear(*given.values(), EPS), strict=True))


def test_gradients_of_several_tasks_at_once() -> None:
    """vmap over the gradients, and over the inputs."""
    given = {name: value.requires_grad_() for name, value in norm_inputs((4, 16), 24, 2).items()}
    y, y2 = ops.norm_linear(*given.values(), backend="triton")
    out = ops.linear_residual(y, normal(24, 24, seed=7), None, y, backend="triton")
    leaves = list(given.values())
    d_out, d_y2 = normal(3, *out.shape, seed=8), normal(3, *y2.shape, seed=9)
    together = torch.autograd.grad([out, y2], leaves, [d_out, d_y2], is_grads_batched=True, retain_graph=True)
    for b in range(3):
        alone = torch.autograd.grad([out, y2], leaves, [d_out[b], d_y2[b]], retain_graph=True)
        for batched, single in zip(together, alone, strict=True):
            torch.testing.assert_close(batched[b], single)
    x = normal(3, 4, 16, seed=10)
    rest = [value.detach() for value in leaves[1:]]
    mapped = torch.vmap(lambda x: ops.norm_linear(x, *rest, backend="triton")[0])(x)
    assert torch.equal(mapped, torch.stack([ops.norm_linear(row, *rest, backend="triton")[0] for row in x]))


def test_opcheck() -> None:
    given = [value.requires_grad_() for value in norm_inputs((4, 2, 16), 24, 2).values()]
    torch.library.opcheck(torch.ops.umda_fast.norm_linear_triton.default, (*given, EPS))
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(6, 8, requires_grad=True)
    residual = torch.randn(4, 6, requires_grad=True)
    op = torch.ops.umda_fast.linear_residual_triton.default
    for keep in (None, torch.rand(4, 6) > 0.5):
        torch.library.opcheck(op, (x, weight, None, residual, keep, 2.0))
