"""gelu_dropout on the CPU: its mask is that of the reference, its values keep the rule."""

import pytest
import torch

from tests.csrc.cpu_checks import FORCED_SETS, assert_close, run_on, threads
from tests.ops.checks import keeps_rule
from umda_fast.parity.layer_cases import gelu_dropout_case
from umda_fast.reference.philox import random_numbers

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDTHS = (1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 127, 128, 129, 256, 1000, 9001)
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF)


def check_masks() -> None:
    """Bit for bit, in rows of every width, over several tiles and partitions."""
    for width in WIDTHS:
        for rows in (1, 5, 33, 200):
            seed = torch.tensor(SEEDS[(rows + width) % len(SEEDS)])
            x = torch.full((rows, width), 20.0)
            kept = random_numbers(x.shape, seed) >= 30_000
            y = torch.ops.umda_fast.gelu_dropout(x, None, seed, 30_000)
            assert torch.equal(y != 0, kept), (rows, width)
            dx, _ = torch.ops.umda_fast.gelu_dropout_backward(x, x, None, seed, 30_000)
            assert torch.equal(dx != 0, kept), (rows, width)


def check_rule() -> None:
    for width in WIDTHS[:-1]:
        for dtype in DTYPES:
            case = gelu_dropout_case("here", (70,), width, p=0.3, wide_bias=width % 2 == 0)
            keeps_rule(case, dtype)


def check_instruction_set() -> None:
    check_masks()
    check_rule()
    test_all_of_the_real_line()


def test_masks() -> None:
    check_masks()


def test_rule() -> None:
    check_rule()


@pytest.mark.parametrize("instruction_set", FORCED_SETS)
def test_instruction_sets(instruction_set: str) -> None:
    run_on(instruction_set, __name__, "check_instruction_set")


def test_all_of_the_real_line() -> None:
    """Value and slope from one tail to the other, 0 and what is next to it, and the ends."""
    x = torch.cat([torch.linspace(-40, 40, 200_001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 3e38])])
    y = torch.ops.umda_fast.gelu_dropout(x, None, None, 0)
    slope, _ = torch.ops.umda_fast.gelu_dropout_backward(torch.ones_like(x), x, None, None, 0)
    wide = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(wide)
    (exact_slope,) = torch.autograd.grad(exact.sum(), wide)
    own = x.clone().requires_grad_()
    composed = torch.nn.functional.gelu(own)
    (own_slope,) = torch.autograd.grad(composed.sum(), own)
    for low, high in [(-40, -3), (-3, 3), (3, 40), (1e38, 4e38)]:  # each to its own scale
        part = (x >= low) & (x <= high)
        assert_close("y", y[part], exact.detach()[part], composed.detach()[part], 2)
        assert_close("slope", slope[part], exact_slope[part], own_slope[part], 3)
    nan = torch.ops.umda_fast.gelu_dropout(torch.tensor([torch.nan, 1.0]), None, None, 0)
    assert nan.isnan().tolist() == [True, False]


def test_the_lower_tail_has_digits() -> None:
    """Where `1 + erf` has none left."""
    x = torch.linspace(-9, -1, 1001)
    y = torch.ops.umda_fast.gelu_dropout(x, None, None, 0)
    exact = x.double() * torch.special.erfc(-x.double() / 2**0.5) / 2
    assert float((y.double() / exact - 1).abs().max()) < 1e-5  # x^2 / 2 is rounded: up to 40 ulp


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, d_y = (torch.randn(3001, 97, generator=generator).to(dtype) for _ in "xy")
    bias, seed = torch.randn(97, generator=generator), torch.tensor(5)
    found = []
    for count in (1, 2, 3):
        with threads(count):
            y = torch.ops.umda_fast.gelu_dropout(x, bias, seed, 6554)
            found.append([y, *torch.ops.umda_fast.gelu_dropout_backward(d_y, x, bias, seed, 6554)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_results_past_the_caches() -> None:
    """More than fits there, and so written by other stores; held to the same rows in parts."""
    x, bias, seed = torch.randn(9000, 1024), torch.randn(1024), torch.tensor(9)
    y = torch.ops.umda_fast.gelu_dropout(x, bias, seed, 6554)
    dx, d_bias = torch.ops.umda_fast.gelu_dropout_backward(x, x, bias, seed, 6554)
    part = torch.ops.umda_fast.gelu_dropout(x[:100], bias, seed, 6554)
    part_dx, _ = torch.ops.umda_fast.gelu_dropout_backward(x[:100], x[:100], bias, seed, 6554)
    assert torch.equal(y[:100], part)
    assert torch.equal(dx[:100], part_dx)
    assert torch.equal(y == 0, (random_numbers(x.shape, seed) < 6554) | (x + bias == 0))
    assert_close("d_bias", d_bias, dx.double().sum(0), dx.sum(0), 3)


def test_direct_callers_are_checked() -> None:
    x, bias, seed = torch.zeros(4, 8), torch.zeros(8), torch.tensor(0)
    for arguments, message in [
        ((torch.zeros(()), None, None, 0), "x must have a last dimension of at least 1"),
        ((x.double(), None, None, 0), "x must be float32"),
        ((x, bias[:7], None, 0), "bias must have size 8"),
        ((x, bias.double(), None, 0), "bias must be float32"),
        ((x, bias, seed.int(), 1), "seed must be Long"),
        ((x, bias, seed[None], 1), "seed must have 0 dimensions"),
        ((x, bias, seed, 65536), r"threshold must be in 0\.\.65535"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.umda_fast.gelu_dropout(*arguments)
    for d_y, message in [
        (x[:3], "d_y must have size 4"),
        (x.bfloat16(), "d_y must be Float"),
        (x[0], "d_y must have 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.umda_fast.gelu_dropout_backward(d_y, x, bias, seed, 1)
