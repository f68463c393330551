"""Scope `shared_parameters`, the exact one: gradients on all shared parameters.

    g_t   =   dL_t / d(shared)                     mhat_t: its average, see `averaged`
    .grad +=  sum_t w_t mhat_t + d(penalty)        of the shared parameters; direction="gradient": g_t for mhat_t
    .grad +=  sum_t w_t dL_t + d(penalty)          of every other parameter

T backward passes, one for each task, and one of the penalty. Memory beyond the model: the gradients and their averages,
2 T P numbers, and P for the result. A missing `.grad` of a shared parameter becomes a view of that.

Over several processes (W of them) the gradients of a task, as soon as they are there, are on their way, summed over the
processes, to the process that keeps these columns, while the next task's backward pass runs. Each process keeps,
averages, multiplies and combines P / W columns; the partial Gram matrices are added up, the combined columns gathered.
Gradients of the other parameters are weighted, then summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from umda_fast.sgl import _gradients
from umda_fast.sgl.batch import Batch
from umda_fast.sgl.buffers import accumulate
from umda_fast.sgl.exchange import Gradients
from umda_fast.sgl.scopes.averaged import AveragedScope
from umda_fast.sgl.scopes.base import Measured, Representation, Setting


class SharedParametersScope(AveragedScope):
    """See the head of this file."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting, more_rows=int(setting.exchange.penalty_in_rows))
        self._direction = self.rows.direction()
        self._views = self.layout.views(self._direction)
        # Which parameters the penalty of this step reaches, where it is a row. Once tasks have reached all of them,
        # in any process, nobody asks any more.
        self._penalized = [False] * len(self.scoped)
        self._all_reached = False
        self._filled: set[int] = set()  # rows that may hold gradients
        if setting.control:
            self.control = self.layout.zeros()

    def measure(self, batch: Batch, representation: Tensor | Representation | None) -> Measured:
        """Gram matrix of the averages, and the gradients of all other parameters."""
        setting, exchange = self._setting, self._setting.exchange
        others = exchange.unshared(batch)
        for row in self._filled.difference(batch.present.rows):
            self.gradients[row].zero_()  # of weight 0 in the combination, to which 0 * inf would be NaN
        self._filled = set(batch.present.rows)
        passes = self.fill(batch, others, keep_graph=batch.penalty is not None)
        if exchange.penalty_in_rows:
            self._penalized = [False] * len(self.scoped)
            if batch.penalized:
                output = None if batch.penalty is None else batch.scaled(batch.penalty)
                found = passes.gradients(output, -1, retain=False)
                self._penalized = [grad is not None for grad in found]
                self.rows.put(setting.tasks, found, [None] * len(found))
        self.rows.wait()
        flags = [] if self._all_reached else [*self.reached, *self._penalized]
        losses, squares, flags = exchange.totals(batch.values(setting.layout.dtype), self.squares(batch), flags)
        if flags:
            count = len(self.reached)
            self.reached, self._penalized = flags[:count], flags[count:]
            self._all_reached = all(self.reached)
        assert squares is not None
        sound = setting.statistics.judge(losses, squares, batch.present)
        broken = batch.present.mask & ~squares.isfinite()
        return Measured(self.smoothed_gram(sound), losses, sound, broken, passes.kept)

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
        unshared: list[Gradients] = []
        for position in range(-1, len(batch.present.rows)):
            of = [(parameter, grad) for parameter, at, grad in measured.unshared if at == position]
            if of:
                found = [grad for _, grad in of]
                scaled = found if position < 0 else list(torch._foreach_mul(found, weights[position]))
                unshared.append(([parameter for parameter, _ in of], scaled))
        exchange.begin(unshared)
        self._release()
        self._combine(rows, everyone * factor, batch.present.mask.to(factor.dtype) * factor, batch.penalized)
        reached = [task or penalty for task, penalty in zip(self.reached, self._penalized, strict=True)]
        parameters = [p for p, seen in zip(self.scoped, reached, strict=True) if seen]
        accumulate(parameters, [view for view, seen in zip(self._views, reached, strict=True) if seen])
        exchange.finish(unshared, None if batch.penalty is None else batch.scaled(batch.penalty))

    def restore(self, reached: Sequence[bool]) -> None:
        """Puts `reached` back."""
        super().restore(reached)
        self._all_reached = all(self.reached)

    def added(self) -> Tensor | None:
        """The direction, where every `.grad` is a view of it still."""
        here = all(
            parameter.grad is None or parameter.grad.data_ptr() == view.data_ptr()
            for parameter, view in zip(self.scoped, self._views, strict=True)
        )
        return self._direction if here else None

    def _combine(self, rows: Tensor, weights: Tensor, equal: Tensor, penalized: bool) -> None:
        """The direction [P], and on demand the difference to it of the direction with equal weights."""
        backend = self._setting.backend
        control = None
        if self.control is not None:
            # Only the difference is kept: whoever reads it adds the update, and with it the penalty's gradient.
            control = self.rows.part(self.control)
            _gradients.combine(rows, equal, control, backend)
        part = self.rows.part(self._direction)
        _gradients.combine(rows, weights, part, backend)
        if control is not None and self.control is not None:
            control.sub_(part)
            self.rows.spread(control, self.control)
        if penalized and self._setting.exchange.penalty_in_rows:
            part.add_(self.rows.rows[self._setting.tasks])
        self.rows.spread(part, self._direction)

    def _release(self) -> None:
        """Gives every `.grad` that is still a view of the direction its own memory."""
        start = self._direction.untyped_storage().data_ptr()
        for parameter in self.scoped:
            grad = parameter.grad
            if grad is not None and grad.untyped_storage().data_ptr() == start:
                parameter.grad = grad.clone()
