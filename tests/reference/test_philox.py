"""Philox4x32-10 against the answers that its authors publish, and what is dropped by it."""

import pytest
import torch

from umda_fast.reference.philox import GROUP, dropout, philox, random_numbers

MASK = 0xFFFFFFFF


def plain(seed: int, counter: int) -> list[int]:
    """One counter, one number at a time (Salmon et al. 2011, section 2)."""
    c, key = [counter & MASK, counter >> 32, 0, 0], [seed & MASK, (seed >> 32) & MASK]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(second >> 32) ^ c[1] ^ key[0], second & MASK, (first >> 32) ^ c[3] ^ key[1], first & MASK]
        key = [(key[0] + 0x9E3779B9) & MASK, (key[1] + 0xBB67AE85) & MASK]
    return c


def test_known_answer() -> None:
    """Of the test vectors of Random123, the one whose upper counter is 0."""
    zero = torch.tensor(0)
    assert [int(x) for x in philox(zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_every_bit_of_seed_and_counter(seed: int) -> None:
    counters = [0, 1, 2**31, 2**32 - 1, 2**32, 2**40 + 7, 2**62 + 2**31]
    words = philox(torch.tensor(seed), torch.tensor(counters))
    for i, counter in enumerate(counters):
        assert [int(x[i]) for x in words] == plain(seed, counter)


def test_places_of_the_numbers() -> None:
    """Eight to a counter, the lower half of a word first; a row begins a new one."""
    numbers = random_numbers(torch.Size([2, 3, 11]), torch.tensor(77)).reshape(6, 11)
    for i in range(6):
        for d in range(11):
            word = plain(77, 2 * i + d // GROUP)[d % GROUP // 2]
            assert int(numbers[i, d]) == (word >> 16 if d % 2 else word & 0xFFFF)


def test_numbers_are_uniform_and_unrelated() -> None:
    """Means and correlations of a million of them, to five deviations."""
    x = random_numbers(torch.Size([1000, 1000]), torch.tensor(5)).double() / 65536
    assert abs(float(x.mean()) - 0.5) < 5 * 12**-0.5 * 1e-3
    centred = (x - 0.5) * 12**0.5
    for other in (centred.roll(1, 0), centred.roll(1, 1), centred.roll(8, 1)):
        assert abs(float((centred * other).mean())) < 5e-3
    other = random_numbers(torch.Size([1000, 1000]), torch.tensor(6)).double() / 65536
    assert abs(float((centred * (other - 0.5)).mean())) < 5 * 12**-0.5 * 1e-3


@pytest.mark.parametrize("threshold", [1, 6554, 32768, 65535])
def test_dropout_keeps_what_is_expected(threshold: int) -> None:
    """Kept is what is at or above the threshold: a share of exactly 1 - threshold / 65536 of all numbers."""
    seed = torch.tensor(3)
    numbers = random_numbers(torch.Size([500, 333]), seed)
    y = dropout(torch.ones(500, 333, dtype=torch.float64), seed, threshold)
    assert torch.equal(y != 0, numbers >= threshold)
    share = 1 - threshold / 65536
    assert torch.allclose(y[y != 0], torch.tensor(1 / share, dtype=torch.float64), rtol=1e-15)
    deviation = (share * (1 - share) / y.numel()) ** 0.5
    assert abs(float((y != 0).double().mean()) - share) <= 5 * deviation


def test_what_is_dropped_is_zero_whatever_it_was() -> None:
    seed = torch.tensor(3)
    y = dropout(torch.full((40, 10), torch.nan), seed, 32768)
    dropped = random_numbers(y.shape, seed) < 32768
    assert (y[dropped] == 0).all()
    assert y[~dropped].isnan().all()


def test_nothing_is_dropped_without_a_seed() -> None:
    x = torch.randn(4, 5)
    assert dropout(x, None, 0) is x
