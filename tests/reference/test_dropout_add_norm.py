"""dropout_add_norm against loops and finite differences."""

import pytest
import torch

from tests.reference._checks import check_gradients, leaf
from umda_fast.reference.dropout_add_norm import dropout_add_norm
from umda_fast.reference.philox import random_numbers

SEED = torch.tensor(-7)
EPS = 1e-5


@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 9), (4,), (0, 3)])
@pytest.mark.parametrize("threshold", [0, 20_000])
def test_loops(shape: tuple[int, ...], threshold: int) -> None:
    """One row at a time."""
    width = shape[-1]
    x, residual = leaf(*shape, seed=0).detach(), leaf(*shape, seed=1).detach()
    bias, gain, scale, shift = (leaf(width, seed=i).detach() for i in range(2, 6))
    seed = SEED if threshold else None
    total, normed = dropout_add_norm(x, bias, gain, residual, scale, shift, seed, threshold, EPS)
    kept = random_numbers(x.shape, SEED).reshape(-1, width) >= threshold
    for i, (row, stream) in enumerate(zip(x.reshape(-1, width), residual.reshape(-1, width), strict=True)):
        expected = stream.clone()
        for d in range(width):
            if kept[i, d]:
                expected[d] += gain[d] * (row[d] + bias[d]) * 65536 / (65536 - threshold)
        torch.testing.assert_close(total.reshape(-1, width)[i], expected)
        off = expected - expected.mean()
        wanted = off / (off.square().mean() + EPS).sqrt() * scale + shift
        torch.testing.assert_close(normed.reshape(-1, width)[i], wanted)


@pytest.mark.parametrize("threshold", [0, 20_000])
@pytest.mark.parametrize("shape", [(3, 5), (2, 2, 4), (0, 3)])
def test_derivatives(shape: tuple[int, ...], threshold: int) -> None:
    seed, width = SEED if threshold else None, shape[-1]
    rows, vectors = [leaf(*shape, seed=i) for i in range(2)], [leaf(width, seed=i) for i in range(2, 6)]
    check_gradients(
        lambda x, residual, bias, gain, scale, shift: dropout_add_norm(
            x, bias, gain, residual, scale, shift, seed, threshold, EPS
        ),
        [*rows, *vectors],
    )
    check_gradients(lambda x, r: dropout_add_norm(x, None, None, r, None, None, seed, threshold, EPS)[0], rows)


def test_without_any_of_the_vectors() -> None:
    x, residual = torch.randn(4, 5), torch.randn(4, 5)
    total, normed = dropout_add_norm(x, None, None, residual, None, None, None, 0, EPS)
    assert torch.equal(total, residual + x)
    assert normed.shape == (0,)


def test_the_stream_keeps_its_dtype() -> None:
    """A narrow product on a wide stream: the sum is wide, what the next layer reads is narrow."""
    x, residual, scale, shift = torch.randn(4, 8).bfloat16(), torch.randn(4, 8), torch.randn(8), torch.randn(8)
    total, normed = dropout_add_norm(x, None, None, residual, scale, shift, None, 0, EPS)
    assert (total.dtype, normed.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(total, residual + x.float())
    with torch.autocast("cpu", torch.bfloat16):
        same, again = dropout_add_norm(x, None, None, residual, scale, shift, None, 0, EPS)
    assert torch.equal(same, total)
    assert torch.equal(again, normed)
