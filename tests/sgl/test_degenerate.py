"""Gradients without full rank: more tasks than dimensions, one direction twice, opposed, zero; float32 Gram matrices.

Every balancer of the Gram matrix is held to the method as it is published (`tests/sgl/published.py`), in float64 on the
gradients themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from tests.sgl import published
from umda_fast import sgl
from umda_fast.sgl import BALANCERS, make_balancer
from umda_fast.sgl.conflicts import conflict_coefficients, freed_coefficients

Array = np.ndarray
OF_GRAM = sorted(name for name in BALANCERS if make_balancer(name).needs_gram)
#: Promise an update that conflicts with no task, where there is one at all.
WITHOUT_CONFLICT = ("upgrad", "dualproj", "mgda", "nash_mtl", "fairgrad")


def random_rows(tasks: int, width: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tasks, width)) * np.exp(rng.standard_normal((tasks, 1)))


def equiangular(tasks: int, cosine: float, seed: int) -> Array:
    """Unit gradients, every two at the same angle: nothing but ties."""
    root = np.linalg.cholesky((1 - cosine) * np.eye(tasks) + cosine)
    return root @ np.linalg.qr(np.random.default_rng(seed).standard_normal((tasks + 3, tasks)))[0].T


def duplicate(seed: int) -> Array:
    rows = random_rows(4, 12, seed)
    rows[1] = rows[0]
    return rows


def collinear(seed: int, factor: float = 2.5) -> Array:
    rows = random_rows(4, 12, seed)
    rows[2] = factor * rows[0]
    return rows


def pairs(seed: int) -> Array:
    rows = random_rows(2, 12, seed)
    return np.concatenate([rows, rows, -rows[:1]])


def zero(seed: int) -> Array:
    rows = random_rows(4, 12, seed)
    rows[1] = 0
    return rows


def more_than_dimensions(seed: int, *, feasible: bool) -> Array:
    rows = np.random.default_rng(seed).standard_normal((6, 3))
    if feasible:
        rows[:, 0] = np.abs(rows[:, 0]) + 1
    return rows


def spread(seed: int) -> Array:
    return random_rows(4, 12, seed) * np.array([[1e4], [1], [1], [1e-4]])


KINDS: dict[str, Callable[[int], Array]] = {
    "generic": lambda seed: random_rows(4, 12, seed),
    "duplicate": duplicate,
    "collinear": collinear,
    "opposed": functools.partial(collinear, factor=-2.5),
    "pairs": pairs,
    "zero": zero,
    "feasible": functools.partial(more_than_dimensions, feasible=True),
    "infeasible": functools.partial(more_than_dimensions, feasible=False),
    "equiangular": lambda seed: equiangular(4, -0.25, seed),
    "spread": spread,
}
SEEDS = range(4)
DTYPES = (torch.float32, torch.float64)


def gram_of(rows: Array, dtype: torch.dtype) -> torch.Tensor:
    """As SelfGuided has it: gradients of `dtype`, products summed in float64."""
    x = torch.from_numpy(rows).to(dtype).double()
    return (x @ x.T).to(dtype)


def weights_of(name: str, rows: Array, dtype: torch.dtype) -> Array:
    found = make_balancer(name).weights(gram_of(rows, dtype), torch.ones(len(rows), dtype=dtype))
    assert bool(found.isfinite().all())
    return np.asarray(found.double().numpy())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OF_GRAM)
def test_numbering_plays_no_part(name: str, kind: str, dtype: torch.dtype) -> None:
    """Ties included; the bound is what rounding, 2e-16, can do to a system regularised by 1e-9."""
    for seed in SEEDS:
        rows = KINDS[kind](seed)
        weights = weights_of(name, rows, dtype)
        for order in (np.roll(np.arange(len(rows)), 1), np.random.default_rng(seed).permutation(len(rows))):
            found = weights_of(name, rows[order], dtype)
            assert np.abs(found - weights[order]).max() <= 2e-6 * np.abs(weights).max()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "spread"])
@pytest.mark.parametrize("name", OF_GRAM)
def test_a_common_scale_plays_no_part(name: str, kind: str) -> None:
    for dtype in DTYPES:
        rows = KINDS[kind](0)
        weights = weights_of(name, rows, dtype)
        for scale in (2.0**-20, 2.0**20):
            found = weights_of(name, scale * rows, dtype)
            assert np.abs(found - weights).max() <= 2e-6 * np.abs(weights).max()


def left_open(name: str, kind: str) -> bool:
    """Whether the paper's formula divides 0 by 0, or has several answers."""
    if name == "imtl_g":
        return kind in ("collinear", "pairs", "zero")
    return name == "nash_mtl" and kind == "zero"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "name",
    ["mgda", "upgrad", "dualproj", "config", "imtl_g", "aligned_mtl", "nash_mtl", "pcgrad", "gradvac", "rotation"],
)
def test_the_update_is_the_published_one(name: str, kind: str, dtype: torch.dtype) -> None:
    """Within 1e-5 (float64) and 1e-3 (float32) of the longest gradient or update, whatever the rank."""
    if left_open(name, kind) or (name == "aligned_mtl" and kind == "spread"):  # see test_condition_numbers
        return
    if kind == "equiangular" and name in ("pcgrad", "gradvac", "rotation"):
        return  # the papers' order is a matter of chance; ours is in the next test
    for seed in SEEDS:
        rows = KINDS[kind](seed)
        expected = getattr(published, name)(rows)
        if expected is None:
            continue
        update = weights_of(name, rows, dtype) @ rows
        scale = max(np.linalg.norm(expected), np.linalg.norm(rows, axis=1).max())
        assert np.linalg.norm(update - expected) <= (1e-5 if dtype == torch.float64 else 1e-3) * scale


@pytest.mark.parametrize("name", ["pcgrad", "gradvac", "rotation", "sgl"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_equally_opposed_is_met_at_once(name: str, dtype: torch.dtype) -> None:
    """Symmetric gradients stay symmetric; those of one direction share what one of them would get."""
    weights = weights_of(name, equiangular(5, -0.2, 0), dtype)
    np.testing.assert_allclose(weights, weights.mean(), rtol=1e-4)
    one, other = random_rows(1, 8, 1)[0], random_rows(1, 8, 2)[0]
    other -= (other @ one / (one @ one) + 0.4) * one
    single = weights_of(name, np.stack([one, other]), dtype)
    twice = weights_of(name, np.stack([one, other, other]), dtype)
    np.testing.assert_allclose(twice[1], twice[2], rtol=1e-4)
    if name in ("pcgrad", "gradvac"):  # the others change a gradient's own weight as well
        np.testing.assert_allclose(twice[1] + twice[2] - 2, single[1] - 1, rtol=1e-4)


@pytest.mark.parametrize("function", [conflict_coefficients, freed_coefficients])
def test_coefficients_only_grow_and_without_conflict_nothing_changes(function: Callable[..., torch.Tensor]) -> None:
    for kind in KINDS.values():
        rows = kind(0)
        assert bool((function(gram_of(rows, torch.float32)) >= 0).all())
        aligned = function(gram_of(np.abs(rows), torch.float64))
        np.testing.assert_array_equal(aligned, np.eye(len(rows)))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "zero"])
def test_self_guided_weights_are_continuous(kind: str) -> None:
    """Gradients a little off give weights a little off: in ties, at right angles and in one direction as well."""
    rng = np.random.default_rng(5)
    for seed in SEEDS:
        rows = KINDS[kind](seed)
        weights = weights_of("sgl", rows, torch.float64)
        for size in (1e-4, 1e-6, 1e-8):
            noise = rng.standard_normal(rows.shape)
            noise *= np.linalg.norm(rows, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
            found = weights_of("sgl", rows + size * noise, torch.float64)
            assert np.abs(found - weights).max() <= 100 * size


def test_freed_gradients_of_two_tasks_are_projections() -> None:
    rows = np.array([[2.0, 0.0], [-0.6, 0.8]])
    found = freed_coefficients(gram_of(rows, torch.float64)).numpy() @ rows
    np.testing.assert_allclose(found, [[2 - 2 * 0.36, 2 * 0.48], [0.0, 0.8]], atol=1e-15)


@pytest.mark.parametrize("name", WITHOUT_CONFLICT)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_conflict_where_promised(name: str, dtype: torch.dtype) -> None:
    for kind in ("generic", "duplicate", "collinear", "zero", "feasible", "equiangular", "spread"):
        if kind == "zero" and name == "mgda":
            continue  # a zero gradient is itself the shortest vector
        for seed in SEEDS:
            rows = KINDS[kind](seed)
            update = weights_of(name, rows, dtype) @ rows
            norms = np.linalg.norm(rows, axis=1)
            cosines = (rows @ update)[norms > 0] / norms[norms > 0] / np.linalg.norm(update)
            assert cosines.min() >= (-1e-6 if dtype == torch.float64 else -1e-4), kind


def best_worst_improvement(rows: Array, bounds: list[dict[str, object]]) -> float:
    """`max min_t <g_t, d>` over the d of `bounds`, in the span of the rows."""
    best = -np.inf
    for seed in range(4):
        start = np.append(np.random.default_rng(seed).standard_normal(rows.shape[1]) * 0.1 + rows.mean(0), 0.0)
        worst = {"type": "ineq", "fun": lambda x: rows @ x[:-1] - x[-1]}
        options = {"ftol": 1e-14}
        result = minimize(lambda x: -x[-1], start, constraints=[worst, *bounds], method="SLSQP", options=options)
        if result.success:
            best = max(best, float(result.x[-1]))
    return best


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("zero", "spread")])
def test_best_worst_improvement_in_the_ball_and_in_the_cone(kind: str, dtype: torch.dtype) -> None:
    """CAGrad and ConicGrad against a general solver; lengths in units of the mean gradient."""
    for seed in SEEDS:
        rows = KINDS[kind](seed)
        mean = rows.mean(0)
        rows = rows / np.linalg.norm(mean)
        mean = rows.mean(0)
        basis = np.linalg.qr(rows.T)[0]
        inside, centre = rows @ basis, basis.T @ mean
        # Where the best is 0 the dual's norm tends to 0, and with it the digits.
        fine = dtype == torch.float64 and kind not in ("opposed", "pairs", "infeasible")
        scale = np.abs(rows).max() * (1e-5 if fine else 3e-3)
        ball = {"type": "ineq", "fun": lambda x, c=centre: 0.25 - ((x[:-1] - c) ** 2).sum()}
        update = weights_of("cagrad", rows, dtype) @ rows / len(rows)
        assert np.linalg.norm(update - mean) <= 0.5 * (1 + 1e-5)
        assert (rows @ update).min() >= best_worst_improvement(inside, [ball]) - scale
        for c in (0.2, 0.5, 0.9):
            unit = {"type": "ineq", "fun": lambda x: 1 - (x[:-1] ** 2).sum()}
            cone = {"type": "ineq", "fun": lambda x, c=c, m=centre: m @ x[:-1] - c}
            found = sgl.ConicGrad(c).weights(gram_of(rows, dtype), torch.ones(len(rows), dtype=dtype))
            update = found.double().numpy() @ rows / len(rows)
            length = np.linalg.norm(update)
            assert c * (1 - 1e-3) <= length <= 1 + 1e-5
            assert mean @ update >= c * length - 1e-5
            best = best_worst_improvement(inside, [unit, cone])
            assert (rows @ update).min() >= best - scale
            if best > scale:
                assert length == pytest.approx(1, abs=1e-4)


#: Up to which condition number (of the cosines; for aligned_mtl of the Gram matrix) a float32 Gram matrix gives the
#: update within 0.1 %, as the docstrings say; None: at any.
CARRIED: dict[str, float | None] = {
    "mgda": None,
    "upgrad": None,
    "dualproj": None,
    "pcgrad": None,
    "gradvac": None,
    "rotation": None,
    "nash_mtl": None,
    "config": 1e6,
    "imtl_g": 1e6,
    "aligned_mtl": 1e5,
}


def conditioned(condition: float, seed: int, lengths: float) -> Array:
    """Four gradients whose cosines have about this condition number, rounded to float32."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((4, 4)))[0]
    right = np.linalg.qr(rng.standard_normal((12, 4)))[0]
    rows = left @ np.diag([1, 0.9, 0.8, condition**-0.5]) @ right.T
    rows *= np.exp(lengths * rng.standard_normal((4, 1))) / np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("name", CARRIED)
def test_condition_numbers(name: str) -> None:
    limit = CARRIED[name]
    for exponent in range(11):
        worst = 0.0
        for seed in range(20):
            rows = conditioned(10.0**exponent, seed, 0.0 if name == "aligned_mtl" else 1.0)
            expected = getattr(published, name)(rows)
            assert expected is not None
            update = weights_of(name, rows, torch.float32) @ rows
            worst = max(worst, float(np.linalg.norm(update - expected) / np.linalg.norm(expected)))
        if limit is None or 10.0**exponent <= limit:
            assert worst <= 1e-3, exponent
    assert limit is None or worst > 1e-3  # at 1e10: the limit is one
