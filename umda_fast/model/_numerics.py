"""What several blocks share."""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: where sums and ratios are taken under autocast."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
