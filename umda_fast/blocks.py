"""Named blocks of a training step: `with block("GMIP"): ...`, ranges in a profile and nothing otherwise. Lowest floor:
imports nothing of the package.

Outside of `recording` a block is a flag that is read; under `torch.compile` and `torch.export` it is not traced. What
autograd does later, in the backward pass, belongs to the block in which the forward pass made its node: nodes are
numbered in the order in which they are made, so a record of the numbers at which blocks begin and end tells.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

__all__ = ["PREFIX", "BlockRecord", "Place", "block", "recording", "span"]

PREFIX = "umda_fast."
"""Before the name of a block in a trace; operations are `umda_fast::<name>`."""

# Accumulation into `.grad` is no node of the forward pass, and has this number or the next.
_NO_NODE = 2**63


class Place(NamedTuple):
    """A part of the step."""

    block: str
    backward: bool


@dataclass
class BlockRecord:
    """Which block is open, and which one made which nodes of the autograd graph.

    Attributes:
        inside: entered with the outermost block, for as long as that is open.
    """

    inside: AbstractContextManager[Any] | None = None
    _open: list[Place] = field(default_factory=list)  # `backward`: opened in a backward pass, as by a checkpoint
    _starts: list[int] = field(default_factory=list)
    _names: list[str | None] = field(default_factory=list)

    def enter(self, name: str) -> None:
        self._open.append(Place(name, torch._C._current_graph_task_id() != -1))
        self._mark()

    def leave(self) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        # What a checkpoint computes again makes nodes that no backward pass runs.
        if torch._C._current_graph_task_id() == -1:
            self._starts.append(torch._C._autograd._get_sequence_nr())
            self._names.append(self._open[-1].block if self._open else None)

    def made_by(self, node: int) -> str | None:
        """The block in whose forward pass the node of this number was made; None if there is none."""
        index = bisect_right(self._starts, node) - 1
        return None if index < 0 or node >= _NO_NODE else self._names[index]

    def here(self) -> Place | None:
        """The place in the step of what is computed now; None outside of all blocks."""
        if not self._open:
            return None
        node = torch._C._current_autograd_node()
        if node is None or self._open[-1].backward:
            return self._open[-1]
        made = self.made_by(node._sequence_nr())
        return self._open[-1] if made is None else Place(made, True)


_record: BlockRecord | None = None


@contextmanager
def recording(record: BlockRecord) -> Iterator[None]:
    """Blocks are ranges, and noted in `record`, inside this."""
    global _record
    before, _record = _record, record
    try:
        yield
    finally:
        _record = before


def block(name: str) -> AbstractContextManager[None]:
    """What is computed inside belongs to the block `name`; of blocks in blocks, to the innermost."""
    if torch.compiler.is_compiling() or _record is None:
        return nullcontext()
    return _range(name, _record)


@contextmanager
def _range(name: str, record: BlockRecord) -> Iterator[None]:
    inside, record.inside = record.inside, None
    try:
        with inside or nullcontext(), span(name, record):
            yield
    finally:
        record.inside = inside


@contextmanager
def span(name: str, record: BlockRecord) -> Iterator[None]:
    """A range around blocks, without what is entered with them."""
    with torch.profiler.record_function(PREFIX + name):
        record.enter(name)
        try:
            yield
        finally:
            record.leave()
