"""Bytes that operations move, against what can be counted by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from umda_fast.blocks import BlockRecord, Place, block, recording
from umda_fast.ops import _library, bag_attention_pool
from umda_fast.profiling.traffic import Traffic, tensor_bytes


def counted(run: Callable[[], object]) -> dict[str, tuple[int, int]]:
    """Calls and bytes by operation."""
    record = BlockRecord()
    traffic = Traffic(record)
    with recording(record), traffic, block("here"):
        run()
    assert {place for place, _ in traffic.counts} <= {Place("here", False)}
    return {name: (count.calls, count.bytes) for (_, name), count in traffic.counts.items()}


A = torch.ones(6, 4)
B = torch.ones(4, 5)


@pytest.mark.parametrize(
    ("run", "name", "numbers"),
    [
        (lambda: A @ B, "aten::mm", 24 + 20 + 30),
        (lambda: A + A, "aten::add", 24 + 24),  # the same tensor is read once
        (lambda: A.clone().add_(A), "aten::add_", 24 + 24 + 24),
        (lambda: torch.empty(6, 4).fill_(1.0), "aten::fill_", 24),
        (lambda: torch.empty(6, 4).copy_(A), "aten::copy_", 24 + 24),
        (lambda: torch.mm(A, B, out=torch.empty(6, 5)), "aten::mm", 24 + 20 + 30),
        (lambda: torch.zeros(6, 1).expand(6, 100).sum(), "aten::sum", 6 + 1),
        (lambda: torch._foreach_add([A, B], [A, B]), "aten::_foreach_add", 2 * (24 + 20)),
        (lambda: torch._foreach_mul_([A.clone(), B.clone()], 1.0), "aten::_foreach_mul_", 2 * (24 + 20)),
        (lambda: A.to(torch.float64), "aten::_to_copy", 24 + 2 * 24),
    ],
)
def test_bytes_of_operations(run: Callable[[], object], name: str, numbers: int) -> None:
    assert counted(run)[name] == (1, 4 * numbers)


def test_what_moves_nothing_is_not_counted() -> None:
    assert counted(lambda: (A.view(4, 6).t()[1:], A.expand(2, 6, 4), torch.empty(9), A.detach())) == {}


@pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))
def test_a_fused_operation_counts_what_goes_in_and_out() -> None:
    z, scores, ptr = torch.randn(9, 4), torch.randn(9, 2), torch.tensor([0, 5, 9])
    found = counted(lambda: bag_attention_pool(z, scores, ptr, backend="cpp"))
    expected = 4 * (9 * 4 + 9 * 2) + 8 * 3 + 4 * (2 * 2 * 4 + 2 * 2 + 2 * 2)
    assert found["umda_fast::bag_pool"] == (1, expected)


def test_bytes_of_a_tensor() -> None:
    assert tensor_bytes(torch.zeros(3, 0)) == 0
    assert tensor_bytes(torch.zeros((), dtype=torch.bfloat16)) == 2
    assert tensor_bytes(torch.zeros(5, 1).expand(5, 7)) == 20
    assert tensor_bytes(torch.zeros(10, 10)[::2]) == 200


def test_outside_of_blocks_nothing_is_counted() -> None:
    record = BlockRecord()
    traffic = Traffic(record)
    with recording(record), traffic:
        _ = A @ B
    assert traffic.counts == {}


def test_results_are_the_same() -> None:
    def run() -> list[Tensor]:
        torch.manual_seed(3)
        x = torch.randn(8, 8, requires_grad=True)
        torch.nn.functional.dropout(x @ x, 0.5).square().sum().backward()
        assert x.grad is not None
        return [x.detach(), x.grad]

    plain = run()
    record = BlockRecord()
    with recording(record), Traffic(record), block("here"):
        looked_at = run()
    assert all(map(torch.equal, plain, looked_at))
