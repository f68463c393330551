"""What a block adds to a residual stream, and the layer norm that the next one reads (docs/model.md, section 1)."""

from typing import Any

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.ops._dropout import seed_of, threshold_of
from umda_fast.reference.dropout_add_norm import dropout_add_norm as reference

#: Widest row: a kernel holds one as a whole.
MAX_WIDTH = 4096


def dropout_add_norm(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None = None,
    gain: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    p: float = 0.0,
    eps: float = 1e-5,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`s = residual + gain * dropout(x + bias)` and, with norm_weight and norm_bias, `LN(s)`, in one pass.

    No mask is stored, see `gelu_dropout`. Backward reads the gradients of both, s, and x for the gradient of the gain,
    once; the gradients of the vectors are added up on the way, in a fixed order. LN is that of s as it is returned.

    Args:
        x: [..., D], D in 1..4096, what a linear layer without its bias gives; float32, bfloat16 or float16 (float64 on
            the reference).
        residual: as x, in any of these dtypes (float64 where x is, and only there).
        bias, gain: [D], one of these dtypes, or None.
        norm_weight, norm_bias: [D], both of one of these dtypes, or both None.
        p: probability with which an element of x + bias becomes 0, rounded to a multiple of 1/65536 as by
            `gelu_dropout`.
        eps: under the root of the variance.
        seed: int64 [] on the device of x; None draws one from torch's generator of that device.
        backend: see `umda_fast.set_backend`.

    Returns:
        s [..., D] in residual's dtype; LN(s) [..., D] in x's dtype, None without norm_weight.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; p outside 0..1; one of norm_weight
            and norm_bias without the other.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    threshold = threshold_of(p)
    _validate.tensor(x, "x", dtype=_validate.FLOATS)
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., D], got {list(x.shape)}")
    width = x.shape[-1]
    _validate.in_range(width, "D (x.shape[-1])", 1, MAX_WIDTH)
    floats = (torch.float64,) if x.dtype == torch.float64 else _validate.FLOATS[:-1]
    _validate.tensor(residual, "residual", list(x.shape), dtype=floats, like=x, like_name="x")
    vectors = {"bias": bias, "gain": gain, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, vector in vectors.items():
        if vector is not None:
            _validate.tensor(vector, name, [width], dtype=floats, like=x, like_name="x")
    if (norm_weight is None) != (norm_bias is None):
        given, missing = ("norm_bias", "norm_weight") if norm_weight is None else ("norm_weight", "norm_bias")
        raise ValueError(f"{missing} must be a tensor beside {given}, got None")
    if norm_weight is not None:
        _validate.tensor(norm_bias, "norm_bias", like=norm_weight, like_name="norm_weight")
    seed = seed_of(seed, threshold, x)
    inputs = (x, bias, gain, residual, norm_weight, norm_bias)
    chosen = resolve("dropout_add_norm", x, backend, inputs)
    if chosen == "reference":
        total, normed = reference(*inputs, seed, threshold, eps)
    else:
        total, normed, *_ = _library.op(native("dropout_add_norm", chosen))(*inputs, seed, threshold, eps)
    return total, None if norm_weight is None else normed


def _fake(
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = residual.new_empty(residual.shape)
    if norm_weight is None:
        return total, x.new_empty(0), _statistic(x, 0), _statistic(x, 0)
    return total, x.new_empty(x.shape), _statistic(x, *x.shape[:-1]), _statistic(x, *x.shape[:-1])


def _statistic(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=_library.wide(x))


def _fake_backward(
    d_sum: Tensor | None,
    d_normed: Tensor | None,
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    total: Tensor,
    norm_weight: Tensor | None,
    *_: Any,
) -> tuple[Tensor, ...]:
    def like(vector: Tensor | None) -> Tensor:
        return x.new_empty(0) if vector is None else vector.new_empty(vector.shape)

    scale = like(norm_weight)
    return (
        x.new_empty(x.shape),
        total.new_empty(total.shape),
        like(bias),
        like(gain),
        scale,
        scale.new_empty(scale.shape),
    )


def _setup_context(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    x, bias, gain, _, norm_weight, _, seed, ctx.threshold, _ = inputs
    total, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, bias, gain, total, norm_weight, mean, rstd, seed)


def _backward(op: Any, ctx: _library.Context, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    _, bias, gain, _, norm_weight, *_ = saved
    d_sum, d_normed = grads[0], None if norm_weight is None else grads[1]
    if d_sum is None and d_normed is None:
        return (None,) * 9
    dx, d_residual, d_bias, d_gain, d_weight, d_shift = op(d_sum, d_normed, *saved, ctx.threshold)
    scaled, normed = gain is not None, norm_weight is not None
    return (
        dx,
        None if bias is None else d_bias,
        d_gain if scaled else None,
        d_residual,
        d_weight if normed else None,
        d_shift if normed else None,
        None,
        None,
        None,
    )


_library.define(
    "dropout_add_norm",
    "(Tensor x, Tensor? bias, Tensor? gain, Tensor residual, Tensor? norm_weight, Tensor? norm_bias, Tensor? seed, "
    "int threshold, float eps) -> (Tensor sum, Tensor normed, Tensor mean, Tensor rstd)",
    _fake,
    triton="dropout_add_norm",
)
_library.define(
    "dropout_add_norm_backward",
    "(Tensor? d_sum, Tensor? d_normed, Tensor x, Tensor? bias, Tensor? gain, Tensor sum, Tensor? norm_weight, "
    "Tensor mean, Tensor rstd, Tensor? seed, int threshold) -> (Tensor dx, Tensor d_residual, Tensor d_bias, "
    "Tensor d_gain, Tensor d_norm_weight, Tensor d_norm_bias)",
    _fake_backward,
    triton="dropout_add_norm",
)
_library.differentiable("dropout_add_norm", _setup_context, _backward)
