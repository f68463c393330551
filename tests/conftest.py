import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent

#: Files that take longest begin first: `make test` hands out whole files in the order in which they are collected, and
#: a long one that begins last leaves the other processes without work.
LONGEST = (
    "bench/test_gpu_suite.py",
    "cuda_host/test_nvcc.py",
    "kernels/test_interpreter.py",
    "kernels/test_compile.py",
    "test_docs.py",
    "train/test_distributed.py",
    "sgl/test_distributed.py",
    "cli/test_commands.py",
    "cli/test_slides.py",
    "bench/test_speed.py",
    "cuda_host/test_bindings.py",
    "csrc/test_build.py",
    "train/test_trainer.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in the order in which they were found."""
    place = {TESTS / name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test draws the same numbers, in any order and in any process."""
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # what an earlier test compiled, or gave up on, is not this one's
        torch.compiler.reset()
