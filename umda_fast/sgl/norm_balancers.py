"""Balancers that read the gradients' norms, and losses."""

import torch
from torch import Tensor

from umda_fast.sgl.balancers import Balancer, StatefulBalancer
from umda_fast.sgl.telemetry import inverse_norms

_TINY = 1e-8


class GradNorm(StatefulBalancer):
    """Gradient normalisation (Chen et al., ICML 2018, arXiv:1711.02257).

    The weights follow `sum_t |w_t n_t - nbar r_t^alpha|` downhill, `n_t` the gradient norms, `nbar = mean_t
    w_t n_t` and `r_t` the relative rates `(L_t / L0_t) / mean`, both held constant: `w_t <- w_t - lr sign(w_t
    n_t - nbar r_t^alpha) n_t / nbar`, then scaled to sum to T. The division by nbar makes the rate
    independent of the gradients' size. Weights stay above 1e-3. The sign is that of a difference which more than
    rounding explains, about 1e-6. A task whose loss or first loss is not positive has no rate: it counts as the mean.

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
        known = (first > _TINY) & (losses > _TINY)
        ratio = torch.where(known, held / first, torch.zeros_like(first))
        mean_ratio = ratio.sum() / known.sum().clamp_min(1)
        rate = torch.where(known, ratio / torch.where(mean_ratio > 0, mean_ratio, 1.0), torch.ones_like(first))
        rate = rate.to(gram.dtype)
        norms = gram.diagonal().clamp_min(0).sqrt()
        weights = state["weights"].to(gram.dtype)
        mean = (weights * norms).mean()
        size = torch.where(mean > 0, mean, torch.ones_like(mean))
        above = (weights * norms - mean * rate.pow(self.alpha)) / size
        slope = (1e6 * above).clamp(-1, 1) * norms / size
        moved = (weights - self.lr * slope).clamp_min(1e-3)
        moved = losses.shape[0] * moved / moved.sum()
        self._write(tasks, weights=moved.to(first.dtype), first_loss=first)
        return moved


class DBMTL(Balancer):
    """Dual-balancing multi-task learning (Lin et al., arXiv:2308.12029).

    The gradients of the logarithms of the losses, `g_t / L_t`, are brought to the length of the longest and added:
    `w_t = max_s (n_s / L_s) / n_t`. The paper averages these gradients over steps; `SelfGuided` averages its own. The
    private parameters of a task get the same weight here, `1 / L_t` in the paper. A zero gradient has weight 0.

    Args:
        normalize: scale the weights to sum to T, which leaves of the losses nothing; False gives the paper's size, with
            losses held above 1e-8.
    """

    def __init__(self, *, normalize: bool = True) -> None:
        self.normalized = normalize

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """`1 / n_t`, scaled."""
        norms = gram.double().diagonal().clamp_min(0).sqrt()
        inverse = inverse_norms(norms)
        if self.normalized:
            total = inverse.sum()
            scaled = gram.shape[0] * inverse / torch.where(total > 0, total, torch.ones_like(total))
            return torch.where(total > 0, scaled, torch.ones_like(scaled)).to(gram.dtype)
        return ((norms / losses.double().clamp_min(_TINY)).amax() * inverse).to(gram.dtype)


class ExcessMTL(StatefulBalancer):
    """Robust multi-task learning with excess risks (He et al., ICML 2024).

    The excess risk of a task, how far its loss is above the least that can be reached, is estimated from its gradient
    as `E_t = g_t^T H_t^-1 g_t`, and the tasks that are furthest get more weight: `w_t <- w_t exp(lr E_t / E0_t)`,
    scaled to sum to T, E0 the mean of the first `warmup` estimates. The paper's H is diagonal, the root of the summed
    squares of every entry of the gradient; a balancer sees inner products only, so ours is one number per task, the
    root of the summed squared norms (as the steps of AdaGrad-Norm, Ward et al. 2019):
    `E_t = G_tt / sqrt(sum_k G_tt)`.

    Args:
        lr: step of the exponentiated gradient.
        warmup: updates of each task that its E0 is the mean of; until then it counts as 1.
    """

    normalized = True

    def __init__(self, lr: float = 0.01, warmup: int = 1) -> None:
        super().__init__()
        if lr <= 0:
            raise ValueError(f"lr: expected more than 0, got {lr}")
        if warmup < 1:
            raise ValueError(f"warmup: expected at least 1, got {warmup}")
        self.lr = lr
        self.warmup = warmup

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """Sums of squared norms, of the first estimates and of their number, and logits [T]."""
        names = ("squares", "first", "seen", "logits")
        return {name: torch.zeros(count, device=device, dtype=torch.float64) for name in names}

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """One step of the weights."""
        state = self._read(gram, losses, tasks)
        square = gram.double().diagonal().clamp_min(0)
        squares = state["squares"] + square
        excess = square / torch.where(squares > 0, squares, torch.ones_like(squares)).sqrt()
        early = state["seen"] < self.warmup
        first = torch.where(early, state["first"] + excess, state["first"])
        seen = torch.where(early, state["seen"] + 1, state["seen"])
        base = first / seen
        relative = torch.where(early | (base == 0), torch.ones_like(base), excess / base)
        logits = state["logits"] + self.lr * relative
        self._write(tasks, squares=squares, first=first, seen=seen, logits=logits)
        return (gram.shape[0] * torch.softmax(logits, 0)).to(gram.dtype)
