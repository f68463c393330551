"""Balancers that read the Gram matrix: projections, bargaining, minimum norm, equal angles.

All work on the correlation matrix `C_st = G_st / (n_s n_t)` and the norms `n_t` where the method allows it,
so that a task whose gradient is 10^8 times larger than another's costs no accuracy.
"""

import torch
from torch import Tensor

from umda_fast.sgl import solvers
from umda_fast.sgl.balancers import Balancer, StatefulBalancer, conflict_coefficients
from umda_fast.sgl.telemetry import cosine_matrix


def _inverse(norms: Tensor) -> Tensor:
    """1 / n, and 0 for a zero gradient, which no weight can make matter."""
    return torch.where(norms > 0, 1 / norms, torch.zeros_like(norms))


def _correlation(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [T] and the slightly regularised correlation matrix [T, T] in float64."""
    norms, cosines = cosine_matrix(gram.double())
    ridge = solvers.RIDGE * torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    return norms, cosines + ridge


class PCGrad(Balancer):
    """Projecting conflicting gradients (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020).

    Every gradient in turn is projected onto the normal plane of each other gradient it conflicts with,
    `g~_t <- g~_t - min(0, <g~_t, g_s>) / ||g_s||^2 g_s`, and the results are added. The paper visits the
    others in random order; here the most opposed comes first (`conflict_coefficients`), which makes it
    deterministic. Weights are at least 1, and 1 each without conflict.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Column sums of the coefficient matrix."""
        return conflict_coefficients(gram).sum(0)


class GradVac(StatefulBalancer):
    """Gradient vaccine (Wang et al., ICLR 2021, arXiv:2010.05874).

    With `phi` the cosine of `g~_t` and `g_s` and `target_ts` its running mean: where `phi < target_ts`,
    `g~_t <- g~_t + ||g~_t|| (target sqrt(1 - phi^2) - phi sqrt(1 - target^2)) / (||g_s|| sqrt(1 - target^2))
    g_s`, after which the cosine is the target. Then `target_ts <- (1 - beta) target_ts + beta phi`. The order
    is that of `conflict_coefficients`. Weights are 1 each when nothing lies below its target.

    Args:
        beta: rate of the running mean.
    """

    _EPS = 1e-8

    def __init__(self, beta: float = 0.5) -> None:
        super().__init__()
        if not 0 <= beta <= 1:
            raise ValueError(f"beta: expected 0 <= beta <= 1, got {beta}")
        self.beta = beta

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The target cosines [T, T], zero at first."""
        return {"target": torch.zeros(count, count, device=device, dtype=dtype)}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Column sums of the coefficient matrix."""
        rows = self._read(gram, losses, tasks)["target"]
        target = rows if tasks is None else rows.index_select(1, tasks)
        count = gram.shape[0]
        norms, cosines = cosine_matrix(gram)
        order = torch.argsort(cosines, dim=1, stable=True)
        own = torch.arange(count, device=gram.device)
        # Coefficients on the unit gradients, each row in units of its own gradient's norm.
        unit = torch.eye(count, dtype=gram.dtype, device=gram.device)
        for position in range(count):
            other = order[:, position]
            index = other[:, None]
            columns = cosines.index_select(0, other)
            length = ((unit @ cosines) * unit).sum(1).clamp_min(0).sqrt()
            phi = (unit * columns).sum(1) / (length + self._EPS)
            goal = target.gather(1, index).squeeze(1)
            sine, goal_sine = (1 - phi**2).clamp_min(0).sqrt(), (1 - goal**2).clamp_min(0).sqrt()
            step = length * (goal * sine - phi * goal_sine) / (goal_sine + self._EPS)
            is_other = other != own
            step = torch.where((phi < goal) & is_other, step, torch.zeros_like(step))
            unit = unit.scatter_add(1, index, step[:, None])
            moved = torch.where(is_other, (1 - self.beta) * goal + self.beta * phi, goal)
            target = target.scatter(1, index, moved[:, None])
        new = target if tasks is None else rows.index_copy(1, tasks, target)
        self._write(tasks, target=new)
        return (unit * norms[:, None] * _inverse(norms)[None, :]).masked_fill_(
            torch.eye(count, dtype=torch.bool, device=gram.device), 0
        ).sum(0) + unit.diagonal()


class Rotation(Balancer):
    """Conflicting gradients rotated, not shortened; our reading of the rotations of HRGrad.

    The published description is: a rotation inside the span of two task gradients. We take it as PCGrad with
    the length kept. Where the cosine c of `g~_t` with `g_s` lies below `target`, `g~_t` is rotated towards
    `g_s` in their plane until the cosine is `target`:
    `g~_t <- a g~_t + ||g_t|| (target - c a) g_s / ||g_s||`, `a = sqrt(1 - target^2) / sqrt(1 - c^2)`.
    Exactly opposed gradients have no plane; such a `g~_t` is dropped, as a projection would. The order is
    that of `conflict_coefficients`. Weights are 1 each when nothing lies below the target.

    Args:
        target: the cosine to reach, in (-1, 1).
    """

    def __init__(self, target: float = 0.0) -> None:
        if not -1 < target < 1:
            raise ValueError(f"target: expected -1 < target < 1, got {target}")
        self.target = target

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Column sums of the coefficient matrix."""
        count = gram.shape[0]
        norms, cosines = cosine_matrix(gram.double())
        order = torch.argsort(cosines, dim=1, stable=True)
        unit = torch.eye(count, dtype=cosines.dtype, device=gram.device)
        kept = (1 - self.target**2) ** 0.5
        for position in range(count):
            other = order[:, position]
            cosine = (unit * cosines.index_select(0, other)).sum(1).clamp(-1, 1)
            sine = (1 - cosine**2).sqrt()
            plane = sine > 1e-6
            stretch = torch.where(plane, kept / sine, torch.zeros_like(sine))
            along = torch.where(plane, self.target - cosine * stretch, torch.zeros_like(sine))
            turn = cosine < self.target
            stretch = torch.where(turn, stretch, torch.ones_like(stretch))
            along = torch.where(turn, along, torch.zeros_like(along))
            unit = (unit * stretch[:, None]).scatter_add(1, other[:, None], along[:, None])
        scaled = unit * norms[:, None] * _inverse(norms)[None, :]
        identity = torch.eye(count, dtype=torch.bool, device=gram.device)
        return torch.where(identity, unit, scaled).sum(0).to(gram.dtype)


class UPGrad(Balancer):
    """Unconflicting projection of gradients (Quinton and Rey, "Jacobian Descent For Multi-Objective
    Optimization", 2024).

    Each `g_t` is projected onto the dual cone `{d: <d, g_s> >= 0 for all s}` and the results are added: with
    `v_t = argmin v^T G v, v >= e_t`, the weights are `sum_t v_t` (arXiv:2406.16232, proposition 1). The
    update conflicts with no task. Weights are at least 1, and 1 each without conflict.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """T quadratic programs, solved together."""
        count = gram.shape[0]
        norms, cosines = _correlation(gram)
        # In units of its own norm, row t is the problem v >= e_t of the correlation matrix.
        added = solvers.nonnegative_qp(cosines, cosines)
        moved = (added * norms[:, None] * _inverse(norms)[None, :]).sum(0)
        return (moved + torch.ones(count, dtype=torch.float64, device=gram.device)).to(gram.dtype)


class DualProj(Balancer):
    """The plain sum of the gradients projected onto their dual cone (Lopez-Paz and Ranzato, NeurIPS 2017,
    equation 11).

    `argmin v^T G v, v >= 1`: the vector closest to `sum_t g_t` that conflicts with no task. Weights are
    at least 1, and 1 each without conflict.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One quadratic program."""
        norms, cosines = _correlation(gram)
        largest = norms.amax()
        relative = torch.where(largest > 0, norms / largest, norms)
        added = solvers.nonnegative_qp(cosines, (cosines @ relative)[None])[0]
        return (1 + added * _inverse(relative)).to(gram.dtype)


class MGDA(Balancer):
    """Multiple-gradient descent: the shortest vector in the convex hull of the gradients (Désidéri, 2012).

    `argmin ||sum_t a_t g_t||, a >= 0, sum a = 1`, times T. With x the minimum of `x^T G x / 2 - sum x` over x
    >= 0, `a = x / sum x`. Weights sum to T. Small gradients get large weights: with one task 10^8 times
    larger than the others it gets practically none.
    """

    normalized = True

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One quadratic program."""
        norms, cosines = _correlation(gram)
        positive = norms > 0
        smallest = torch.where(positive, norms, torch.full_like(norms, torch.inf)).amin()
        # A zero gradient is itself the shortest vector; it is given a length far below every other.
        smallest = torch.where(positive.any(), smallest, torch.ones_like(smallest))
        inverse = smallest / torch.where(positive, norms, 1e-6 * smallest)
        x = solvers.simplex_minimum(
            lambda x: (cosines @ x, cosines), inverse, torch.ones_like(inverse) / inverse.sum()
        )
        return (gram.shape[0] * inverse * x).to(gram.dtype)


class CAGrad(Balancer):
    """Conflict-averse gradient descent (Liu et al., NeurIPS 2021, arXiv:2110.14048).

    The direction d with the best worst improvement `min_t <d, g_t>` in a ball of radius `k = c ||g0||` around
    the mean gradient g0. The paper's dual is the minimum of `<g_w, g0> + k ||g_w||` over the simplex, `g_w =
    sum_t w_t g_t`, and `d = g0 + k g_w / ||g_w||`. Here `||g_w||` is written as the minimum of `(||g_w||^2 /
    r + r) / 2` over r > 0, which is jointly convex and smooth, and `d = g0 + k g_w / r`: the same, and still
    the solution where `||g_w||` tends to 0 and the paper's quotient is undefined. Weights are times T, so
    that `c = 0` is the plain sum.

    Args:
        c: radius, 0 <= c < 1 for the paper's guarantees.
    """

    _SHORTEST = 1e-5

    def __init__(self, c: float = 0.5) -> None:
        if c < 0:
            raise ValueError(f"c: expected at least 0, got {c}")
        self.c = c

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One convex problem on the simplex."""
        count = gram.shape[0]
        exact = gram.double()
        mean = torch.full((count,), 1 / count, dtype=torch.float64, device=gram.device)
        squared = mean @ exact @ mean
        # In units of ||g0||. A zero mean (or gradients that cancel to rounding) is met with the plain sum.
        usable = squared > 1e-24 * exact.diagonal().sum()
        scaled = exact / torch.where(usable, squared, torch.ones_like(squared))
        inner = scaled @ mean

        def derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
            w, r = x[:-1], x[-1] + self._SHORTEST
            product = scaled @ w / r
            ratio = w @ product / r
            gradient = torch.cat([inner + self.c * product, (self.c * (1 - ratio) / 2)[None]])
            side = -product / r
            top = torch.cat([scaled / r, side[:, None]], 1)
            hessian = torch.cat([top, torch.cat([side, (ratio / r)[None]])[None]])
            return gradient, self.c * hessian

        ones = torch.ones_like(mean)
        normal, start = torch.cat([ones, 0 * ones[:1]]), torch.cat([mean, ones[:1]])
        x = solvers.simplex_minimum(derivatives, normal, start, iterations=60)
        w = x[:-1]
        # At the solution r >= ||g_w||. Where the iterations ran out before it, the direction stays in the
        # ball.
        r = torch.maximum(x[-1] + self._SHORTEST, (w @ scaled @ w).clamp_min(0).sqrt())
        found = 1 + count * self.c * w / r
        return torch.where(usable, found, torch.ones_like(found)).to(gram.dtype)


class IMTLG(Balancer):
    """Impartial multi-task learning, gradient part (Liu et al., ICLR 2021).

    The update has the same projection on every task's unit gradient: `w ~ G^-1 n`, that is
    `w_t ~ (C^-1 1)_t / n_t`, normalised to sum to T (weights may be negative). All 0 when they would sum to
    0.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One linear system."""
        norms, cosines = _correlation(gram)
        found = solvers.solve(cosines, torch.ones_like(norms)) * _inverse(norms)
        total = found.sum()
        usable = total.abs() > 1e-12 * found.abs().sum()
        scaled = gram.shape[0] * found / torch.where(usable, total, torch.ones_like(total))
        return torch.where(usable, scaled, torch.zeros_like(scaled)).to(gram.dtype)


class ConFIG(Balancer):
    """Conflict-free inverse gradients (Liu, Chu and Thuerey, ICLR 2025, arXiv:2408.11104).

    The direction u has equal cosines with all gradients, `u ~ U^+ 1` for the matrix U of unit gradients, and
    the update is `(sum_t <g_t, u>) u`. In the correlation matrix, `x = C^-1 1`, `u = sum_t x_t g_t / n_t /
    sqrt(x^T C x)`. Identical gradients get weights that sum to T.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One linear system."""
        norms, cosines = _correlation(gram)
        some = norms > 0
        # A zero gradient has no direction to agree with; it must not turn the others'.
        x = solvers.solve(cosines, some.double())
        x = torch.where(some, x, torch.zeros_like(x))
        squared = x @ cosines @ x
        x = x / torch.where(squared > 0, squared, torch.ones_like(squared)).sqrt()
        length = norms @ (cosines @ x)
        return (length * x * _inverse(norms)).to(gram.dtype)


class FairGrad(Balancer):
    """Fair resource allocation (Ban and Ji, ICML 2024, arXiv:2402.15638).

    Weights w > 0 with `(G w)_t = w_t^(-1/alpha)`: the update maximises the alpha-fair utility of the tasks'
    improvements. In the correlation matrix, `x = n w`, `C x = n^(1/alpha - 1) x^(-1/alpha)`.

    Args:
        alpha: fairness; 1 is proportional fairness (Nash), towards infinity max-min.
        normalize: scale the weights to sum to T; False gives the solution itself, whose size falls with
            that of the gradients.
    """

    def __init__(self, alpha: float = 1.0, *, normalize: bool = True) -> None:
        if alpha <= 0:
            raise ValueError(f"alpha: expected more than 0, got {alpha}")
        self.alpha = alpha
        self.normalized = normalize

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One equilibrium, by Newton's method."""
        norms, cosines = _correlation(gram)
        some = norms > 0
        largest = norms.amax()
        size = torch.where(largest > 0, largest, torch.ones_like(largest))
        relative = torch.where(some, norms / size, torch.ones_like(norms))
        power = 1 / self.alpha
        x = solvers.power_equilibrium(cosines, relative.pow(power - 1), power)
        # With the norms in units of the largest, w is in units of size^(-2 / (1 + 1 / alpha)).
        found = torch.where(some, x / relative, torch.zeros_like(x))
        if self.normalized:
            total = found.sum()
            scaled = gram.shape[0] * found / torch.where(total > 0, total, torch.ones_like(total))
            return torch.where(total > 0, scaled, torch.ones_like(scaled)).to(gram.dtype)
        return (found * size.pow(-2 / (1 + power))).to(gram.dtype)


class NashMTL(FairGrad):
    """Multi-task learning as a bargaining game (Navon et al., ICML 2022, arXiv:2202.01017).

    Weights w > 0 with `G w = 1 / w` (elementwise): the Nash bargaining solution, `FairGrad` with alpha 1. The
    paper approximates it by a sequence of convex programs; this is its solution to machine precision.

    Args:
        normalize: scale the weights to sum to T; False gives the solution itself, an update of norm sqrt(T).
    """

    def __init__(self, *, normalize: bool = True) -> None:
        super().__init__(1.0, normalize=normalize)


class AlignedMTL(Balancer):
    """Independent component alignment (Senushkin et al., CVPR 2023, arXiv:2305.19000).

    `w = B 1`, `B = sqrt(lambda_min) V Lambda^(-1/2) V^T` from `G = V Lambda V^T` without the eigenvalues
    below `T eps lambda_max`: the principal components of the gradients all get the length of the smallest.
    Orthogonal gradients of the same norm get 1 each.
    """

    synchronizes = True  # torch.linalg.eigh reads LAPACK's error code

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One eigendecomposition."""
        values, vectors = torch.linalg.eigh(gram.double())
        tolerance = values[-1] * gram.shape[0] * torch.finfo(gram.dtype).eps
        kept = (values > tolerance) & (values > 0)
        smallest = torch.where(kept, values, torch.full_like(values, torch.inf)).amin()
        stretch = torch.where(kept, (smallest / values).sqrt(), torch.zeros_like(values))
        found = (vectors * stretch) @ vectors.sum(0)
        return torch.where(kept.any(), found, torch.ones_like(found)).to(gram.dtype)
