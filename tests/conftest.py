import sys
from pathlib import Path
from typing import Any

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
    "cli/test_slides.py",
    "cli/test_commands.py",
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


def _save_plainly(figure: Any, path: Path) -> None:
    figure.set_layout_engine("none")
    figure.savefig(path, format="png", dpi=20)


@pytest.fixture(autouse=True)
def _plain_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a training are drawn, but small and not laid out, which took longer than a test's training.

    What a module's fixture trains is drawn as users get it, for those come before this one: the run of
    `tests/cli/test_commands.py`, which has every picture, and that of `tests/studies/test_report.py`.
    """
    plots = sys.modules.get("umda_fast.train.plots")  # nothing is imported for it
    if plots is not None:
        monkeypatch.setattr(plots, "_save", _save_plainly)
