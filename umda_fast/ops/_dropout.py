"""What operations with dropout share: the probability in 1/65536, and the seed of a mask that is not stored."""

import torch
from torch import Tensor

from umda_fast.ops import _validate


def threshold_of(p: float) -> int:
    """Of 65536 random numbers, how many drop an element.

    Raises:
        TypeError, ValueError: p is no number, or not at least 0 and below 1.
    """
    if isinstance(p, bool) or not isinstance(p, float | int):
        raise TypeError(f"p must be a float, got {type(p).__name__}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"p must be at least 0 and below 1, got {p}")
    return min(round(65536 * p), 65535)


def seed_of(seed: Tensor | None, threshold: int, like: Tensor) -> Tensor | None:
    """The seed that a call uses: the one given, or one drawn from torch's generator of the device of ``like``; None
    where nothing is dropped.

    Raises:
        TypeError, ValueError: not an int64 scalar, or on another device.
    """
    if seed is not None:
        _validate.tensor(seed, "seed", [], dtype=torch.int64, like=like, like_name="x")
    if not threshold:
        return None
    return dropout_seed(like.device) if seed is None else seed


def dropout_seed(device: torch.device | str) -> Tensor:
    """A seed for the dropout of one call, int64 [], drawn from torch's generator of the device, where it stays.

    A run that is seeded or resumed draws the same ones.
    """
    # The largest int64 is never drawn: `high` is exclusive and must be an int64 itself.
    return torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=device)
