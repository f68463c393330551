"""The linear layers around attention, with what precedes and follows them (docs/model.md, section 1)."""

import torch.nn.functional as F
from torch import Tensor


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    weight2: Tensor | None,
    bias2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`LN(x) weight^T + bias` [..., P] and `LN(x) weight2^T + bias2` [..., P2] (P2 = 0 without weight2)."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight.to(x.dtype), norm_bias.to(x.dtype), eps).to(weight.dtype)
    second = normed.new_zeros(*x.shape[:-1], 0) if weight2 is None else F.linear(normed, weight2, bias2)
    return F.linear(normed, weight, bias), second


def linear_residual(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, dropout: float) -> Tensor:
    """`residual + dropout(x weight^T + bias)`."""
    return residual + F.dropout(F.linear(x, weight, bias), dropout)
