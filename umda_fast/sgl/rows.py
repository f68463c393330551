"""Rows of task gradients, [T, P] for the P numbers of a scope's parameters.

`LocalRows` are those of one process. Of several, each keeps some of the columns of the sum (`distributed.ShardedRows`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from umda_fast.sgl.buffers import FlatLayout, in_use
from umda_fast.sgl.graph import Reach
from umda_fast.sgl.linear import LinearUse, linear_uses, write_gradients


class Rows(ABC):
    """What a scope asks of its rows.

    Attributes:
        rows: [count, columns] of this process; complete after `wait`.
    """

    rows: Tensor

    @abstractmethod
    def uses(self, reach: Reach, parameters: Sequence[Tensor]) -> list[LinearUse | None]:
        """For each parameter where its gradient is to be asked for instead; None for the parameter itself."""

    @abstractmethod
    def put(self, row: int, gradients: Sequence[Tensor | None], uses: Sequence[LinearUse | None]) -> None:
        """Takes this process's gradients of one task, None for zeros."""

    @abstractmethod
    def wait(self) -> None:
        """Completes every row."""

    @abstractmethod
    def part(self) -> Tensor:
        """Room for this process's columns of a combination of rows."""

    @abstractmethod
    def spread(self, part: Tensor) -> Tensor:
        """All columns [P], from the parts of the processes."""

    @abstractmethod
    def whole(self, rows: Tensor, *, keep: bool = True) -> Tensor:
        """All columns [count, P] of `rows` [count, columns]; every process calls it, without `keep` for nothing."""

    @abstractmethod
    def own(self, whole: Tensor) -> Tensor:
        """This process's columns of [count, P]."""


class LocalRows(Rows):
    """All columns, in one process."""

    def __init__(self, layout: FlatLayout, count: int, backend: str | None) -> None:
        self._layout = layout
        self._backend = backend
        self.rows = layout.zeros(count)
        self._views = [layout.views(row) for row in self.rows]
        self._part: Tensor | None = None

    def uses(self, reach: Reach, parameters: Sequence[Tensor]) -> list[LinearUse | None]:
        """See `linear.linear_uses`; of parameters of the rows' dtype."""
        uses = linear_uses(reach, parameters)
        return [use if p.dtype == self._layout.dtype else None for p, use in zip(parameters, uses, strict=True)]

    def put(self, row: int, gradients: Sequence[Tensor | None], uses: Sequence[LinearUse | None]) -> None:
        """Writes the gradients into the row."""
        write_gradients(self._views[row], gradients, uses, self._backend)

    def wait(self) -> None:
        """Nothing is on its way."""

    def part(self) -> Tensor:
        """[P]; the memory of the last one where nobody has it any more."""
        if self._part is None or in_use(self._part):
            self._part = self.rows.new_empty(self._layout.numel)
        return self._part.detach()

    def spread(self, part: Tensor) -> Tensor:
        """It is all of them."""
        return part

    def whole(self, rows: Tensor, *, keep: bool = True) -> Tensor:
        """The rows themselves."""
        return rows

    def own(self, whole: Tensor) -> Tensor:
        """All of it."""
        return whole
