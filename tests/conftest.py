import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, in any order and in any process."""
    torch.manual_seed(0)
