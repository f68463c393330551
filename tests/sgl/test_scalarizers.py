"""Balancers of losses: the new ones by their definition, all of them on losses that are not positive."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from umda_fast import sgl
from umda_fast.sgl import BALANCERS, StatefulBalancer, make_balancer

NO_GRAM = torch.zeros(3, 3, dtype=torch.float64)
#: Of losses, in whatever way; gram balancers read none.
OF_LOSSES = [*sorted(name for name in BALANCERS if not make_balancer(name).needs_gram), "gradnorm", "sgl", "db_mtl"]


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- by their definition


def test_geometric_mean_is_the_derivative_of_its_scalar() -> None:
    losses = double(0.2, 3.0, 1.5).requires_grad_()
    (slope,) = torch.autograd.grad(losses.prod() ** (1 / 3), losses)
    found = sgl.GeometricMean().weights(NO_GRAM, losses.detach())
    torch.testing.assert_close(found, 3 * slope / slope.sum())
    assert sgl.GeometricMean().weights(NO_GRAM, double(2, 2, 2)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("preference", [None, (1.0, 2.0, 0.5)])
@pytest.mark.parametrize("reference", [None, (-1.0, 0.1, 0.0)])
def test_pbi_is_the_derivative_of_its_scalar(
    preference: tuple[float, ...] | None, reference: tuple[float, ...] | None
) -> None:
    balancer = sgl.PBI(2.0, preference=preference, reference=reference, relative=False)
    losses = double(0.2, 3.0, 1.5).requires_grad_()
    p = double(*(preference or (1, 1, 1)))
    p = p / p.norm()
    shifted = losses - double(*(reference or (0, 0, 0)))
    along = shifted @ p
    (slope,) = torch.autograd.grad(along + 2.0 * (shifted - along * p).norm(), losses)
    torch.testing.assert_close(balancer.weights(NO_GRAM, losses.detach()), 3 / p.sum() * slope)


def test_pbi_on_its_preference_and_relative_to_the_first_losses() -> None:
    balancer = sgl.PBI(5.0)
    first = double(0.2, 30.0, 1.5)
    torch.testing.assert_close(balancer.weights(NO_GRAM, first), 3 / first / (1 / first).sum())
    # The first task has halved: it is ahead, and the others get more.
    weights = balancer.weights(NO_GRAM, first * double(0.5, 1, 1)) * first
    assert weights[0] < 0 < weights[1]
    torch.testing.assert_close(weights[1], weights[2])
    with pytest.raises(ValueError, match=r"^preference: expected 3 numbers, one per task, got 2"):
        sgl.PBI(preference=[1.0, 2.0]).weights(NO_GRAM, first)


def test_pbi_with_a_missing_task_has_the_preferences_of_the_others() -> None:
    balancer = sgl.PBI(0.0, preference=(1.0, 2.0, 4.0), relative=False)
    balancer.setup(3, torch.device("cpu"), torch.float64)
    found = balancer.weights(NO_GRAM[:2, :2], double(1, 1), torch.tensor([0, 2]))
    torch.testing.assert_close(found, double(2 / 5, 8 / 5))


def test_imtl_l_follows_the_gradient_of_its_loss() -> None:
    balancer = sgl.IMTLL(lr=0.1)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for losses in (double(0.5, 3, 1), double(0.4, 2, 2), double(0.3, 1, 4)):
        (slope,) = torch.autograd.grad((s.exp() * losses - s).sum(), s)
        torch.testing.assert_close(balancer.weights(NO_GRAM, losses), s.detach().exp())
        s = (s - 0.1 * slope).detach().requires_grad_()
    for _ in range(3000):
        found = balancer.weights(NO_GRAM, double(0.5, 3, 1))
    torch.testing.assert_close(found, double(2, 1 / 3, 1))
    torch.testing.assert_close(sgl.IMTLL(closed_form=True).weights(NO_GRAM, double(0.5, 3, 1)), found)


@pytest.mark.parametrize("discrepancy", [0.0, 0.3])
def test_ldc_mtl_follows_its_total(discrepancy: float) -> None:
    """With autograd on the total, pairs written out."""
    balancer = sgl.LDCMTL(discrepancy, lr=0.05)
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    first = double(2, 0.5, 1)
    for losses in (first.clone(), double(1, 0.6, 1), double(0.5, 0.5, 1.2)):
        losses.requires_grad_()
        s = 3 * torch.softmax(logits, 0)
        weighted = s * losses / first
        apart = sum((weighted[i] - weighted[j]).abs() for i in range(3) for j in range(i))
        total = weighted.sum() + discrepancy * 2 / 3 * apart
        slope, by_logits = torch.autograd.grad(total, [losses, logits])
        unit = 3 / (s.detach() / first).sum()
        torch.testing.assert_close(balancer.weights(NO_GRAM, losses.detach()), unit * slope)
        logits = (logits - 0.05 * by_logits).detach().requires_grad_()


def test_ldc_mtl_of_two_tasks_is_the_papers() -> None:
    balancer = sgl.LDCMTL(0.25)
    balancer.weights(NO_GRAM[:2, :2], double(1, 1))
    state = balancer.state_dict()
    s = 2 * torch.softmax(state["logits"], 0)
    losses = double(1.5, 1.0).requires_grad_()
    (slope,) = torch.autograd.grad((s * losses).sum() + 0.25 * (s[0] * losses[0] - s[1] * losses[1]).abs(), losses)
    torch.testing.assert_close(balancer.weights(NO_GRAM[:2, :2], losses.detach()), slope)


def test_ldc_mtl_keeps_weighted_losses_together() -> None:
    """A task that stays where it began gets more than one that has gone ahead."""
    balancer = sgl.LDCMTL(0.4)
    balancer.weights(NO_GRAM, double(1, 1, 1))
    for _ in range(300):
        weights = balancer.weights(NO_GRAM, double(1, 0.5, 0.5))
    assert weights.min() > 0
    assert float(weights.sum()) == pytest.approx(3, rel=0.3)


def test_db_mtl_brings_every_gradient_to_the_longest_of_the_logarithms() -> None:
    rows = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    losses = double(0.2, 3.0, 1.5)
    weights = sgl.DBMTL(normalize=False).weights(rows @ rows.T, losses)
    of_logs = rows / losses[:, None]
    longest = of_logs.norm(dim=1).max()
    torch.testing.assert_close(weights[:, None] * rows, longest * of_logs / of_logs.norm(dim=1, keepdim=True))
    scaled = sgl.DBMTL().weights(rows @ rows.T, losses)
    torch.testing.assert_close(scaled, 3 * weights / weights.sum())


def test_excess_mtl_by_hand() -> None:
    balancer = sgl.ExcessMTL(lr=0.5, warmup=2)
    grams = [torch.diag(double(4, 1)), torch.diag(double(4, 9)), torch.diag(double(1, 16))]
    losses = double(1, 1)
    assert [balancer.weights(gram, losses).tolist() for gram in grams[:2]] == [[1, 1], [1, 1]]
    first = double((4 / 2 + 4 / math.sqrt(8)) / 2, (1 + 9 / math.sqrt(10)) / 2)
    excess = double(1 / 3, 16 / math.sqrt(26))
    expected = 2 * torch.softmax(0.5 * excess / first, 0)
    torch.testing.assert_close(balancer.weights(grams[2], losses), expected)


def test_famo_learns_from_the_next_losses_where_nobody_calls_update() -> None:
    """The task that improves least gets more, as after calls of `update` with the same losses."""
    alone, told = sgl.FAMO(), sgl.FAMO()
    series = [double(1, 1, 1) * double(0.99, 0.9, 0.999) ** step for step in range(30)]
    for now, then in zip(series, [*series[1:], None], strict=True):
        torch.testing.assert_close(alone.weights(NO_GRAM, now), told.weights(NO_GRAM, now))
        if then is not None:
            told.update(then)
    logits = alone.state_dict()["logits"]
    assert logits[2] > logits[0] > logits[1]


# -- losses that are not positive


def negative_likelihoods(step: int) -> Tensor:
    """A Gaussian's that falls through 0, one that is negative from the start, and a loss that is 0 at first."""
    return double(1 - 0.02 * step, -3 - 0.01 * step, 0.0 if step < 3 else 0.1 + 0.05 * math.sin(step))


@pytest.mark.parametrize("name", OF_LOSSES)
def test_losses_below_zero_leave_weights_bounded(name: str) -> None:
    balancer = make_balancer(name, **({"period": 7} if name == "dwa" else {}))
    gram = torch.diag(double(1, 2, 3)) + 0.2
    for step in range(200):
        losses = negative_likelihoods(step)
        weights = balancer.weights(gram, losses)
        if isinstance(balancer, sgl.FAMO):
            balancer.update(negative_likelihoods(step + 1))
        assert bool(weights.isfinite().all()), step
        assert float(weights.abs().max()) <= 100, step
        if isinstance(balancer, StatefulBalancer):
            for key, value in balancer.state_dict().items():
                if isinstance(value, Tensor) and value.is_floating_point() and name != "dwa":
                    assert bool(value.isfinite().all()), key
    if make_balancer(name).normalized:
        assert float(weights.min()) > 1e-3  # nobody starves


@pytest.mark.parametrize("name", ["famo", "geometric_mean"])
def test_a_loss_below_zero_counts_as_an_average_task(name: str) -> None:
    found = make_balancer(name).weights(NO_GRAM, double(0.5, -2.0, 2.0))
    expected = double(2.0, 1.25, 0.5)
    torch.testing.assert_close(found, 3 * expected / expected.sum())
    assert make_balancer(name).weights(NO_GRAM, double(-1, -2, 0)).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", ["uncertainty", "imtl_l"])
def test_a_loss_below_zero_moves_no_variance(name: str) -> None:
    for options in ({}, {"closed_form": True}):
        balancer = make_balancer(name, **options)
        balancer.weights(NO_GRAM, double(1, 1, 1))
        before = balancer.state_dict()  # type: ignore[attr-defined]
        balancer.weights(NO_GRAM, double(-5, 0, 1))
        after = balancer.state_dict()  # type: ignore[attr-defined]
        assert torch.equal(before["log_variance"][:2], after["log_variance"][:2])


@pytest.mark.parametrize("name", ["uncertainty", "imtl_l", "ldc_mtl"])
def test_one_huge_loss_moves_what_is_learned_by_one_at_most(name: str) -> None:
    balancer = make_balancer(name)
    balancer.weights(NO_GRAM, double(1, 1, 1))
    balancer.weights(NO_GRAM, double(1e12, 1, 1))
    weights = balancer.weights(NO_GRAM, double(1, 1, 1))
    assert float(weights.min()) >= 0.1


def test_self_guided_rates_of_losses_below_zero() -> None:
    """A first loss that is not positive says nothing; one that falls through 0 has come as far as it can be said."""
    gram = torch.eye(2, dtype=torch.float64)
    balancer = sgl.SGLBalancer(loss_beta=0.0)
    balancer.weights(gram, double(-1, 1))
    assert balancer.weights(gram, double(5, 1)).tolist() == [1, 1]
    balancer = sgl.SGLBalancer(loss_beta=0.0)
    balancer.weights(gram, double(1, 1))
    small = balancer.weights(gram, double(1e-9, 1))
    torch.testing.assert_close(balancer.weights(gram, double(-1, 1)), small)
