"""The methods as they are published: on the gradients themselves, in float64, with nothing of the package in it.

Each takes rows [T, P] and returns the update [P], in the scale that our balancers have: where a method leaves it open,
tasks in no conflict add up.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares, nnls

Array = np.ndarray


def units(rows: Array) -> tuple[Array, Array]:
    norms = np.linalg.norm(rows, axis=1)
    return norms, np.divide(rows, norms[:, None], where=norms[:, None] > 0, out=np.zeros_like(rows))


def mgda(rows: Array) -> Array:
    """The shortest vector of the convex hull: `min ||R^T x||^2 + (sum x - 1)^2` over x >= 0 goes with it."""
    scale = np.linalg.norm(rows, axis=1).max() or 1.0
    system = np.vstack([rows.T / scale, np.ones((1, len(rows)))])
    x, _ = nnls(system, np.append(np.zeros(rows.shape[1]), 1.0), maxiter=10_000)
    return len(rows) * rows.T @ (x / x.sum())


def on_dual_cone(vector: Array, rows: Array) -> Array:
    """The closest vector with no negative product with any row (Moreau's decomposition)."""
    unit = units(rows)[1]
    x, _ = nnls(unit.T, -vector, maxiter=10_000)
    found: Array = vector + unit.T @ x
    return found


def upgrad(rows: Array) -> Array:
    return np.sum([on_dual_cone(row, rows) for row in rows], axis=0)


def dualproj(rows: Array) -> Array:
    return on_dual_cone(rows.sum(0), rows)


def config(rows: Array) -> Array:
    norms, unit = units(rows)
    some = norms > 0
    direction = np.linalg.pinv(unit[some], rcond=1e-9) @ np.ones(some.sum())
    length = np.linalg.norm(direction)
    if length == 0:
        return direction
    direction = direction / length
    found: Array = (rows @ direction).sum() * direction
    return found


def imtl_g(rows: Array) -> Array:
    """The paper's system: equal projections on all unit gradients, coefficients that sum to 1."""
    unit = units(rows)[1]
    system = np.vstack([(unit[:1] - unit[1:]) @ rows.T, np.ones((1, len(rows)))])
    right = np.append(np.zeros(len(rows) - 1), 1.0)
    found: Array = len(rows) * rows.T @ np.linalg.lstsq(system, right, rcond=1e-12)[0]
    return found


def aligned_mtl(rows: Array) -> Array:
    left, values, right = np.linalg.svd(rows, full_matrices=False)
    kept = values > values[0] * 1e-7
    found: Array = values[kept].min() * np.ones(len(rows)) @ left[:, kept] @ right[kept]
    return found


def nash_mtl(rows: Array) -> Array | None:
    """`(G w)_t = 1 / w_t`, scaled to weights of mean 1; None where it has no solution."""
    norms, unit = units(rows)
    cosines = unit @ unit.T

    def off(log_x: Array) -> Array:
        return np.log(np.maximum(cosines @ np.exp(log_x), 1e-300)) + log_x

    if (norms == 0).any():
        return None
    result = least_squares(off, np.zeros(len(rows)), xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=5000)
    if np.abs(off(result.x)).max() > 1e-8:
        return None
    weights = np.exp(result.x) / norms
    found: Array = len(rows) * (weights / weights.sum()) @ rows
    return found


def _visited(rows: Array, t: int) -> list[int]:
    """The others, most opposed first."""
    unit = units(rows)[1]
    return [int(s) for s in np.argsort(unit @ unit[t], kind="stable") if s != t]


def pcgrad(rows: Array) -> Array:
    total = np.zeros(rows.shape[1])
    for t, row in enumerate(rows):
        projected = row.copy()
        for s in _visited(rows, t):
            if projected @ rows[s] < 0:
                projected -= projected @ rows[s] / (rows[s] @ rows[s]) * rows[s]
        total += projected
    return total


def gradvac(rows: Array) -> Array:
    """The first step: all targets are 0."""
    return pcgrad(rows)


def rotation(rows: Array) -> Array:
    """Projected, then brought back to its length, one after the other."""
    unit = units(rows)[1]
    total = np.zeros(rows.shape[1])
    for t, row in enumerate(rows):
        turned, length = row.copy(), np.linalg.norm(row)
        for s in _visited(rows, t):
            if turned @ unit[s] < 0:
                turned = turned - turned @ unit[s] * unit[s]
                left = np.linalg.norm(turned)
                turned = turned * (length / left) if left > 1e-6 * length else 0 * turned
        total += turned
    return total
