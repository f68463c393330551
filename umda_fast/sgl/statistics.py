"""What is kept from step to step about T tasks: Gram matrix, cosines, how often each was seen, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from umda_fast.sgl._gradients import bias_correction
from umda_fast.sgl.batch import Present
from umda_fast.sgl.telemetry import cosine_matrix


class GramStatistics:
    """The last Gram matrix and the running mean of its cosines.

    Attributes:
        gram: [T, T] of the last statistics step; zeros before.
        norms: [T] square roots of its diagonal.
        cosine: [T, T] its cosines.
        cosine_ema: [T, T] their running mean, not bias-corrected.
        counts: int64 [T], updates of each task.
        pair_counts: int64 [T, T], updates with both tasks of a pair.
    """

    def __init__(self, count: int, beta: float, device: torch.device, dtype: torch.dtype) -> None:
        self.beta = beta
        self.gram = torch.zeros(count, count, device=device, dtype=dtype)
        self.cosine_ema = torch.zeros_like(self.gram)
        self.counts = torch.zeros(count, device=device, dtype=torch.int64)
        self.pair_counts = torch.zeros(count, count, device=device, dtype=torch.int64)
        self.derive()

    def derive(self) -> None:
        """Norms and cosines of the Gram matrix at hand."""
        self.norms, self.cosine = cosine_matrix(self.gram)

    def average(self, mean: Tensor, new: Tensor, pairs: Tensor) -> None:
        """`mean <- beta mean + (1 - beta) new`, [T, T], in place and where `pairs` holds."""
        mixed = self.beta * mean + (1 - self.beta) * new
        mean.copy_(torch.where(pairs, mixed, mean))

    def remember(self, gram: Tensor, present: Present) -> None:
        """Keeps the Gram matrix of a step and takes its cosines into their running mean."""
        self.gram = gram
        self.derive()
        pairs = present.pairs
        self.pair_counts += pairs
        self.average(self.cosine_ema, self.cosine, pairs)

    def cosine_mean(self) -> Tensor:
        """The running mean [T, T] of the cosines; 0 for pairs never seen together, diagonal 1."""
        corrected = self.cosine_ema * bias_correction(self.pair_counts, self.beta, self.cosine_ema.dtype)
        identity = torch.eye(len(corrected), device=corrected.device, dtype=corrected.dtype)
        return torch.where(identity.bool(), identity, corrected)


class TaskWeights:
    """Running weights, starting at 1, and what a step makes of them.

    Args:
        beta: their decay.
        normalized: whether those used in a step sum to the number of tasks present.

    Attributes:
        running: [T].
    """

    def __init__(self, count: int, beta: float, normalized: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.beta = beta
        self.normalized = normalized
        self.running = torch.ones(count, device=device, dtype=dtype)
        self._held: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def update(self, new: Tensor, present: Present) -> None:
        """Smooths new weights [A] of the tasks present into the running ones."""
        old = present.take(self.running, 0)
        mixed = self.beta * old + (1 - self.beta) * new.to(old.dtype)
        self.running = self.running.index_copy(0, present.index, mixed)
        self.forget()

    def forget(self) -> None:
        """The running weights have changed: what was made of them is no longer so."""
        self._held.clear()

    def used(self, present: Present) -> Tensor:
        """Weights [A] of the tasks present; they sum to their number where the balancer's always do."""
        weights = present.take(self.running, 0)
        # Needed with all tasks present too: after a step without some of them the running weights' sum drifts.
        return weights * (len(present.rows) / weights.sum()) if self.normalized else weights

    def of_step(self, present: Present) -> tuple[Tensor, Tensor]:
        """`used`, and [T] with 0 for the others; made once between two updates."""
        if present.rows not in self._held:
            weights = self.used(present)
            everyone = torch.zeros_like(self.running).index_copy(0, present.index, weights)
            self._held[present.rows] = weights, everyone
        return self._held[present.rows]
