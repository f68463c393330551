"""The one layer between a scope and the processes: `Alone` in one process, `Together` in several.

A scope works on its own process's share of the batch and asks this layer wherever the others count: for the batch, for
rows of gradients, for sums of small numbers, for a backward pass. What several processes do differently is here and
nowhere else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from umda_fast.sgl.batch import Batch, TaskSets
from umda_fast.sgl.buffers import FlatLayout, accumulate
from umda_fast.sgl.distributed import GradientReducer, Processes, ShardedRows
from umda_fast.sgl.parameters import ParameterLists
from umda_fast.sgl.rows import LocalRows, Rows

#: Gradients of some parameters.
Gradients = tuple[list[Parameter], list[Tensor]]


class Totals(NamedTuple):
    """What all processes have together.

    Attributes:
        losses: [A] of the tasks present.
        squares: [T] or [T, T], None where none are asked for.
        flags: true where one is in some process.
    """

    losses: Tensor
    squares: Tensor | None
    flags: list[bool]


class Exchange(ABC):
    """What a scope asks for.

    Attributes:
        sets: the sets of tasks present.
        penalty_in_rows: whether the penalty's gradient on the scope is a row of its own, after those of the tasks, and
            not the matter of a last backward pass.
    """

    penalty_in_rows: bool

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
    ) -> Batch:
        """What all processes have of a batch, given what this one has."""

    @abstractmethod
    def rows(self, layout: FlatLayout, count: int, backend: str | None) -> Rows:
        """Rows for `count` tasks."""

    @abstractmethod
    def unshared(self, batch: Batch) -> list[Parameter]:
        """Parameters outside the shared ones whose gradients have to be asked for."""

    @abstractmethod
    def totals(self, values: Tensor, squares: Tensor | None, flags: Sequence[bool]) -> Totals:
        """Sums over the processes, from this one's part of the losses [A] and of inner products of gradients, and its
        flags."""

    @abstractmethod
    def total(self, gram: Tensor) -> Tensor:
        """Sum over the processes of a Gram matrix."""

    @abstractmethod
    def agreed(self, weights: Tensor) -> Tensor:
        """The same weights everywhere."""

    @abstractmethod
    def backward(self, total: Tensor | None) -> None:
        """One backward pass; None: this process has nothing to add."""

    @abstractmethod
    def begin(self, gradients: Sequence[Gradients]) -> None:
        """Sends gradients of unshared parameters, several of one parameter being added up, on their way."""

    @abstractmethod
    def finish(self, gradients: Sequence[Gradients], penalty: Tensor | None) -> None:
        """Adds those of `begin`, and the penalty's where no row has it, to `.grad`."""


class Alone(Exchange):
    """One process: all is there already."""

    penalty_in_rows = False

    def batch(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        scale: Tensor | None,
    ) -> Batch:
        """The losses in the order of the tasks."""
        rows = tuple(row for row, task in enumerate(self._tasks) if task in losses)
        parts: list[Tensor | None] = [losses[self._tasks[row]].reshape(()) for row in rows]
        return Batch(self.sets(rows), parts, penalty, penalty is not None, scale)

    def rows(self, layout: FlatLayout, count: int, backend: str | None) -> Rows:
        """All columns."""
        return LocalRows(layout, count, backend)

    def unshared(self, batch: Batch) -> list[Parameter]:
        """Those listed, else those found."""
        return self._parameters.unshared(dict(zip(batch.present.rows, (loss for _, loss in batch.own), strict=True)))

    def totals(self, values: Tensor, squares: Tensor | None, flags: Sequence[bool]) -> Totals:
        """As they are."""
        return Totals(values, squares, list(flags))

    def total(self, gram: Tensor) -> Tensor:
        """As it is."""
        return gram

    def agreed(self, weights: Tensor) -> Tensor:
        """As they are."""
        return weights

    def backward(self, total: Tensor | None) -> None:
        """Adds to `.grad`."""
        if total is not None:
            torch.autograd.backward(total)

    def begin(self, gradients: Sequence[Gradients]) -> None:
        """Nothing is sent."""

    def finish(self, gradients: Sequence[Gradients], penalty: Tensor | None) -> None:
        """Adds to `.grad`; the penalty by a backward pass."""
        for parameters, found in gradients:
            accumulate(parameters, found)
        self.backward(penalty)


class Together(Exchange):
    """Several processes, each with a share of the batch."""

    penalty_in_rows = True

    def __init__(
        self, parameters: ParameterLists, tasks: Sequence[str], device: torch.device, processes: Processes
    ) -> None:
        super().__init__(parameters, tasks, device)
        self._processes = processes
        # FSDP2's own collectives run in the same pass, in an order that ours must not disturb.
        self._reducer = GradientReducer(parameters.groups(), processes, overlap=not parameters.sharded)

    def batch(
        self,
        losses: Mapping[str, Tensor],
        counts: Mapping[str, float] | None,
        penalty: Tensor | None,
        scale: Tensor | None,
    ) -> Batch:
        """Each loss as this process's part of that of the whole batch; one exchange of T + 1 numbers."""
        own = [0.0 if task not in losses else 1.0 if counts is None else float(counts[task]) for task in self._tasks]
        *totals, penalized = self._processes.total_on_host([*own, float(penalty is not None)])
        rows = tuple(row for row, total in enumerate(totals) if total > 0)
        parts: list[Tensor | None] = []
        for row in rows:
            loss = losses.get(self._tasks[row])
            parts.append(None if loss is None else loss.reshape(()) * (own[row] / totals[row]))
        outputs = {row: part for row, part in zip(rows, parts, strict=True) if part is not None}
        self._parameters.check_reached(outputs if penalty is None else {**outputs, -1: penalty})
        return Batch(self.sets(rows), parts, penalty, penalized > 0, scale)

    def rows(self, layout: FlatLayout, count: int, backend: str | None) -> Rows:
        """This process's columns of the sum over all; the gradients themselves are autograd's."""
        return ShardedRows(layout, count, self._processes)

    def unshared(self, batch: Batch) -> list[Parameter]:
        """Those listed."""
        return self._parameters.groups()[1]

    def totals(self, values: Tensor, squares: Tensor | None, flags: Sequence[bool]) -> Totals:
        """One exchange; it waits for the device where there are flags."""
        small = [values.double(), torch.tensor(list(flags), dtype=torch.float64, device=values.device)]
        if squares is not None:
            small.append(squares.double().reshape(-1))
        total = self._processes.total(torch.cat(small))
        losses, raised, products = total.split([len(values), len(flags), len(total) - len(values) - len(flags)])
        everywhere: list[bool] = (raised > 0).tolist() if flags else []
        if squares is not None:
            squares = products.view_as(squares).to(squares.dtype)
        return Totals(losses.to(values.dtype), squares, everywhere)

    def total(self, gram: Tensor) -> Tensor:
        """One exchange."""
        return self._processes.total(gram).to(gram.dtype)

    def agreed(self, weights: Tensor) -> Tensor:
        """Those of process 0: all have the same Gram matrix, but their arithmetic, and a balancer that draws, may
        differ."""
        return self._processes.from_first(weights.contiguous())

    def backward(self, total: Tensor | None) -> None:
        """Adds the sum over the processes to `.grad`."""
        self._reducer.backward(total)

    def begin(self, gradients: Sequence[Gradients]) -> None:
        """Begins to sum them over the processes."""
        self._reducer.begin(1)
        for parameters, found in gradients:
            self._reducer.add(parameters, found)
        self._reducer.start()

    def finish(self, gradients: Sequence[Gradients], penalty: Tensor | None) -> None:
        """Waits for the sums."""
        self._reducer.finish()
