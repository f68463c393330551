"""Balancers that read the losses (GradNorm: gradient norms as well), each in closed form per step."""

from typing import Any

import torch
from torch import Tensor

from umda_fast.sgl.balancers import StatefulBalancer

_TINY = 1e-8


class Uncertainty(StatefulBalancer):
    """Homoscedastic uncertainty (Kendall, Gal and Cipolla, CVPR 2018, arXiv:1705.07115).

    The total loss is `sum_t exp(-s_t) L_t + s_t` with learned log-variances s, so that `w_t = exp(-s_t)`. The
    gradient `1 - exp(-s_t) L_t` needs the loss only, and s follows it here by plain gradient descent, without
    an optimiser of its own: `s_t <- s_t - lr (1 - exp(-s_t) L_t)` after the weights are given. Starts at s =
    0, weights 1.

    Args:
        lr: learning rate of s. At `closed_form` it has no meaning.
        closed_form: take the minimum in s at once, `w_t = 1 / L_t` (losses held above 1e-8).
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
            weights = 1 / losses.clamp_min(_TINY)
            self._write(tasks, log_variance=-weights.log())
            return weights
        weights = torch.exp(-s)
        self._write(tasks, log_variance=s - self.lr * (1 - weights * losses))
        return weights


class DWA(StatefulBalancer):
    """Dynamic weight average (Liu, Johns and Davison, CVPR 2019, arXiv:1803.10704).

    `w_t = T softmax(r_t / temperature)`, `r_t` the ratio of the mean losses of the last two periods; 1 each
    until there are two. The paper's period is an epoch; here it is a number of updates.

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
        ratio = torch.nan_to_num(state["newer"] / state["older"], nan=1.0, posinf=1.0, neginf=1.0)
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


class GradNorm(StatefulBalancer):
    """Gradient normalisation (Chen et al., ICML 2018, arXiv:1711.02257).

    The weights follow `sum_t |w_t n_t - nbar r_t^alpha|` downhill, `n_t` the gradient norms, `nbar = mean_t
    w_t n_t` and `r_t` the relative rates `(L_t / L0_t) / mean`, both held constant: `w_t <- w_t - lr sign(w_t
    n_t - nbar r_t^alpha) n_t / nbar`, then scaled to sum to T. The division by nbar makes the rate
    independent of the gradients' size. Weights stay above 1e-3.

    Args:
        alpha: strength of the rates.
        lr: learning rate.
    """

    normalized = True

    def __init__(self, alpha: float = 1.5, lr: float = 0.025) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr: expected more than 0, got {lr}")
        self.alpha = alpha
        self.lr = lr

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Weights and first losses [T]; 0 until a task is seen."""
        zeros = torch.zeros(count, device=device, dtype=dtype)
        return {"weights": torch.ones_like(zeros), "first_loss": zeros}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """One step of the weights."""
        state = self._read(gram, losses, tasks)
        held = losses.clamp_min(_TINY)
        first = torch.where(state["first_loss"] == 0, held, state["first_loss"])
        rate = held / first
        rate = (rate / rate.mean()).to(gram.dtype)
        norms = gram.diagonal().clamp_min(0).sqrt()
        weights = state["weights"].to(gram.dtype)
        mean = (weights * norms).mean()
        size = torch.where(mean > 0, mean, torch.ones_like(mean))
        slope = torch.sign(weights * norms - mean * rate.pow(self.alpha)) * norms / size
        moved = (weights - self.lr * slope).clamp_min(1e-3)
        moved = losses.shape[0] * moved / moved.sum()
        self._write(tasks, weights=moved.to(first.dtype), first_loss=first)
        return moved


class STCH(StatefulBalancer):
    """Smooth Tchebycheff scalarisation (Lin et al., ICML 2024, arXiv:2402.19078).

    The total is `mu log sum_t exp(L_t / (L0_t mu))`, whose weights are `softmax_t(L_t / (L0_t mu)) / L0_t`,
    scaled to sum to T. L0 is the first loss seen: it puts the tasks on one scale, as a nadir point does in
    the paper; `relative=False` leaves it out.

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
        first = self._read(gram, losses, tasks)["first_loss"]
        first = torch.where(first == 0, losses.clamp_min(_TINY), first)
        self._write(tasks, first_loss=first)
        scale = first if self.relative else torch.ones_like(first)
        weights = torch.softmax(losses / (scale * self.mu), 0) / scale
        return losses.shape[0] * weights / weights.sum()


class FAMO(StatefulBalancer):
    """Fast adaptive multitask optimisation (Liu et al., NeurIPS 2023, arXiv:2306.03792).

    `w_t ~ z_t / L_t`, `z = softmax(xi)`, scaled to sum to T (losses held above 1e-8). After the optimiser's
    step, `update` with the losses of the SAME batch moves xi by one Adam step along `d/dxi sum_t z_t (log L_t
    before - log L_t after)`, towards the task that improved least. Without calls of `update` the logits stay
    and `w_t ~ 1 / L_t`.

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
        """Logits, losses before the step, and Adam's two moments and step count [T]."""
        names = ("logits", "before", "first_moment", "second_moment", "steps")
        return {name: torch.zeros(count, device=device, dtype=dtype) for name in names}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """`T z / L / sum(z / L)` over the tasks present."""
        logits = self._read(gram, losses, tasks)["logits"]
        held = losses.clamp_min(_TINY)
        self._write(tasks, before=held)
        weights = torch.softmax(logits, 0) / held
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
        state = self._read(losses, losses, tasks)
        change = state["before"].log() - losses.clamp_min(_TINY).log()
        z = torch.softmax(state["logits"], 0)
        slope = z * (change - (z * change).sum()) + self.weight_decay * state["logits"]
        steps = state["steps"] + 1
        first = self._BETAS[0] * state["first_moment"] + (1 - self._BETAS[0]) * slope
        second = self._BETAS[1] * state["second_moment"] + (1 - self._BETAS[1]) * slope**2
        numerator = first / (1 - self._BETAS[0] ** steps)
        denominator = (second / (1 - self._BETAS[1] ** steps)).sqrt() + 1e-8
        self._write(
            tasks,
            logits=state["logits"] - self.lr * numerator / denominator,
            first_moment=first,
            second_moment=second,
            steps=steps,
        )
