"""The one layer between a scope and the processes: `Alone` in one process, `Together` in several.

A scope works on its own process's share of the batch and asks this layer wherever the others count: for the batch, for
rows of gradients, for sums of small numbers, for a backward pass. What several processes do differently is here and
nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from umda_fast.sgl.batch import Batch, TaskSets
from umda_fast.sgl.buffers import FlatLayout
from umda_fast.sgl.distributed import GradientReducer, Processes, ShardedRows
from umda_fast.sgl.graph import Look
from umda_fast.sgl.handover import Gradient
from umda_fast.sgl.parameters import ParameterLists
from umda_fast.sgl.rows import LocalRows, Rows


class Exchange(ABC):
    """What a scope asks for.

    Attributes:
        sets: the sets of tasks present.
        several: whether there are other processes. Then the penalty's gradient on the scope is a row of its own, after
            those of the tasks.
    """

    several: bool

    def __init__(self, parameters: ParameterLists, tasks: Sequence[str], device: torch.device) -> None:
        self.sets = TaskSets(len(tasks), device)
        self._parameters = parameters
        self._tasks = tasks

    @abstractmethod
    def batch(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        scale: Tensor | None,
        look: Look,
    ) -> Batch:
        """What all processes have of a batch, given what this one has."""

    @abstractmethod
    def rows(self, layout: FlatLayout, count: int, backend: str | None) -> Rows:
        """Rows for `count` tasks."""

    @abstractmethod
    def totals(self, *values: Tensor) -> list[Tensor]:
        """Sums over the processes of small tensors, in one exchange."""

    @abstractmethod
    def agreed(self, weights: Tensor) -> Tensor:
        """The same weights everywhere."""

    @abstractmethod
    def backward(self, total: Tensor | None) -> None:
        """One backward pass; None: this process has nothing to add."""

    @abstractmethod
    def begin(self, gradients: list[Gradient]) -> None:
        """Sends gradients of unshared leaves, one of each, on their way; the list is given away."""

    @abstractmethod
    def finish(self) -> list[Gradient]:
        """Those of `begin`, of all processes."""


class Alone(Exchange):
    """One process: all is there already."""

    several = False

    def __init__(self, parameters: ParameterLists, tasks: Sequence[str], device: torch.device) -> None:
        super().__init__(parameters, tasks, device)
        self._begun: list[Gradient] = []

    def batch(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        scale: Tensor | None,
        look: Look,
    ) -> Batch:
        """The losses in the order of the tasks."""
        rows = tuple(row for row, task in enumerate(self._tasks) if task in losses)
        parts: list[Tensor | None] = [losses[self._tasks[row]].reshape(()) for row in rows]
        return Batch(self.sets(rows), parts, penalty, penalty is not None, look.flags, scale)

    def rows(self, layout: FlatLayout, count: int, backend: str | None) -> Rows:
        """All columns."""
        return LocalRows(layout, count, backend)

    def totals(self, *values: Tensor) -> list[Tensor]:
        """As they are."""
        return list(values)

    def agreed(self, weights: Tensor) -> Tensor:
        """As they are."""
        return weights

    def backward(self, total: Tensor | None) -> None:
        """Adds to `.grad`."""
        if total is not None:
            torch.autograd.backward(total)

    def begin(self, gradients: list[Gradient]) -> None:
        """Nothing is sent."""
        self._begun = gradients

    def finish(self) -> list[Gradient]:
        """The same."""
        found, self._begun = self._begun, []
        return found


class Together(Exchange):
    """Several processes, each with a share of the batch."""

    several = True

    def __init__(
        self, parameters: ParameterLists, tasks: Sequence[str], device: torch.device, processes: Processes
    ) -> None:
        super().__init__(parameters, tasks, device)
        self._processes = processes
        # FSDP2's own collectives run in the same pass, in an order that ours must not disturb.
        self._reducer = GradientReducer(parameters.groups(), processes, overlap=not parameters.sharded)
        self._own: list[Gradient] = []

    def batch(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        scale: Tensor | None,
        look: Look,
    ) -> Batch:
        """Each loss as this process's part of that of the whole batch; one exchange of T + 1 numbers and the flags."""
        outputs = {self._tasks.index(task): loss for task, loss in losses.items()}
        self._parameters.check_together(outputs if penalty is None else {**outputs, -1: penalty}, look)
        own = [0.0 if task not in losses else 1.0 if counts is None else float(counts[task]) for task in self._tasks]
        numbers = self._processes.total_on_host([*own, float(penalty is not None), *map(float, look.flags)])
        totals, (penalized, *raised) = numbers[: len(own)], numbers[len(own) :]
        rows = tuple(row for row, total in enumerate(totals) if total > 0)
        parts: list[Tensor | None] = []
        for row in rows:
            loss = losses.get(self._tasks[row])
            parts.append(None if loss is None else loss.reshape(()) * (own[row] / totals[row]))
        return Batch(self.sets(rows), parts, penalty, penalized > 0, [flag > 0 for flag in raised], scale)

    def rows(self, layout: FlatLayout, count: int, backend: str | None) -> Rows:
        """This process's columns of the sum over all; the gradients themselves are autograd's."""
        return ShardedRows(layout, count, self._processes)

    def totals(self, *values: Tensor) -> list[Tensor]:
        """One exchange."""
        total = self._processes.total(torch.cat([value.double().reshape(-1) for value in values]))
        pieces = zip(total.split([value.numel() for value in values]), values, strict=True)
        return [piece.view_as(value).to(value.dtype) for piece, value in pieces]

    def agreed(self, weights: Tensor) -> Tensor:
        """Those of process 0: all have the same Gram matrix, but their arithmetic, and a balancer that draws, may
        differ."""
        return self._processes.from_first(weights.contiguous())

    def backward(self, total: Tensor | None) -> None:
        """Adds the sum over the processes to `.grad`."""
        self._reducer.backward(total)

    def begin(self, gradients: list[Gradient]) -> None:
        """Begins to sum them over the processes; leaves that are no parameter of theirs are this process's own."""
        self._reducer.begin(1)
        self._own = self._reducer.add(gradients)
        self._reducer.start()

    def finish(self) -> list[Gradient]:
        """Waits for the sums."""
        own, self._own = self._own, []
        return [*self._reducer.sums(), *own]
