"""gelu_dropout against loops and finite differences."""

import math

import pytest
import torch

from tests.reference._checks import check_gradients, leaf
from umda_fast.reference.gelu_dropout import gelu_dropout
from umda_fast.reference.philox import random_numbers

SEED = torch.tensor(-7)


@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 9), (4,), (0, 3)])
@pytest.mark.parametrize("threshold", [0, 20_000])
def test_loops(shape: tuple[int, ...], threshold: int) -> None:
    """`a Phi(a)` one number at a time, Phi by the error function of the C library."""
    x, bias = leaf(*shape, seed=0).detach(), leaf(shape[-1], seed=1).detach()
    y = gelu_dropout(x, bias, SEED if threshold else None, threshold).reshape(-1, shape[-1])
    numbers = random_numbers(x.shape, SEED).reshape(y.shape)
    for i in range(y.shape[0]):
        for d in range(shape[-1]):
            a = float(x.reshape(y.shape)[i, d] + bias[d])
            expected = a * (1 + math.erf(a / 2**0.5)) / 2
            if threshold:
                expected *= (int(numbers[i, d]) >= threshold) * 65536 / (65536 - threshold)
            assert float(y[i, d]) == pytest.approx(expected, rel=1e-13, abs=1e-15)


@pytest.mark.parametrize("threshold", [0, 20_000])
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 9), (0, 3)])
def test_derivatives(shape: tuple[int, ...], threshold: int) -> None:
    seed = SEED if threshold else None
    x, bias = leaf(*shape, seed=0), leaf(shape[-1], seed=1)
    check_gradients(lambda x, bias: gelu_dropout(x, bias, seed, threshold), [x, bias])
    check_gradients(lambda x: gelu_dropout(x, None, seed, threshold), [x])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_once(dtype: torch.dtype) -> None:
    x, bias = leaf(50, 9, seed=0).detach().to(dtype), leaf(9, seed=1).detach().to(dtype)
    wide = gelu_dropout(x.float(), bias.float(), SEED, 9000)
    assert torch.equal(gelu_dropout(x, bias, SEED, 9000), wide.to(dtype))
