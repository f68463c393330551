"""Small optimisation problems of the balancers, solved on the device.

T is the number of tasks, at most some tens. A fixed number of iterations of an interior-point or Newton
method takes the place of a stopping test, which would wait for the device at every iteration; systems are
solved by `solve_ex`, which does not read its error code back. Everything is float64.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

#: The least that is added to the diagonal of a correlation matrix.
RIDGE = 1e-9


def ridge(gram: Tensor) -> float:
    """What is added to the diagonal of the correlation matrix of `gram` [T, T].

    Gradients in exact linear dependence then have one solution, the shortest, and it moves by about this much,
    relatively. Rounding of the entries makes eigenvalues that are 0 a little negative: not more than this.
    """
    return max(RIDGE, math.sqrt(gram.shape[0]) * torch.finfo(gram.dtype).eps)


def solve(matrix: Tensor, right: Tensor) -> Tensor:
    """`matrix^-1 right` for `right` [..., T], without reading the error code."""
    solution: Tensor = torch.linalg.solve_ex(matrix, right.unsqueeze(-1))[0]
    return solution.squeeze(-1)


def shortest_solution(matrix: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`matrix^+ right`, and the part of `right` that `matrix` maps to 0.

    Args:
        matrix: float64 [T, T], symmetric, positive semidefinite but for rounding in `dtype`: eigenvalues up to
            `T eps` of the largest count as 0.
        right: float64 [T].
    """
    values, vectors = torch.linalg.eigh(matrix)
    kept = values > values[-1] * len(right) * torch.finfo(dtype).eps
    along = right @ vectors
    solution = vectors @ torch.where(kept, along / values, torch.zeros_like(values))
    return solution, vectors @ torch.where(kept, torch.zeros_like(values), along)


def _finished(flag: Tensor) -> bool:
    """Whether to stop early. On the CPU a flag costs nothing to read; elsewhere it would make us wait."""
    return flag.device.type == "cpu" and bool(flag)


def _longest(x: Tensor, dx: Tensor) -> Tensor:
    """Largest step [..., 1] at most 1 with `x + step dx >= 0`."""
    return 1 / (-dx / x).amax(-1, keepdim=True).clamp_min(1)


def nonnegative_qp(quadratic: Tensor, linear: Tensor, iterations: int = 30) -> Tensor:
    """`argmin_{x >= 0} x^T C x / 2 + q^T x` for several q at once.

    Mehrotra's predictor-corrector interior-point method (SIAM J. Optim. 2(4), 1992) on the optimality
    conditions `y = C x + q, x >= 0, y >= 0, x y = 0`, then one exact solve on the set of positive x it has
    found, taken where it satisfies the conditions.

    Args:
        quadratic: C float64 [T, T], positive definite, unit diagonal.
        linear: q float64 [B, T].

    Returns:
        [B, T].
    """
    size = linear.abs().amax(-1, keepdim=True)
    size = torch.where(size > 0, size, torch.ones_like(size))
    q = linear / size
    # Both sides of the complementarity x y = 0 in one tensor: half as many small operations.
    pair = torch.ones(2, *q.shape, dtype=q.dtype, device=q.device)
    for _ in range(iterations):
        x, y = pair
        residual = x @ quadratic + q - y
        gap = (x * y).mean(-1, keepdim=True)
        # Converged rows stand still: going on would divide rounding errors by each other.
        going = (gap > 1e-20) | (residual.abs().amax(-1, keepdim=True) > 1e-13)
        if _finished(~going.any()):
            break
        inverse: Tensor = torch.linalg.inv_ex(quadratic + torch.diag_embed(y / x))[0]
        right = -residual - y
        dx = (inverse @ right.unsqueeze(-1)).squeeze(-1)
        change = torch.stack([dx, dx @ quadratic + residual])
        step = _longest(pair, change).amin(0)
        ahead = (pair + step * change).prod(0).mean(-1, keepdim=True)
        center = (ahead / gap).clamp(0, 1).pow(3) * gap
        right = right + (center - change.prod(0)) / x
        dx = (inverse @ right.unsqueeze(-1)).squeeze(-1)
        change = torch.stack([dx, dx @ quadratic + residual])
        step = torch.where(going, 0.995 * _longest(pair, change).amin(0), torch.zeros_like(gap))
        pair = pair + step * change

    x, y = pair
    positive = x > y
    free = positive[:, :, None] & positive[:, None, :]
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    exact = solve(torch.where(free, quadratic, identity), torch.where(positive, -q, torch.zeros_like(q)))
    worst = torch.minimum(exact, exact @ quadratic + q).amin(-1, keepdim=True)
    return size * torch.where(worst >= -1e-11, exact.clamp_min(0), x)


def simplex_minimum(
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]],
    normal: Tensor,
    start: Tensor,
    iterations: int = 40,
) -> Tensor:
    """`argmin f(x)` over `x >= 0, <normal, x> = 1` for a smooth convex f, by a primal-dual interior-point
    method.

    Args:
        derivatives: x [T] -> (gradient [T], Hessian [T, T]).
        normal: float64 [T], not negative; ones for the simplex.
        start: float64 [T], positive, with `<normal, start> = 1`.
        iterations: how many.

    Returns:
        [T].
    """
    count = normal.shape[0]
    x = start
    gradient, _ = derivatives(x)
    y = gradient.abs().mean().clamp_min(1e-12).expand(count)
    level = torch.zeros_like(normal[:1])
    corner = torch.zeros_like(level)[None]
    for _ in range(iterations):
        gradient, hessian = derivatives(x)
        dual = gradient - y - level * normal
        primal = 1 - (normal @ x)
        target = 0.1 * (x * y).mean()
        if _finished(target <= 1e-19):
            break
        top = torch.cat([hessian + torch.diag(y / x), -normal[:, None]], 1)
        bottom = torch.cat([-normal[None], corner], 1)
        right = torch.cat([-dual - y + target / x, -primal[None]])
        solution = solve(torch.cat([top, bottom]), right)
        dx = solution[:count]
        dy = (target - x * y - y * dx) / x
        step = 0.995 * torch.minimum(_longest(x, dx), _longest(y, dy))
        going = (target > 1e-19) & solution.isfinite().all()
        step = torch.where(going, step, torch.zeros_like(step))
        dx, dy = torch.nan_to_num(dx), torch.nan_to_num(dy)
        x, y, level = x + step * dx, y + step * dy, level + step * torch.nan_to_num(solution[count:])
    return x


#: Least r of `norm_on_simplex`: where the norm tends to 0 the Hessian stays finite.
_SHORTEST = 1e-5


def norm_on_simplex(
    quadratic: Tensor, linear: Tensor, normal: Tensor, start: Tensor, *, factor: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`argmin <q, x> + factor ||x||` over `x >= 0, <normal, x> = 1` with `||x||^2 = x^T S x`, and r, the norm there.

    The norm is written as the minimum of `(||x||^2 / r + r) / 2` over r > 0, which is jointly convex and smooth.

    Args:
        quadratic: S float64 [T, T], positive definite. linear: q float64 [T].
        normal, start: as of `simplex_minimum`.
        factor: 0 or more.
    """

    def derivatives(y: Tensor) -> tuple[Tensor, Tensor]:
        x, r = y[:-1], y[-1] + _SHORTEST
        product = quadratic @ x / r
        ratio = x @ product / r
        gradient = torch.cat([linear + factor * product, (factor * (1 - ratio) / 2)[None]])
        side = -product / r
        top = torch.cat([quadratic / r, side[:, None]], 1)
        hessian = torch.cat([top, torch.cat([side, (ratio / r)[None]])[None]])
        return gradient, factor * hessian

    zero, one = torch.zeros_like(start[:1]), torch.ones_like(start[:1])
    y = simplex_minimum(derivatives, torch.cat([normal, zero]), torch.cat([start, one]), iterations=60)
    x = y[:-1]
    # At the solution r >= ||x||; also where the iterations ran out before it.
    return x, torch.maximum(y[-1] + _SHORTEST, (x @ quadratic @ x).clamp_min(0).sqrt())


def power_equilibrium(quadratic: Tensor, right: Tensor, power: float, iterations: int = 60) -> Tensor:
    """The x > 0 with `C x = r x^-p`: the minimum of `x^T C x / 2 - sum_t r_t phi(x_t)`, `phi' = x^-p`.

    Newton's method with the step `1 / (1 + max_t |dx_t| / x_t)`: within such a step the curvature of phi
    changes by a bounded factor, so that the step never overshoots, and near the solution it tends to 1.

    Args:
        quadratic: C float64 [T, T], positive definite, unit diagonal.
        right: r float64 [T], positive.
        power: p > 0.
    """
    # The solution for uncorrelated gradients.
    x = right.pow(1 / (1 + power))
    for _ in range(iterations):
        gradient = quadratic @ x - right * x.pow(-power)
        hessian = quadratic + torch.diag(power * right * x.pow(-power - 1))
        dx = solve(hessian, -gradient)
        longest = (dx / x).abs().amax()
        x = x + dx / (1 + longest)
        if _finished(longest < 1e-14):
            break
    return x
