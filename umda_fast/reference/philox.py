"""Dropout whose mask is drawn again wherever it is needed, and never stored (docs/model.md, section 1).

Source: Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011: a
function of a counter and a key, without a state. csrc/cpu/philox.h and kernels/_philox.py give the same bits.
"""

import math

import torch
from torch import Tensor

#: Elements of a row that share a counter, 16 bits each.
GROUP = 8
ROUNDS = 10
_LOW = 0xFFFFFFFF


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """Upper and lower word of x times factor, both below 2^32: int64 holds the 64 bits, whatever their sign says."""
    product = x * (factor - (1 << 64) if factor >> 63 else factor)
    return (product >> 32) & _LOW, product & _LOW


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words, int64 in 0..2^32 - 1, of every counter.

    Args:
        seed: int64 [], the key, all 64 bits of it.
        counter: int64, any shape: the lower half of the counter, whose upper half is 0.
    """
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    c0, c1 = counter & _LOW, (counter >> 32) & _LOW
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(ROUNDS):
        high0, low0 = _product(c0, 0xD2511F53)
        high2, low2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    return c0, c1, c2, c3


def random_numbers(shape: torch.Size, seed: Tensor) -> Tensor:
    """int64 in 0..65535, one for every element of `shape` [..., D].

    Element d of row i has the d % 8-th 16 bits, from the lowest of the first word on, of counter
    `i ceil(D / 8) + d // 8`: a row begins a counter of its own, and where a tensor begins or ends in memory does not
    count.
    """
    *rows, width = shape
    count, groups = math.prod(rows), -(-width // GROUP)
    words = torch.stack(philox(seed, torch.arange(count * groups, device=seed.device)), -1)
    halves = torch.stack([words & 0xFFFF, words >> 16], -1)
    return halves.reshape(count, groups * GROUP)[:, :width].reshape(shape)


def dropout(x: Tensor, seed: Tensor | None, threshold: int) -> Tensor:
    """x [..., D] where its number is at least `threshold`, times `65536 / (65536 - threshold)`, else 0.

    An element is kept with the probability `1 - threshold / 65536` exactly, so that x is what is expected.
    """
    if seed is None:
        return x
    kept = random_numbers(x.shape, seed) >= threshold
    return torch.where(kept, x * (65536 / (65536 - threshold)), 0.0)
