"""Scope `shared_parameters`, the exact one: gradients on all shared parameters.

    g_t   =   dL_t / d(shared)                     mhat_t: its average, see `averaged`
    .grad +=  sum_t w_t mhat_t + d(penalty)        of the shared parameters; direction="gradient": g_t for mhat_t
    .grad +=  sum_t w_t dL_t + d(penalty)          of every other leaf

T backward passes, one for each task, and one of the penalty; then what is to be added is handed to autograd, so that
hooks of leaves, their memory order and the way `.grad` accumulates are PyTorch's own (`handover`). A gradient that is
sparse for every task stays so. Memory beyond the model: the gradients and their averages, 2 T P numbers, and P for the
result, of which a missing `.grad` of a shared parameter becomes a view.

Over several processes (W of them) the gradients of a task, as soon as they are there, are on their way, summed over the
processes, to the process that keeps these columns, while the next task's backward pass runs. Each process keeps,
averages, multiplies and combines P / W columns; the partial Gram matrices are added up, the combined columns gathered.
Gradients of the other parameters are weighted, then summed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from umda_fast.sgl import _gradients
from umda_fast.sgl.batch import Batch
from umda_fast.sgl.buffers import finite
from umda_fast.sgl.graph import Look
from umda_fast.sgl.handover import hand_over, hooks_held, weighted_sums
from umda_fast.sgl.scopes.averaged import AveragedScope, taken
from umda_fast.sgl.scopes.base import Measured, Representation, Setting, reentrant


class SharedParametersScope(AveragedScope):
    """See the head of this file."""

    tells_added: ClassVar[bool] = True
    from_everything: ClassVar[bool] = True

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, more_rows=int(setting.exchange.several))
        self._filled: set[int] = set()  # rows that may hold gradients
        self._direction: Tensor | None = None
        # Of the step that is going on, by the number of a shared parameter: which get something, which of these
        # gradients are sparse, and the gradients of this process's penalty.
        self._given: list[bool] = []
        self._sparse: set[int] = set()
        self._penalty: dict[int, Tensor] = {}

    def look(self, losses: Mapping[int, Tensor], penalty: Tensor | None) -> Look:
        """What losses and penalty reach."""
        look = super().look(losses, penalty)
        assert look.penalty is not None
        if losses and look.penalty.reentrant:
            raise ValueError(reentrant("in the graph of the penalty"))
        return replace(look, flags=[*look.flags, *(p in look.penalty for p in self.scoped)])

    def measure(self, batch: Batch, look: Look, representation: Tensor | Representation | None) -> Measured:
        """Gram matrix of the averages, and the gradients of all other leaves."""
        setting, exchange = self._setting, self._setting.exchange
        assert look.tasks is not None
        hits = self.check(batch)
        others = setting.parameters.outside(look.tasks, complete=exchange.several)
        for row in self._filled.difference(batch.present.rows):
            self.gradients[row].zero_()  # of weight 0 in the combination, to which 0 * inf would be NaN
        self._filled = set(batch.present.rows)
        filled = self.fill(batch, look, others, keep_graph=batch.penalty is not None)
        if filled.sparse and setting.direction == "average":
            raise ValueError(
                "shared_parameters: sparse gradients (as of Embedding(sparse=True)) have no sparse average; expected "
                'direction="gradient"'
            )
        if not exchange.several:
            hits = filled.reached
        self.reached = [old or new for old, new in zip(self.reached, hits, strict=True)]
        penalized = self._penalize(batch, look, filled.others)
        here = self.reached if setting.direction == "average" else hits
        self._given = [task or penalty for task, penalty in zip(here, penalized, strict=True)]
        self._keep_sparse(filled.sparse, filled.others)
        self.rows.wait()
        losses, squares = exchange.totals(batch.values(setting.layout.dtype), self.squares(batch))
        sound = setting.statistics.judge(losses, squares, batch.present)
        broken = batch.present.mask & ~finite(squares)
        return Measured(self.smoothed_gram(sound), losses, sound, broken, filled.others)

    def _penalize(self, batch: Batch, look: Look, others: list[tuple[Tensor, int, Tensor]]) -> list[bool]:
        """Takes the penalty's gradients; which shared parameters it reaches."""
        self._penalty = {}
        if not batch.penalized:
            return [False] * len(self.scoped)
        exchange, reach = self._setting.exchange, look.penalty
        assert reach is not None
        hits = [number for number, p in enumerate(self.scoped) if p in reach]
        outside = self._setting.parameters.outside(reach, complete=exchange.several)
        wanted = [*(self.scoped[number] for number in hits), *outside]
        with hooks_held(wanted):
            found = taken(None if batch.penalty is None else batch.scaled(batch.penalty), wanted, retain=False)
        self._penalty = {n: gradient for n, gradient in zip(hits, found, strict=False) if gradient is not None}
        kept = zip(outside, found[len(hits) :], strict=True)
        others.extend((leaf, -1, gradient) for leaf, gradient in kept if gradient is not None)
        if not exchange.several:
            return [number in self._penalty for number in range(len(self.scoped))]
        numbers = range(len(self.scoped))
        self.rows.put(self._setting.tasks, [self._penalty.get(n) for n in numbers], [None] * len(numbers))
        return list(batch.flags[1 + len(self.scoped) :])

    def _keep_sparse(self, sparse: dict[int, dict[int, Tensor]], others: list[tuple[Tensor, int, Tensor]]) -> None:
        """Lets gradients that are sparse for every task, and the penalty, stay so, in one process."""
        self._sparse = set()
        if self._setting.exchange.several:
            return
        for number, found in sparse.items():
            penalty = self._penalty.get(number)
            if penalty is None or penalty.layout != torch.strided:
                found = found if penalty is None else {**found, -1: penalty}
                others.extend((self.scoped[number], position, gradient) for position, gradient in found.items())
                self._sparse.add(number)

    def apply(self, measured: Measured, batch: Batch, weights: Tensor, everyone: Tensor) -> None:
        """Combines the rows and adds everything to `.grad`."""
        exchange, statistics = self._setting.exchange, self._setting.statistics
        if self._setting.direction == "average":
            rows, factor = self.ema, _gradients.bias_correction(statistics.counts, statistics.beta, weights.dtype)
            # A task that does not count has no part in the direction; whoever guards the optimiser is to see a gradient
            # that is not finite.
            factor = factor * measured.sound
            if measured.broken is not None:
                factor = factor.masked_fill(measured.broken, math.nan)
        else:
            rows, factor = self.gradients, torch.ones_like(everyone)
        factor = batch.scaled(factor)
        exchange.begin(weighted_sums(measured.unshared, weights))
        self._combine(rows, everyone * factor, batch.present.mask.to(factor.dtype) * factor, batch.penalized)
        given = exchange.finish()
        assert self._direction is not None
        # Made anew, and held by nobody else: a missing .grad takes their place without a copy.
        pieces = self.layout.gradients(self._direction)
        for number, penalty in self._penalty.items():
            if not exchange.several:
                pieces[number].add_(penalty)
        self._penalty = {}
        for number, (parameter, piece) in enumerate(zip(self.scoped, pieces, strict=True)):
            if self._given[number] and number not in self._sparse and parameter.requires_grad:
                dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype  # newer torch lets the two differ
                given.append((parameter, piece.to(dtype)))
        del piece, pieces
        hand_over(given)

    def added(self) -> Tensor | None:
        """The direction."""
        found, self._direction = self._direction, None
        return found

    def _combine(self, rows: Tensor, weights: Tensor, equal: Tensor, penalized: bool) -> None:
        """The direction [P], and on demand the difference to it of the direction with equal weights."""
        backend, control = self._setting.backend, None
        if self._setting.control:
            # Only the difference is kept: whoever reads it adds the update, and with it the penalty's gradient.
            control = self.rows.part()
            _gradients.combine(rows, equal, control, backend)
        part = self.rows.part()
        _gradients.combine(rows, weights, part, backend)
        if control is not None:
            self.control = self.rows.spread(control.sub_(part))
        if penalized and self._setting.exchange.several:
            part.add_(self.rows.rows[self._setting.tasks])
        self._direction = self.rows.spread(part)
