"""What the scopes on parameters share: a row of gradients for each task, averaged from step to step.

m_t  <- beta m_t + (1 - beta) g_t          mhat_t = m_t / (1 - beta^k_t)        k_t: updates of task t
G    =  Mhat Mhat^T                        [T, T]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from umda_fast.sgl import _gradients
from umda_fast.sgl.batch import Batch
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.linear import LinearUse
from umda_fast.sgl.scopes.base import GradientScope, Setting


class Passes:
    """Backward passes that end at the parameters of a scope, and on the way at `others`.

    Attributes:
        kept: gradients of the others: (parameter, position of the output, gradient).
    """

    def __init__(
        self, scoped: Sequence[Parameter], uses: Sequence[LinearUse | None], others: Sequence[Parameter]
    ) -> None:
        self._count = len(scoped)
        self._others = others
        asked = [p if use is None else use.edge for p, use in zip(scoped, uses, strict=True)]
        self._wanted: list[Any] = [*asked, *others]
        self.kept: list[tuple[Parameter, int, Tensor]] = []

    def gradients(self, output: Tensor | None, position: int, *, retain: bool) -> Sequence[Tensor | None]:
        """Of `output` on the scope; None where it does not reach, as everywhere where there is no output."""
        if output is None:
            return [None] * self._count
        found = torch.autograd.grad(output, self._wanted, retain_graph=retain, allow_unused=True)
        self.kept.extend(
            (parameter, position, grad)
            for parameter, grad in zip(self._others, found[self._count :], strict=True)
            if grad is not None
        )
        return found[: self._count]


class AveragedScope(GradientScope):
    """Gradients on parameters; see the head of this file.

    Attributes:
        rows: the gradients of the last step, [T, columns] in this process.
        ema: their averages m, not bias-corrected.
    """

    def __init__(self, setting: Setting, more_rows: int = 0) -> None:
        super().__init__(setting)
        self.scoped = setting.scoped
        self.layout = FlatLayout(self.scoped)
        self.rows = setting.exchange.rows(self.layout, setting.tasks + more_rows, setting.backend)
        self.gradients = self.rows.rows[: setting.tasks]
        self.ema = torch.zeros_like(self.gradients)

    def fill(self, batch: Batch, others: Sequence[Parameter], *, keep_graph: bool) -> Passes:
        """Takes the gradients of the tasks present; the rows are complete after `rows.wait`."""
        own = batch.own
        uses = self.rows.uses([loss for _, loss in own], self.scoped)
        passes = Passes(self.scoped, uses, others)
        last = -1 if keep_graph or not own else own[-1][0]
        for position, (row, loss) in enumerate(zip(batch.present.rows, batch.losses, strict=True)):
            output = None if loss is None else batch.scaled(loss)
            found = passes.gradients(output, position, retain=position != last)
            self.rows.put(row, found, uses)
            self.reached = [old or grad is not None for old, grad in zip(self.reached, found, strict=True)]
        return passes

    def squares(self, batch: Batch) -> Tensor:
        """Takes the scale out of the complete rows; their squared lengths [T], of this process's columns."""
        batch.unscale_(self.gradients)
        lengths: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        return lengths.square()

    def smoothed_gram(self, sound: Tensor) -> Tensor:
        """Averages the rows of the tasks that count, bool [T], into the running ones; Gram matrix [T, T] of these."""
        setting, statistics = self._setting, self._setting.statistics
        statistics.counts += sound
        part = _gradients.smooth([self.gradients], self.ema, statistics.counts, sound, statistics.beta, setting.backend)
        return setting.exchange.total(part)

    def tensors(self) -> dict[str, Tensor]:
        """The averages, this process's columns."""
        return {"ema": self.ema}

    def state(self, *, keep: bool) -> dict[str, Tensor]:
        """The averages [T, P]."""
        return {"ema": self.rows.whole(self.ema, keep=keep)}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[T, P]."""
        return {"ema": (self._setting.tasks, self.layout.numel)}

    def load(self, name: str, value: Tensor) -> None:
        """Takes this process's columns of [T, P]."""
        self.ema.copy_(self.rows.own(value))
