"""A bias, GELU and dropout (docs/model.md, section 1)."""

from torch import Tensor
from torch.nn.functional import gelu

from umda_fast.reference import philox
from umda_fast.reference._numerics import accumulation_dtype


def gelu_dropout(x: Tensor, bias: Tensor | None, seed: Tensor | None, threshold: int) -> Tensor:
    """`dropout(gelu(x + bias))`, rounded once; see `umda_fast.reference.philox.dropout`."""
    wide = x.to(accumulation_dtype(x))
    if bias is not None:
        wide = wide + bias.to(wide.dtype)
    return philox.dropout(gelu(wide), seed, threshold).to(x.dtype)
