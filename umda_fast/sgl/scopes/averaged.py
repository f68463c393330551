"""What the scopes on parameters share: a row of gradients for each task, averaged from step to step.

    m_t  <- beta m_t + (1 - beta) g_t          mhat_t = m_t / (1 - beta^k_t)        k_t: updates of task t
    G    =  Mhat Mhat^T                        [T, T]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from umda_fast.sgl import _gradients
from umda_fast.sgl.batch import Batch
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.graph import Look, Reach
from umda_fast.sgl.handover import hooks_held
from umda_fast.sgl.linear import LinearUse
from umda_fast.sgl.scopes.base import GradientScope, Setting, reentrant


@dataclass(frozen=True)
class Filled:
    """What came of the backward passes of a step, beside the rows.

    Attributes:
        reached: for each parameter of the scope whether a gradient came to it in this process.
        others: gradients of other leaves: (leaf, position of the task, gradient).
        sparse: (parameter, its gradients by position of the task) of the scope, where no gradient was dense.
    """

    reached: list[bool]
    others: list[tuple[Tensor, int, Tensor]]
    sparse: dict[int, dict[int, Tensor]]


def taken(output: Tensor | None, wanted: Sequence[Any], *, retain: bool) -> Sequence[Tensor | None]:
    """Gradients of `output` on what is wanted; None where it does not reach, as everywhere where there is no output."""
    if output is None or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad(output, list(wanted), retain_graph=retain, allow_unused=True)


class AveragedScope(GradientScope):
    """Gradients on parameters; see the head of this file.

    Attributes:
        from_everything: whether the passes go through the whole graph.
        rows: the gradients of the last step, [T, columns] in this process.
        ema: their averages m, not bias-corrected.
    """

    from_everything: ClassVar[bool] = False

    def __init__(self, setting: Setting, more_rows: int = 0) -> None:
        super().__init__(setting)
        self.scoped = setting.scoped
        self.layout = FlatLayout(self.scoped)
        self.rows = setting.exchange.rows(self.layout, setting.tasks + more_rows, setting.backend)
        self.gradients = self.rows.rows[: setting.tasks]
        self.ema = torch.zeros_like(self.gradients)
        self._reaching: set[int] = set()  # tasks that have reached the scope

    def look(self, losses: Mapping[int, Tensor], penalty: Tensor | None) -> Look:
        """What the losses reach; whether that is nothing of the scope, but was or has to be something."""
        reach = Reach(losses.values())
        hits = [p in reach for p in self.scoped]
        if reach.reentrant and (self.from_everything or not any(hits)):
            raise ValueError(reentrant("in the graph of the losses"))
        # A task that needs nothing of the scope may be alone in a batch, but no task that did.
        lost = bool(losses) and not any(hits) and (not any(self.reached) or not self._reaching.isdisjoint(losses))
        some = penalty is not None and (self.from_everything or self._setting.exchange.several)
        return Look([lost, *hits], hits, reach, Reach([penalty] if penalty is not None and some else []))

    def check(self, batch: Batch) -> list[bool]:
        """For each parameter whether the losses of any process reach it.

        Raises:
            ValueError: they reach none, and that is no matter of the tasks present.
        """
        lost, *hits = batch.flags[: 1 + len(self.scoped)]
        if lost and not any(hits):
            name = "last_shared_layer" if self.needs_layer else "shared_parameters"
            raise ValueError(
                f"{name}: the losses reach none of the {len(hits)} parameters given. Were they replaced since (as by "
                "load_state_dict(assign=True): make a new SelfGuided), is their output detached, or are they frozen?"
            )
        return hits

    def fill(self, batch: Batch, look: Look, others: Sequence[Tensor], *, keep_graph: bool) -> Filled:
        """Takes the gradients of the tasks present; the rows are complete after `rows.wait`."""
        assert look.tasks is not None
        hits = [number for number, hit in enumerate(look.hits) if hit]
        asked = [self.scoped[number] for number in hits]
        uses = self.rows.uses(look.tasks, asked)
        wanted = [p if use is None else use.edge for p, use in zip(asked, uses, strict=True)]
        found_uses: list[LinearUse | None] = [None] * len(self.scoped)
        for number, use in zip(hits, uses, strict=True):
            found_uses[number] = use
        own = batch.own
        last = -1 if keep_graph or not own else own[-1][0]
        filled = Filled([False] * len(self.scoped), [], {})
        dense: set[int] = set()
        with hooks_held((*asked, *others)):
            for position, (row, loss) in enumerate(zip(batch.present.rows, batch.losses, strict=True)):
                output = None if loss is None else batch.scaled(loss)
                found = taken(output, [*wanted, *others], retain=position != last)
                of_scope: list[Tensor | None] = [None] * len(self.scoped)
                for number, gradient in zip(hits, found, strict=False):
                    if gradient is not None:
                        of_scope[number] = gradient
                        filled.reached[number] = True
                        self._reaching.add(row)
                        if gradient.layout == torch.strided:
                            dense.add(number)
                        else:
                            filled.sparse.setdefault(number, {})[position] = gradient
                kept = zip(others, found[len(hits) :], strict=True)
                filled.others.extend((leaf, position, gradient) for leaf, gradient in kept if gradient is not None)
                self.rows.put(row, of_scope, found_uses)
        for number in dense & filled.sparse.keys():
            del filled.sparse[number]
        return filled

    def squares(self, batch: Batch) -> Tensor:
        """Takes the scale out of the complete rows; their squared lengths [T], of this process's columns."""
        batch.unscale_(self.gradients)
        lengths: Tensor = torch.linalg.vector_norm(self.gradients, dim=1)
        return lengths.square()

    def smoothed_gram(self, sound: Tensor) -> Tensor:
        """Averages the rows of the tasks that count, bool [T], into the running ones; Gram matrix [T, T] of these."""
        setting, statistics = self._setting, self._setting.statistics
        statistics.counts += sound
        part = _gradients.smooth(
            [self.gradients], self.ema, statistics.counts, sound, statistics.beta, setting.backend
        )
        (gram,) = setting.exchange.totals(part)
        return gram

    def tensors(self) -> dict[str, Tensor]:
        """The averages, this process's columns."""
        return {"ema": self.ema}

    def state(self, *, keep: bool) -> dict[str, Tensor]:
        """The averages [T, P]."""
        whole = self.rows.whole(self.ema, keep=keep)
        return {"ema": self.layout.by_shape(whole) if keep else whole}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """[T, P]."""
        return {"ema": (self._setting.tasks, self.layout.numel)}

    def load(self, name: str, value: Tensor) -> None:
        """Takes this process's columns of [T, P]."""
        self.ema.copy_(self.rows.own(self.layout.by_memory(value)))
