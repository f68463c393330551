"""Balancers that read the Gram matrix: projections, bargaining, minimum norm, equal angles.

All work on the correlation matrix `C_st = G_st / (n_s n_t)` and the norms `n_t` where the method allows it,
so that a task whose gradient is 10^8 times larger than another's costs no accuracy.

Gradients may lack rank: more tasks than dimensions, one direction twice, opposed, zero. Of several solutions the
shortest is taken, so that gradients of one direction share, and how tasks are numbered plays no part. With a float32
Gram matrix the update is that of the published method on the gradients in float64 within 0.1 %, whatever their
condition, but for the three whose docstrings say from which condition number on it is not (measured in
tests/sgl/test_degenerate.py).
"""

import torch
from torch import Tensor

from umda_fast.sgl import solvers
from umda_fast.sgl.balancers import Balancer, StatefulBalancer
from umda_fast.sgl.conflicts import conflict_coefficients, in_gradients, resolution, share, tied
from umda_fast.sgl.telemetry import cosine_matrix, inverse_norms


def _correlation(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Norms [T] and the slightly regularised correlation matrix [T, T] in float64."""
    norms, cosines = cosine_matrix(gram.double())
    identity = torch.eye(gram.shape[0], dtype=torch.float64, device=gram.device)
    return norms, cosines + solvers.ridge(gram) * identity


def _around_the_mean(gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The regularised Gram matrix in units of the mean gradient's length, the weights 1 / T that make the mean, and
    whether there is one: gradients that cancel to rounding are met with their plain sum."""
    count = gram.shape[0]
    norms, cosines = _correlation(gram)
    exact = cosines * norms[:, None] * norms[None, :]
    mean = torch.full_like(norms, 1 / count)
    squared = mean @ gram.double() @ mean
    usable = squared > solvers.ridge(gram) * exact.diagonal().sum() / count**2
    return exact / torch.where(usable, squared, torch.ones_like(squared)), mean, usable


class PCGrad(Balancer):
    """Projecting conflicting gradients (Yu et al., "Gradient Surgery for Multi-Task Learning", NeurIPS 2020).

    Every gradient in turn is projected onto the normal plane of each other gradient it conflicts with,
    `g~_t <- g~_t - min(0, <g~_t, g_s>) / ||g_s||^2 g_s`, and the results are added. The paper visits the
    others in random order; here the most opposed comes first (`conflict_coefficients`), which makes it
    deterministic; what is equally opposed is met at once. Weights are at least 1, and 1 each without conflict.
    """

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Column sums of the coefficient matrix."""
        return conflict_coefficients(gram).sum(0).to(gram.dtype)


class GradVac(StatefulBalancer):
    """Gradient vaccine (Wang et al., ICLR 2021, arXiv:2010.05874).

    With `phi` the cosine of `g~_t` and `g_s` and `target_ts` its running mean: where `phi < target_ts`,
    `g~_t <- g~_t + ||g~_t|| (target sqrt(1 - phi^2) - phi sqrt(1 - target^2)) / (||g_s|| sqrt(1 - target^2))
    g_s`, after which the cosine is the target. Then `target_ts <- (1 - beta) target_ts + beta phi`. The order
    is that of `conflict_coefficients`, what is equally opposed is met at once. Weights are 1 each when nothing lies
    below its target.

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
        norms, cosines = cosine_matrix(gram.double())
        count, turns = len(norms), tied(cosines, resolution(gram.dtype))
        own = torch.eye(count, dtype=torch.bool, device=gram.device)
        goal = target.to(cosines.dtype)
        sine_goal = (1 - goal**2).clamp_min(0).sqrt()
        seen = goal.clone()
        # Coefficients on the unit gradients, each row in units of its own gradient's norm.
        unit = own.to(cosines.dtype)
        for turn in range(count):
            inner = unit @ cosines
            length = (inner * unit).sum(1, keepdim=True).clamp_min(0).sqrt()
            phi = inner / (length + self._EPS)
            sine = (1 - phi**2).clamp_min(0).sqrt()
            met = (turns == turn) & ~own
            step = length * (goal * sine - phi * sine_goal) / (sine_goal + self._EPS)
            step = torch.where(met & (phi < goal), step, torch.zeros_like(step))
            unit = unit + share(step, cosines) * step
            seen = torch.where(met, (1 - self.beta) * goal + self.beta * phi, seen)
        new = seen.to(rows.dtype)
        self._write(tasks, target=new if tasks is None else rows.index_copy(1, tasks, new))
        return in_gradients(unit, norms).sum(0).to(gram.dtype)


class Rotation(Balancer):
    """Conflicting gradients rotated, not shortened; our reading of the rotations of HRGrad.

    The published description is: a rotation inside the span of two task gradients. We take it as PCGrad with
    the length kept. Where the cosine c of `g~_t` with `g_s` lies below `target`, `g~_t` is rotated towards
    `g_s` in their plane until the cosine is `target`:
    `g~_t <- a g~_t + ||g_t|| (target - c a) g_s / ||g_s||`, `a = sqrt(1 - target^2) / sqrt(1 - c^2)`.
    Exactly opposed gradients have no plane; such a `g~_t` is dropped, as a projection would. The order is
    that of `conflict_coefficients`; what comes at once is added up, then the length restored. Weights are 1 each when
    nothing lies below the target.

    Args:
        target: the cosine to reach, in (-1, 1).
    """

    def __init__(self, target: float = 0.0) -> None:
        if not -1 < target < 1:
            raise ValueError(f"target: expected -1 < target < 1, got {target}")
        self.target = target

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Column sums of the coefficient matrix."""
        norms, cosines = cosine_matrix(gram.double())
        turns = tied(cosines, resolution(gram.dtype))
        own = torch.eye(len(norms), dtype=torch.bool, device=gram.device)
        unit = own.to(cosines.dtype)
        slope = self.target / (1 - self.target**2) ** 0.5
        for turn in range(len(norms)):
            cosine = (unit @ cosines).clamp(-1, 1)
            sine = (1 - cosine**2).sqrt()
            # g~ + step g_s has the direction of the rotated g~.
            met = (turns == turn) & ~own & (cosine < self.target)
            step = torch.where(met, slope * sine - cosine, torch.zeros_like(cosine))
            step = share(step, cosines) * step
            along = (step * cosine).sum(1, keepdim=True)
            length = (1 + 2 * along + ((step @ cosines) * step).sum(1, keepdim=True)).clamp_min(0).sqrt()
            moved = torch.where(length > 1e-6, (unit + step) / length, torch.zeros_like(unit))
            unit = torch.where(step.any(1, keepdim=True), moved, unit)
        return in_gradients(unit, norms).sum(0).to(gram.dtype)


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
        moved = (added * norms[:, None] * inverse_norms(norms)[None, :]).sum(0)
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
        return (1 + added * inverse_norms(relative)).to(gram.dtype)


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
    sum_t w_t g_t`, and `d = g0 + k g_w / ||g_w||`; here with r in place of `||g_w||` (`solvers.norm_on_simplex`):
    the same, and still the solution where `||g_w||` tends to 0 and the paper's quotient is undefined. Weights are
    times T, so that `c = 0` is the plain sum.

    Args:
        c: radius, 0 <= c < 1 for the paper's guarantees.
    """

    def __init__(self, c: float = 0.5) -> None:
        if c < 0:
            raise ValueError(f"c: expected at least 0, got {c}")
        self.c = c

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One convex problem on the simplex."""
        scaled, mean, usable = _around_the_mean(gram)
        w, r = solvers.norm_on_simplex(scaled, scaled @ mean, torch.ones_like(mean), mean, factor=self.c)
        found = 1 + gram.shape[0] * self.c * w / r
        return torch.where(usable, found, torch.ones_like(found)).to(gram.dtype)


class ConicGrad(Balancer):
    """Conic gradients (Hassanpour et al., arXiv:2502.00217).

    The direction d with the best worst improvement `min_t <d, g_t>` in the cone `<d, g0> >= c ||d|| ||g0||` around the
    mean gradient g0. With `||d|| <= ||g0||` and `<d, g0> >= c ||g0||^2`, a convex set inside the cone, the dual is the
    minimum of `||g_w + m g0|| - c m ||g0||` over the simplex and `m >= 0`, and d goes with `g_w + m g0`: of g0's
    length, or of less, down to c of it, where no direction of the cone improves all tasks. The paper follows w by
    gradient steps and gives the direction a length of its own; here the problem is solved, as in `CAGrad`. A zero
    gradient, which nothing improves, is left out. Weights are times T, so that `c = 1` would be the plain sum.

    Args:
        c: cosine of the cone's angle, 0 < c < 1.
    """

    def __init__(self, c: float = 0.5) -> None:
        if not 0 < c < 1:
            raise ValueError(f"c: expected 0 < c < 1, got {c}")
        self.c = c

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One convex problem on the simplex."""
        count = gram.shape[0]
        scaled, mean, usable = _around_the_mean(gram)
        # Variables w and m; in units of ||g0|| the mean is a unit vector.
        to_mean = scaled @ mean
        one = mean @ to_mean
        quadratic = torch.cat([torch.cat([scaled, to_mean[:, None]], 1), torch.cat([to_mean, one[None]])[None]])
        size = scaled.diagonal().amax().sqrt()
        linear = torch.cat([torch.where(gram.diagonal() > 0, 0.0, 10 * size), -self.c * one[None]])
        normal, start = torch.cat([torch.ones_like(mean), 0 * mean[:1]]), torch.cat([mean, one[None]])
        x, r = solvers.norm_on_simplex(quadratic, linear, normal, start)
        found = (count * x[:-1] + x[-1]) / r
        return torch.where(usable, found, torch.ones_like(found)).to(gram.dtype)


class IMTLG(Balancer):
    """Impartial multi-task learning, gradient part (Liu et al., ICLR 2021).

    The update has the same projection on every task's unit gradient: `w ~ G^-1 n`, that is `w_t ~ x_t / n_t`,
    `C x = 1`, normalised to sum to T (weights may be negative). All 0 when they would sum to 0.

    Without full rank: x is the shortest where there is one. Where there is none, the only common projection is 0, and
    x is the part of 1 that C maps to 0: the update vanishes, as the paper's formula has it. In float32 within 0.1 % up
    to a condition number of C of 10^6, beyond within some 1 %.
    """

    synchronizes = True  # torch.linalg.eigh reads LAPACK's error code

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One eigendecomposition."""
        norms, cosines = cosine_matrix(gram.double())
        ones = torch.ones_like(norms)
        x, left = solvers.shortest_solution(cosines, ones, gram.dtype)
        mapped_to_nothing = left.norm() > torch.finfo(gram.dtype).eps ** 0.5 * ones.norm()
        found = torch.where(mapped_to_nothing, left, x) * inverse_norms(norms)
        total = found.sum()
        usable = total.abs() > 1e-12 * found.abs().sum()
        scaled = gram.shape[0] * found / torch.where(usable, total, torch.ones_like(total))
        return torch.where(usable, scaled, torch.zeros_like(scaled)).to(gram.dtype)


class ConFIG(Balancer):
    """Conflict-free inverse gradients (Liu, Chu and Thuerey, ICLR 2025, arXiv:2408.11104).

    The direction u has equal cosines with all gradients, `u ~ U^+ 1` with the pseudo-inverse of the matrix U of unit
    gradients (of several directions that are equally near to that, the shortest), and the update is
    `(sum_t <g_t, u>) u`. In the correlation matrix, `x = C^+ 1`, `u = sum_t x_t g_t / n_t / sqrt(x^T C x)`. Identical
    gradients get weights that sum to T. In float32 up to a condition number of C of 10^6; beyond, what can no longer be
    told from linear dependence is taken for it, and the update is another.
    """

    synchronizes = True  # torch.linalg.eigh reads LAPACK's error code

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """One eigendecomposition."""
        norms, cosines = cosine_matrix(gram.double())
        some = norms > 0
        # A zero gradient has no direction to agree with; it must not turn the others'.
        x, _ = solvers.shortest_solution(cosines, some.double(), gram.dtype)
        x = torch.where(some, x, torch.zeros_like(x))
        squared = x @ cosines @ x
        x = x / torch.where(squared > 0, squared, torch.ones_like(squared)).sqrt()
        length = norms @ (cosines @ x)
        return (length * x * inverse_norms(norms)).to(gram.dtype)


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
    Orthogonal gradients of the same norm get 1 each. In float32 up to a condition number of G of 10^5 (lengths count:
    the square of their ratio); beyond, the smallest eigenvalue is rounding, or is left out.
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
