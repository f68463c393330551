import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, in any order and in any process."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # what an earlier test compiled, or gave up on, is not this one's
        torch.compiler.reset()
