"""What is kept from step to step about T tasks: Gram matrix, cosines, how often each was seen, and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

from umda_fast.sgl._gradients import bias_correction
from umda_fast.sgl.batch import Present
from umda_fast.sgl.buffers import finite
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
        skipped: int64 [T], steps on which a task was present, but its loss or gradient not finite.
        last_loss: [T], the last finite one. known: bool [T], whether there was one.
    """

    def __init__(self, count: int, beta: float, device: torch.device, dtype: torch.dtype) -> None:
        self.beta = beta
        self.gram = torch.zeros(count, count, device=device, dtype=dtype)
        self.cosine_ema = torch.zeros_like(self.gram)
        self.counts = torch.zeros(count, device=device, dtype=torch.int64)
        self.pair_counts = torch.zeros(count, count, device=device, dtype=torch.int64)
        self.skipped = torch.zeros_like(self.counts)
        self.last_loss = torch.zeros(count, device=device, dtype=dtype)
        self.known = torch.zeros(count, device=device, dtype=torch.bool)
        self.derive()

    def derive(self) -> None:
        """Norms and cosines of the Gram matrix at hand."""
        self.norms, self.cosine = cosine_matrix(self.gram)

    def average(self, mean: Tensor, new: Tensor, pairs: Tensor) -> None:
        """`mean <- beta mean + (1 - beta) new`, [T, T], in place and where `pairs` holds."""
        mean.copy_(torch.where(pairs, mean.lerp(new, 1 - self.beta), mean))

    def judge(self, losses: Tensor, squares: Tensor | None, present: Present) -> Tensor:
        """The tasks present that count in this step, bool [T]: loss and gradient are finite. No wait for the device.

        Args:
            losses: [A].
            squares: [T] squared lengths of the gradients, None: there are none.
        """
        sound = finite(losses)
        if not present.everyone:
            sound = present.put(torch.zeros_like(present.mask), sound)
        if squares is not None:
            sound = sound & finite(squares)
        self.skipped += ~sound if present.everyone else present.mask & ~sound
        return sound

    def finite_losses(self, losses: Tensor, sound: Tensor, present: Present) -> tuple[Tensor, Tensor]:
        """The losses [A], in place of what is not `sound` [T] the last that was; and whether each task had one."""
        usable = present.take(sound, 0)
        held = torch.where(usable, losses, present.take(self.last_loss, 0))
        self.known = self.known | sound
        self.last_loss = present.put(self.last_loss, held)
        return held, present.take(self.known, 0).all()

    def remember(self, gram: Tensor, sound: Tensor) -> None:
        """Keeps the Gram matrix of a step and takes its cosines, of the tasks that count, into their running mean."""
        self.gram = gram
        self.derive()
        pairs = sound[:, None] & sound[None, :]
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
        held: int64, updates on which no weight moved, for want of finite ones.
    """

    def __init__(self, count: int, beta: float, normalized: bool, device: torch.device, dtype: torch.dtype) -> None:
        self.beta = beta
        self.normalized = normalized
        self.running = torch.ones(count, device=device, dtype=dtype)
        self.held = torch.zeros((), device=device, dtype=torch.int64)
        self._of_step: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def update(self, new: Tensor, present: Present, taken: Tensor) -> None:
        """Smooths new weights [A] of the tasks present into the running ones, where `taken` [T] holds."""
        old = present.take(self.running, 0)
        mixed = torch.where(present.take(taken, 0), old.lerp(new.to(old.dtype), 1 - self.beta), old)
        self.running = present.put(self.running, mixed)
        self.forget()

    def forget(self) -> None:
        """The running weights have changed: what was made of them is no longer so."""
        self._of_step.clear()

    def used(self, present: Present) -> Tensor:
        """Weights [A] of the tasks present; they sum to their number where the balancer's always do."""
        weights = present.take(self.running, 0)
        # Needed with all tasks present too: after a step without some of them the running weights' sum drifts.
        return weights / weights.mean() if self.normalized else weights

    def of_step(self, present: Present) -> tuple[Tensor, Tensor]:
        """`used`, and [T] with 0 for the others; made once between two updates."""
        if present.rows not in self._of_step:
            weights = self.used(present)
            # Never the running weights themselves: a step that was handed out is not to change with them.
            own = present.everyone and self.normalized
            everyone = weights if own else torch.zeros_like(self.running).index_copy(0, present.index, weights)
            self._of_step[present.rows] = weights, everyone
        return self._of_step[present.rows]
