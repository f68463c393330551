"""A bias, GELU and dropout between two linear layers (docs/model.md, section 1)."""

from typing import Any

import torch
from torch import Tensor

from umda_fast.ops import _library, _validate
from umda_fast.ops._dispatch import native, resolve
from umda_fast.ops._dropout import seed_of, threshold_of
from umda_fast.reference.gelu_dropout import gelu_dropout as reference


def gelu_dropout(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    p: float = 0.0,
    seed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`dropout(gelu(x + bias))`, `gelu(a) = a Phi(a)` with the normal distribution function Phi, in one pass.

    No mask is stored: whether an element is dropped is a function of its place and a seed, the same on every backend
    (`umda_fast.reference.philox`), and backward asks again. Backward reads x and the gradient once; the gradient of
    the bias is added up on the way, in a fixed order.

    Args:
        x: [..., D], D at least 1; float32, bfloat16 or float16 (float64 on the reference).
        bias: [D], one of the same dtypes (float64 where x is), or None.
        p: probability with which an element becomes 0, rounded to a multiple of 1/65536 (at most 65535/65536). The
            others are divided by 1 minus the rounded one, so that the result without dropout is what is expected.
        seed: int64 [] on the device of x; None draws one from torch's generator of that device.
        backend: see `umda_fast.set_backend`.

    Returns:
        [..., D] in x's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device; p outside 0..1.
        BackendUnavailableError: ``backend`` cannot serve the call.
    """
    threshold = threshold_of(p)
    _validate.tensor(x, "x", dtype=_validate.FLOATS)
    if x.dim() < 1 or x.shape[-1] < 1:
        raise ValueError(f"x must have shape [..., D] with D at least 1, got {list(x.shape)}")
    if bias is not None:
        floats = (torch.float64,) if x.dtype == torch.float64 else _validate.FLOATS[:-1]
        _validate.tensor(bias, "bias", [x.shape[-1]], dtype=floats, like=x, like_name="x")
    seed = seed_of(seed, threshold, x)
    chosen = resolve("gelu_dropout", x, backend, (x, bias))
    if chosen == "reference":
        return reference(x, bias, seed, threshold)
    y: Tensor = _library.op(native("gelu_dropout", chosen))(x, bias, seed, threshold)
    return y


def _fake(x: Tensor, bias: Tensor | None, seed: Tensor | None, threshold: int) -> Tensor:
    return x.new_empty(x.shape)


def _fake_backward(
    d_y: Tensor, x: Tensor, bias: Tensor | None, seed: Tensor | None, threshold: int
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


def _setup_context(ctx: _library.Context, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.threshold = inputs
    ctx.save_for_backward(*tensors)


def _backward(op: Any, ctx: _library.Context, d_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_y is None:
        return None, None, None, None
    x, bias, seed = ctx.saved_tensors
    dx, d_bias = op(d_y, x, bias, seed, ctx.threshold)
    return dx, d_bias if bias is not None else None, None, None


_library.define(
    "gelu_dropout", "(Tensor x, Tensor? bias, Tensor? seed, int threshold) -> Tensor", _fake, triton="gelu_dropout"
)
_library.define(
    "gelu_dropout_backward",
    "(Tensor d_y, Tensor x, Tensor? bias, Tensor? seed, int threshold) -> (Tensor dx, Tensor d_bias)",
    _fake_backward,
    triton="gelu_dropout",
)
_library.differentiable("gelu_dropout", _setup_context, _backward)
