"""The rule of accuracy that the interpreted kernels are held to."""

import torch
from torch import Tensor


def assert_close(name: str, actual: Tensor, exact: Tensor, composed: Tensor, factor: float) -> None:
    """The largest error against float64 is at most ``factor`` times that of PyTorch's own composition.

    Where the composition happens to be exact there remain 4 units in the last place of the output's scale.
    """
    assert actual.shape == exact.shape, name
    assert not actual.isnan().any(), name
    if actual.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    theirs = (composed.double() - exact).abs().max().item()
    floor = 4 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= factor * theirs + floor, f"{name}: error {error:.3g}, PyTorch's {theirs:.3g}, floor {floor:.3g}"


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal values in ``dtype``."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
