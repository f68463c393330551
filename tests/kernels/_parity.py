"""The rule of accuracy that the interpreted kernels are held to, and their inputs."""

import torch
from torch import Tensor

from umda_fast.parity.rule import assert_close

__all__ = ["assert_close", "normal"]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values in ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
