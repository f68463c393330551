"""Every operation and the training step as benchmarks of pytest-benchmark: ``pytest bench --benchmark-only``.

Workloads, sizes, floors and contenders are those of `workloads.py` and `training_step.py`. A benchmark is one
contender in one pass at one size; contenders on the same data are a group. pytest-benchmark times one after the other,
which serves to compare a run with an earlier one. A ratio to be quoted comes from where contenders take turns:
``umda-fast bench``, `gpu_suite.py`, ``bench_<stem>.py``.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from .conftest import device_of
from .measure import explain
from .session import Case, Session, all_cases_of
from .workloads import OURS

# Parity fails a benchmark before its fixture is used; that is the one thing to be said then.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The cases in order, so that data are made once for all who use them."""
    profile = "quick" if metafunc.config.getoption("quick") else device_of(metafunc.config).type
    cases = [(x.op, x.size, x.direction, x.contender) for x in all_cases_of(profile)]
    ids = [f"{op}-{size_name(size)}-{direction}-{contender}" for op, size, direction, contender in cases]
    metafunc.parametrize(("op", "size", "direction", "contender"), cases, ids=ids)


def size_name(size: Any) -> str:
    """``1000``, ``1024x64``."""
    return "x".join(map(str, size)) if isinstance(size, tuple) else str(size)


def test_speed(
    op: str,
    size: Any,
    direction: str,
    contender: str,
    session: Session,
    parity: Callable[[str], None],
    benchmark: Any,
) -> None:
    """Fails where ours is wrong or breaks; a contender that is missing or cannot run is skipped, with the reason."""
    parity(op)
    try:
        group = session.group(Case(op, size, direction, contender))
        if contender in group.absent:
            pytest.skip(group.absent[contender])
        session.time(benchmark, group, contender)
    except Exception as error:
        if contender == OURS and not isinstance(error, torch.OutOfMemoryError):
            raise
        pytest.skip(": ".join(explain(error)))
