"""Task balancers: objects that turn the Gram matrix of the task gradients, or the losses, into weights.

A balancer has one method, `weights(gram, losses) -> [T]`, and the update is `d = sum_t weights_t g_t`. A
method that changes every gradient (a projection, a rotation) fits in as well: each changed gradient is
`sum_s A_ts g_s` with a coefficient matrix A [T, T] read off the Gram matrix, so that its weights are the
column sums of A. No balancer touches a gradient, and the cost does not depend on the number of parameters.

Scale: where a method leaves it open, weights are such that tasks in no conflict get 1 each, as with `Equal`;
a learning rate and penalty weights then keep their meaning from one balancer to the next. Each class says
what it does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from umda_fast.sgl.conflicts import freed_coefficients
from umda_fast.sgl.telemetry import cosine_matrix


class Balancer(ABC):
    """Weights from the Gram matrix and the losses.

    Attributes:
        needs_gram: whether `weights` reads the Gram matrix; where not, no task gradient is ever computed.
        weight_beta: how much of the old weight `SelfGuided` keeps at each update, 0 for none.
        normalized: whether the weights always sum to the number of tasks; `SelfGuided` then makes those of
            the tasks present in a batch sum to their number too.
        synchronizes: whether `weights` waits for the device on CUDA.
    """

    needs_gram: bool = True
    weight_beta: float = 0.0
    normalized: bool = False
    synchronizes: bool = False

    @abstractmethod
    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Weights of the task gradients.

        Args:
            gram: float32 or float64 [T, T], inner products of the task gradients.
            losses: [T], detached, same dtype.

        Returns:
            [T] in gram's dtype.
        """


class StatefulBalancer(Balancer):
    """A balancer that remembers something about each task.

    Its `weights` takes a third argument: the positions (int64 [A]) of the A tasks present among all T; `gram`
    and `losses` are then those of the present tasks only. None means that all are present.
    """

    def __init__(self) -> None:
        self._state: dict[str, Tensor] = {}

    @abstractmethod
    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """What to remember before the first step; every tensor has the tasks first."""

    def setup(self, count: int, device: torch.device, dtype: torch.dtype) -> None:
        """Makes room for `count` tasks. `SelfGuided` calls it; without it the first `weights` does."""
        self._state = self.initial_state(count, device, dtype)

    @abstractmethod
    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """See `Balancer.weights`; `tasks` int64 [A] says which of all tasks are present, None: all."""

    def _read(self, gram: Tensor, losses: Tensor, tasks: Tensor | None) -> dict[str, Tensor]:
        if not self._state:
            if tasks is not None:
                raise ValueError("tasks: call setup(count, device, dtype) before weights for a part of the tasks")
            self.setup(losses.shape[0], losses.device, losses.dtype)
        if tasks is None:
            return dict(self._state)
        return {name: value.index_select(0, tasks) for name, value in self._state.items()}

    def _write(self, tasks: Tensor | None, **values: Tensor) -> None:
        for name, value in values.items():
            if tasks is None:
                self._state[name] = value
            else:
                self._state[name] = self._state[name].index_copy(0, tasks, value)

    def remembered(self) -> dict[str, Tensor]:
        """The state at present, for `forget`."""
        return dict(self._state)

    def forget(self, before: dict[str, Tensor], tasks: Tensor) -> None:
        """Puts the state of the tasks that bool [T] names back to what `remembered` gave."""
        for name, old in before.items():
            new = self._state[name]
            if new is not old:
                self._state[name] = torch.where(tasks.view(-1, *[1] * (old.dim() - 1)), old, new)

    def state_dict(self) -> dict[str, Any]:
        """Everything that changes from step to step."""
        return {name: value.clone() for name, value in self._state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave, on the device of the present state if there is one."""
        for name, value in state.items():
            present = self._state.get(name)
            self._state[name] = value.clone() if present is None else value.to(present.device, present.dtype)


class Equal(Balancer):
    """`w_t = 1`: the plain sum of the losses. With it self-guided learning is off."""

    needs_gram = False
    normalized = True

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """Ones [T]."""
        return torch.ones_like(losses)


class SGLBalancer(StatefulBalancer):
    """Self-guided learning: gradient strength, learning speed and alignment (docs/model.md, section 4).

    With `n_t = sqrt(G_tt)`, `C_st = G_st / (n_s n_t)`, `nbar = mean_s n_s` over the T tasks present:

    - learning speed `rate_t = (Lema_t / L0_t) / mean_s (Lema_s / L0_s)`, where `L0_t` is the first loss seen
      and `Lema_t <- loss_beta Lema_t + (1 - loss_beta) L_t` starts at it. Losses are held above 1e-12: one that
      falls below zero has come as far as a ratio can say. If `L0_t` was not above it, the ratio says nothing: 1.
    - `scale_t = clip(nbar rate_t^alpha / n_t, 1/clip, clip)`; a zero gradient gets the limit, `clip`, and
      when all gradients are zero every scale is 1.
    - `align_t = 1 + alignment * mean_{s != t} C_st` (1 for a single task).
    - `u_t = scale_t align_t`, and with the coefficients A of `freed_coefficients` at `conflict_threshold`:
      `v_s = min(sum_t A_ts u_t, clip u_s)`. The default threshold is 0, where A is continuous: a pair just below
      it is hardly changed, and gradients of one direction share what one of them would get. None switches it off.
      The bound is met only by gradients whose norms differ more than `clip` allows for: without it the head of a
      task with a vanishing gradient would take the whole sum.
    - `w_t = T v_t / sum_s v_s`, smoothed by `SelfGuided` with `weight_beta`, starting at 1.

    All weights are positive. Source: the project's docs/model.md, after Mahmood et al., Sci Rep 16, 6414
    (2026).

    Raises:
        ValueError: an option out of its range.
    """

    normalized = True
    _FLOOR = 1e-12

    def __init__(
        self,
        *,
        alpha: float = 0.5,
        clip: float = 5.0,
        alignment: float = 0.5,
        conflict_threshold: float | None = 0.0,
        loss_beta: float = 0.9,
        weight_beta: float = 0.9,
    ) -> None:
        super().__init__()
        if clip < 1:
            raise ValueError(f"clip: expected at least 1, got {clip}")
        if not 0 <= alignment < 1:
            raise ValueError(f"alignment: expected 0 <= alignment < 1, got {alignment}")
        if conflict_threshold is not None and not -1 <= conflict_threshold <= 0:
            raise ValueError(f"conflict_threshold: expected a cosine in [-1, 0], got {conflict_threshold}")
        for name, value in (("loss_beta", loss_beta), ("weight_beta", weight_beta)):
            if not 0 <= value < 1:
                raise ValueError(f"{name}: expected 0 <= {name} < 1, got {value}")
        self.alpha = alpha
        self.clip = clip
        self.alignment = alignment
        self.conflict_threshold = conflict_threshold
        self.loss_beta = loss_beta
        self.weight_beta = weight_beta

    def initial_state(self, count: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
        """First loss and smoothed loss of each task; 0 until the task is seen, which no held loss can be."""
        return {
            "first_loss": torch.zeros(count, device=device, dtype=dtype),
            "loss_ema": torch.zeros(count, device=device, dtype=dtype),
        }

    def weights(self, gram: Tensor, losses: Tensor, tasks: Tensor | None = None) -> Tensor:
        """Steps 2 to 5 before smoothing; sums to the number of tasks present."""
        state = self._read(gram, losses, tasks)
        held = losses.clamp_min(self._FLOOR)
        new = state["first_loss"] == 0
        first = torch.where(new, held, state["first_loss"])
        smoothed = torch.where(new, held, state["loss_ema"].lerp(held, 1 - self.loss_beta))
        self._write(tasks, first_loss=first, loss_ema=smoothed)

        count = gram.shape[0]
        norms, cosines = cosine_matrix(gram)
        progress = torch.where(first > self._FLOOR, smoothed / first, torch.ones_like(first)).to(gram.dtype)
        rate = progress / progress.mean()
        mean_norm = norms.mean()
        scale = (mean_norm * rate.pow(self.alpha) / norms).clamp(1 / self.clip, self.clip)
        scale = torch.where(mean_norm > 0, scale, torch.ones_like(scale))
        pull = self.alignment / max(count - 1, 1)
        align = cosines.sum(1) * pull + (1 - pull)  # the cosine with itself is 1
        strength = scale * align
        if self.conflict_threshold is not None and count > 1:
            projected = strength @ freed_coefficients(gram, self.conflict_threshold).to(strength.dtype)
            strength = torch.minimum(projected, self.clip * strength)
        return strength / strength.mean()


class FunctionBalancer(Balancer):
    """Weights given by any function of the Gram matrix, gram [T, T] -> [T]."""

    synchronizes = True  # for all we know

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def weights(self, gram: Tensor, losses: Tensor) -> Tensor:
        """`function(gram)`, detached."""
        return self.function(gram).detach()
