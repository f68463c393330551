"""Balancers: properties that all have, and each against its definition or an exhaustive search."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from tests.sgl.oracle import TwoHeads
from umda_fast import sgl
from umda_fast.sgl import BALANCERS, Balancer, SelfGuided, StatefulBalancer, make_balancer, solvers
from umda_fast.sgl.conflicts import freed_coefficients

#: Read no task gradient; every property of gradients is met by them trivially or not at all.
OF_LOSSES = {"equal", "uncertainty", "dwa", "rlw", "stch", "famo", "geometric_mean", "imtl_l", "ldc_mtl", "pbi"}
OF_GRAM = sorted(set(BALANCERS) - OF_LOSSES)
#: Claim an update that conflicts with no task.
WITHOUT_CONFLICT = ["upgrad", "dualproj", "mgda", "nash_mtl", "fairgrad"]


def jacobian(tasks: int, seed: int, spread: float = 1.0, width: int = 12) -> Tensor:
    """Gradients [T, P] of different lengths, some in conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    lengths = torch.exp(spread * torch.randn(tasks, 1, generator=generator, dtype=torch.float64))
    return lengths * rows


def losses_for(tasks: int, seed: int = 0) -> Tensor:
    return 0.1 + torch.rand(tasks, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(name: str, rows: Tensor, losses: Tensor | None = None) -> Tensor:
    balancer = make_balancer(name)
    return balancer.weights(rows @ rows.T, losses_for(len(rows)) if losses is None else losses)


@pytest.mark.parametrize("name", BALANCERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_finite_whatever_the_gradients(name: str, dtype: torch.dtype) -> None:
    g = jacobian(3, 0)
    cases = {
        "random": g,
        "identical": g[:1].repeat(3, 1),
        "opposite": torch.stack([g[0], -g[0], g[1]]),
        "all opposite": torch.stack([g[0], -g[0]]),
        "zero": torch.zeros(3, 4, dtype=torch.float64),
        "one zero": g * torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64),
        "one huge": g * torch.tensor([[1.0], [1e8], [1.0]], dtype=torch.float64),
        "tiny": 1e-8 * g,
        "one task": g[:1],
    }
    for case, rows in cases.items():
        rows = rows.to(dtype)
        weights = fresh(name, rows, losses_for(len(rows)).to(dtype))
        assert weights.shape == (len(rows),), case
        assert weights.dtype == dtype, case
        assert bool(weights.isfinite().all()), (case, weights)
        if make_balancer(name).normalized:
            assert float(weights.sum()) == pytest.approx(len(rows), rel=1e-5), case


@pytest.mark.parametrize("name", BALANCERS)
def test_one_task_gets_weight_one(name: str) -> None:
    expected = 1.5 if name == "cagrad" else 1.0  # CAGrad goes to the edge of its ball, c = 0.5
    assert float(fresh(name, jacobian(1, 1))) == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("name", sorted(set(BALANCERS) - {"rlw", "uncertainty", "dwa", "equal"}))
@pytest.mark.parametrize("tasks", [2, 5])
def test_numbering_of_the_tasks_does_not_matter(name: str, tasks: int) -> None:
    for seed in range(5):
        rows, losses = jacobian(tasks, seed), losses_for(tasks, seed)
        order = torch.randperm(tasks, generator=torch.Generator().manual_seed(seed))
        expected = fresh(name, rows, losses)[order]
        torch.testing.assert_close(fresh(name, rows[order], losses[order]), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OF_GRAM)
def test_a_common_scale_of_the_gradients_does_not_matter(name: str) -> None:
    rows = jacobian(4, 2)
    expected = fresh(name, rows)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(fresh(name, scale * rows), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", OF_GRAM)
def test_identical_gradients_are_added(name: str) -> None:
    rows = jacobian(1, 3).repeat(4, 1)
    update = fresh(name, rows, torch.ones(4, dtype=torch.float64)) @ rows
    expected = (1.5 * 4 if name == "cagrad" else 4.0) * rows[0]
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", sorted(set(OF_GRAM) - {"gradnorm", "fairgrad", "nash_mtl", "mgda"}))
def test_opposite_gradients_of_one_length_cancel(name: str) -> None:
    g = jacobian(1, 4)
    rows = torch.cat([g, -g])
    update = fresh(name, rows, torch.ones(2, dtype=torch.float64)) @ rows
    assert float(update.norm()) <= 1e-6 * float(g.norm())


@pytest.mark.parametrize("name", WITHOUT_CONFLICT)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_no_conflict_where_claimed(name: str, spread: float) -> None:
    for seed in range(20):
        rows = jacobian(2 + seed % 6, seed, spread, width=4 + seed)
        if name in ("nash_mtl", "fairgrad") and len(rows) > rows.shape[1]:
            continue  # more tasks than dimensions: there may be no direction that improves all
        update = fresh(name, rows) @ rows
        cosines = rows @ update / rows.norm(dim=1) / update.norm()
        assert float(cosines.min()) >= -1e-6, seed


@pytest.mark.parametrize("name", WITHOUT_CONFLICT)
def test_no_conflict_with_a_task_that_is_ten_to_the_eight_larger(name: str) -> None:
    rows = jacobian(4, 5) * torch.tensor([[1.0], [1e8], [1.0], [1.0]], dtype=torch.float64)
    update = fresh(name, rows) @ rows
    assert float((rows @ update / rows.norm(dim=1) / update.norm()).min()) >= -1e-6


# -- each against its definition ---------------------------------------------------------


def best_of_all_supports(gram: np.ndarray, start: np.ndarray, total: float | None) -> np.ndarray:
    """`argmin v^T G v` over `v >= start` (and `sum v = total`) by trying every set of free entries."""
    count = len(start)
    best, best_value = None, math.inf
    for bits in itertools.product([False, True], repeat=count):
        free = np.array(bits)
        v = start.astype(float).copy()
        size = int(free.sum())
        if total is None:
            if size:
                v[free] = np.linalg.solve(gram[np.ix_(free, free)], -gram[np.ix_(free, ~free)] @ v[~free])
        else:
            if not size:
                continue
            system = np.zeros((size + 1, size + 1))
            system[:size, :size] = gram[np.ix_(free, free)]
            system[size, :size] = system[:size, size] = 1
            v[free] = np.linalg.solve(system, np.append(np.zeros(size), total))[:size]
        if (v >= start - 1e-12).all() and v @ gram @ v < best_value:
            best, best_value = v, v @ gram @ v
    assert best is not None
    return best


@pytest.mark.parametrize("seed", range(8))
def test_projections_and_minimum_norm_against_every_active_set(seed: int) -> None:
    count = 2 + seed % 5
    rows = jacobian(count, seed)
    gram = (rows @ rows.T).numpy()
    expected = sum(best_of_all_supports(gram, np.eye(count)[t], None) for t in range(count))
    np.testing.assert_allclose(fresh("upgrad", rows).numpy(), expected, rtol=1e-6)
    expected = best_of_all_supports(gram, np.ones(count), None)
    np.testing.assert_allclose(fresh("dualproj", rows).numpy(), expected, rtol=1e-6)
    expected = best_of_all_supports(gram, np.zeros(count), float(count))
    np.testing.assert_allclose(fresh("mgda", rows).numpy(), expected, rtol=1e-5, atol=1e-7)


def test_minimum_norm_of_two_by_hand() -> None:
    # The point of the segment closest to 0: a = <g2, g2 - g1> / ||g1 - g2||^2 when inside.
    rows = torch.tensor([[3.0, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    a = (5 + 3) / 20
    np.testing.assert_allclose(fresh("mgda", rows).numpy(), [2 * a, 2 * (1 - a)], rtol=1e-7)
    rows = torch.tensor([[1.0, 0.0], [5.0, 1.0]], dtype=torch.float64)
    np.testing.assert_allclose(fresh("mgda", rows).numpy(), [2, 0], atol=1e-7)


def slow_pcgrad(rows: np.ndarray) -> np.ndarray:
    """Algorithm 1 of the paper on the gradients themselves, the most opposed first."""
    update = np.zeros(rows.shape[1])
    norms = np.linalg.norm(rows, axis=1)
    cosines = rows @ rows.T / np.outer(norms, norms)
    for t, row in enumerate(rows):
        projected = row.copy()
        for s in np.argsort(cosines[t], kind="stable"):
            if s != t and projected @ rows[s] < 0:
                projected -= projected @ rows[s] / (rows[s] @ rows[s]) * rows[s]
        update += projected
    return update


@pytest.mark.parametrize("seed", range(5))
def test_pcgrad_against_the_gradients(seed: int) -> None:
    rows = jacobian(6, seed, spread=2.0)
    np.testing.assert_allclose(
        (fresh("pcgrad", rows) @ rows).numpy(), slow_pcgrad(rows.numpy()), rtol=1e-9, atol=1e-12
    )


def test_freed_coefficients_with_a_threshold_leave_mild_conflicts() -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.1, 1.0], [-1.0, 0.2]], dtype=torch.float64)
    gram = rows @ rows.T
    assert torch.equal(freed_coefficients(gram, -0.99), torch.eye(3, dtype=torch.float64))
    found = freed_coefficients(gram, -0.5)
    assert float(found[0, 1]) == 0
    assert float(found[0, 2]) == pytest.approx(1 / 1.04)
    assert bool((found >= 0).all())
    assert float((found[0] @ rows) @ rows[2]) == pytest.approx(0, abs=1e-15)


def test_gradvac_moves_to_the_target_and_remembers_it() -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    balancer = sgl.GradVac(beta=0.25)
    losses = torch.ones(2, dtype=torch.float64)
    # Target 0: the cosine -0.6 is lifted to 0, as PCGrad does.
    np.testing.assert_allclose(balancer.weights(rows @ rows.T, losses), [1.6, 1.6], rtol=1e-7)
    target = balancer.state_dict()["target"]
    np.testing.assert_allclose(target, [[0, -0.15], [-0.15, 0]], rtol=1e-7)
    # Now the target is -0.15: the changed gradient has exactly this cosine with the other.
    weights = balancer.weights(rows @ rows.T, losses)
    changed = rows[0] + (weights[1] - 1) * rows[1]
    assert float(changed @ rows[1] / changed.norm()) == pytest.approx(-0.15, rel=1e-6)


def test_rotation_keeps_the_length_and_reaches_the_angle() -> None:
    rows = torch.tensor([[2.0, 0.0], [-0.6, 0.8]], dtype=torch.float64)
    gram = rows @ rows.T
    for target in (0.0, 0.3):
        weights = sgl.Rotation(target).weights(gram, torch.ones(2, dtype=torch.float64))
        stretch = math.sqrt(1 - target**2) / 0.8
        along = target + 0.6 * stretch
        expected = [stretch + along * 1 / 2, stretch + along * 2 / 1]
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-12)
        turned = stretch * rows[0] + along * 2 * rows[1]
        assert float(turned.norm()) == pytest.approx(2)
        assert float(turned @ rows[1]) == pytest.approx(2 * target)
    assert sgl.Rotation(-0.7).weights(gram, torch.ones(2)).tolist() == [1, 1]


@pytest.mark.parametrize("c", [0.0, 0.2, 0.5, 0.9])
def test_cagrad_reaches_its_dual(c: float) -> None:
    # min_t <d, g_t> cannot exceed F(w) for any w; equality proves d optimal, without any other solver.
    for seed in range(12):
        rows = jacobian(2 + seed % 6, seed, spread=0.7)
        if seed % 4 == 0:
            rows[1] = -0.5 * rows[0]
        count, mean = len(rows), rows.mean(0)
        weights = sgl.CAGrad(c).weights(rows @ rows.T, losses_for(count)) / count
        update = weights @ rows
        radius = c * float(mean.norm())
        assert float((update - mean).norm()) <= radius * (1 + 1e-9) + 1e-12
        if c:
            w = (weights - 1 / count) / (weights - 1 / count).sum()
            dual = float((w @ rows) @ mean) + radius * float((w @ rows).norm())
            assert float((rows @ update).min()) >= dual - 2e-5 * float(mean.norm()) ** 2


@pytest.mark.parametrize("seed", range(4))
def test_equal_angles(seed: int) -> None:
    rows = jacobian(4, seed)
    unit = rows / rows.norm(dim=1, keepdim=True)
    for name in ("imtl_g", "config"):
        projections = unit @ (fresh(name, rows) @ rows)
        torch.testing.assert_close(projections, projections.mean().expand(4), rtol=1e-5, atol=0)
    update = fresh("config", rows) @ rows
    assert float(update.norm()) == pytest.approx(float((rows @ update).sum() / update.norm()), rel=1e-6)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 5.0])
def test_fairness_satisfies_its_equation(alpha: float) -> None:
    for seed in range(5):
        rows = jacobian(2 + seed, seed, spread=2.0)
        gram = rows @ rows.T
        weights = sgl.FairGrad(alpha, normalize=False).weights(gram, losses_for(len(rows)))
        np.testing.assert_allclose((gram @ weights * weights ** (1 / alpha)).numpy(), 1, rtol=1e-6)
        if alpha == 1:
            nash = sgl.NashMTL(normalize=False).weights(gram, losses_for(len(rows)))
            assert torch.equal(nash, weights)
            assert float((nash @ rows).norm()) == pytest.approx(math.sqrt(len(rows)), rel=1e-6)


def test_aligned_components_have_the_smallest_singular_value() -> None:
    rows = jacobian(4, 7)
    weights = fresh("aligned_mtl", rows).numpy()
    left, values, right = np.linalg.svd(rows.numpy(), full_matrices=False)
    np.testing.assert_allclose(weights @ rows.numpy(), values.min() * np.ones(4) @ left @ right, rtol=1e-9)


def test_gradnorm_by_hand() -> None:
    gram = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    balancer = sgl.GradNorm(alpha=1.0, lr=0.1)
    # Norms 2 and 1, mean 1.5, rates 1: w = 1 - 0.1 * 2 / 1.5 and 1 + 0.1 / 1.5, scaled to sum 2.
    moved = np.array([1 - 0.2 / 1.5, 1 + 0.1 / 1.5])
    weights = balancer.weights(gram, torch.tensor([2.0, 3.0], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(weights, 2 * moved / moved.sum(), rtol=1e-12)
    # The first task has halved its loss, the second has not: rates 2/3 and 4/3.
    mean = (weights * [2, 1]).mean()
    sign = np.sign(weights * [2, 1] - mean * np.array([2 / 3, 4 / 3]))
    moved = weights - 0.1 * sign * np.array([2, 1]) / mean
    found = balancer.weights(gram, torch.tensor([1.0, 3.0], dtype=torch.float64)).numpy()
    np.testing.assert_allclose(found, 2 * moved / moved.sum(), rtol=1e-12)


def test_uncertainty_follows_the_gradient_of_its_loss() -> None:
    balancer = sgl.Uncertainty(lr=0.1)
    s = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for seed in range(4):
        losses = losses_for(3, seed)
        total = (torch.exp(-s) * losses + s).sum()
        (slope,) = torch.autograd.grad(total, s)
        torch.testing.assert_close(balancer.weights(torch.zeros(3, 3), losses), torch.exp(-s.detach()))
        s = (s - 0.1 * slope).detach().requires_grad_()
    losses = losses_for(3, 9)
    torch.testing.assert_close(
        sgl.Uncertainty(closed_form=True).weights(torch.zeros(3, 3), losses), 1 / losses
    )


def test_dwa_by_hand() -> None:
    balancer = sgl.DWA(temperature=2.0, period=2)
    data = torch.tensor([[1.0, 2], [3, 2], [1, 2], [1, 4], [5, 5]], dtype=torch.float64)
    found = [balancer.weights(torch.zeros(2, 2), losses) for losses in data]
    assert all(w.tolist() == [1, 1] for w in found[:4])
    expected = 2 * torch.softmax(torch.tensor([1 / 2, 3 / 2], dtype=torch.float64) / 2, 0)
    torch.testing.assert_close(found[4], expected)


def test_stch_is_the_derivative_of_its_scalar() -> None:
    first, losses = losses_for(3, 0), losses_for(3, 1).requires_grad_()
    balancer = sgl.STCH(mu=0.3)
    balancer.weights(torch.zeros(3, 3), first)
    scalar = 0.3 * torch.logsumexp(losses / first / 0.3, 0)
    (slope,) = torch.autograd.grad(scalar, losses)
    found = balancer.weights(torch.zeros(3, 3), losses.detach())
    torch.testing.assert_close(found, 3 * slope / slope.sum())


def test_famo_takes_an_adam_step_on_its_logits() -> None:
    balancer = sgl.FAMO(lr=0.05, weight_decay=0.01)
    with pytest.raises(RuntimeError, match="expected a call of weights"):
        balancer.update(torch.ones(3))
    logits = Parameter(torch.zeros(3, dtype=torch.float64))
    adam = torch.optim.Adam([logits], lr=0.05, weight_decay=0.01)
    for seed in range(4):
        before, after = losses_for(3, seed), losses_for(3, 10 + seed)
        z = torch.softmax(logits, 0)
        expected = z.detach() / before
        found = balancer.weights(torch.zeros(3, 3), before)
        torch.testing.assert_close(found, 3 * expected / expected.sum())
        logits.grad = torch.autograd.grad((z * (before.log() - after.log())).sum(), logits)[0]
        adam.step()
        balancer.update(after)
    torch.testing.assert_close(balancer.state_dict()["logits"], logits.detach())


def test_random_weights_are_reproducible() -> None:
    def draw(seed: int) -> list[list[float]]:
        balancer = sgl.RLW(seed)
        return [balancer.weights(torch.zeros(3, 3), torch.ones(3)).tolist() for _ in range(3)]

    assert draw(0) == draw(0) != draw(1)
    assert draw(0)[0] != draw(0)[1]


def test_sgl_weights_by_hand() -> None:
    gram = torch.tensor([[1.0, -0.5], [-0.5, 1.0]], dtype=torch.float64)
    losses = torch.tensor([1.0, 1.0], dtype=torch.float64)
    assert sgl.SGLBalancer().weights(gram, losses).tolist() == [1, 1]
    # Norms 3 and 1, cosine -1/3: scales 2/3 and 2, both aligned by 1 - 1/6; projection adds a third of the
    # other's length: 2/3 + 2 * (1/3) * (1/3) and 2 + (2/3) * (1/3) * 3.
    gram = torch.tensor([[9.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    u = np.array([2 / 3, 2])
    v = np.array([u[0] + u[1] / 9, u[1] + u[0]])
    np.testing.assert_allclose(sgl.SGLBalancer().weights(gram, losses), 2 * v / v.sum(), rtol=1e-14)
    plain = sgl.SGLBalancer(conflict_threshold=None).weights(gram, losses)
    np.testing.assert_allclose(plain, 2 * u / u.sum(), rtol=1e-14)


def test_sgl_weights_stay_within_their_clip() -> None:
    rows = jacobian(4, 8) * torch.tensor([[1.0], [1e8], [1.0], [1.0]], dtype=torch.float64)
    weights = fresh("sgl", rows)
    assert float(weights.max() / weights.min()) <= 5**3 * 1.5 / 0.5
    assert bool((weights > 0).all())


# -- inside a step ---------------------------------------------------------


@pytest.mark.parametrize("name", BALANCERS)
def test_in_a_step_with_missing_tasks_and_resumed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.sgl.test_self_guided import NothingRead

    monkeypatch.setattr(solvers, "_finished", lambda flag: False)

    def build() -> SelfGuided:
        balancer = make_balancer(name, **({"period": 2} if name == "dwa" else {}))
        return SelfGuided(model.shared(), ["t0", "t1", "t2"], balancer=balancer, variance_window=0)

    def steps(balanced: SelfGuided, first: int, last: int) -> list[Tensor]:
        found = []
        for number in range(first, last):
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            losses, penalty, _ = model.losses(x)
            if number % 3 == 1:
                del losses["t1"]
            model.zero_grad()
            with NothingRead():
                step = balanced.backward(losses, penalty=penalty)
            assert float(step.weights[1]) != 0 or number % 3 == 1
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
            found.append(step.weights)
        return found

    model = TwoHeads()
    whole = steps(build(), 0, 7)
    stopped = build()
    steps(stopped, 0, 4)
    resumed = build()
    resumed.load_state_dict(stopped.state_dict())
    for mine, theirs in zip(steps(resumed, 4, 7), whole[4:], strict=True):
        assert torch.equal(mine, theirs)


def test_who_synchronizes_is_known() -> None:
    assert {name for name in BALANCERS if make_balancer(name).synchronizes} == {"aligned_mtl", "config", "imtl_g"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: sgl.SGLBalancer(clip=0.5),
        lambda: sgl.SGLBalancer(alignment=1.0),
        lambda: sgl.SGLBalancer(conflict_threshold=0.1),
        lambda: sgl.SGLBalancer(loss_beta=1.0),
        lambda: sgl.SGLBalancer(weight_beta=1.0),
        lambda: sgl.GradVac(beta=2.0),
        lambda: sgl.Rotation(1.0),
        lambda: sgl.CAGrad(-0.1),
        lambda: sgl.FairGrad(0.0),
        lambda: sgl.Uncertainty(0.0),
        lambda: sgl.DWA(temperature=0.0),
        lambda: sgl.DWA(period=0),
        lambda: sgl.GradNorm(lr=0.0),
        lambda: sgl.STCH(mu=0.0),
        lambda: sgl.FAMO(lr=-1.0),
        lambda: sgl.ConicGrad(0.0),
        lambda: sgl.ConicGrad(1.0),
        lambda: sgl.ExcessMTL(lr=0.0),
        lambda: sgl.ExcessMTL(warmup=0),
        lambda: sgl.PBI(-1.0),
        lambda: sgl.PBI(preference=[1.0, 0.0]),
        lambda: sgl.LDCMTL(-0.1),
        lambda: sgl.LDCMTL(lr=0.0),
        lambda: sgl.IMTLL(lr=0.0),
        lambda: make_balancer("best"),
    ],
)
def test_wrong_options_are_named(make: Callable[[], Balancer]) -> None:
    with pytest.raises(ValueError, match=r"^\w+: expected .*, got "):
        make()


def test_a_stateful_balancer_must_know_how_many_tasks_there_are() -> None:
    balancer = sgl.SGLBalancer()
    assert isinstance(balancer, StatefulBalancer)
    with pytest.raises(ValueError, match=r"^tasks: .*setup"):
        balancer.weights(torch.eye(2), torch.ones(2), torch.tensor([0, 2]))


def test_any_function_of_the_gram_matrix_is_a_balancer() -> None:
    shared = Parameter(torch.tensor([1.0, 2.0]))
    balanced = SelfGuided([shared], ["a", "b"], balancer=lambda gram: gram.diagonal() / 4, beta=0.0)
    step = balanced.backward({"a": 2 * shared[0], "b": shared[0] * 4})
    assert step.weights.tolist() == [1, 4]
    assert shared.grad.tolist() == [2 + 16, 0]
    wrong = SelfGuided([shared], ["a", "b"], balancer=lambda gram: gram)
    with pytest.raises(ValueError, match=r"^balancer: expected 2 weights"):
        wrong.backward({"a": shared.sum(), "b": shared.sum()})
