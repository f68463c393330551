"""A kernel of a user's in the place of ours (docs/profiling.md): it serves, with our gradient; then ours is back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from umda_fast.ops import _library, bag_attention_pool
from umda_fast.parity import run_parity
from umda_fast.parity.cases import all_cases

pytestmark = pytest.mark.skipif(_library.cpp_status is not None, reason=str(_library.cpp_status))

PAGE = Path(__file__).resolve().parents[2] / "docs" / "profiling.md"
CASES = [case for case in all_cases() if case.op == "bag_pool"]


def documented() -> Callable[..., Any]:
    """`my_bag_pool` of the page."""
    [text] = re.findall(r"^def my_bag_pool.*?^    return [^\n]*\n", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    names: dict[str, Any] = {"torch": torch}
    exec(text, names)
    return names["my_bag_pool"]  # type: ignore[no-any-return]


def test_a_kernel_of_ones_own_serves_every_call_and_is_gone_with_its_library() -> None:
    mine, calls = documented(), []

    def kernel(*inputs: torch.Tensor) -> Any:
        calls.append(len(inputs))
        return mine(*inputs)

    z, scores, ptr = torch.randn(9, 4, requires_grad=True), torch.randn(9, 2), torch.tensor([0, 5, 5, 9])
    own = torch.library.Library("umda_fast", "IMPL")
    own.impl("bag_pool", kernel, "CPU", allow_override=True)
    try:
        bag_attention_pool(z, scores, ptr).pooled.sum().backward()
        assert calls == [3]
        assert z.grad is not None
        # As ours is held to the reference: forward and backward, in all dtypes.
        result = run_parity(backends=["cpp"], cases=CASES)
        assert {row["verdict"] for row in result["rows"]} == {"pass"}, result["rows"]
        assert len(calls) > 1
    finally:
        del own
    before = len(calls)
    bag_attention_pool(z, scores, ptr)
    assert len(calls) == before


def test_parity_finds_a_kernel_that_is_wrong() -> None:
    mine = documented()

    def wrong(*inputs: torch.Tensor) -> Any:
        pooled, entropy, lse = mine(*inputs)
        return pooled * 1.01, entropy, lse

    own = torch.library.Library("umda_fast", "IMPL")
    own.impl("bag_pool", wrong, "CPU", allow_override=True)
    try:
        assert not run_parity(backends=["cpp"], cases=CASES[:1], dtypes=[torch.float32])["passed"]
    finally:
        del own
    assert run_parity(backends=["cpp"], cases=CASES[:1], dtypes=[torch.float32])["passed"]
