"""Blocks of a step: nothing unless they are recorded, and what a backward pass computes belongs to where it began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from umda_fast.blocks import PREFIX, BlockRecord, Place, block, recording, span


class Places(TorchDispatchMode):
    """The place of every operation, by its name."""

    def __init__(self, record: BlockRecord) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.seen: dict[str, set[Place | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.setdefault(func._schema.name, set()).add(self.record.here())
        return func(*args, **(kwargs or {}))


def test_a_block_is_nothing_outside_of_a_recording() -> None:
    assert isinstance(block("GMIP"), nullcontext)
    record = BlockRecord()
    with recording(record):
        assert not isinstance(block("GMIP"), nullcontext)
    assert isinstance(block("GMIP"), nullcontext)
    assert record.here() is None
    with torch.profiler.profile() as profile, block("GMIP"):
        torch.ones(3).exp()
    assert not any(event.name.startswith(PREFIX) for event in profile.events())


def test_a_node_belongs_to_the_block_that_made_it() -> None:
    record = BlockRecord()
    w = torch.randn(4, requires_grad=True)
    with recording(record), Places(record) as places:
        with block("outer"):
            a = w.sin()
            with block("inner"):
                b = a.tanh()
            c = b.sigmoid()
        free = c.exp()
        with block("sums"):
            (free.sum() + w.square().sum()).backward()
    assert places.seen["aten::tanh_backward"] == {Place("inner", True)}
    assert places.seen["aten::sigmoid_backward"] == {Place("outer", True)}
    assert places.seen["aten::cos"] == {Place("outer", True)}
    assert places.seen["aten::sin"] == {Place("outer", False)}
    assert places.seen["aten::exp"] == {None}
    assert Place("sums", False) in places.seen["aten::mul"]  # exp's node was made in no block: it is whoever's asks
    assert record.here() is None


def test_what_a_checkpoint_computes_again_is_backward() -> None:
    record = BlockRecord()
    x = torch.randn(4, requires_grad=True)

    def part(x: Tensor) -> Tensor:
        with block("part"):
            return x.sin().tanh()

    with recording(record), Places(record) as places:
        with block("model"):
            y = checkpoint(part, x, use_reentrant=False)
        with block("SGL"):
            y.sum().backward()
    assert places.seen["aten::sin"] == {Place("part", False), Place("part", True)}
    assert places.seen["aten::tanh_backward"] == {Place("part", True)}


def test_what_is_inside_is_entered_once() -> None:
    entered: list[str] = []

    @contextmanager
    def inside() -> Iterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    record = BlockRecord(inside())
    with recording(record), span("step", record):
        assert entered == []
        with block("outer"), block("inner"):
            assert entered == ["in"]
        assert entered == ["in", "out"]


def test_an_error_leaves_the_block() -> None:
    record = BlockRecord()
    with recording(record):
        with pytest.raises(RuntimeError, match="wrong"), block("GMIP"):
            raise RuntimeError("wrong")
        assert record.here() is None


class Blocks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with block("first"):
            y = x.sin()
        with block("second"):
            return y.tanh()


@pytest.mark.parametrize("recorded", [False, True])
def test_compiled_and_exported_programs_have_no_blocks(recorded: bool) -> None:
    x = torch.randn(5)
    record = BlockRecord()
    torch._dynamo.reset()
    with recording(record) if recorded else nullcontext():
        compiled = torch.compile(Blocks(), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), x.sin().tanh())
        program = torch.export.export(Blocks(), (x,))
    names = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert names == [torch.ops.aten.sin.default, torch.ops.aten.tanh.default]
    assert record._starts == []
