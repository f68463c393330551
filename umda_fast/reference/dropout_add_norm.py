"""What a block adds to a residual stream, and the layer norm of the sum (docs/model.md, section 1)."""

import torch
from torch import Tensor

from umda_fast.reference import philox
from umda_fast.reference._numerics import accumulation_dtype, without_autocast


@without_autocast
def dropout_add_norm(
    x: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`s = residual + gain * dropout(x + bias)` in the dtype of residual, and `LN(s)` in that of x ([0] without norm).

    The layer norm is that of s as it was rounded. See `umda_fast.reference.philox.dropout`.
    """
    dtype = torch.promote_types(accumulation_dtype(x), residual.dtype)
    wide = x.to(dtype)
    if bias is not None:
        wide = wide + bias.to(dtype)
    wide = philox.dropout(wide, seed, threshold)
    if gain is not None:
        wide = wide * gain.to(dtype)
    total = (residual.to(dtype) + wide).to(residual.dtype)
    if norm_weight is None or norm_bias is None:
        return total, x.new_empty(0)
    parameters = norm_weight.to(dtype), norm_bias.to(dtype)
    return total, torch.nn.functional.layer_norm(total.to(dtype), x.shape[-1:], *parameters, eps).to(x.dtype)
