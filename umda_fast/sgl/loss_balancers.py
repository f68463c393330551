"""Balancers that read the losses alone, each in closed form per step.

Ratios and logarithms say something about losses above 0. What a method does with others (a Gaussian's negative
log-likelihood, say) is in its docstring: no weight leaves its bounds, no state stops being finite.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from umda_fast.sgl.balancers import Balancer, StatefulBalancer

#: Losses up to here count as 0.
_TINY = 1e-8


def _inverse(losses: Tensor) -> Tensor:
    """1 / L; for a loss that is not positive the mean over the others: as an average task."""
    positive = losses > _TINY
    inverse = torch.where(positive, 1 / losses.clamp_min(_TINY), torch.zeros_like(losses))
    mean = torch.where(positive.any(), inverse.sum() / positive.sum().clamp_min(1), torch.ones_like(inverse.sum()))
    return torch.where(positive, inverse, mean)


def _first(seen: Tensor, losses: Tensor) -> Tensor:
    """Sizes of the first losses, 0 until a task had one that is not 0."""
    size = losses.abs()
    return torch.where((seen == 0) & (size > _TINY), size, seen)


class Uncertainty(StatefulBalancer):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla, CVPR 2018, arXiv:1705.07115).

    The total loss is `sum_t exp(-s_t) L_t + s_t` with learned log-variances s, so that `w_t = exp(-s_t)`. The
    gradient `1 - exp(-s_t) L_t` needs the loss only, and s follows it here by plain gradient descent, without
    an optimiser of its own: `s_t <- s_t - lr (1 - exp(-s_t) L_t)` after the weights are given, at most by 1.
    Starts at s = 0, weights 1.

    A loss at or below 0 says nothing of the variance (the total would have no minimum): its s stays.

    Args:
        lr: learning rate of s. At `closed_form` it has no meaning.
        closed_form: take the minimum in s at once, `w_t = 1 / L_t`.
    """

    needs_gram = False

    def __init__(self, lr: float = 0.01, *, closed_form: bool = False) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr: expected more than 0, got {lr}")
        self.lr = lr
        self.closed_form = closed_form

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The log-variances [T]."""
        return {"log_variance": torch.zeros(count, device=device, dtype=dtype)}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """`exp(-s)` of the tasks present."""
        s = self._read(gram, losses, tasks)["log_variance"]
        if self.closed_form:
            s = torch.where(losses > _TINY, losses.clamp_min(_TINY).log(), s)
            self._write(tasks, log_variance=s)
            return torch.exp(-s)
        weights = torch.exp(-s)
        step = (self.lr * (1 - weights * losses)).clamp(-1, 1)
        self._write(tasks, log_variance=torch.where(losses > 0, s - step, s))
        return weights


class IMTLL(Uncertainty):
    """Impartial multi-task learning, loss part (Liu et al., ICLR 2021).

    The total is `sum_t exp(s_t) L_t - s_t` with learned scales s, so that the scaled losses all tend to 1. It is
    the total of `Uncertainty` with s of the other sign, and is followed in the same way: the paper derives it without a
    distribution. Its minimum in s, `closed_form`, is the sum of the logarithms of the losses.

    Args:
        lr, closed_form: as of `Uncertainty`.
    """


class DWA(StatefulBalancer):
    """Dynamic weight average (Liu, Johns and Davison, CVPR 2019, arXiv:1803.10704).

    `w_t = T softmax(r_t / temperature)`, `r_t` the ratio of the mean losses of the last two periods; 1 each
    until there are two, and for a task with a mean that is not positive. The paper's period is an epoch; here it is a
    number of updates.

    Args:
        temperature: larger is more uniform.
        period: updates per mean loss.
    """

    needs_gram = False
    normalized = True

    def __init__(self, temperature: float = 2.0, period: int = 100) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature: expected more than 0, got {temperature}")
        if period < 1:
            raise ValueError(f"period: expected at least 1, got {period}")
        self.temperature = temperature
        self.period = period
        self._calls = 0

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Sum and number of losses in this period, means of the last two; nan until there is one."""
        zeros = torch.zeros(count, device=device, dtype=dtype)
        missing = torch.full_like(zeros, torch.nan)
        return {"total": zeros, "count": zeros.clone(), "newer": missing, "older": missing.clone()}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """The softmax over the tasks present; a task without two means counts as a ratio of 1."""
        state = self._read(gram, losses, tasks)
        newer, older = state["newer"], state["older"]
        ratio = torch.where((newer > 0) & (older > 0), newer / older, torch.ones_like(newer))
        ratio = torch.nan_to_num(ratio, nan=1.0, posinf=1.0)
        self._write(tasks, total=state["total"] + losses, count=state["count"] + 1)
        self._calls += 1
        if self._calls % self.period == 0:
            full = self._state
            seen = full["count"] > 0
            mean = full["total"] / full["count"].clamp_min(1)
            self._write(
                None,
                older=torch.where(seen, full["newer"], full["older"]),
                newer=torch.where(seen, mean, full["newer"]),
                total=torch.zeros_like(mean),
                count=torch.zeros_like(mean),
            )
        return losses.shape[0] * torch.softmax(ratio / self.temperature, 0)

    def state_dict(self) -> dict[str, Any]:
        """The tensors and the number of calls."""
        return {**super().state_dict(), "calls": self._calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        rest = dict(state)
        self._calls = rest.pop("calls")
        super().load_state_dict(rest)


class RLW(StatefulBalancer):
    """Random loss weighting (Lin et al., TMLR 2022, arXiv:2111.10603): `w = T softmax(standard normals)` at
    each update.

    Args:
        seed: of its own generator, whose state is part of `state_dict`.
    """

    needs_gram = False
    normalized = True

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self._generator: torch.Generator | None = None

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """The last weights, for the record."""
        self._generator = torch.Generator(device).manual_seed(self.seed)
        return {"weights": torch.ones(count, device=device, dtype=dtype)}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """New random weights for the tasks present."""
        self._read(gram, losses, tasks)
        count = losses.shape[0]
        normal = torch.randn(count, generator=self._generator, device=losses.device, dtype=losses.dtype)
        weights = count * torch.softmax(normal, 0)
        self._write(tasks, weights=weights)
        return weights

    def state_dict(self) -> dict[str, Any]:
        """The weights and the generator's state."""
        state = super().state_dict()
        if self._generator is not None:
            state["generator"] = self._generator.get_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""
        rest = dict(state)
        generator = rest.pop("generator", None)
        super().load_state_dict(rest)
        if generator is not None:
            if self._generator is None:
                self._generator = torch.Generator(rest["weights"].device)
            self._generator.set_state(generator.cpu())


class STCH(StatefulBalancer):
    """Smooth Tchebycheff scalarisation (Lin et al., ICML 2024, arXiv:2402.19078).

    The total is `mu log sum_t exp(L_t / (L0_t mu))`, whose weights are `softmax_t(L_t / (L0_t mu)) / L0_t`,
    scaled to sum to T. L0 is the size of the first loss seen (the first that is not 0): it puts the tasks on one
    scale, as a nadir point does in the paper; `relative=False` leaves it out. Losses may have any sign.

    Args:
        mu: smoothing, small for the maximum.
        relative: divide by the first losses.
    """

    needs_gram = False
    normalized = True

    def __init__(self, mu: float = 1.0, *, relative: bool = True) -> None:
        super().__init__()
        if mu <= 0:
            raise ValueError(f"mu: expected more than 0, got {mu}")
        self.mu = mu
        self.relative = relative

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """First losses [T], 0 until a task is seen."""
        return {"first_loss": torch.zeros(count, device=device, dtype=dtype)}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """The scaled softmax."""
        first = _first(self._read(gram, losses, tasks)["first_loss"], losses)
        self._write(tasks, first_loss=first)
        scale = torch.where((first > 0) & self.relative, first, torch.ones_like(first))
        weights = torch.softmax(losses / (scale * self.mu), 0) / scale
        return losses.shape[0] * weights / weights.sum()


class GeometricMean(Balancer):
    """Geometric loss strategy (Chennupati et al., "MultiNet++", CVPR workshops 2019).

    The total is `(prod_t L_t)^(1/T)`, whose derivative by L_t goes with `1 / L_t`; scaled to sum to T. A loss that is
    not positive counts as the mean of the others' `1 / L`.
    """

    needs_gram = False
    normalized = True

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """`T / L_t / sum_s 1 / L_s`."""
        inverse = _inverse(losses)
        return losses.shape[0] * inverse / inverse.sum()


class PBI(StatefulBalancer):
    """Penalty-based boundary intersection (Zhang and Li, "MOEA/D", IEEE Trans. Evol. Comput. 11(6), 2007).

    The total is `d1 + theta d2` of the losses L (relative to their first, L0) less a reference point: d1 is how far
    they are along the preference, `d1 = <L - z, p> / ||p||`, d2 how far from it. Its derivative is
    `p / ||p|| + theta q`, q the unit vector from the preference to the losses (0 on it), and is scaled so that
    losses on the preference give weights that sum to T. A task far ahead of the preference can get a negative weight.
    Losses may have any sign.

    Args:
        theta: weight of d2; the paper's experiments have 5.
        preference: one positive number per task, in their order; None: all equal.
        reference: z, one number per task, below the losses to be reached; None: 0.
        relative: divide by the sizes of the first losses.
    """

    needs_gram = False

    def __init__(
        self,
        theta: float = 1.0,
        *,
        preference: Sequence[float] | None = None,
        reference: Sequence[float] | None = None,
        relative: bool = True,
    ) -> None:
        super().__init__()
        if theta < 0:
            raise ValueError(f"theta: expected at least 0, got {theta}")
        if preference is not None and not all(value > 0 for value in preference):
            raise ValueError(f"preference: expected positive numbers, got {list(preference)}")
        self.theta = theta
        self.preference = preference
        self.reference = reference
        self.relative = relative

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """First losses [T], 0 until a task is seen; preference and reference [T].

        Raises:
            ValueError: a preference or reference of another length.
        """
        state = {"first_loss": torch.zeros(count, device=device, dtype=dtype)}
        for name, values, default in (("preference", self.preference, 1.0), ("reference", self.reference, 0.0)):
            if values is not None and len(values) != count:
                raise ValueError(f"{name}: expected {count} numbers, one per task, got {len(values)}")
            given = [default] * count if values is None else list(values)
            state[name] = torch.tensor(given, device=device, dtype=dtype)
        return state

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """The derivative of the total by the losses present."""
        state = self._read(gram, losses, tasks)
        first = _first(state["first_loss"], losses)
        self._write(tasks, first_loss=first)
        scale = torch.where((first > 0) & self.relative, first, torch.ones_like(first))
        along = state["preference"] / torch.linalg.vector_norm(state["preference"])
        shifted = (losses - state["reference"]) / scale
        off = shifted - (shifted @ along) * along
        length = torch.linalg.vector_norm(off)
        # On the preference there is no direction away from it: rounding must not become one.
        some = length > 16 * torch.finfo(losses.dtype).eps * torch.linalg.vector_norm(shifted)
        toward = torch.where(some, off / torch.where(some, length, torch.ones_like(length)), torch.zeros_like(off))
        unit = losses.shape[0] / (along / scale).sum()
        found: Tensor = unit * (along + self.theta * toward) / scale
        return found


class LDCMTL(StatefulBalancer):
    """Loss discrepancy control (Xiao, Dong, Zou and Ji, arXiv:2502.08585).

    The weights and the model minimise one total together, `sum_t s_t L_t + lambda sum of |s_t L_t - s_u L_u|`: the
    weighted losses are to stay together. Here L is relative to the first losses, `s = T softmax(logits)`, and the sum
    is over all pairs of tasks, times 2 / T so that it has the size of the paper's, over neighbours in a list: the
    numbering of the tasks plays no part, and for two tasks they agree. The paper's router makes the weights of the
    batch's features; ours are numbers. The derivative by the losses is given, scaled so that without lambda it sums to
    T, then the logits follow their own derivative by plain gradient descent, at most by 1. Losses may have any sign.

    Args:
        discrepancy: lambda. Above 0.5 a task that is far ahead can get a negative weight.
        lr: learning rate of the logits.
    """

    needs_gram = False

    def __init__(self, discrepancy: float = 0.1, lr: float = 0.01) -> None:
        super().__init__()
        if discrepancy < 0:
            raise ValueError(f"discrepancy: expected at least 0, got {discrepancy}")
        if lr <= 0:
            raise ValueError(f"lr: expected more than 0, got {lr}")
        self.discrepancy = discrepancy
        self.lr = lr

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logits and first losses [T], the latter 0 until a task is seen."""
        zeros = torch.zeros(count, device=device, dtype=dtype)
        return {"logits": zeros, "first_loss": zeros.clone()}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """The derivative of the total by the losses present."""
        state = self._read(gram, losses, tasks)
        first = _first(state["first_loss"], losses)
        scale = torch.where(first > 0, first, torch.ones_like(first))
        count = losses.shape[0]
        relative = losses / scale
        s = count * torch.softmax(state["logits"], 0)
        weighted = s * relative
        pull = 1 + self.discrepancy * (2 / count) * torch.sign(weighted[:, None] - weighted[None, :]).sum(1)
        slope = weighted * pull
        slope = slope - s / count * slope.sum()
        step = (self.lr * slope).clamp(-1, 1)
        self._write(tasks, logits=state["logits"] - step, first_loss=first)
        return count / (s / scale).sum() * s * pull / scale


class FAMO(StatefulBalancer):
    """Fast adaptive multitask optimisation (Liu et al., NeurIPS 2023, arXiv:2306.03792).

    `w_t ~ z_t / L_t`, `z = softmax(xi)`, scaled to sum to T. After the optimiser's step, `update` with the losses
    of the SAME batch moves xi by one Adam step along `d/dxi sum_t z_t (log L_t before - log L_t after)`, towards the
    task that improved least. Where nobody called `update`, the losses of the next call of `weights` take their place:
    of another batch, so that xi follows more noise.

    A loss that is not positive has no logarithm: it counts as the mean of the others' `1 / L`, and moves no xi.

    Args:
        lr: learning rate of the logits.
        weight_decay: of the logits.
    """

    needs_gram = False
    normalized = True
    _BETAS = (0.9, 0.999)

    def __init__(self, lr: float = 0.025, weight_decay: float = 1e-3) -> None:
        super().__init__()
        if lr < 0:
            raise ValueError(f"lr: expected at least 0, got {lr}")
        self.lr = lr
        self.weight_decay = weight_decay

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Logits, losses before the step (0: none that wait for those after it), Adam's two moments and step
        count [T]."""
        names = ("logits", "before", "first_moment", "second_moment", "steps")
        return {name: torch.zeros(count, device=device, dtype=dtype) for name in names}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """`T z / L / sum(z / L)` over the tasks present."""
        state = self._moved(self._read(gram, losses, tasks), losses)
        self._write(tasks, **{**state, "before": torch.where(losses > _TINY, losses, torch.zeros_like(losses))})
        weights = torch.softmax(state["logits"], 0) * _inverse(losses)
        return losses.shape[0] * weights / weights.sum()

    def update(self, losses: Tensor, tasks: Tensor | None = None) -> None:
        """Moves the logits.

        Args:
            losses: [A] after the optimiser's step, on the batch that `weights` was called for.
            tasks: int64 [A] positions of the tasks present, None: all.

        Raises:
            RuntimeError: before any call of `weights`.
        """
        if not self._state:
            raise RuntimeError("FAMO.update: expected a call of weights before it")
        losses = losses.detach()
        self._write(tasks, **self._moved(self._read(losses, losses, tasks), losses))

    def _moved(self, state: dict[str, Tensor], after: Tensor) -> dict[str, Tensor]:
        """The state after an Adam step of the tasks whose losses before are known, which are used up."""
        before, logits = state["before"], state["logits"]
        known = (before > 0) & (after > _TINY) & after.isfinite()
        held = torch.where(known, after, torch.ones_like(after))
        change = torch.where(known, torch.where(known, before, held).log() - held.log(), torch.zeros_like(held))
        z = torch.softmax(logits, 0)
        slope = z * (change - (z * change).sum()) + self.weight_decay * logits
        steps = state["steps"] + 1
        first = self._BETAS[0] * state["first_moment"] + (1 - self._BETAS[0]) * slope
        second = self._BETAS[1] * state["second_moment"] + (1 - self._BETAS[1]) * slope**2
        numerator = first / (1 - self._BETAS[0] ** steps)
        denominator = (second / (1 - self._BETAS[1] ** steps)).sqrt() + 1e-8
        moved = {
            "logits": logits - self.lr * numerator / denominator,
            "first_moment": first,
            "second_moment": second,
            "steps": steps,
        }
        kept = {name: torch.where(known, value, state[name]) for name, value in moved.items()}
        return {**kept, "before": torch.zeros_like(before)}
