"""Linear layers around attention, with what precedes and follows them (docs/model.md, section 1).

A block is `x + W_o attention(LN(x))`, then `x + W_2 gelu(W_1 LN(x))`: `norm_linear` is a layer norm and the linear
layers that read it, `linear_residual` a linear layer, dropout and the sum. On the CPU, where the matrix product is all
that counts, they are PyTorch's composition. The model takes plain products and `dropout_add_norm` between them.
"""

from typing import Any

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.reference.projections import linear_residual as residual_reference
from umda_fast.reference.projections import norm_linear as norm_reference


def _cast(reference: Tensor, *values: Tensor | None) -> list[Tensor | None]:
    """`values` in autocast's dtype, where it is on for the device of `reference`, as F.linear casts them."""
    device = reference.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(values)
    dtype = torch.get_autocast_dtype(device)
    return [None if value is None else value.to(dtype) for value in values]


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    weight2: Tensor | None = None,
    bias2: Tensor | None = None,
    *,
    eps: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`LN(x) weight^T + bias` and, of the same normalised rows, `LN(x) weight2^T + bias2`.

    A kernel reads x and writes the results; the normalised rows are never stored, backward recomputes them and can be
    differentiated any number of times. (The reference can twice: PyTorch takes the moments in the second derivative of
    its layer norm as constants, and the third is wrong.)

    Args:
        x: [..., D], float32, bfloat16 or float16 (float64 on the reference).
        norm_weight, norm_bias: [D], floating.
        weight: [P, D], weight2: [P2, D] or None, of one floating dtype; bias: [P] or None, bias2: [P2] or None.
            Under autocast they are cast to its dtype, as `F.linear` casts them.
        eps: under the root of the variance.
        backend: see `umda_fast.set_backend`.

    Returns:
        [..., P] and [..., P2] (P2 = 0 without weight2), in the dtype of weight (autocast's, if it is on).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; bias2 without weight2.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    _validate.tensor(x, "x", dtype=_validate.FLOATS)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., D] with D at least 1, got {list(x.shape)}")
    width = x.shape[-1]
    for name, value in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        _validate.tensor(value, name, [width], dtype=_validate.FLOATS, like=x, like_name="x")
    _validate.tensor(weight, "weight", ["P", width], dtype=_validate.FLOATS, like=x, like_name="x")
    _optional(bias, "bias", [weight.shape[0]], weight)
    _optional(weight2, "weight2", ["P2", width], weight)
    if weight2 is not None:
        _optional(bias2, "bias2", [weight2.shape[0]], weight)
    elif bias2 is not None:
        raise ValueError("bias2 must be None without weight2, got a tensor")
    chosen = resolve("norm_linear", x, backend, (x, norm_weight, norm_bias, weight, bias, weight2, bias2))
    if chosen == "reference":
        y, y2 = norm_reference(x, norm_weight, norm_bias, weight, bias, weight2, bias2, eps)
        return y, y2
    weight, bias, weight2, bias2 = _cast(x, weight, bias, weight2, bias2)  # type: ignore[assignment]
    op = _library.op(native("norm_linear", chosen))
    y, y2, *_ = op(x, norm_weight, norm_bias, weight, bias, weight2, bias2, eps)
    return y, y2


def linear_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    *,
    dropout: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """`residual + dropout(x weight^T + bias)`.

    Args:
        x: [..., K], float32, bfloat16 or float16 (float64 on the reference).
        weight: [P, K], bias: [P] or None, in the dtype of x. Under autocast all three are cast to its dtype.
        residual: [..., P], floating.
        dropout: probability with which an element of the product is set to 0; the others are divided by
            `1 - dropout`. Drawn from torch's generator of the device: another backend draws other elements.
        backend: see `umda_fast.set_backend`.

    Returns:
        [..., P] in the dtype of residual (in the reference under autocast: what the sum of both promotes to).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; dropout outside 0..1.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    _validate.tensor(x, "x", dtype=_validate.FLOATS)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., K] with K at least 1, got {list(x.shape)}")
    _validate.tensor(weight, "weight", ["P", x.shape[-1]], dtype=_validate.FLOATS, like=x, like_name="x")
    _optional(bias, "bias", [weight.shape[0]], weight)
    shape = [*x.shape[:-1], weight.shape[0]]
    _validate.tensor(residual, "residual", shape, dtype=_validate.FLOATS, like=x, like_name="x")
    chosen = resolve("linear_residual", x, backend, (x, weight, bias, residual))
    if chosen == "reference":
        return residual_reference(x, weight, bias, residual, dropout)
    x, weight, bias = _cast(x, x, weight, bias)  # type: ignore[assignment]
    keep = torch.empty(shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout) if dropout else None
    op = _library.op(native("linear_residual", chosen))
    y: Tensor = op(x, weight, bias, residual, keep, 1 / (1 - dropout))
    return y


def _optional(value: Tensor | None, name: str, shape: list[int | str], like: Tensor) -> None:
    if value is not None:
        _validate.tensor(value, name, shape, like=like, like_name="weight")


def _fake_norm_linear(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight2, _, _ = rest
    rows = x.shape[:-1]
    second = 0 if weight2 is None else weight2.shape[0]
    return (
        weight.new_empty(*rows, weight.shape[0]),
        weight.new_empty(*rows, second),
        x.new_empty(rows, dtype=_library.wide(x)),
        x.new_empty(rows, dtype=_library.wide(x)),
    )


def _fake_linear_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, keep: Tensor | None, scale: float
) -> Tensor:
    return residual.new_empty(residual.shape)


def _setup_norm_linear(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    x, norm_weight, norm_bias, weight, bias, weight2, bias2, ctx.eps = inputs
    ctx.dtypes = [None if value is None else value.dtype for value in (bias, bias2)]
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(x, norm_weight, norm_bias, weight, weight2, *output[2:])


def _norm_linear_backward(ctx: _library.Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norm_weight, norm_bias, weight, weight2, mean, rstd = ctx.saved_tensors
    width, wide = x.shape[-1], _library.wide(x)
    if torch.is_grad_enabled():  # to be differentiated again: what the kernel saved is constant
        mean, variance = x.to(wide).mean(-1), x.to(wide).var(-1, correction=0)
        rstd = (variance + ctx.eps).rsqrt()
    flat = ((x.to(wide) - mean[..., None]) * rstd[..., None]).reshape(-1, width)
    gamma = norm_weight.to(wide)
    normed = (flat * gamma + norm_bias.to(wide)).to(weight.dtype)
    d_normed: Tensor | None = None
    results: list[Tensor | None] = []
    for d_y, matrix, dtype in zip(grads[:2], (weight, weight2), ctx.dtypes, strict=True):
        if d_y is None or matrix is None:
            results += [None, None]
            continue
        d_flat = d_y.reshape(-1, matrix.shape[0]).to(matrix.dtype)
        part = (d_flat @ matrix).to(wide)
        d_normed = part if d_normed is None else d_normed + part
        results += [d_flat.T @ normed, None if dtype is None else d_flat.sum(0, dtype=wide).to(dtype)]
    if d_normed is None:
        return (None,) * 8
    scaled = d_normed * gamma
    mean_scaled = scaled.mean(1, keepdim=True)
    along = (scaled * flat).mean(1, keepdim=True)
    dx = (scaled - mean_scaled - flat * along) * rstd.reshape(-1, 1)
    d_gamma = (d_normed * flat).sum(0).to(norm_weight.dtype)
    return dx.view(x.shape).to(x.dtype), d_gamma, d_normed.sum(0).to(norm_bias.dtype), *results, None


def _setup_linear_residual(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, bias, residual, keep, ctx.scale = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.residual_dtype = residual.dtype
    ctx.save_for_backward(x, weight, keep)


def _linear_residual_backward(ctx: _library.Context, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return (None,) * 6
    x, weight, keep = ctx.saved_tensors
    d_product = d_y if keep is None else torch.where(keep, d_y * ctx.scale, 0.0)
    flat = d_product.reshape(-1, weight.shape[0]).to(weight.dtype)
    d_bias = None if ctx.bias_dtype is None else d_product.reshape(flat.shape).sum(0, dtype=_library.wide(d_product))
    return (
        (flat @ weight).view(x.shape),
        flat.T @ x.reshape(-1, x.shape[-1]),
        None if d_bias is None else d_bias.to(ctx.bias_dtype),
        d_y.to(ctx.residual_dtype),
        None,
        None,
    )


_library.define(
    "norm_linear",
    "(Tensor x, Tensor norm_weight, Tensor norm_bias, Tensor weight, Tensor? bias, Tensor? weight2, Tensor? bias2, "
    "float eps) -> (Tensor y, Tensor y2, Tensor mean, Tensor rstd)",
    _fake_norm_linear,
    triton="projections",
)
_library.define(
    "linear_residual",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor? keep, float scale) -> Tensor",
    _fake_linear_residual,
    triton="projections",
)
_library.differentiable("norm_linear", _setup_norm_linear, _norm_linear_backward, backward_op=False)
_library.differentiable("linear_residual", _setup_linear_residual, _linear_residual_backward, backward_op=False)
