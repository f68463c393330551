"""dropout_add_norm on the CPU: its mask is that of the reference, its values keep the rule."""

import itertools

import pytest
import torch

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, run_on, threads
from tests.ops.checks import keeps_rule
from umda_fast.parity.layer_cases import dropout_add_norm_case
from umda_fast.reference.philox import random_numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 7, 8, 9, 16, 17, 33, 64, 129, 256, 1000)
op = torch.ops.umda_fast.dropout_add_norm
backward = torch.ops.umda_fast.dropout_add_norm_backward


def check_masks() -> None:
    """Bit for bit, over several tiles and partitions."""
    for width, rows in itertools.product((*WIDTHS, 4096), (1, 33, 200)):
        seed = torch.tensor(width - 100)
        x, residual = torch.ones(rows, width), torch.zeros(rows, width)
        kept = random_numbers(x.shape, seed) >= 30_000
        total, _, *moments = op(x, None, None, residual, None, None, seed, 30_000, 1e-5)
        assert torch.equal(total != 0, kept), (rows, width)
        dx, d_residual, *_ = backward(x, None, x, None, None, total, None, *moments, seed, 30_000)
        assert torch.equal(dx != 0, kept), (rows, width)
        assert torch.equal(d_residual, x)


def check_rule() -> None:
    for i, width in enumerate(WIDTHS):
        for dtype in DTYPES:
            case = dropout_add_norm_case("here", (70,), width, p=0.3, gain=i % 3 != 1, norm=i % 4 != 1, wide=i % 2 == 0)
            keeps_rule(case, dtype)


def check_instruction_set() -> None:
    check_masks()
    check_rule()


def test_masks() -> None:
    check_masks()


def test_rule() -> None:
    check_rule()


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_instruction_sets(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_instruction_set")


@pytest.mark.parametrize("used", ["sum", "normed"])
def test_a_gradient_of_one_output_alone(used: str) -> None:
    """The other one counts as 0, and is not read."""
    generator = torch.Generator().manual_seed(0)
    x, residual, d = (torch.randn(50, 24, generator=generator) for _ in range(3))
    bias, gain, scale, shift = (torch.randn(24, generator=generator) for _ in range(4))
    seed = torch.tensor(3)
    total, _, *moments = op(x, bias, gain, residual, scale, shift, seed, 9000, 1e-5)
    rest = (x, bias, gain, total, scale, *moments, seed, 9000)
    zeros = torch.zeros_like(d)
    alone = backward(*((d, None) if used == "sum" else (None, d)), *rest)
    both = backward(*((d, zeros) if used == "sum" else (zeros, d)), *rest)
    for a, b in zip(alone, both, strict=True):
        torch.testing.assert_close(a, b)
    assert all(bool(g.any()) for g in alone[:4])
    assert bool(alone[4].any()) == bool(alone[5].any()) == (used == "normed")


def test_a_large_mean_costs_no_digits() -> None:
    generator = torch.Generator().manual_seed(0)
    residual = torch.randn(40, 96, generator=generator) + 4096
    x, scale, shift = torch.zeros(40, 96), torch.ones(96), torch.zeros(96)
    _, normed, _, _ = op(x, None, None, residual, scale, shift, None, 0, 1e-5)
    layer_norm = torch.nn.functional.layer_norm
    assert_close("normed", normed, layer_norm(residual.double(), (96,)), layer_norm(residual, (96,)), 2)


def test_what_is_dropped_may_be_anything() -> None:
    """An infinite product that is dropped leaves no trace, forward and backward."""
    seed = torch.tensor(3)
    x, residual, gain = torch.ones(30, 16), torch.ones(30, 16), torch.ones(16)
    dropped = random_numbers(x.shape, seed) < 30_000
    x[dropped] = torch.inf
    total, _, *moments = op(x, None, gain, residual, None, None, seed, 30_000, 1e-5)
    assert torch.equal(total[dropped], residual[dropped])
    gradients = backward(residual, None, x, None, gain, total, None, *moments, seed, 30_000)
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual, d_sum, d_normed = (torch.randn(3001, 97, generator=generator).to(dtype) for _ in range(4))
    vectors = [torch.randn(97, generator=generator) for _ in range(4)]
    seed = torch.tensor(5)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            total, normed, *moments = op(x, *vectors[:2], residual, *vectors[2:], seed, 6554, 1e-5)
            rest = (x, *vectors[:2], total, vectors[2], *moments, seed, 6554)
            found.append([total, normed, *moments, *backward(d_sum, d_normed, *rest)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_direct_callers_are_checked() -> None:
    x, v, seed = torch.zeros(4, 8), torch.zeros(8), torch.tensor(0)
    for arguments, message in [
        ((torch.zeros(()), None, None, torch.zeros(()), None, None, None, 0), "x must have a last dimension"),
        ((x.double(), None, None, x, None, None, None, 0), "x must be float32"),
        ((x, v[:7], None, x, None, None, None, 0), "bias must have size 8"),
        ((x, None, v.double(), x, None, None, None, 0), "gain must be float32"),
        ((x, None, None, x[:3], None, None, None, 0), "residual must have size 4"),
        ((x, None, None, x.double(), None, None, None, 0), "residual must be float32"),
        ((x, None, None, x, v, None, None, 0), "norm_weight and norm_bias must both be given"),
        ((x, None, None, x, None, None, seed.int(), 0), "seed must be Long"),
        ((x, None, None, x, None, None, seed, -1), r"threshold must be in 0\.\.65535"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            op(*arguments, 1e-5)
    total, _, *moments = op(x, v, v, x, v, v, seed, 1, 1e-5)
    for d_sum, d_normed, means, message in [
        (x[:3], None, moments, "d_sum must have size 4"),
        (x.bfloat16(), None, moments, "d_sum must be Float"),
        (None, x.bfloat16(), moments, "d_normed must be Float"),
        (None, x, [moments[0][:3], moments[1]], "mean must have 4 elements"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            backward(d_sum, d_normed, x, v, v, total, v, *means, seed, 1)
